"""The pool of a run, which holds its VMs and its lease.

Sources for what PVE does are recordings of PVE 9.2 (pools, clones, reused ids) made for this project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership.lease import Lease, LeaseLost, parse_lease
from pytest_nestedpve.pve.answers import entries, shown
from pytest_nestedpve.pve.api import Api, patiently
from pytest_nestedpve.pve.errors import (
    AlreadyExists,
    ApiError,
    CommandTimeout,
    NotFound,
    PveError,
    SshError,
    UnreadableAnswer,
)
from pytest_nestedpve.pve.qemu import read_guest
from pytest_nestedpve.run.identity import HARD_LIMIT, Run

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost

# Pools are nested three deep at most; a parent may have any name that PVE allows.
_POOL = re.compile(r"(?:[A-Za-z0-9._-]+/){0,2}npve-([0-9a-f]{12})\Z")


def pool_name(settings: Settings, run: Run | str) -> str:
    """The run's pool, below `pool_parent` if that is set."""
    name = f"npve-{run if isinstance(run, str) else run.id}"
    return f"{settings.pool_parent}/{name}" if settings.pool_parent else name


def run_of_pool(pool: object) -> str | None:
    """The run that a pool belongs to by its name."""
    match = _POOL.match(pool) if isinstance(pool, str) else None
    return match[1] if match else None


def host_clock(host: PveHost) -> int:
    """Epoch seconds of the host's clock, read now. Raises PveError."""
    output = host.run(["date", "+%s"], timeout=20).stdout.strip()
    if not re.fullmatch(r"\d{9,12}", output):
        raise PveError(f"expected epoch seconds from `date +%s` on {host.name}, found {output[:60]!r}")
    return int(output)


@dataclass(frozen=True)
class Pool:
    """A pool as the host shows it; `members` are its guests (kind, vmid, node), without its storages."""

    id: str
    comment: str
    members: tuple[tuple[str, int, str], ...]

    @property
    def vmids(self) -> frozenset[int]:
        return frozenset(vmid for _, vmid, _ in self.members)


def read_pool(api: Api, pool: str) -> Pool | None:
    """The pool, or None when there is none. Raises PveError.

    `/pools?poolid=` is current and the only form that works for nested pools. Unreadable members are left
    out.
    """
    try:
        answer = api.get("/pools", poolid=pool)
    except NotFound as error:
        if f"pool '{pool}' does not exist" not in error.text:
            raise
        return None
    pools = [entry for entry in entries(answer, call="get /pools") if entry.get("poolid") == pool]
    if not pools:
        # A pool that does not exist is an error (recorded); this answer is about something else.
        raise UnreadableAnswer(f"expected the pool {pool}, found {shown(answer)}", call="get /pools")
    listed = pools[0].get("members")
    guests = [read_guest(entry) for entry in entries([] if listed is None else listed, call="get /pools")]
    members = tuple((guest.kind, guest.vmid, guest.node) for guest in guests if guest is not None)
    comment = pools[0].get("comment")
    return Pool(pool, comment if isinstance(comment, str) else "", members)


def create_pool(api: Api, run: Run, settings: Settings, now: int) -> Lease:
    """Create the run's pool with its lease, from `now` on (the host's clock). Raises PveError.

    After a lost reply the comment is read: with our session's nonce in it, the pool is ours.
    """
    lease = Lease(
        run.owner, run.client, run.session, "live", now, now + int(settings.lease), now + HARD_LIMIT
    )
    name = pool_name(settings, run)
    try:
        patiently(lambda: api.post("/pools", poolid=name, comment=lease.to_text()))
    except (AlreadyExists, SshError, CommandTimeout):
        pool = read_pool(api, name)
        ours = parse_lease(pool.comment) if pool else None
        if ours is None or ours.session != run.session:
            raise
        return ours
    except ApiError as e:
        if settings.pool_parent and "does not exist" in e.text:
            raise NotFound(
                f"{e.text}; pool_parent names the pool {settings.pool_parent!r}: create it, or name another",
                call=e.call,
                rc=e.rc,
            ) from e
        raise
    return lease


def remove_pool(api: Api, name: str) -> None:
    """Remove an empty pool; no error if none exists afterwards, whatever PVE answered. Raises PveError."""
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

    `seconds` from `now` (default: the setting), never beyond the hard limit of its creation.
    """
    name = pool_name(settings, run)
    pool = read_pool(api, name)
    if pool is None:
        raise LeaseLost(
            f"the pool {name} of this run is gone: a clean-up removed it; nothing more is created"
        )
    lease = parse_lease(pool.comment)
    if lease is None or lease.session != run.session:
        state_now = "is unreadable" if lease is None else f"is now that of {lease.owner}"
        raise LeaseLost(f"the lease in pool {name} {state_now}; nothing more is created")
    if now > lease.hard:
        raise LeaseLost(f"the hard limit of run {run.id} has passed; nothing more is created")
    length = int(settings.lease if seconds is None else seconds)
    lease = replace(lease, expires=min(now + length, lease.hard), state=state or lease.state)
    patiently(lambda: api.put("/pools", poolid=name, comment=lease.to_text()))
    return lease
