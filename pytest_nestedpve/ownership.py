"""Whose is it: the pool with its lease, the marker on a VM, and the proof from what the host says now.

Sources for what PVE does are recordings of PVE 9.2 (pools, clones, reused ids) made for this project.
"""

from __future__ import annotations

import fnmatch
import json
import re
import uuid as uuids
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pytest_nestedpve.pve.answers import entries, shown
from pytest_nestedpve.pve.api import Api, patiently
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import (
    AlreadyExists,
    ApiError,
    CommandTimeout,
    GuestNotFound,
    NotFound,
    PveError,
    SshError,
    UnreadableAnswer,
)
from pytest_nestedpve.pve.guests import cautious, path_of, protects, read_guest
from pytest_nestedpve.run import HARD_LIMIT, RUN_ID, Run

if TYPE_CHECKING:
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.settings import Settings

MARKER = "nestedpve:"
TAG = "nestedpve"
ROLES = ("nested", "leaf")
STATES = ("live", "kept")
# Pools are nested three deep at most; a parent may have any name that PVE allows.
_POOL = re.compile(r"(?:[A-Za-z0-9._-]+/){0,2}npve-([0-9a-f]{12})\Z")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")
_LATEST = 1 << 40  # epoch seconds no clock shows: what is beyond is not a time
_MOVES = 4  # nodes on which a VM is looked for, one after the other, while it is being moved


class LeaseLost(PveError):
    """The run's pool is gone, or its lease is another session's: nothing more may be made."""


class Located(Protocol):
    """Anything that says which guest is meant."""

    @property
    def vmid(self) -> int: ...

    @property
    def node(self) -> str: ...


@dataclass(frozen=True)
class Marker:
    """The line in a VM's description that says whose it is; written at create, never again."""

    run: str
    vmid: int
    uuid: str
    role: str = "nested"

    def to_text(self) -> str:
        """The line, without its end."""
        data = {"v": 1, "run": self.run, "vmid": self.vmid, "uuid": self.uuid, "role": self.role}
        return f"{MARKER} {json.dumps(data, separators=(',', ':'))}"


def parse_marker(description: object) -> Marker | None:
    """The marker of a description; None unless there is exactly one such line, and it is as we write it."""
    lines = marker_lines(description)
    if len(lines) != 1:
        return None
    data = _object(lines[0][len(MARKER) :])
    if data is None or set(data) != {"v", "run", "vmid", "uuid", "role"}:
        return None
    run, vmid, uuid, role = data["run"], data["vmid"], data["uuid"], data["role"]
    if (
        data["v"] != 1
        or type(data["v"]) is not int
        or type(vmid) is not int
        or not 100 <= vmid <= 999_999_999
    ):
        return None
    if not (isinstance(run, str) and RUN_ID.match(run) and isinstance(uuid, str) and _UUID.match(uuid)):
        return None
    return Marker(run, vmid, uuid, role) if isinstance(role, str) and role in ROLES else None


def marker_lines(description: object) -> list[str]:
    """The lines of a description that look like a marker, well-formed or not."""
    if not isinstance(description, str) or MARKER not in description:
        return []
    return [line.strip() for line in description.split("\n") if line.strip().startswith(MARKER)]


@dataclass(frozen=True)
class Lease:
    """The comment of a run's pool. Times: epoch seconds of the outer host's clock."""

    owner: str
    client: str
    session: str
    state: str
    created: int
    expires: int
    hard: int

    def to_text(self) -> str:
        """One line of JSON."""
        data = {
            "v": 1,
            "owner": self.owner,
            "client": self.client,
            "session": self.session,
            "state": self.state,
            "created": self.created,
            "expires": self.expires,
            "hard": self.hard,
        }
        return json.dumps(data, separators=(",", ":"))

    def lapsed(self, now: float) -> bool:
        """Whether it is over at `now`, a moment of the outer host's clock."""
        return now > min(self.expires, self.hard)


