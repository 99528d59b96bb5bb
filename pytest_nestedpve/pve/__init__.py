"""A Proxmox VE host: its API over HTTPS or pvesh, SSH, tasks, guests, storages, clusters.

Independent of pytest, of runs and of the lab.
"""
