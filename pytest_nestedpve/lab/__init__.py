"""The embedded lab: an outer PVE host on this machine, made of system containers.

Only `config.hosts` imports this package; to all other code a lab is a PVE host like any other.
"""