def parse_lease(comment: object) -> Lease | None:
    """The lease in a pool's comment; None unless it is exactly one as we write it."""
    data = _object(comment) if isinstance(comment, str) else None
    names = {"owner", "client", "session", "state", "created", "expires", "hard"}
    if data is None or set(data) != {"v", *names} or type(data["v"]) is not int or data["v"] != 1:
        return None
    for key in ("owner", "client", "session", "state"):
        if not isinstance(data[key], str) or not 0 < len(data[key]) <= 200:
            return None
    for key in ("created", "expires", "hard"):
        if type(data[key]) is not int or not 0 < data[key] < _LATEST:
            return None
    if data["state"] not in STATES or data["expires"] < data["created"] or data["hard"] < data["created"]:
        return None
    return Lease(**{key: data[key] for key in names})


def _object(text: str) -> dict[str, Any] | None:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def pool_name(settings: Settings, run: Run | str) -> str:
    """The run's pool, below `pool_parent` if that is set."""
    name = f"npve-{run if isinstance(run, str) else run.id}"
    return f"{settings.pool_parent}/{name}" if settings.pool_parent else name


def run_of_pool(pool: object) -> str | None:
    """The run that a pool belongs to by its name."""
    match = _POOL.match(pool) if isinstance(pool, str) else None
    return match[1] if match else None


def host_clock(host: PveHost) -> int:
    """Epoch seconds of the host's clock, asked now. Raises PveError."""
    said = host.run(["date", "+%s"], timeout=20).stdout.strip()
    if not re.fullmatch(r"\d{9,12}", said):
        raise PveError(f"expected epoch seconds from `date +%s` on {host.name}, found {said[:60]!r}")
    return int(said)


@dataclass(frozen=True)
class Pool:
    """A pool as the host shows it; members are (kind, vmid, node), a storage has neither place here."""

    id: str
    comment: str
    members: tuple[tuple[str, int, str], ...]

    @property
    def vmids(self) -> frozenset[int]:
        return frozenset(vmid for _, vmid, _ in self.members)


def read_pool(api: Api, pool: str) -> Pool | None:
    """The pool, or None when there is none. Raises PveError.

    `/pools?poolid=` is right at once and the only form that works for nested pools. Members that make no
    sense are left out.
    """
    try:
        answer = api.get("/pools", poolid=pool)
    except NotFound as error:
        if f"pool '{pool}' does not exist" not in error.text:
            raise
        return None
    found = [entry for entry in entries(answer, call="get /pools") if entry.get("poolid") == pool]
    if not found:
        # A pool that does not exist is an error (recorded); this is an answer about something else.
        raise UnreadableAnswer(f"expected the pool {pool}, found {shown(answer)}", call="get /pools")
    listed = found[0].get("members")
    guests = [read_guest(each) for each in entries([] if listed is None else listed, call="get /pools")]
    members = tuple((guest.kind, guest.vmid, guest.node) for guest in guests if guest is not None)
    comment = found[0].get("comment")
    return Pool(pool, comment if isinstance(comment, str) else "", members)


def create_pool(api: Api, run: Run, settings: Settings, now: int) -> Lease:
    """Make the run's pool with its lease in it, from `now` on (the host's clock). Raises PveError.

    A lost reply is answered by reading the comment: our session's nonce in it, and it is ours.
    """
    lease = Lease(
        run.owner, run.client, run.session, "live", now, now + int(settings.lease), now + HARD_LIMIT
    )
    name = pool_name(settings, run)
    try:
        patiently(lambda: api.post("/pools", poolid=name, comment=lease.to_text()))
    except (AlreadyExists, SshError, CommandTimeout) as e:
        found = read_pool(api, name)
        ours = parse_lease(found.comment) if found else None
        if ours is None or ours.session != run.session:
            raise
        del e
        return ours
    except ApiError as e:
        if settings.pool_parent and "does not exist" in e.text:
            raise NotFound(
                f"{e.text}; pool_parent names the pool {settings.pool_parent!r}: make it, or name another",
                call=e.call,
                rc=e.rc,
            ) from e
        raise
    return lease


