"""The phases as tests: `from pytest_nestedpve import steps` in a test file adds one test per phase to it.

The module is a sentinel: in a file that imports it, the plugin collects `test_preflight` and the other steps.
"""
