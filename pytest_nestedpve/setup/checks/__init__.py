"""Checks of the requirements of an outer host, for the phase preflight and for --nested-doctor.

A check reads and reports. Nothing here changes a host.
"""
