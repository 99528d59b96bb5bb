"""The end of runs: destroying their VMs, removing their leftovers, proving that nothing remains.

Whether a VM belongs to a run is decided by `ownership`; nothing here decides it again.
"""
