"""One run on this client: identity, directory, lock, audit log, records of kept runs, signals.

What a run has on a host is not here.
"""
