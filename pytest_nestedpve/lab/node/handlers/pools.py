# ruff: noqa: ARG001 (every handler has the same signature)
"""/pools, both forms. A destroy removes the membership; an id without a VM can be added (facts 53)."""

from __future__ import annotations

import re
from typing import Any

from ..api import access
from ..api.access import Caller
from ..api.errors import NotAllowed, PveFailure
from ..api.tree import api
from ..state import broadcast, guests, volumes
from ..state.store import store
from .cluster import guest_with_id


def exists(pool: str) -> bool:
    return store().get("pool", pool) is not None


def require(pool: str) -> None:
    """Raise the error of create and clone for a missing pool."""
    if not exists(pool):
        raise NotAllowed(f"pool '{pool}' does not exist", rc=2)


def add_guest(pool: str, vmid: int) -> None:
    with store().change() as db:
        if db.get("pool", pool) is not None:
            db.run("INSERT OR REPLACE INTO member VALUES (?, ?)", vmid, pool)
    _render()


def remove_guest(vmid: int) -> None:
    """Remove a destroyed guest from its pool, with its ACLs (facts 23)."""
    with store().change() as db:
        db.run("DELETE FROM member WHERE vmid=?", vmid)
        db.run("DELETE FROM acl WHERE path=?", f"/vms/{vmid}")
    _render()


def _render() -> None:
    from .users import render

    render()


def _members(pool: str, only: str | None) -> list[dict[str, Any]]:
    """Existing members, as rows of /cluster/resources without the pool."""
    broadcasts, containers, rows = broadcast.last(), guests.containers(), []
    for vmid in store().members(pool):
        body = store().get("qemu", vmid)
        if body is not None and only in (None, "qemu"):
            row = broadcast.guest_row(vmid, body["node"], body["conf"], broadcasts)
            row.pop("pool", None)
            rows.append(row)
        container = containers.get(vmid)
        if container is not None and only in (None, "lxc"):
            rows.append(broadcast.container_row(vmid, container))
    for name in (store().get("pool", pool) or {}).get("storages", []):
        if only in (None, "storage"):
            rows += [row for row in broadcast.resources(access.ROOT, "storage") if row["storage"] == name]
    return rows


def _description(pool: str) -> dict[str, Any]:
    comment = (store().get("pool", pool) or {}).get("comment", "")
    return {"comment": comment, "poolid": pool} if comment else {"poolid": pool}


@api("GET", "/pools")
def index(caller: Caller, params: dict[str, Any]) -> Any:
    """All pools, or with `poolid` one: any caller reads comment and members (facts 57)."""
    if "poolid" in params:
        pool = params["poolid"]
        if not exists(pool):
            raise PveFailure(f"pool '{pool}' does not exist")
        return [_description(pool) | {"members": _members(pool, params.get("type"))}]
    return [
        _description(pool)
        for pool in store().all("pool")
        if caller.is_root or access.has(caller, f"/pool/{pool}", ["Pool.Audit"])
    ]


@api("GET", "/pools/{poolid}")
def read(caller: Caller, params: dict[str, Any]) -> Any:
    pool = params["poolid"]
    if not exists(pool):
        raise PveFailure(f"pool '{pool}' does not exist")
    return _description(pool) | {"members": _members(pool, params.get("type"))}


@api("POST", "/pools")
def create(caller: Caller, params: dict[str, Any]) -> Any:
    pool = params["poolid"]
    if not re.match("[A-Za-z]", pool):
        raise PveFailure("create pool failed: pool name must start with a letter")
    with store().change() as db:
        if db.get("pool", pool) is not None:
            raise PveFailure(f"create pool failed: pool '{pool}' already exists")
        parent = pool.rpartition("/")[0]
        if parent and db.get("pool", parent) is None:
            raise PveFailure(f"create pool failed: parent '{parent}' of pool '{pool}' does not exist")
        db.put("pool", pool, {"comment": params.get("comment", ""), "storages": []})
    _render()


@api("PUT", "/pools")
def update(caller: Caller, params: dict[str, Any]) -> Any:
    pool = params["poolid"]
    with store().change() as db:
        body = db.get("pool", pool)
        if body is None:
            raise PveFailure(f"update pools failed: pool '{pool}' does not exist")
        if "comment" in params:
            body["comment"] = params["comment"]
        for vmid in map(int, filter(None, re.split(r"[,;\s]+", params.get("vms", "")))):
            try:
                access.check(caller, f"/vms/{vmid}", ["Permissions.Modify", "VM.Allocate"], any_of=True)
            except NotAllowed as e:
                raise PveFailure(f"update pools failed: 403 {e.text}") from e
            current = db.pool_of(vmid)
            if params.get("delete") == "1":
                if current != pool:
                    raise PveFailure(f"update pools failed: VM {vmid} is not a pool member")
                db.run("DELETE FROM member WHERE vmid=?", vmid)
            elif current == pool:
                raise PveFailure(f"update pools failed: VM {vmid} is already a pool member")
            elif current is not None and params.get("allow-move") != "1":
                raise PveFailure(
                    f"update pools failed: VM {vmid} belongs already to pool '{current}'"
                    " and 'allow-move' is not set"
                )
            else:
                db.run("INSERT OR REPLACE INTO member VALUES (?, ?)", vmid, pool)
        for name in filter(None, re.split(r"[,;\s]+", params.get("storage", ""))):
            volumes.storage(name)
            if params.get("delete") == "1":
                body["storages"] = [other for other in body["storages"] if other != name]
            elif name not in body["storages"]:
                body["storages"].append(name)
        db.put("pool", pool, body)
    _render()


@api("PUT", "/pools/{poolid}")
def update_by_path(caller: Caller, params: dict[str, Any]) -> Any:
    update(caller, params)


@api("DELETE", "/pools")
def delete(caller: Caller, params: dict[str, Any]) -> Any:
    pool = params["poolid"]
    with store().change() as db:
        body = db.get("pool", pool)
        if body is None:
            raise PveFailure(f"delete pool failed: pool '{pool}' does not exist")
        # An id without a VM does not count [ownB-062].
        existing = [vmid for vmid in db.members(pool) if guest_with_id(vmid)]
        if existing:
            raise PveFailure(f"delete pool failed: pool '{pool}' is not empty (contains VM {existing[0]})")
        if body["storages"]:
            raise PveFailure(
                f"delete pool failed: pool '{pool}' is not empty (contains storage '{body['storages'][0]}')"
            )
        below = [other for other in db.all("pool") if other.startswith(pool + "/")]
        if below:
            raise PveFailure(f"delete pool failed: pool '{pool}' is not empty (contains pool '{below[0]}')")
        db.run("DELETE FROM member WHERE pool=?", pool)
        db.run("DELETE FROM acl WHERE path=?", f"/pool/{pool}")
        db.drop("pool", pool)
    _render()


@api("DELETE", "/pools/{poolid}")
def delete_by_path(caller: Caller, params: dict[str, Any]) -> Any:
    delete(caller, params)
