"""Modes of a session other than running tests, or in addition to it: one module and one option per mode.

The work of a mode on a host is not here: `setup` and `teardown` do it.
"""
