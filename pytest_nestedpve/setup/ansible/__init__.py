"""Playbooks: packed sources, variables, inventory, and the process that runs them.

The phases decide when each playbook runs.
"""
