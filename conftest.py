"""What this repository's own test runs need beyond the plugin itself."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

EXAMPLE_SECRET = Path(__file__).parent / "examples" / "secrets.yaml"


def pytest_configure(config: pytest.Config) -> None:
    """Make the secret that `nested_pve_secrets` in pytest.ini names: git ignores it, so a clone has none."""
    del config
    if EXAMPLE_SECRET.exists():
        return
    EXAMPLE_SECRET.parent.mkdir(exist_ok=True)
    draft = EXAMPLE_SECRET.with_name(f".{EXAMPLE_SECRET.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write("# Made by conftest.py; stands for a file that a project keeps out of git.\n")
        out.write(f"example: {secrets.token_hex(16)}\n")
    draft.replace(EXAMPLE_SECRET)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope`: most of what brings up labs runs in one process, the rest test by test.

    More labs side by side on two cores would only wait for each other, and for limits. Two files are in the
    other process: they are a quarter of all that labs take, and the rest of the tests are done before the
    labs'.
    """
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            if nodeid.startswith(("tests/lab/test_kept.py", "tests/lab/test_two_nodes.py")):
                return "other labs"
            return "lab" if nodeid.startswith(("tests/lab/", "tests/test_round_trip.py")) else nodeid

    return Scheduling(config, log)
