"""`python -m pytest_nestedpve.report RUN_DIRECTORY`: write the report of a run, also of a killed one."""

from __future__ import annotations

import sys
from pathlib import Path

from pytest_nestedpve.report import write_report


def main(arguments: list[str]) -> int:
    """Write the report of each run directory in `arguments`. Returns 0, or 4 after printing the error."""
    if not arguments:
        print("usage: python -m pytest_nestedpve.report RUN_DIRECTORY...", file=sys.stderr)
        return 4
    for name in arguments:
        try:
            print(write_report(Path(name)))
        except OSError as error:
            print(f"no report for {name}: {error}", file=sys.stderr)
            return 4
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
