"""The state of a node: guests, volumes, tasks, locks, the cluster file system.

The processes of guests belong to `machine`.
"""
