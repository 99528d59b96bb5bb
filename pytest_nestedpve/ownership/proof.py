"""The proof that a VM belongs to a run, from what the host reports now.

Sources for what PVE does are recordings of PVE 9.2 (pools, clones, reused ids) made for this project.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pytest_nestedpve.ownership.marker import marker_lines, parse_marker, uuid_of
from pytest_nestedpve.ownership.pool import pool_name, read_pool
from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import GuestNotFound, PveError, UnreadableAnswer
from pytest_nestedpve.pve.qemu import cautious, path_of, protects
from pytest_nestedpve.run.identity import RUN_ID, Run

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings

_MOVES = 4  # nodes on which a VM is searched for, one after the other, while it is being moved


class Located(Protocol):
    """Anything that names a guest: its id, and the node on which it was last seen."""

    @property
    def vmid(self) -> int: ...

    @property
    def node(self) -> str: ...


@dataclass(frozen=True)
class Proof:
    """Whether a VM may be destroyed, by its configuration, status and pool as the host reports them now.

    `reason`: why it may not. `gone`: no such VM exists. `marked`: its marker is ours, names this VM and has
    its uuid, whatever else forbids to destroy it. `outside`: only its absence from the pool forbids it, as
    while its create task runs. `status` is PVE's, `lock` the lock property, `config` the
    configuration that was proved. `identity` distinguishes it from another VM of the same id: the SMBIOS uuid
    of a marked VM, the digest of the configuration of an unmarked one; empty if not known. `node`: where the
    VM is, or was last searched for; it may have been moved.
    """

    ok: bool
    reason: str
    config_digest: str = ""
    status: str = ""
    lock: str | None = None
    identity: str = ""
    config: Mapping[str, Any] | None = None
    gone: bool = False
    marked: bool = False
    outside: bool = False
    node: str = ""


class Prover(Protocol):
    """Decides whether a VM may be destroyed. The destroyer calls it before each step that changes the VM.

    `own_tasks`: UPIDs of the tasks of the run that owns the VM. They may be stopped, locks of tasks that
    ended may be removed, and leftovers of killed tasks deleted. None: the VM belongs to no run, and none of
    that is done. `retries`: whether a failed attempt may be repeated; a VM without a marker gets one attempt.
    """

    @property
    def own_tasks(self) -> frozenset[str] | None: ...

    @property
    def retries(self) -> bool: ...

    def prove(self, vm: Located) -> Proof:
        """Ask the host and judge; raises PveError when the host cannot be asked."""
        ...


@dataclass(frozen=True)
class RunProver:
    """Proves VMs of one run: marker, SMBIOS uuid, id range, name and pool."""

    api: Api
    settings: Settings
    run_id: str
    own_tasks: frozenset[str] = frozenset()
    retries: bool = True

    def prove(self, vm: Located) -> Proof:
        return prove(self.api, self.settings, vm, self.run_id)


def prove(api: Api, settings: Settings, guest: Located, run: Run | str) -> Proof:
    """Read configuration, status and pool of `guest` and judge. Never raises for a VM that is not ours.

    Raises PveError when the host cannot be asked: then nothing is proved either.
    """
    run_id = run if isinstance(run, str) else run.id
    name = pool_name(settings, run_id)
    return prove_where_it_is(
        api, guest, lambda node: _prove_at(api, settings, node, guest.vmid, run_id, name)
    )


def prove_where_it_is(api: Api, vm: Located, prove_at: Callable[[str], Proof]) -> Proof:
    """`prove_at(node)` on the node of the VM, which may have been moved. Raises PveError."""
    node = vm.node
    for _ in range(_MOVES):
        proof = replace(prove_at(node), node=node)
        if not proof.gone:
            return proof
        # No configuration on that node: the VM is gone only if it is on no other node either.
        current = node_of(api, vm.vmid)
        if current is None or current == node:
            return proof
        node = current
    raise PveError(f"VM {vm.vmid} was on another node at each of {_MOVES} searches, last on {node}")


def _prove_at(api: Api, settings: Settings, node: str, vmid: int, run_id: str, name: str) -> Proof:
    base = path_of(node, vmid)
    members = read_pool(api, name)
    try:
        # The configuration last: it is the most recent answer when the VM is stopped or deleted next.
        status = api.get(f"{base}/status/current")
        config = api.get(f"{base}/config", current=1)
    except GuestNotFound:
        return Proof(False, "there is no such VM", gone=True)
    except UnreadableAnswer as e:
        # `lock: destroyed`, or written by hand: pvesh refuses to print such a configuration.
        return Proof(False, f"its configuration is not readable: {e.text}")
    proof = judge(settings, vmid, run_id, config, status)
    if (
        proof.ok
        and members is not None
        and vmid in members.vmids
        and ("qemu", vmid, node) not in members.members
    ):
        members = read_pool(api, name)  # moved between the two answers
    if proof.ok and members is None:
        return replace(proof, ok=False, reason=f"the pool {name} does not exist")
    if proof.ok and members is not None and ("qemu", vmid, node) not in members.members:
        return replace(proof, ok=False, reason=f"it is not in the pool {name}", outside=True)
    return proof


def judge(settings: Settings, vmid: int, run_id: str, config: object, status: object) -> Proof:
    """The part of the proof that needs no host: every condition on configuration and status."""
    if not isinstance(config, dict) or not isinstance(status, dict):
        return Proof(False, "its configuration is not readable")
    lock = config.get("lock") or status.get("lock")
    marker_problem = _marker_problem(vmid, run_id, config)
    reason = marker_problem or _obstacle(settings, vmid, config, status)
    return Proof(
        not reason,
        reason,
        config_digest=str(config.get("digest") or ""),
        status=str(
            status.get("qmpstatus") if status.get("qmpstatus") == "paused" else status.get("status") or ""
        ),
        lock=str(lock) if lock else None,
        identity=uuid_of(config) or "",
        config=config,
        marked=not marker_problem,
    )


def _marker_problem(vmid: int, run_id: str, config: dict[str, Any]) -> str:
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


def _obstacle(settings: Settings, vmid: int, config: dict[str, Any], status: dict[str, Any]) -> str:
    """What forbids to destroy a VM although its marker is ours; empty if nothing does."""
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
    """A PVE boolean; everything but a plain no is a yes, also a value that is present and empty."""
    return value is None or cautious(value)


def in_range(settings: Settings, vmid: int) -> bool:
    return any(low <= vmid <= high for low, high in settings.vmid_ranges)


def name_matches(settings: Settings, name: object) -> bool:
    return isinstance(name, str) and any(fnmatch.fnmatchcase(name, p) for p in settings.name_patterns)
