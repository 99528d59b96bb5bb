"""Playbooks: packed sources, variables, inventory, and the process that runs them.

The order of playbooks is not decided here, but by the phases.
"""
