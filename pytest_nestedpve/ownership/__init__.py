"""Ownership of VMs: marker, lease, pool, creation, discovery, and the proof.

Nothing here destroys a VM.
"""
