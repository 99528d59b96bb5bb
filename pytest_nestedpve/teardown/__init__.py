"""The end of runs: destroy their VMs, delete their leftovers, prove that nothing remains.

Start with `teardown.teardown`; VMs are destroyed by `teardown.destroy` alone, and only what a prover proves.
"""
