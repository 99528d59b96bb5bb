"""The state of a node: guests, volumes, tasks, locks, the cluster file system.

Processes of guests are not here.
"""
