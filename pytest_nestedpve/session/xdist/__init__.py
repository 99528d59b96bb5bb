"""pytest-xdist: the run that workers share, and the controller's teardown after them.

pytest-xdist alone distributes the tests.
"""
