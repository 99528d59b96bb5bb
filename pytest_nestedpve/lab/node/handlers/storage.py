# ruff: noqa: ARG001 (every handler has the same signature)
"""/storage and /nodes/N/storage: definitions, status, content, allocation."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from ..api import access, validation
from ..api.access import Caller
from ..api.errors import BadParameters, PveFailure, Unsupported
from ..api.tree import api, task
from ..machine import disks
from ..state import cluster_fs, output, paths, volumes
from ..state.store import store

BASE = "/nodes/{node}/storage"


def _digest() -> str:
    return hashlib.sha1(_text().encode()).hexdigest()


def _text() -> str:
    """The text of storage.cfg; empty while `local` is implicit."""
    lines = []
    for name, body in store().all("storage").items():
        path_line = f"\tpath {body['path']}\n" if "path" in body else ""
        lines.append(f"{body['type']}: {name}\n{path_line}")
        lines += [f"\t{key} {body[key]}\n" for key in sorted(body) if key not in ("type", "path")]
        lines.append("\n")
    return "".join(lines)


def _render() -> None:
    cluster_fs.show("storage.cfg", _text())


def _definition(name: str) -> dict[str, Any]:
    body = dict(volumes.storages()[name])
    body.setdefault("priority", 0) if store().get("storage", name) is None else None
    return {"storage": name, "digest": _digest(), **body}


@api("GET", "/storage")
def definitions(caller: Caller, params: dict[str, Any]) -> Any:
    return [
        _definition(name)
        for name in volumes.storages()
        if caller.is_root or access.has(caller, f"/storage/{name}", ["Datastore.Allocate"])
    ]


@api("GET", "/storage/{storage}")
def definition(caller: Caller, params: dict[str, Any]) -> Any:
    volumes.storage(params["storage"], enabled=False)
    return _definition(params["storage"])


def _settings(params: dict[str, Any]) -> dict[str, Any]:
    skip = ("node", "storage", "type", "delete", "digest")
    return {key: value for key, value in params.items() if key not in skip}


@api("POST", "/storage")
def add(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["storage"]
    if name in volumes.storages():
        raise PveFailure(f"create storage failed: storage ID '{name}' already defined")
    if params["type"] != "dir":
        raise Unsupported(f"storage type '{params['type']}'")
    if "path" not in params:
        raise BadParameters({"path": "property is missing and it is not optional"}, rc=255)
    body = {"type": "dir", "content": "images,rootdir,vztmpl,iso,backup,snippets", **_settings(params)}
    store().put("storage", name, body)
    _create_folders(name, body)
    _render()
    return {"storage": name, "type": "dir"}


def _create_folders(name: str, body: dict[str, Any]) -> None:
    base = paths.at(str(body["path"]))
    for what in str(body.get("content", "")).split(","):
        folder = {"images": "images", "rootdir": "private", **volumes.FOLDERS}.get(what)
        if folder:
            (base / folder).mkdir(parents=True, exist_ok=True)


@api("PUT", "/storage/{storage}")
def change(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["storage"]
    if name not in volumes.storages():
        raise PveFailure(f"update storage failed: storage '{name}' does not exist")
    body = dict(volumes.storages()[name])
    body.update(_settings(params))
    for key in filter(None, re.split(r"[,;\s]+", params.get("delete", ""))):
        body.pop(key, None)
    store().put("storage", name, body)
    _create_folders(name, body)
    _render()
    return {"storage": name, "type": body["type"]}


@api("DELETE", "/storage/{storage}")
def drop(caller: Caller, params: dict[str, Any]) -> Any:
    if params["storage"] not in volumes.storages():
        raise PveFailure(f"delete storage failed: storage '{params['storage']}' does not exist")
    store().drop("storage", params["storage"])
    store().run("DELETE FROM acl WHERE path=?", f"/storage/{params['storage']}")
    _render()


def status_of(name: str) -> dict[str, Any]:
    body = volumes.storages()[name]
    enabled = str(body.get("disable", "0")) != "1" and paths.node() in volumes.nodes(name)
    row: dict[str, Any] = {"active": 0, "content": body.get("content", ""), "enabled": int(enabled)}
    row |= {"shared": int(body.get("shared", 0)), "type": body["type"]}
    if enabled:
        total, used, avail = volumes.usage(name)
        row |= {"active": 1, "avail": avail, "total": total, "used": used}
    return row


@api("GET", BASE)
def index(caller: Caller, params: dict[str, Any]) -> Any:
    rows = []
    if "storage" in params and params["storage"] not in volumes.storages():
        raise BadParameters({"storage": "No such storage."}, rc=255)
    for name in volumes.storages():
        if "storage" in params and name != params["storage"]:
            continue
        if not caller.is_root and not access.has(
            caller, f"/storage/{name}", ["Datastore.Audit", "Datastore.AllocateSpace"], any_of=True
        ):
            continue
        contents = set(filter(None, params.get("content", "").split(",")))
        if contents and not contents & volumes.content(name):
            continue
        row = status_of(name) | {"storage": name}
        if params.get("enabled") == "1" and not row["enabled"]:
            continue
        if row.get("total"):
            row["used_fraction"] = row["used"] / row["total"]
        rows.append(row)
    return rows


@api("GET", BASE + "/{storage}")
def storage_index(caller: Caller, params: dict[str, Any]) -> Any:
    names = (
        "content",
        "download-url",
        "file-restore",
        "import-metadata",
        "prunebackups",
        "rrd",
        "rrddata",
        "status",
        "upload",
    )
    return [{"subdir": name} for name in names]


@api("GET", BASE + "/{storage}/status")
def status(caller: Caller, params: dict[str, Any]) -> Any:
    volumes.storage(params["storage"], enabled=False)
    return status_of(params["storage"])


@api("GET", BASE + "/{storage}/content")
def content(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["storage"]
    volumes.storage(name, rc=2)
    vmid = int(params["vmid"]) if "vmid" in params else None
    rows = volumes.listing(name, vmid=vmid, of=params.get("content"))
    if caller.is_root or access.has(caller, f"/storage/{name}", ["Datastore.Allocate"]):
        return rows
    return [row for row in rows if _may_see(caller, name, row, vmid)]


def _may_see(caller: Caller, name: str, row: dict[str, Any], vmid: int | None) -> bool:
    """Whether the caller may see a row: ISOs and the like always, a guest's disks with rights on the guest,
    or in a listing for its id `vmid`."""
    owner = row.get("vmid")
    if row["content"] in ("iso", "vztmpl", "import"):
        return True
    if owner is None:
        return False
    return owner == vmid or (
        access.has(caller, f"/storage/{name}", ["Datastore.Audit"])
        and access.has(caller, f"/vms/{owner}", ["VM.Config.Disk"])
    )


def _volume_id(params: dict[str, Any]) -> str:
    volid = params["volume"]
    return volid if ":" in volid else f"{params['storage']}:{volid}"


@api("POST", BASE + "/{storage}/content")
def allocate(caller: Caller, params: dict[str, Any]) -> Any:
    name, vmid = params["storage"], int(params["vmid"])
    volumes.storage(name)
    fmt = params.get("format") or (volumes.file_format(params["filename"]) if params["filename"] else "raw")
    file = params["filename"]
    match = re.fullmatch(r"vm-(\d+)-\S+", file) if file else None
    if file and match is None:
        raise PveFailure(f"illegal name '{file}' - should be 'vm-{vmid}-*'")
    size = validation.size(params["size"]) or 0
    if params["size"].isdigit():
        size = int(params["size"]) * 1024
    volid = f"{name}:{vmid}/{file or volumes.next_name(name, vmid, fmt)}"
    volumes.allocate(volid, size, fmt) if caller.sync else _allocate_quietly(volid, size, fmt)
    return volid


def _allocate_quietly(volid: str, size: int, fmt: str) -> None:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        volumes.allocate(volid, size, fmt)


@api("GET", BASE + "/{storage}/content/{volume}")
def volume(caller: Caller, params: dict[str, Any]) -> Any:
    volid = _volume_id(params)
    volumes.storage(volumes.split(volid)[0])
    file = volumes.path(volid)
    if not caller.is_root and (owner := volumes.owner(volid)) is not None:
        access.check(caller, f"/vms/{owner}", ["VM.Audit"])
    if not file.is_file():
        raise PveFailure(f"volume_size_info on '{volid}' failed", rc=255)
    about = disks.info(file)
    return {
        "format": about["format"],
        "path": paths.shown(file),
        "size": about["size"],
        "used": about["used"],
    }


@api("DELETE", BASE + "/{storage}/content/{volume}")
def free(caller: Caller, params: dict[str, Any]) -> Any:
    volid = _volume_id(params)
    name = volumes.split(volid)[0]
    volumes.storage(name)
    owner = volumes.owner(volid)
    if not caller.is_root:
        if volumes.kind(volid) == "images":
            access.check(caller, f"/storage/{name}", ["Datastore.Allocate"])
        else:
            access.check(caller, f"/storage/{name}", ["Datastore.AllocateTemplate"])
    volumes.path(volid)

    def work() -> None:
        file = volumes.path(volid)
        if volumes.kind(volid) == "images":
            volumes.free(volid)
        elif file.exists():
            file.unlink()
        else:
            output.line(f"disk image '{paths.shown(file)}' does not exist")
        output.line(f"Removed volume '{volid}'")

    return task(caller, "imgdel", f"{owner}@{name}" if owner else name, work)