def remove_pool(api: Api, name: str) -> None:
    """Remove an empty pool; that it is gone is no error, whatever the host says of it. Raises PveError."""
    try:
        patiently(lambda: api.delete("/pools", poolid=name))
    except PveError:
        if read_pool(api, name) is not None:
            raise


def renew(
    api: Api,
    run: Run,
    settings: Settings,
    now: int,
    *,
    state: str | None = None,
    seconds: float | None = None,
) -> Lease:
    """Write a later end into the run's lease; touches no VM. Raises LeaseLost, PveError.

    `seconds` from `now` (default: the setting), never beyond the hard limit that it was made with.
    """
    name = pool_name(settings, run)
    pool = read_pool(api, name)
    if pool is None:
        raise LeaseLost(
            f"the pool {name} of this run is gone: somebody cleaned up after it; nothing more is made"
        )
    lease = parse_lease(pool.comment)
    if lease is None or lease.session != run.session:
        whose = "is unreadable" if lease is None else f"is now that of {lease.owner}"
        raise LeaseLost(f"the lease in pool {name} {whose}; nothing more is made")
    if now > lease.hard:
        raise LeaseLost(f"the hard limit of run {run.id} has passed; nothing more is made")
    longer = int(settings.lease if seconds is None else seconds)
    lease = replace(lease, expires=min(now + longer, lease.hard), state=state or lease.state)
    patiently(lambda: api.put("/pools", poolid=name, comment=lease.to_text()))
    return lease


@dataclass(frozen=True)
class Proof:
    """Whether a VM is this run's, by what its configuration, status and pool said just now.

    `reason` says why not; `gone`: there is no such VM; `unreadable`: PVE refuses to print it.
    `marked`: its marker is this run's, this VM's and this uuid's, whatever else speaks against it.
    `status` is PVE's; `lock` the lock property; `config` the configuration proved. `node` is where the VM
    was found, or looked for last: it may have been moved.
    """

    ok: bool
    reason: str
    config_digest: str = ""
    status: str = ""
    lock: str | None = None
    uuid: str = ""
    config: Mapping[str, Any] | None = None
    gone: bool = False
    unreadable: bool = False
    marked: bool = False
    node: str = ""


def prove(api: Api, settings: Settings, guest: Located, run: Run | str, *, pool: str | None = None) -> Proof:
    """Read configuration, status and pool of `guest` and judge. Never raises for a VM that is not ours.

    Raises PveError when the host cannot be asked: then nothing is proved either.
    `pool`: the pool's full name where it is known from discovery (another `pool_parent`).
    """
    run_id = run if isinstance(run, str) else run.id
    name = pool if pool is not None and run_of_pool(pool) == run_id else pool_name(settings, run_id)
    node = guest.node
    for _ in range(_MOVES):
        found = replace(_prove_at(api, settings, node, guest.vmid, run_id, name), node=node)
        if not found.gone:
            return found
        # No configuration on that node: it is gone only if it is on no other one either.
        there = node_of(api, guest.vmid)
        if there is None or there == node:
            return found
        node = there
    raise PveError(f"VM {guest.vmid} was on another node each time it was looked for, last on {node}")


