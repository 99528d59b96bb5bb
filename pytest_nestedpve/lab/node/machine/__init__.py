"""The guests of a node as machines: system containers, their disks and control groups.

PVE's configuration of a guest is interpreted by `handlers` and `cloudinit`.
"""
