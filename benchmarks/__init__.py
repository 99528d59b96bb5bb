"""Measurements of the costs that the project promises: `python -m benchmarks [NAME…] [--json FILE]`."""
