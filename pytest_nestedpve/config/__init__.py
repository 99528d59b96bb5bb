"""Settings: their sources, their parsers, contradictions between them, and the host that they name.

Only `hosts` imports the lab. Only functions of `hosts` and their callers open connections.
"""
