"""A replacement of Proxmox VE for the nodes of a lab: API, commands and machines.

Delivered to the nodes as a separate package, so it needs the standard library alone.
"""
