"""One run on this client: identity, directory, lock, audit log, records of kept runs, signals.

The objects of a run on a host are created and proved in `ownership`, not here.
"""
