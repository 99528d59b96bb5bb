"""The end of a first boot, by the files that cloud-init writes and, where these do not say, by itself."""

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
    """A guest's files: `run`, and a cloud-init that tells that it was asked."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "enabled").touch()
    command = tmp_path / "bin" / "cloud-init"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho '{OTHER}'; echo \"$*\"; exit 3\n")
    command.chmod(0o755)
    return tmp_path


def written(guest: Path, errors: list[str], **stages: dict[str, Any]) -> None:
    (guest / "run" / "status.json").write_text(json.dumps({"v1": {"stage": None, **stages}}))
    (guest / "run" / "result.json").write_text(json.dumps({"v1": {"datasource": "x", "errors": errors}}))


def ask(guest: Path) -> tuple[int, str]:
    script = address._CLOUD_INIT.replace("/run/cloud-init/", f"{guest}/run/")
    path = f"{guest}/bin:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/sh", "-c", script], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout


def test_a_first_boot_without_complaints_is_done_and_its_command_is_not_asked(guest: Path) -> None:
    written(guest, [], init={"errors": [], "recoverable_errors": {}})
    assert ask(guest) == (0, "")


def test_what_it_recovered_from_is_told_with_status_2(guest: Path) -> None:
    written(guest, [], init={"errors": []}, final={"recoverable_errors": {"WARNING": ["one", "two"]}})
    assert ask(guest) == (2, "- one\n- two\n")
    assert address._messages("- one\n- two\n") == "one; two"


def test_the_end_is_waited_for(guest: Path) -> None:
    threading.Timer(0.4, lambda: written(guest, [], init={"errors": []})).start()
    assert ask(guest) == (0, "")


@pytest.mark.parametrize("case", ["errors", "stage", "disabled", "unreadable", "another form"])
def test_whatever_else_is_asked_of_cloud_init_itself(guest: Path, case: str) -> None:
    written(guest, ["bad"] if case == "errors" else [], init={"errors": ["bad"] if case == "stage" else []})
    if case == "disabled":
        (guest / "run" / "enabled").unlink()
        (guest / "run" / "result.json").unlink()
    if case == "unreadable":
        (guest / "run" / "status.json").write_text("{")
    if case == "another form":
        (guest / "run" / "result.json").write_text(json.dumps({"v2": {}}))
    assert ask(guest) == (3, f"{OTHER}\nstatus --wait --long\n")


def test_a_guest_without_cloud_init_says_so(guest: Path) -> None:
    (guest / "bin" / "cloud-init").unlink()
    assert ask(guest) == (0, "absent\n")
