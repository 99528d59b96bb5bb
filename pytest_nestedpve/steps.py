"""The phases as tests: `from pytest_nestedpve import steps` in a test file adds one test per phase to it.

The module is a sentinel: the plugin recognises the imported name and collects `test_preflight` and the
others in its place.
"""
