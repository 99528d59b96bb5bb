"""Playbooks: packed sources, variables, inventory, and the process that runs them.

Which playbook runs when is decided by the phases, not here.
"""
