"""The records of environments that are kept after their session, to resume them on this client.

A record is outside the project (whose `git clean` must not delete the only key of a running VM) and holds
the run's keys, known hosts and state. The session that resumes a run holds the run's lock.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run import phase_record, rerun_commands
from pytest_nestedpve.run.directory import RunDirectoryError
from pytest_nestedpve.run.identity import RUN_ID, client_hash, owner, state_home
from pytest_nestedpve.run.lock import SessionLock

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.run.directory import RunDirectory
    from pytest_nestedpve.run.identity import Run

from pytest_nestedpve.config.vm_shape import SHAPE, shape

_FILES = (
    "key", "key.pub", "known_hosts", "state.json", phase_record.FILE, "api_token", "pve-root-ca.pem",
    "root_password",
)  # fmt: skip
_RECORD, _SHAPE = "kept.json", "shape.json"
_STALE = 7 * 24 * 3600  # seconds after the end of a run until its record is deleted


@dataclass(frozen=True)
class Kept:
    """The record of a kept environment. Times: epoch seconds of this client's clock.

    `shape` holds the settings of the VM's creation, as texts, `fixtures` the names of those that a fixture
    set; only the project at `rootdir` may resume the run.
    """

    run: str
    host: str
    rootdir: str
    client: str
    owner: str
    created: int
    expires: int
    shape: Mapping[str, str]
    fixtures: Sequence[str] = ()

    def list_changes(self, settings: Settings, *, early: bool = False) -> list[str]:
        """Texts of the changed settings; `early`: before the fixtures have set their values."""
        current = shape(settings)
        return [
            f"{name}: {self.shape.get(name, 'unknown')}, now {current[name]}"
            for name in SHAPE
            if self.shape.get(name) != current[name] and not (early and name in self.fixtures)
        ]


def _shape_fields(settings: Settings) -> dict[str, Any]:
    by_fixture = [name for name in SHAPE if settings.origin(name).startswith("the fixture ")]
    return {"shape": shape(settings), "fixtures": by_fixture}


def report_shape(directory: RunDirectory, settings: Settings) -> None:
    """Report the shape of this worker process, which has the values of the fixtures, to xdist's controller.

    The controller stores it with the run. Raises PveError when the run was kept with another shape.
    """
    run_id = directory.path.name
    kept = find_kept(run_id)
    if kept is not None and (changes := kept.list_changes(settings)):
        raise PveError(
            f"the kept run {run_id} was created with other settings ({'; '.join(changes)}), and workers that "
            "share one environment (nested_pve_scope = run) cannot create a second one; destroy it first: "
            f"{rerun_commands.command_to_destroy(settings, run_id)}"
        )
    directory.write(_SHAPE, json.dumps(_shape_fields(settings)))


def _home() -> Path:
    return state_home() / "kept"


def list_kept() -> list[Kept]:
    """The records on this client, the newest first; records that expired a week ago are deleted."""
    records = []
    with contextlib.suppress(OSError):
        for path in _home().iterdir():
            kept = _read(path)
            if kept is not None and kept.expires + _STALE < time.time():
                forget(kept.run)
            elif kept is not None:
                records.append(kept)
    return sorted(records, key=lambda kept: kept.created, reverse=True)


def _read(path: Path) -> Kept | None:
    if not RUN_ID.match(path.name):
        return None
    try:
        data = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        kept = Kept(**{name: data[name] for name in Kept.__dataclass_fields__ if name in data})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_valid = kept.run == path.name and isinstance(kept.expires, int) and isinstance(kept.shape, dict)
    return kept if is_valid else None


def candidates(settings: Settings, rootdir: Path, *, early: bool) -> Iterator[tuple[Kept, str]]:
    """The kept runs of this project on this host, with the reason against resuming (empty: none).

    `early`: before the project's fixtures have set their values.
    """
    if settings.make_template:
        return  # a template needs an unused VM
    if settings.attach is not None:
        return  # an attached PVE is never kept, and the kept runs are of another one
    for kept in list_kept():
        if kept.rootdir != str(rootdir) or kept.host != str(settings.host):
            continue
        if kept.client != client_hash() or kept.owner != owner():
            continue
        if kept.expires <= time.time():
            yield kept, "it has expired"
        elif changes := kept.list_changes(settings, early=early):
            yield kept, "it was created with other settings (" + "; ".join(changes) + ")"
        else:
            yield kept, ""


def find_kept(run_id: str) -> Kept | None:
    """The record of a run; None if it does not exist."""
    return next((kept for kept in list_kept() if kept.run == run_id), None)


def read_done_phases(kept: Kept) -> frozenset[str]:
    """The phases that a kept run has done and whose inputs have not changed since, by its record."""
    try:
        record = phase_record.parse((_home() / kept.run / phase_record.FILE).read_text(encoding="utf-8"))
    except (OSError, PveError):
        return frozenset()
    return frozenset(name for name, digest in record.digests.items() if digest)


@dataclass(frozen=True)
class LockedRun:
    """A run whose lock is held: a new one, or `kept`, to be resumed. `remarks`: on other kept runs."""

    lock: SessionLock
    kept: Kept | None
    remarks: tuple[str, ...]


def find_resumable(settings: Settings, rootdir: Path) -> Kept | None:
    """The kept run that a session would resume, by the records of this client; None: a new run."""
    return next((kept for kept, reason in candidates(settings, rootdir, early=True) if not reason), None)


def take_lock(settings: Settings, rootdir: Path, run_id: str, *, early: bool = False) -> LockedRun:
    """Take the lock of a kept run that can be resumed, or that of the new run `run_id`.

    `early`: before the project's fixtures have set their values. Raises RunDirectoryError.
    """
    remarks: list[str] = []
    for kept, reason in candidates(settings, rootdir, early=early):
        lock = SessionLock(kept.run)
        try:
            lock.acquire()
        except RunDirectoryError as e:
            reason = str(e)
        else:
            if not reason:
                return LockedRun(lock, kept, tuple(remarks))
            lock.release(remove=True)
        remarks.append(f"the kept run {kept.run} is not resumed: {reason}")
    lock = SessionLock(run_id)
    lock.acquire()
    return LockedRun(lock, None, tuple(remarks))


def store(run: Run, settings: Settings, rootdir: Path, expires: int) -> None:
    """Write the record of a run whose lease ends at `expires` (epoch seconds, this client's clock).

    `settings` are those without the host's profile. Raises OSError.
    """
    target = _home() / run.id
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.chmod(0o700)
    for name in _FILES:
        _copy(run.dir / name, target / name)
    reported = run.dir / _SHAPE
    shape_fields = (
        json.loads(reported.read_text(encoding="utf-8")) if reported.exists() else _shape_fields(settings)
    )
    kept = Kept(
        run.id, str(settings.host), str(rootdir), run.client, run.owner, run.created, expires, **shape_fields
    )
    local_file.write(target / _RECORD, json.dumps(asdict(kept), indent=1))


def restore(kept: Kept, directory: RunDirectory) -> None:
    """Copy the keys and the state of a kept run into its directory. Raises OSError."""
    for name in _FILES:
        source = _home() / kept.run / name
        if source.exists():
            directory.write(name, source.read_bytes())


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    local_file.write(target, source.read_bytes())


def forget(run_id: str) -> None:
    """Delete the record of a run, with its keys."""
    if RUN_ID.match(run_id):
        shutil.rmtree(_home() / run_id, ignore_errors=True)
