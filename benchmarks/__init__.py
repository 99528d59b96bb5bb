"""What the project promises about cost, measured: `python -m benchmarks [NAME…] [--json FILE]`."""
