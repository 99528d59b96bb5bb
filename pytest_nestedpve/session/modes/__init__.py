"""What a session does instead of, or beside, running tests: one module per mode.

Each mode is an option, such as --nested-doctor. What a mode does on a host is in the rooms below.
"""
