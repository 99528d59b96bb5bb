"""What guests take of a host: memory, ids, and the pool above theirs."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.create import free_ids
from pytest_nestedpve.ownership.pool import read_pool
from pytest_nestedpve.pve.answers import mapping, text, whole
from pytest_nestedpve.setup.checks.finding import WARNING, Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.setup.checks.context import Seen

GIB = 1024**3
MIB = 1024**2
# Of larger ranges it is enough to know that something is free.
_COUNTED = 20_000


def cores(seen: Seen) -> Iterator[Finding]:
    """PVE starts no VM with more cores than its node has."""
    there = whole(mapping(seen.status.get("cpuinfo", {})).get("cpus"))
    wanted = seen.settings.cores
    if there is None:
        return
    if wanted <= there:
        yield fine("cores", f"{there} on {seen.host.node}; {wanted} for a nested PVE")
        return
    yield Finding(
        "cores", f"at least {wanted} ({seen.settings.origin('cores')}) on {seen.host.node}", str(there),
        "Give the nested PVE fewer.", fix=(seen.pytest("-o", f"nested_pve_cores={there}"),), here=True,
    )  # fmt: skip


def memory(seen: Seen) -> Iterator[Finding]:
    """Whether all nested PVEs that there will be fit into the node, beside what runs there now.

    More than the node has at all cannot be; more than is available now is a warning: caches give way
    (ZFS says that they are used), and QEMU takes memory only as its guest touches it.
    """
    settings, node = seen.settings, seen.host.node
    found = mapping(seen.status.get("memory"))
    total = whole(found.get("total"))
    available = whole(found.get("available", found.get("free")))
    if total is None or available is None:
        yield Finding("memory", f"{_gib(settings.memory * MIB)}", f"{node} does not say", level=WARNING)
        return
    each = settings.memory * MIB
    begun = [guest for guest in seen.guests if _is_own(guest, seen.own) and guest.get("node") == node]
    more = max(0, seen.workers - len(begun))
    # Of those that run already the rest of what they were given.
    coming = more * each + sum(_still_to_come(guest) for guest in begun)
    whole_need = max(seen.workers * each, coming)
    one = f"{_gib(each)} for a nested PVE"
    what = one if seen.workers == 1 else f"{_gib(whole_need)} for {seen.workers} workers, {one} each"
    if begun:
        what += f"; {len(begun)} run{'s' * (len(begun) == 1)} already, {_gib(coming)} still to come"
    if whole_need <= total and coming <= available:
        yield fine("memory", f"{_gib(available)} of {_gib(total)} available on {node}; {what}")
        return
    fits = min(total // each, available // each)
    yield Finding(
        "memory",
        what,
        f"{_gib(available)} available of {_gib(total)} on {node}",
        _less(seen.workers, fits, settings),
        fix=(_smaller(seen, fits, min(total, available)),),
        here=True,
        **({} if whole_need > total else {"level": WARNING}),
    )


def _less(workers: int, fits: int, settings: Settings) -> str:
    if workers == 1:
        return "Stop other guests there, or give the nested PVE less (nested_pve_memory)."
    least = f"{fits} fit{'s' * (fits == 1)} as things are" if fits else "None fits as things are"
    where = settings.origin("memory")
    return (
        f"{least}: start fewer workers, share one nested PVE (nested_pve_scope = run), or give each less "
        f"(nested_pve_memory; {where})."
    )


def _smaller(seen: Seen, fits: int, room: int) -> str:
    if seen.workers > 1 and fits > 1:
        return seen.pytest("-n", str(fits))
    if seen.workers > 1 and fits == 1:
        return seen.pytest("-n", str(seen.workers), "-o", "nested_pve_scope=run")
    return seen.pytest("-o", f"nested_pve_memory={max(2048, room // MIB // 1024 * 1024)}")


def _is_own(guest: dict[str, Any], runs: frozenset[str]) -> bool:
    pool = (text(guest.get("pool")) or "").rpartition("/")[2]
    return guest.get("status") == "running" and pool.removeprefix("npve-") in runs


def _still_to_come(guest: dict[str, Any]) -> int:
    return max(0, (whole(guest.get("maxmem")) or 0) - (whole(guest.get("mem")) or 0))


def _gib(size: float) -> str:
    return f"{round(size / GIB, 1):g} GiB"


def ids(seen: Seen) -> Iterator[Finding]:
    """A free id in the range for each nested PVE."""
    settings = seen.settings
    size = sum(high - low + 1 for low, high in settings.vmid_ranges)
    ranges = "any" if settings.any_id else ", ".join(f"{low}-{high}" for low, high in settings.vmid_ranges)
    where = f"{ranges} ({settings.origin('vmid_range')})"
    count = sum(1 for _ in islice(free_ids(seen.host, settings), _COUNTED if size <= _COUNTED else 1))
    if count:
        shown = f"{count} of {size} free" if size <= _COUNTED else "ids are free"
        seen.choose(f"drawn at random in {where}; {shown}", vmid="a free one")
        yield fine("VM id", f"{shown} in {where}")
        return
    yield Finding(
        "VM id", f"a free id in {where}",
        "all of them are taken: by guests, by volumes on a storage, or in a pool",
        "See what earlier runs left, or set another nested_pve_vmid_range.",
        fix=(seen.pytest("--nested-destroy-only", "--nested-dry-run"),), here=True,
    )  # fmt: skip


def pool_parent(seen: Seen) -> Iterator[Finding]:
    """The pool that each run makes its own in."""
    settings, parent = seen.settings, seen.settings.pool_parent
    if parent is None:
        return
    if read_pool(seen.host.api, parent) is not None:
        yield fine("pool", f"{parent} ({settings.origin('pool_parent')})")
        return
    yield Finding(
        "pool", f"the pool {parent!r} ({settings.origin('pool_parent')})", "no such pool",
        "Make it, or leave nested_pve_pool_parent out.", fix=(shlex.join(["pveum", "pool", "add", parent]),),
    )  # fmt: skip
