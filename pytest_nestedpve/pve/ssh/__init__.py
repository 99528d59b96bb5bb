"""SSH: configuration as OpenSSH reads it, host keys, logins, commands and tunnels.

Knows nothing of Proxmox VE.
"""
