"""The commands of a node: pvesh, qm, pvesm, pveum, pvecm, pveversion.

They parse arguments and print results; the methods are those of the API tree.
"""
