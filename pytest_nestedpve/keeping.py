"""Environments that outlive their session: the host's lease says so, a record on the client how to go on.

The record lies outside the project (its `git clean` must not take the only key to a running VM) and holds the
run's keys, known hosts and state. Who takes it up again holds the run's lock from then on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve import record
from pytest_nestedpve.ownership import Lease, LeaseLost, host_clock, parse_lease, pool_name, read_pool, renew
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run import (
    HARD_LIMIT,
    RUN_ID,
    RunDirectoryError,
    SessionLock,
    client_hash,
    owner,
    state_home,
)

if TYPE_CHECKING:
    from pytest_nestedpve.environment import Environment
    from pytest_nestedpve.run import Run, RunDirectory
    from pytest_nestedpve.settings import Settings

#: What a VM is made from: another value of one of these is another VM.
SHAPE = (
    "host", "name_patterns", "vmid_ranges", "pool_parent", "image", "template", "storage", "bridge",
    "ipconfig", "cores", "memory", "disk", "vm_options", "leaf_image", "leaf_options",
)  # fmt: skip
_FILES = (
    "key", "key.pub", "known_hosts", "state.json", record.FILE, "api_token", "pve-root-ca.pem",
    "root_password",
)  # fmt: skip
_RECORD, _SHAPE = "kept.json", "shape.json"
ADOPTED = "adopted"
"""The file in a run's directory that tells xdist's controller that a worker went on with a kept run."""
_STALE = 7 * 24 * 3600  # seconds after its end for which the record of a run may still explain something


@dataclass(frozen=True)
class Kept:
    """An environment that was kept. Times: epoch seconds of this client's clock.

    `shape` holds the settings that made the VM, as texts, `fixtures` those of them that a fixture decided;
    `rootdir` the project that may go on with it.
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

    def differs(self, settings: Settings, *, early: bool = False) -> list[str]:
        """The settings that are other ones now, in words; `early`: before fixtures say what they do."""
        now = shape(settings)
        return [
            f"{name}: {self.shape.get(name, 'unknown')}, now {now[name]}"
            for name in SHAPE
            if self.shape.get(name) != now[name] and not (early and name in self.fixtures)
        ]


def _shaped(settings: Settings) -> dict[str, Any]:
    by_fixture = [name for name in SHAPE if settings.origin(name).startswith("the fixture ")]
    return {"shape": shape(settings), "fixtures": by_fixture}


def joined(directory: RunDirectory, settings: Settings) -> None:
    """As one of xdist's workers, which alone know what fixtures say: tell the controller, who stores it.

    Raises PveError when the run is a kept one of another shape.
    """
    run_id = directory.path.name
    kept = recorded(run_id)
    if kept is not None and (differs := kept.differs(settings)):
        raise PveError(
            f"the kept run {run_id} was made with other settings ({'; '.join(differs)}), and workers that "
            "share one environment (nested_pve_scope = run) cannot make another beside it; destroy it first: "
            f"--nested-destroy-only --nested-run {run_id}"
        )
    directory.write(_SHAPE, json.dumps(_shaped(settings)))


def shape(settings: Settings) -> dict[str, str]:
    """The settings that a VM is made from, as texts."""
    return {name: _text(getattr(settings, name)) for name in SHAPE}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
    if isinstance(value, tuple):
        return ", ".join("-".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return "none" if value is None else str(value)


def _home() -> Path:
    return state_home() / "kept"


def all_kept() -> list[Kept]:
    """The records on this client, the newest first; those that ended long ago are removed."""
    found = []
    with contextlib.suppress(OSError):
        for path in _home().iterdir():
            kept = _read(path)
            if kept is not None and kept.expires + _STALE < time.time():
                forget(kept.run)
            elif kept is not None:
                found.append(kept)
    return sorted(found, key=lambda kept: kept.created, reverse=True)


def _read(path: Path) -> Kept | None:
    if not RUN_ID.match(path.name):
        return None
    try:
        data = json.loads((path / _RECORD).read_text(encoding="utf-8"))
        kept = Kept(**{name: data[name] for name in Kept.__dataclass_fields__ if name in data})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = kept.run == path.name and isinstance(kept.expires, int) and isinstance(kept.shape, dict)
    return kept if sound else None


def candidates(settings: Settings, rootdir: Path, *, early: bool) -> Iterator[tuple[Kept, str]]:
    """The kept runs of this project on this host, and why each cannot be gone on with (empty: it can).

    `early`: before the project's fixtures say what they do.
    """
    if settings.make_template:
        return  # of a VM that nobody has used
    if settings.attach is not None:
        return  # nothing of an attached PVE is kept, and what was kept has another one
    for kept in all_kept():
        if kept.rootdir != str(rootdir) or kept.host != str(settings.host):
            continue
        if kept.client != client_hash() or kept.owner != owner():
            continue
        if kept.expires <= time.time():
            yield kept, "its time is over"
        elif differs := kept.differs(settings, early=early):
            yield kept, "it was made with other settings (" + "; ".join(differs) + ")"
        else:
            yield kept, ""


def recorded(run_id: str) -> Kept | None:
    """The record of a run; None when it has none."""
    return next((kept for kept in all_kept() if kept.run == run_id), None)


def done_in(kept: Kept) -> frozenset[str]:
    """The phases that are done in a kept run, by its record, unless what they depend on has changed."""
    try:
        said = record.parse((_home() / kept.run / record.FILE).read_text(encoding="utf-8"))
    except (OSError, PveError):
        return frozenset()
    return frozenset(name for name, digest in said.digests.items() if digest)


@dataclass(frozen=True)
class Taken:
    """A run whose lock is held: a new one, or `kept` to go on with. `remarks`: about other kept ones."""

    lock: SessionLock
    kept: Kept | None
    remarks: tuple[str, ...]


def resumable(settings: Settings, rootdir: Path) -> Kept | None:
    """The kept run that a session would go on with, by what the client knows."""
    return next((kept for kept, against in candidates(settings, rootdir, early=True) if not against), None)


def take_lock(settings: Settings, rootdir: Path, run_id: str, *, early: bool = False) -> Taken:
    """Hold the lock of a kept run that can be gone on with, or that of the new run `run_id`.

    `early`: before the project's fixtures say what they do. Raises RunDirectoryError.
    """
    remarks: list[str] = []
    for kept, against in candidates(settings, rootdir, early=early):
        lock = SessionLock(kept.run)
        try:
            lock.acquire()
        except RunDirectoryError as e:
            against = str(e)
        else:
            if not against:
                return Taken(lock, kept, tuple(remarks))
            lock.release(remove=True)
        remarks.append(f"the kept run {kept.run} is not gone on with: {against}")
    lock = SessionLock(run_id)
    lock.acquire()
    return Taken(lock, None, tuple(remarks))


def store(run: Run, settings: Settings, rootdir: Path, expires: int) -> None:
    """Write the record of a run whose lease ends at `expires` (epoch seconds, this client's clock).

    `settings` are those before the host's profile was read. Raises OSError.
    """
    target = _home() / run.id
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.chmod(0o700)
    for name in _FILES:
        _copy(run.dir / name, target / name)
    told = run.dir / _SHAPE
    shaped = json.loads(told.read_text(encoding="utf-8")) if told.exists() else _shaped(settings)
    kept = Kept(
        run.id, str(settings.host), str(rootdir), run.client, run.owner, run.created, expires, **shaped
    )
    temporary = target / f".{_RECORD}"
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(kept), file, indent=1)
    temporary.replace(target / _RECORD)


