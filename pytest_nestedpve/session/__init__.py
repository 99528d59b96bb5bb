"""The pytest session: hooks, fixtures, modes, the open run and its end.

Code that uses pytest's items, options and exit status is here. Calls to hosts are in the rooms below.
"""
