"""Checks of the requirements of an outer host, for the phase preflight and for --nested-doctor."""
