"""The methods of the API, by their part of the tree.

Rights and parameters are checked before, in `api`; nothing here parses a command line or a request.
"""
