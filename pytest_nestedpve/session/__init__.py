"""The pytest session: hooks, fixtures, modes, the open run and its end.

Everything that knows pytest's items, options and exit status is here. What a run does on a host is not.
"""