def restore(kept: Kept, directory: RunDirectory) -> None:
    """Bring a run's keys and state back into its directory. Raises OSError."""
    for name in _FILES:
        source = _home() / kept.run / name
        if source.exists():
            directory.write(name, source.read_bytes())


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        target.unlink(missing_ok=True)
        return
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(source.read_bytes())


def forget(run_id: str) -> None:
    """Remove a run's record, keys included."""
    if RUN_ID.match(run_id):
        shutil.rmtree(_home() / run_id, ignore_errors=True)


def keep(env: Environment) -> Lease:
    """Have the lease say that the run is kept, and write its record. Raises PveError, OSError."""
    env.end_lease()
    host, settings = env.outer, env.settings
    now = host_clock(host)
    lease = renew(host.api, env.run, settings, now, state="kept", seconds=settings.keep_expiry)
    store(env.run, env.wanted, env.rootdir, int(time.time()) + lease.expires - now)
    return lease


def adopt(env: Environment) -> bool:
    """Make a kept run's lease this session's; False when the run is gone from the host.

    Who calls this holds the run's lock: no other session of this client can. Raises LeaseLost when the lease
    is somebody else's or has lapsed, PveError.
    """
    host, run, settings = env.outer, env.run, env.settings
    name = pool_name(settings, run)
    pool = read_pool(host.api, name)
    if pool is None:
        return False
    lease, now = parse_lease(pool.comment), host_clock(host)
    if lease is None or (lease.client, lease.owner) != (run.client, run.owner):
        whose = "no lease can be read" if lease is None else f"it is {lease.owner}'s"
        raise LeaseLost(f"the kept run {run.id} cannot be gone on with: {whose} in the pool {name}")
    if lease.lapsed(now):
        raise LeaseLost(f"the kept run {run.id} has expired by the clock of {host.name}, and may go any time")
    ours = Lease(
        run.owner, run.client, run.session, "live", lease.created, now + int(settings.lease), now + HARD_LIMIT
    )
    patiently(lambda: host.api.put("/pools", poolid=name, comment=ours.to_text()))
    run.directory.write(ADOPTED, "")
    return True


class StateKeeper:
    """Keeps facts and record in the run's directory after each phase, and facts in a context file."""

    def __init__(self, env: Environment) -> None:
        self._env = env

    def acting(self, _phase: Any) -> None:
        """A phase's action begins: from now on it is not known to be done."""
        self._env.run.directory.write(record.FILE, self._env.record.to_text())

    def phase_started(self, phase: Any) -> None:
        pass

    def phase_finished(
        self, phase: Any, status: str, seconds: float, facts: Mapping[str, Any], cause: str | None
    ) -> None:
        del phase, seconds, facts, cause
        if status == "failed":
            return
        facts_now, path = self._env.facts, self._env.settings.context_file
        self._env.run.directory.save_state(facts_now)
        self._env.run.directory.write(record.FILE, self._env.record.to_text())
        if path is not None:
            from pytest_nestedpve import context

            context.save(path, facts_now)

    def progress(self, text: str) -> None:
        pass


def load(env: Environment) -> None:
    """Have a resumed environment know what its run's directory says. Raises PveError."""
    directory = env.run.directory
    env.facts.update(directory.load_state())
    try:
        env.record = record.parse((directory.path / record.FILE).read_text(encoding="utf-8"))
    except OSError as e:
        raise PveError(f"the record of the kept run {env.run.id} cannot be read: {e}") from e
