"""pytest-xdist: what workers share, and the controller that tears down after them.

How the tests are distributed is decided by pytest-xdist, not here.
"""
