"""The pool of a run, which holds its VMs and its lease.

Sources for what PVE does are recordings of PVE 9.2 (pools, clones, reused ids) made for this project.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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

from pytest_nestedpve.ownership.lease import Lease, LeaseLost, parse_lease

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
