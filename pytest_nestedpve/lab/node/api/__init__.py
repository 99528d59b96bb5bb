"""The API of a node: its tree, its schema, access control, errors, HTTPS.

The methods are implemented in `handlers`.
"""
