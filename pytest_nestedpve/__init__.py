"""A real, throw-away Proxmox VE inside a VM of a Proxmox VE host, for a pytest session."""
