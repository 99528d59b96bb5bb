"""The guests of a node as machines: system containers, their disks and control groups.

What PVE's configuration of a guest says is not interpreted here.
"""
