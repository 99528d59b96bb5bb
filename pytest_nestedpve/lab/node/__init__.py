"""What runs on the nodes of a lab in place of Proxmox VE: its API, its commands, its machines.

Delivered to the nodes as a package of its own, so it needs the standard library alone.
"""
