"""Modules that a session imports beyond those of bare pytest, with the plugin installed but unused."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rows import Row

LIMIT = 15

_COUNTER = """
import os, sys
def pytest_unconfigure(config):
    with open(os.environ["MODULES_FILE"], "w") as out:
        out.write("\\n".join(sorted(sys.modules)))
"""


def imported_modules(*plugins: str) -> set[str]:
    """Names of the modules that `pytest --collect-only` of one empty test has imported at its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "module_counter.py").write_text(_COUNTER)
        (folder / "test_nothing.py").write_text("def test_nothing(): pass\n")
        output = folder / "modules.txt"
        env = {
            **os.environ,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "MODULES_FILE": str(output),
            "PYTHONPATH": name,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        arguments = ["--collect-only", "-q", "-p", "no:cacheprovider"]
        arguments += [word for plugin in ("module_counter", *plugins) for word in ("-p", plugin)]
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, name],
            cwd=name,
            env=env,
            check=True,
            capture_output=True,
        )
        return set(output.read_text().split())


def measure() -> list[Row]:
    """One row."""
    bare, ours = imported_modules(), imported_modules("pytest_nestedpve.plugin")
    return [
        Row(
            "modules_at_load",
            "modules",
            (float(len(ours)),),
            (float(len(bare)),),
            LIMIT,
            "difference",
            "of ours: " + ", ".join(sorted(ours - bare)),
        )
    ]
