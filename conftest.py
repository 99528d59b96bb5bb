"""Configuration of this repository's own test runs."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any

import pytest

pytest_plugins = ["pytester"]

EXAMPLE_SECRET = Path(__file__).parent / "examples" / "secrets.yaml"


def pytest_configure(config: pytest.Config) -> None:
    """Create the secret file of `nested_pve_secrets` in pytest.ini: git ignores it, so a clone has none."""
    del config
    if EXAMPLE_SECRET.exists():
        return
    EXAMPLE_SECRET.parent.mkdir(exist_ok=True)
    draft = EXAMPLE_SECRET.with_name(f".{EXAMPLE_SECRET.name}.{os.getpid()}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write("# Created by conftest.py, as an example of a file that a project keeps out of git.\n")
        out.write(f"example: {secrets.token_hex(16)}\n")
    draft.replace(EXAMPLE_SECRET)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadscope`: most tests that start labs run in one worker process, other tests one by one.

    More labs at once on two cores would only slow each other down, and exceed time limits. Two files of lab
    tests, a quarter of their time, run in the other process, which finishes its other tests first.
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
