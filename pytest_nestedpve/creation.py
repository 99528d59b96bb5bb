"""Making a VM that can be proved ours from its first moment: diskless, in the pool, with its marker."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership import TAG, Marker, new_uuid, parse_marker, pool_name, uuid_of
from pytest_nestedpve.pve.errors import AlreadyExists, GuestNotFound, NotFound, PveError
from pytest_nestedpve.pve.guests import create_diskless, guest_config, list_guests

if TYPE_CHECKING:
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.run import Run
    from pytest_nestedpve.settings import Settings

_TRIES = 20


class NoFreeId(PveError):
    """Every id of the range is taken."""


@dataclass(frozen=True)
class Created:
    """The VM that was made."""

    vmid: int
    node: str
    name: str
    uuid: str


def guest_name(settings: Settings, run: Run, role: str) -> str:
    """The name of the run's VM: the literal prefix of the first pattern, the role of a leaf, the run."""
    prefix = settings.name_patterns[0].split("*")[0].rstrip("-.")
    return f"{prefix}-leaf-{run.id}" if role == "leaf" else f"{prefix}-{run.id}"


def create_marked(
    host: PveHost,
    run: Run,
    settings: Settings,
    role: str = "nested",
    *,
    timeout: float = 120.0,
    **options: Any,
) -> Created:
    """Make the run's VM without disks: marker, uuid and pool at create, tags afterwards.

    Ids are drawn at random in the range, never one with volumes or one that stands in a pool. An error to
    a create is no proof that nothing was made (recorded under load): the configuration is read, our uuid
    means go on, another's means the next id. Raises NoFreeId, PveError.
    """
    name, node, pool = guest_name(settings, run, role), host.node, pool_name(settings, run)
    refused: PveError | None = None
    for vmid, _ in zip(_free_ids(host, settings), range(_TRIES), strict=False):
        uuid = new_uuid()
        marker = Marker(run.id, vmid, uuid, role)
        try:
            create_diskless(
                host.api,
                node,
                vmid,
                name=name,
                pool=pool,
                description=marker.to_text(),
                smbios1=f"uuid={uuid}",
                timeout=timeout,
                **options,
            )
        except AlreadyExists as e:
            refused = e
            if not _is_ours(host, vmid, marker):
                continue
        except PveError:
            if not _is_ours(host, vmid, marker):
                raise
        # Tags at create are refused to a token whose rights come from the pool alone.
        host.api.put(f"/nodes/{node}/qemu/{vmid}/config", tags=f"{TAG};{run.tag}")
        return Created(vmid, node, name, uuid)
    ranges = ",".join(f"{low}-{high}" for low, high in settings.vmid_ranges)
    raise NoFreeId(
        f"expected a free VM id in {ranges} on {host.name}, found none"
        + (f" ({refused})" if refused else "")
        + "; widen nested_pve_vmid_range, or clear orphans by `pytest --nested-destroy-only`"
    ) from refused


def _is_ours(host: PveHost, vmid: int, marker: Marker) -> bool:
    try:
        config = guest_config(host.api, host.node, vmid)
    except (GuestNotFound, NotFound):
        return False
    return uuid_of(config) == marker.uuid and parse_marker(config.get("description")) == marker


def _free_ids(host: PveHost, settings: Settings) -> Iterator[int]:
    taken = {guest.vmid for guest in list_guests(host.api)}
    for entry in host.api.get(f"/nodes/{host.node}/storage") or ():
        if "images" in str(entry.get("content", "")).split(",") and entry.get("active", 1):
            path = f"/nodes/{host.node}/storage/{entry['storage']}/content"
            for each in host.api.get(path, content="images"):
                taken.add(int(each.get("vmid") or 0))
    for pool in host.api.get("/pools") or ():
        found = host.api.get("/pools", poolid=pool["poolid"])
        taken |= {int(m["vmid"]) for e in found for m in e.get("members", ()) if m.get("vmid")}
    seen: set[int] = set()
    sizes = [high - low + 1 for low, high in settings.vmid_ranges]
    draw = random.SystemRandom()
    while len(seen) < sum(sizes):
        low, high = draw.choices(settings.vmid_ranges, weights=sizes)[0]
        vmid = draw.randint(low, high)
        if vmid not in seen and vmid not in taken:
            yield vmid
        seen.add(vmid)
        if len(seen) > 20_000:  # a range without bounds is full of free ids: enough were drawn
            return
