"""The end of a first boot, by the files that cloud-init writes or, without a clear result, by its command."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from pytest_nestedpve.setup import address

OTHER = "status: from the command"


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    """A guest's files: `run`, and a cloud-init command that prints its arguments."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "enabled").touch()
    command = tmp_path / "bin" / "cloud-init"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho '{OTHER}'; echo \"$*\"; exit 3\n")
    command.chmod(0o755)
    return tmp_path


def write_result(guest: Path, errors: list[str], **stages: dict[str, Any]) -> None:
    (guest / "run" / "status.json").write_text(json.dumps({"v1": {"stage": None, **stages}}))
    (guest / "run" / "result.json").write_text(json.dumps({"v1": {"datasource": "x", "errors": errors}}))


def run_script(guest: Path) -> tuple[int, str]:
    script = address._CLOUD_INIT.replace("/run/cloud-init/", f"{guest}/run/")
    path = f"{guest}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_after_a_first_boot_without_warnings_the_command_is_not_run(guest: Path) -> None:
    write_result(guest, [], init={"errors": [], "recoverable_errors": {}})
    assert run_script(guest) == (0, "")


def test_recoverable_errors_are_printed_with_status_2(guest: Path) -> None:
    write_result(guest, [], init={"errors": []}, final={"recoverable_errors": {"WARNING": ["one", "two"]}})
    assert run_script(guest) == (2, "- one\n- two\n")
    assert address._messages("- one\n- two\n") == "one; two"


def test_the_script_waits_for_the_end(guest: Path) -> None:
    threading.Timer(0.4, lambda: write_result(guest, [], init={"errors": []})).start()
    assert run_script(guest) == (0, "")


@pytest.mark.parametrize("case", ["errors", "stage", "disabled", "unreadable", "another form"])
def test_any_other_result_is_that_of_the_command(guest: Path, case: str) -> None:
    write_result(
        guest, ["bad"] if case == "errors" else [], init={"errors": ["bad"] if case == "stage" else []}
    )
    if case == "disabled":
        (guest / "run" / "enabled").unlink()
        (guest / "run" / "result.json").unlink()
    if case == "unreadable":
        (guest / "run" / "status.json").write_text("{")
    if case == "another form":
        (guest / "run" / "result.json").write_text(json.dumps({"v2": {}}))
    assert run_script(guest) == (3, f"{OTHER}\nstatus --wait --long\n")


def test_a_guest_without_cloud_init_is_reported_as_such(guest: Path) -> None:
    (guest / "bin" / "cloud-init").unlink()
    assert run_script(guest) == (0, "absent\n")
