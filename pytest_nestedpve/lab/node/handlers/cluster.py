# ruff: noqa: ARG001 (every handler has the same signature)
"""/version and /cluster: status, resources, next id, tasks, options, HA resources, backup jobs."""

from __future__ import annotations

import re
from typing import Any

from ..api import access
from ..api.access import Caller
from ..api.errors import BadParameters, PveFailure
from ..api.tree import api
from ..state import broadcast, cluster_fs, guests, members, paths, reported, tasks
from ..state.store import store
from .nodes import task_row


@api("GET", "/version")
def version(caller: Caller, params: dict[str, Any]) -> Any:
    versions = {"version": paths.VERSION, "release": paths.RELEASE, "repoid": paths.REPOID}
    return versions | reported.of("version")


@api("GET", "/cluster/status")
def status(caller: Caller, params: dict[str, Any]) -> Any:
    """A stand-alone node has no `cluster` entry (facts 36)."""
    access.check(caller, "/", ["Sys.Audit"])
    rows: list[dict[str, Any]] = []
    nodes, name = members.every(), members.cluster()
    if name is not None:
        about: dict[str, Any] = {
            "id": "cluster",
            "name": name,
            "nodes": len(nodes),
            "quorate": 1,
            "version": len(nodes),
        }
        rows.append(about | {"type": "cluster"} | reported.of("cluster"))
    for member in nodes:
        row: dict[str, Any] = {"id": f"node/{member.name}", "name": member.name, "type": "node", "level": ""}
        row |= {"local": int(member.local), "nodeid": member.number, "online": int(member.online)}
        if ip := member.address or cluster_fs.address():
            row["ip"] = ip
        rows.append(row)
    return rows


@api("GET", "/cluster/resources")
def resources(caller: Caller, params: dict[str, Any]) -> Any:
    return broadcast.resources(caller, params.get("type"))


def guest_with_id(vmid: int) -> tuple[str, str] | None:
    """The kind ("VM" or "CT") and node of the guest with the id; None for a free id."""
    body = store().get("qemu", vmid)
    if body is not None:
        return "VM", str(body["node"])
    container = guests.containers().get(vmid)
    return ("CT", container["node"]) if container is not None else None


@api("GET", "/cluster/nextid")
def nextid(caller: Caller, params: dict[str, Any]) -> Any:
    if "vmid" in params:
        if existing := guest_with_id(int(params["vmid"])):
            raise BadParameters({"vmid": f"{existing[0]} {params['vmid']} already exists"})
        return str(params["vmid"])
    return str(next(vmid for vmid in range(100, 1_000_000) if not guest_with_id(vmid)))


@api("GET", "/cluster/tasks")
def cluster_tasks(caller: Caller, params: dict[str, Any]) -> Any:
    """Recent tasks; for a token those of its user, or all with Sys.Audit."""
    rows = []
    for task in tasks.everywhere()[:50]:
        if not caller.is_root and task.user != caller.user and not access.has(caller, "/", ["Sys.Audit"]):
            continue
        row = task_row(task)
        row.pop("pid"), row.pop("pstart")
        row["saved"] = "0" if task.running else "1"
        rows.append(row)
    return rows


@api("GET", "/cluster/options")
def options(caller: Caller, params: dict[str, Any]) -> Any:
    return {"allowed-tags": [], "description": "", "mac_prefix": "BC:24:11"}


@api("GET", "/cluster/replication")
def replication(caller: Caller, params: dict[str, Any]) -> Any:
    return [{"id": key, **body} for key, body in store().all("replication").items()]


@api("GET", "/cluster/backup")
def backup_jobs(caller: Caller, params: dict[str, Any]) -> Any:
    return [{"id": key, **body} for key, body in store().all("job").items()]


@api("POST", "/cluster/backup")
def add_backup_job(caller: Caller, params: dict[str, Any]) -> Any:
    """Add a job, for destroy --purge to edit; the lab never runs it."""
    name = params.pop("id", None) or f"backup-{len(store().all('job')):08x}"
    if store().get("job", name) is not None:
        raise PveFailure(f"Job '{name}' already exists")
    body = {"type": "vzdump", "enabled": 1, **params}
    store().put("job", name, body)


@api("DELETE", "/cluster/backup/{id}")
def drop_backup_job(caller: Caller, params: dict[str, Any]) -> Any:
    if not store().drop("job", params["id"]):
        raise BadParameters({"id": f"No such job '{params['id']}'"})


def _sid(text: str) -> str:
    return text if ":" in text else f"vm:{text}"


@api("GET", "/cluster/ha/resources")
def ha_resources(caller: Caller, params: dict[str, Any]) -> Any:
    return [{"sid": sid, **body} for sid, body in store().all("ha").items()]


@api("POST", "/cluster/ha/resources")
def add_ha(caller: Caller, params: dict[str, Any]) -> Any:
    sid = _sid(params["sid"])
    if store().get("qemu", sid.partition(":")[2]) is None:
        raise PveFailure(f"resource '{sid}' does not exist")
    if store().get("ha", sid) is not None:
        raise PveFailure(f"resource ID '{sid}' already defined")
    store().put("ha", sid, {"state": params.get("state", "started"), "type": "vm"})


@api("DELETE", "/cluster/ha/resources/{sid}")
def drop_ha(caller: Caller, params: dict[str, Any]) -> Any:
    sid = _sid(params["sid"])
    if not store().drop("ha", sid):
        raise PveFailure(f"cannot delete service '{sid}', not HA managed!")


@api("GET", "/cluster/ha/status/current")
def ha_status(caller: Caller, params: dict[str, Any]) -> Any:
    node = paths.node()
    return [
        {"id": "quorum", "node": node, "quorate": 1, "status": "OK", "type": "quorum"},
        {
            "armed-state": "standby",
            "id": "fencing",
            "node": node,
            "status": "standby (CRM watchdog standby)",
            "type": "fencing",
        },
    ]


def purge_references(vmid: int) -> None:
    """Remove the VM from backup jobs and HA, for destroy --purge."""
    with store().change() as db:
        for key, body in db.all("job").items():
            ids = [part for part in re.split(r"[,;\s]+", str(body.get("vmid", ""))) if part]
            if str(vmid) in ids:
                remaining = ",".join(part for part in ids if part != str(vmid))
                if remaining:
                    db.put("job", key, {**body, "vmid": remaining})
                else:
                    db.drop("job", key)
        db.drop("ha", f"vm:{vmid}")
