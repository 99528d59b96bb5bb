"""Creation of the nested VM as a clone of a template: in the run's pool, marked at once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership.create import Created, NoFreeId, free_ids, guest_name
from pytest_nestedpve.ownership.marker import TAG, Marker, new_uuid
from pytest_nestedpve.ownership.pool import pool_name
from pytest_nestedpve.pve.answers import text
from pytest_nestedpve.pve.api import call_limit, patiently
from pytest_nestedpve.pve.errors import AlreadyExists, ApiError, TaskFailed
from pytest_nestedpve.pve.storage import vm_can
from pytest_nestedpve.pve.tasks import wait_task

if TYPE_CHECKING:
    from typing import Any

    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.run.identity import Run

CLONE_LIMIT = 900.0
_TRIES = 10


def clone_marked(
    host: PveHost,
    run: Run,
    settings: Settings,
    template: int,
    *,
    role: str = "nested",
    storage: str | None,
    format: str | None = None,
    source: str | None = None,
) -> Created:
    """Clone `template`: linked where its storage can, else a full copy on `storage`, in `format` if given.

    `source` is the node that the template is on; None: that of `host`, on which the clone is created.
    A clone copies description, tags and protection of its template (recordings of PVE 9.2): the description
    is a parameter of the call; tags, protection and the uuid of the marker are set afterwards, because PVE
    generates a new uuid for each clone. Raises NoFreeId, PveError.
    """
    name, node = guest_name(settings, run, role), host.node
    source = source or node
    # Checked first: a linked clone that is refused in its task leaves a failed task.
    full = vm_can(host.api, source, template, "clone") is False
    copy = {"full": True, "storage": storage, "format": format}
    for vmid, _ in zip(free_ids(host, settings), range(_TRIES), strict=False):
        marker = Marker(run.id, vmid, new_uuid(), role)
        call: dict[str, Any] = {
            "newid": vmid, "name": name, "pool": pool_name(settings, run), "description": marker.to_text(),
            "target": node if node != source else None,
        }  # fmt: skip
        for _attempt in (1, 2):
            try:
                _clone(host, source, template, call | (copy if full else {}))
                break
            except ApiError as e:
                reason = e.reason if isinstance(e, TaskFailed) else e
                if isinstance(reason, AlreadyExists):
                    vmid = 0
                    break
                if full or "linked clone" not in str(e).lower():
                    raise
                full = True
        if not vmid:
            continue
        path = f"/nodes/{node}/qemu/{vmid}/config"
        options = {"smbios1": f"uuid={marker.uuid}", "tags": f"{TAG};{run.tag}", "protection": 0, "onboot": 0}
        patiently(partial(host.api.put, path, **options))
        return Created(vmid, node, name, marker.uuid)
    raise NoFreeId(
        f"expected a free VM id on {host.name} for a clone of {template}, found none in the range; destroy "
        "leftovers with `pytest --nested-destroy-only`, or widen nested_pve_vmid_range"
    )


def _clone(host: PveHost, node: str, template: int, call: dict[str, Any]) -> None:
    with call_limit(CLONE_LIMIT):
        upid = text(patiently(lambda: host.api.post(f"/nodes/{node}/qemu/{template}/clone", **call)))
        if upid:
            wait_task(host.api, upid, timeout=CLONE_LIMIT)
