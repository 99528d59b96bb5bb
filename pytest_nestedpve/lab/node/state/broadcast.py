"""/cluster/resources: what pvestatd last broadcast, every ten seconds, not what is (facts 16, 56).

A VM made since has no name and status "unknown"; a VM of an id used before shows the dead one's.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from typing import Any

from ..api import access
from ..api.access import Caller
from . import clock, cluster_fs, guests, members, paths, vitals, volumes
from .store import store

CYCLE = 10.0
OLD = 120.0  # after that without a broadcast everything is "unknown"


def tick() -> None:
    """One broadcast of this node: what it and its guests are now."""
    db = store()
    rows = {}
    for guest in guests.every():
        now = guests.status(guest, full=False)
        if guests.paused(guest.vmid):
            now["status"] = "paused"
        rows[str(guest.vmid)] = {
            "maxcpu": now["cpus"],
            "diskread": 0,
            "diskwrite": 0,
            "template": 1 if guest.template else 0,
            **{k: now[k] for k in ("cpu", "disk", "maxdisk", "maxmem", "mem", "memhost", "name")},
            **{k: now[k] for k in ("netin", "netout", "status", "uptime")},
        }
    spaces = {}
    for name, about in volumes.storages().items():
        if str(about.get("disable", "0")) != "1" and paths.node() in volumes.nodes(name):
            with contextlib.suppress(OSError):
                total, used, _ = volumes.usage(name)
                spaces[name] = {"maxdisk": total, "disk": used}
    told = {"time": clock.now(), "node": vitals.row(), "guests": rows, "storages": spaces}
    db.put("broadcast", paths.node(), told)


def guest_row(vmid: int, node: str, conf: dict[str, str], last: dict[str, Any]) -> dict[str, Any]:
    """The row of a guest in /cluster/resources and among a pool's members."""
    row: dict[str, Any] = {"id": f"qemu/{vmid}", "node": node, "type": "qemu", "vmid": vmid}
    row |= last["guests"].get(str(vmid), {"status": "unknown"})
    for key in ("lock", "tags"):
        if conf.get(key):
            row[key] = conf[key]
    if (pool := store().pool_of(vmid)) is not None:
        row["pool"] = pool
    return row


def last() -> dict[str, Any]:
    """What the nodes told last: of guests by their id, of nodes and each one's storages by the node."""
    told: dict[str, Any] = {"guests": {}, "storages": {}, "nodes": {}}
    for node, found in sorted(store().all("broadcast").items(), key=lambda each: float(each[1]["time"])):
        if clock.now() - found["time"] <= OLD:
            told["guests"] |= found["guests"]
            told["storages"][node] = found["storages"]
        told["nodes"][node] = found["node"]
    return told


def resources(caller: Caller, only: str | None) -> list[dict[str, Any]]:
    seen = last()
    rows: list[dict[str, Any]] = []

    def may(path: str, *privs: str) -> bool:
        return caller.is_root or access.has(caller, path, privs, any_of=True)

    if only is None:
        for pool in store().all("pool"):
            if may(f"/pool/{pool}", "Pool.Audit"):
                rows.append({"id": f"/pool/{pool}", "pool": pool, "type": "pool"})
    if only in (None, "vm"):
        for guest in guests.everywhere():
            if may(f"/vms/{guest.vmid}", "VM.Audit"):
                rows.append(guest_row(guest.vmid, guest.node, guest.conf, seen))
        for vmid, body in guests.containers().items():
            if may(f"/vms/{vmid}", "VM.Audit"):
                rows.append(container_row(vmid, body))
    if only in (None, "node"):
        rows += node_rows(caller)
    if only in (None, "storage"):
        for name, about in volumes.storages().items():
            if may(f"/storage/{name}", "Datastore.Audit", "Datastore.AllocateSpace"):
                rows += [_storage_row(node, name, about, seen) for node in volumes.nodes(name)]
    if only in (None, "network") and may("/sdn/zones/localnetwork", "SDN.Audit"):
        rows += [
            {
                "id": f"network/{each.name}/zone/localnetwork",
                "network": "localnetwork",
                "network-type": "zone",
                "node": each.name,
                "status": "ok",
                "type": "network",
            }
            for each in members.every()
        ]
    return rows


def node_rows(caller: Caller) -> list[dict[str, Any]]:
    """The nodes in /cluster/resources and /nodes, another one as it told last; without Sys.Audit only that
    they are there [ownA-004]."""
    told, rows = last()["nodes"], []
    for each in members.every():
        row: dict[str, Any] = {"cgroup-mode": 2, "id": f"node/{each.name}", "level": "", "node": each.name}
        row |= {"status": "online" if each.online else "offline", "type": "node"}
        if caller.is_root or access.has(caller, f"/nodes/{each.name}", ["Sys.Audit"]):
            known = vitals.row() if each.local else told.get(each.name, {})
            kept = known if each.online else [key for key in known if key.startswith("max")]
            row |= {key: known[key] for key in kept}
        rows.append(row)
    return rows


def container_row(vmid: int, body: dict[str, Any]) -> dict[str, Any]:
    row = {"id": f"lxc/{vmid}", "node": body["node"], "type": "lxc", "vmid": vmid, "status": "stopped"}
    row |= {"name": body.get("hostname", f"CT{vmid}"), "template": 0, "uptime": 0}
    row |= {key: body[key] for key in ("lock", "tags") if key in body}
    if (pool := store().pool_of(vmid)) is not None:
        row["pool"] = pool
    return row


def _storage_row(node: str, name: str, about: dict[str, Any], seen: dict[str, Any]) -> dict[str, Any]:
    told = seen["storages"].get(node, {})
    row: dict[str, Any] = {
        "content": about.get("content", ""),
        "id": f"storage/{node}/{name}",
        "node": node,
        "plugintype": about["type"],
        "shared": int(about.get("shared", 0)),
        "status": "available" if name in told else "unknown",
        "storage": name,
        "type": "storage",
    }
    row |= told.get(name, {})
    return row


def serve() -> int:
    """pvestatd.service: broadcast until told to end."""
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    while True:
        if cluster_fs.is_up():
            try:
                tick()
            except Exception as e:
                print(f"status update error: {e}", file=sys.stderr, flush=True)
        if signal.sigtimedwait(stop, CYCLE) is not None:
            return 0


if __name__ == "__main__":
    sys.exit(serve())
