"""The API of a node: its tree, its schema, access control, errors, HTTPS.

What a method does is in `handlers`.
"""
