"""The embedded lab: an outer PVE host on this machine, made of system containers.

Only `config.hosts` knows it; the code that speaks to a PVE host cannot tell a lab from a real one.
"""
