"""Talking to a Proxmox VE host over SSH and its API; knows nothing of pytest."""
