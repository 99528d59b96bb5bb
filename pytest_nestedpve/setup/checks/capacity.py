"""Checks of cores, memory, free VM ids and the parent pool."""

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
    from pytest_nestedpve.setup.checks.context import Context

GIB = 1024**3
MIB = 1024**2
# Free ids of larger ranges are not counted: one is enough.
_COUNTED = 20_000


def cores(context: Context) -> Iterator[Finding]:
    """Check that the node has the configured cores: PVE starts no VM with more."""
    existing = whole(mapping(context.status.get("cpuinfo", {})).get("cpus"))
    cores = context.settings.cores
    if existing is None:
        return
    if cores <= existing:
        yield fine("cores", f"{existing} on {context.host.node}; {cores} for a nested PVE")
        return
    yield Finding(
        "cores", f"at least {cores} ({context.settings.origin('cores')}) on {context.host.node}",
        str(existing), "Set nested_pve_cores to fewer.",
        fix=(context.pytest("-o", f"nested_pve_cores={existing}"),), local_fix=True,
    )  # fmt: skip


def memory(context: Context) -> Iterator[Finding]:
    """Check that the nested PVEs of all workers fit into the memory of the node.

    More than the node's total is an error. More than is available is a warning: caches shrink (ZFS reports
    them as used), and QEMU allocates memory only when its guest uses it.
    """
    settings, node = context.settings, context.host.node
    answer = mapping(context.status.get("memory"))
    total = whole(answer.get("total"))
    available = whole(answer.get("available", answer.get("free")))
    if total is None or available is None:
        yield Finding(
            "memory", _gib(settings.memory * MIB), f"{node} does not report its memory", level=WARNING
        )
        return
    per_vm = settings.memory * MIB
    running = [
        guest for guest in context.guests if _runs_for(guest, context.begun) and guest.get("node") == node
    ]
    # Running VMs of this session still need the part of their memory that they do not use yet.
    remaining = max(0, context.workers - len(running)) * per_vm + sum(_unused_memory(vm) for vm in running)
    needed = max(context.workers * per_vm, remaining)
    expected = f"{_gib(per_vm)} for a nested PVE"
    if context.workers > 1:
        expected = f"{_gib(needed)} for {context.workers} workers, {expected} each"
    if running:
        expected += f"; {len(running)} already running, {_gib(remaining)} still needed"
    if needed <= total and remaining <= available:
        yield fine("memory", f"{_gib(available)} of {_gib(total)} available on {node}; {expected}")
        return
    fitting = min(total, available) // per_vm
    yield Finding(
        "memory",
        expected,
        f"{_gib(available)} available of {_gib(total)} on {node}",
        _advice(context.workers, fitting, settings),
        fix=(_fitting_command(context, fitting, min(total, available)),),
        local_fix=True,
        **({} if needed > total else {"level": WARNING}),
    )


def _advice(workers: int, fitting: int, settings: Settings) -> str:
    if workers == 1:
        return "Stop other guests of the node, or set nested_pve_memory to less."
    count = f"{fitting} fit{'s' * (fitting == 1)}" if fitting else "None fits"
    return (
        f"{count} now: start fewer workers, share one nested PVE (nested_pve_scope = run), or set "
        f"nested_pve_memory to less ({settings.origin('memory')})."
    )


def _fitting_command(context: Context, fitting: int, available: int) -> str:
    if context.workers > 1 and fitting > 1:
        return context.pytest("-n", str(fitting))
    if context.workers > 1 and fitting == 1:
        return context.pytest("-n", str(context.workers), "-o", "nested_pve_scope=run")
    return context.pytest("-o", f"nested_pve_memory={max(2048, available // MIB // 1024 * 1024)}")


def _runs_for(guest: dict[str, Any], runs: frozenset[str]) -> bool:
    pool = (text(guest.get("pool")) or "").rpartition("/")[2]
    return guest.get("status") == "running" and pool.removeprefix("npve-") in runs


def _unused_memory(guest: dict[str, Any]) -> int:
    return max(0, (whole(guest.get("maxmem")) or 0) - (whole(guest.get("mem")) or 0))


def _gib(size: float) -> str:
    return f"{round(size / GIB, 1):g} GiB"


def ids(context: Context) -> Iterator[Finding]:
    """Check that the configured range has a free id."""
    settings = context.settings
    size = sum(high - low + 1 for low, high in settings.vmid_ranges)
    ranges = "any" if settings.any_id else ", ".join(f"{low}-{high}" for low, high in settings.vmid_ranges)
    where = f"{ranges} ({settings.origin('vmid_range')})"
    count = sum(1 for _ in islice(free_ids(context.host, settings), _COUNTED if size <= _COUNTED else 1))
    if count:
        free = f"{count} of {size} free" if size <= _COUNTED else "ids are free"
        context.choose(f"selected at random in {where}; {free}", vmid="a free one")
        yield fine("VM id", f"{free} in {where}")
        return
    yield Finding(
        "VM id", f"a free id in {where}",
        "all of them are in use: by guests, by volumes on a storage, or in a pool",
        "List leftovers of earlier runs, or set another nested_pve_vmid_range.",
        fix=(context.pytest("--nested-destroy-only", "--nested-dry-run"),), local_fix=True,
    )  # fmt: skip


def pool_parent(context: Context) -> Iterator[Finding]:
    """Check that the configured parent of the runs' pools exists."""
    settings, parent = context.settings, context.settings.pool_parent
    if parent is None:
        return
    if read_pool(context.host.api, parent) is not None:
        yield fine("pool", f"{parent} ({settings.origin('pool_parent')})")
        return
    yield Finding(
        "pool", f"the pool {parent!r} ({settings.origin('pool_parent')})", "no such pool",
        "Create it, or leave nested_pve_pool_parent out.",
        fix=(shlex.join(["pveum", "pool", "add", parent]),),
    )  # fmt: skip
