"""Directories of old runs are deleted, unless they may be needed to clean up."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_nestedpve.run import kept_runs
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.identity import state_home
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.run.old_runs import NEWEST, prune, record_cleanup

CLEAN: dict[str, Any] = {"event": "teardown", "phase": "destroy", "status": "clean"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "runs"


def create_run(folder: Path, number: int, *lines: dict[str, Any], cut_off: bool = False) -> str:
    """Create the directory of a run; runs with higher numbers are older. Returns its id."""
    name = f"{number:012x}"
    log = AuditLog(folder / name / "audit.jsonl", name)
    log.write("session", status="new")
    log.write("phase_start", phase="provision", title="create the VM")
    log.write("phase_end", phase="provision", status="done")
    for line in lines or (CLEAN,):
        fields = dict(line)
        log.write(fields.pop("event"), **fields)
    log.close()
    (folder / name / "key").write_text("secret")
    if cut_off:
        with log.path.open("a") as file:
            file.write('{"ts": 1, "eve')
    moment = 1_700_000_000 - number
    os.utime(log.path, (moment, moment))
    return name


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_the_newest_ended_runs_are_kept(folder: Path) -> None:
    runs = [create_run(folder, number) for number in range(NEWEST + 3)]
    (folder / ".gitignore").write_text("*\n")
    (folder / "notes").mkdir()
    prune(folder, own="f" * 12)
    assert names_in(folder) == {*runs[:NEWEST], ".gitignore", "notes"}


def killed(folder: Path) -> str:
    return create_run(folder, 900, {"event": "phase_start", "phase": "start_vm"}, cut_off=True)


def ended_with_leftovers(folder: Path) -> str:
    leak = {"event": "leak", "status": "left", "cause": "VM 99900"}
    return create_run(folder, 901, leak, {**CLEAN, "status": "left"})


def teardown_failed(folder: Path) -> str:
    return create_run(folder, 902, {"event": "leak", "status": "unknown", "cause": "no route to the host"})


def resumed_and_killed(folder: Path) -> str:
    return create_run(folder, 903, CLEAN, {"event": "session", "status": "resumed"})


def kept(folder: Path) -> str:
    run = create_run(folder, 904, {"event": "teardown", "status": "kept", "expires": 1})
    store(run)
    return run


def kept_and_resumed(folder: Path) -> str:
    run = create_run(folder, 905, CLEAN)
    store(run)
    return run


def locked(folder: Path) -> str:
    run = create_run(folder, 906)
    lock = SessionLock(run)
    lock.acquire()
    LOCKS.append(lock)
    return run


LOCKS: list[SessionLock] = []


def store(run: str) -> None:
    """Write the record of a kept run."""
    kept = kept_runs.Kept(run, "father", "/", "client", "owner", 1, 1 << 40, {})
    target = state_home() / "kept" / run
    target.mkdir(parents=True)
    (target / "kept.json").write_text(json.dumps(dataclasses.asdict(kept)))
    assert [record.run for record in kept_runs.list_kept()] == [run]


@pytest.mark.parametrize(
    "create",
    [
        killed,
        ended_with_leftovers,
        teardown_failed,
        resumed_and_killed,
        kept,
        kept_and_resumed,
        locked,
    ],
)
def test_an_old_run_that_may_be_needed_is_kept(folder: Path, create: Callable[[Path], str]) -> None:
    for number in range(NEWEST + 1):
        create_run(folder, number)
    old = create(folder)
    prune(folder, own="f" * 12)
    assert (folder / old / "key").exists()
    assert len(names_in(folder)) == NEWEST + 1
    for lock in LOCKS:
        lock.release()
    LOCKS.clear()


def test_a_run_that_another_session_cleaned_up_is_deleted(folder: Path) -> None:
    for number in range(NEWEST):
        create_run(folder, number)
    old = killed(folder)
    log = folder / old / "audit.jsonl"
    before = log.stat().st_mtime
    record_cleanup(folder / old, "father")
    os.utime(log, (before, before))
    prune(folder, own="f" * 12)
    assert old not in names_in(folder)


def test_errors_of_the_deletion_do_not_fail_the_session(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(folder / "none", own="f" * 12)
    runs = [create_run(folder, number) for number in range(NEWEST + 2)]

    def refuse(*_: Any) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr(Path, "rename", refuse)
    prune(folder, own="f" * 12)
    assert names_in(folder) == set(runs)
    monkeypatch.setattr(kept_runs, "list_kept", refuse)
    prune(folder, own="f" * 12)


def test_an_interrupted_deletion_is_finished_later(folder: Path) -> None:
    run = create_run(folder, 1)
    (folder / run).rename(folder / f".over-{run}")
    prune(folder, own="f" * 12)
    assert names_in(folder) == set()
