"""One run on this client: identity, directory, lock, audit log, records of kept runs, signals.

Objects of a run on a host: `ownership`.
"""
