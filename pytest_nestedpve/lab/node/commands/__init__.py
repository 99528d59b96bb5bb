"""The commands of a node: pvesh, qm, pvesm, pveum, pvecm, pveversion.

They parse and print; every method is carried out by the API tree.
"""
