"""Settings: where they come from, how their text is parsed, what contradicts what; and the host they name.

`hosts` is the only module that knows the lab. Nothing here connects except on request of a caller.
"""
