"""SSH: configuration as OpenSSH reads it, host keys, logins, commands and tunnels.

Independent of Proxmox VE.
"""
