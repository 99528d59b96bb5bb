"""/cluster/resources: the last broadcast of pvestatd, up to ten seconds old (facts 16, 56).

A VM created since has no name and status "unknown"; a reused VM id shows the destroyed VM's values.
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
OLD = 120.0  # seconds without a broadcast after which every status is "unknown"


def tick() -> None:
    """Store one broadcast of this node: its status and that of its guests and storages."""
    db = store()
    rows = {}
    for guest in guests.every():
        status = guests.status(guest, full=False)
        if guests.paused(guest.vmid):
            status["status"] = "paused"
        rows[str(guest.vmid)] = {
            "maxcpu": status["cpus"],
            "diskread": 0,
            "diskwrite": 0,
            "template": 1 if guest.template else 0,
            **{k: status[k] for k in ("cpu", "disk", "maxdisk", "maxmem", "mem", "memhost", "name")},
            **{k: status[k] for k in ("netin", "netout", "status", "uptime")},
        }
    spaces = {}
    for name, about in volumes.storages().items():
        if str(about.get("disable", "0")) != "1" and paths.node() in volumes.nodes(name):
            with contextlib.suppress(OSError):
                total, used, _ = volumes.usage(name)
                spaces[name] = {"maxdisk": total, "disk": used}
    message = {"time": clock.now(), "node": vitals.row(), "guests": rows, "storages": spaces}
    db.put("broadcast", paths.node(), message)


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
    """The last broadcasts of all nodes: guests by VM id, node rows and storages by node name."""
    merged: dict[str, Any] = {"guests": {}, "storages": {}, "nodes": {}}
    for node, message in sorted(store().all("broadcast").items(), key=lambda entry: float(entry[1]["time"])):
        if clock.now() - message["time"] <= OLD:
            merged["guests"] |= message["guests"]
            merged["storages"][node] = message["storages"]
        merged["nodes"][node] = message["node"]
    return merged


def resources(caller: Caller, only: str | None) -> list[dict[str, Any]]:
    broadcasts = last()
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
                rows.append(guest_row(guest.vmid, guest.node, guest.conf, broadcasts))
        for vmid, body in guests.containers().items():
            if may(f"/vms/{vmid}", "VM.Audit"):
                rows.append(container_row(vmid, body))
    if only in (None, "node"):
        rows += node_rows(caller)
    if only in (None, "storage"):
        for name, about in volumes.storages().items():
            if may(f"/storage/{name}", "Datastore.Audit", "Datastore.AllocateSpace"):
                rows += [_storage_row(node, name, about, broadcasts) for node in volumes.nodes(name)]
    if only in (None, "network") and may("/sdn/zones/localnetwork", "SDN.Audit"):
        rows += [
            {
                "id": f"network/{member.name}/zone/localnetwork",
                "network": "localnetwork",
                "network-type": "zone",
                "node": member.name,
                "status": "ok",
                "type": "network",
            }
            for member in members.every()
        ]
    return rows


def node_rows(caller: Caller) -> list[dict[str, Any]]:
    """The nodes in /cluster/resources and /nodes: other nodes by their last broadcast; without Sys.Audit only
    name and status [ownA-004]."""
    broadcast, rows = last()["nodes"], []
    for node in members.every():
        row: dict[str, Any] = {"cgroup-mode": 2, "id": f"node/{node.name}", "level": "", "node": node.name}
        row |= {"status": "online" if node.online else "offline", "type": "node"}
        if caller.is_root or access.has(caller, f"/nodes/{node.name}", ["Sys.Audit"]):
            known = vitals.row() if node.local else broadcast.get(node.name, {})
            shown_keys = known if node.online else [key for key in known if key.startswith("max")]
            row |= {key: known[key] for key in shown_keys}
        rows.append(row)
    return rows


def container_row(vmid: int, body: dict[str, Any]) -> dict[str, Any]:
    row = {"id": f"lxc/{vmid}", "node": body["node"], "type": "lxc", "vmid": vmid, "status": "stopped"}
    row |= {"name": body.get("hostname", f"CT{vmid}"), "template": 0, "uptime": 0}
    row |= {key: body[key] for key in ("lock", "tags") if key in body}
    if (pool := store().pool_of(vmid)) is not None:
        row["pool"] = pool
    return row


def _storage_row(node: str, name: str, about: dict[str, Any], broadcasts: dict[str, Any]) -> dict[str, Any]:
    space = broadcasts["storages"].get(node, {})
    row: dict[str, Any] = {
        "content": about.get("content", ""),
        "id": f"storage/{node}/{name}",
        "node": node,
        "plugintype": about["type"],
        "shared": int(about.get("shared", 0)),
        "status": "available" if name in space else "unknown",
        "storage": name,
        "type": "storage",
    }
    row |= space.get(name, {})
    return row


def serve() -> int:
    """pvestatd.service: broadcast until SIGTERM or SIGINT."""
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
