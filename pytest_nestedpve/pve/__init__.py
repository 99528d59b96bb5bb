"""A Proxmox VE host: its API over HTTPS or pvesh, SSH, tasks, guests, storages, clusters.

Knows nothing of pytest, of runs or of the lab.
"""
