"""`python -m benchmarks [NAME…] [--json FILE]`: measure and print rows. Status 1 if a limit is exceeded."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import command, modules, reuse, round_trip, setup_phases, teardown, trip
from benchmarks.rows import Row, show

BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "modules": modules.measure,
    "command": command.measure,
    "round_trip": round_trip.measure,
    "reuse": reuse.measure,
    "teardown8": teardown.measure_eight,
    "teardown50": teardown.measure_fifty,
    "api_calls": trip.measure_calls,
    "noticed": trip.measure_noticed,
    "setup_phases": setup_phases.measure,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all rows pass, else 1; argparse's 2 for usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; expected some of {', '.join(BENCHMARKS)}")
    rows: list[Row] = []
    failed = False
    for name in options.names or BENCHMARKS:
        try:
            measured = BENCHMARKS[name]()
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = True
            continue
        show(measured)
        rows += measured
    if options.json is not None:
        options.json.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    return 0 if not failed and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