def _prove_at(api: Api, settings: Settings, node: str, vmid: int, run_id: str, name: str) -> Proof:
    base = path_of(node, vmid)
    members = read_pool(api, name)
    try:
        # The configuration last: what is read of it is the youngest when the blow follows.
        status = api.get(f"{base}/status/current")
        config = api.get(f"{base}/config", current=1)
    except GuestNotFound:
        return Proof(False, "there is no such VM", gone=True)
    except UnreadableAnswer as e:
        # `lock: destroyed`, or written by hand: pvesh refuses to print such a configuration.
        return Proof(False, f"its configuration is not readable: {e.text}", unreadable=True)
    found = judge(settings, vmid, run_id, config, status)
    if (
        found.ok
        and members is not None
        and vmid in members.vmids
        and ("qemu", vmid, node) not in members.members
    ):
        members = read_pool(api, name)  # moved between the two answers
    if found.ok and members is None:
        return replace(found, ok=False, reason=f"the pool {name} does not exist")
    if found.ok and members is not None and ("qemu", vmid, node) not in members.members:
        return replace(found, ok=False, reason=f"it is not in the pool {name}")
    return found


def judge(settings: Settings, vmid: int, run_id: str, config: object, status: object) -> Proof:
    """The part of the proof that needs no host: every condition on configuration and status."""
    if not isinstance(config, dict) or not isinstance(status, dict):
        return Proof(False, "its configuration is not readable")
    lock = config.get("lock") or status.get("lock")
    found = Proof(
        True,
        "",
        config_digest=str(config.get("digest") or ""),
        status=str(
            status.get("qmpstatus") if status.get("qmpstatus") == "paused" else status.get("status") or ""
        ),
        lock=str(lock) if lock else None,
        uuid=uuid_of(config) or "",
        config=config,
    )
    copied = _unmarked(vmid, run_id, config)
    reason = copied or _against(settings, vmid, config, status)
    return replace(found, ok=not reason, reason=reason, marked=not copied)


def _unmarked(vmid: int, run_id: str, config: dict[str, Any]) -> str:
    """What is wrong with the marker; empty if it is this run's, this VM's and this uuid's."""
    marker = parse_marker(config.get("description"))
    if not RUN_ID.match(run_id):
        return f"{run_id[:40]!r} is no run"
    if marker is None:
        return "its marker is malformed" if marker_lines(config.get("description")) else "it has no marker"
    if marker.run != run_id:
        return f"its marker names another run, {marker.run}"
    if marker.vmid != vmid:
        return f"its marker names another VM, {marker.vmid}: it is a copy"
    uuid = uuid_of(config)
    if uuid is None or uuid != marker.uuid:
        return "its SMBIOS uuid is not the one in its marker: it is a copy, or another VM"
    return ""


def _against(settings: Settings, vmid: int, config: dict[str, Any], status: dict[str, Any]) -> str:
    """What speaks against taking a VM of ours away."""
    if not in_range(settings, vmid):
        return "its id is outside the range"
    if not name_matches(settings, config.get("name")):
        return f"its name {str(config.get('name'))[:60]!r} does not match the pattern"
    if protects(config, "template") or protects(status, "template"):
        return "it is a template"
    if protects(config, "protection"):
        return "it is protected"
    managed = status.get("ha")
    if not isinstance(managed, dict) or _set(managed.get("managed", 1)):
        return "it is managed by HA" if isinstance(managed, dict) else "whether HA manages it is not known"
    return ""


def _set(value: object) -> bool:
    """A PVE boolean; everything but a plain no is a yes, also what is there and says nothing."""
    return value is None or cautious(value)


def in_range(settings: Settings, vmid: int) -> bool:
    return any(low <= vmid <= high for low, high in settings.vmid_ranges)


def name_matches(settings: Settings, name: object) -> bool:
    return isinstance(name, str) and any(fnmatch.fnmatchcase(name, p) for p in settings.name_patterns)


def uuid_of(config: Mapping[str, Any]) -> str | None:
    """The SMBIOS uuid of a configuration, lower case."""
    for part in str(config.get("smbios1") or "").split(","):
        key, _, value = part.strip().partition("=")
        if key == "uuid":
            text = value.strip().lower()
            return text if _UUID.match(text) else None
    return None


def new_uuid(taken: Iterable[str] = ()) -> str:
    """A fresh SMBIOS uuid."""
    while (found := str(uuids.uuid4())) in set(taken):
        pass
    return found
