# ruff: noqa: ARG001, ARG005, UP031 (printers have one signature)
"""pvesm: storages and volumes as a command."""

from __future__ import annotations

import sys
from typing import Any

from ..api import access, tree
from ..api.errors import BadParameters
from ..state import paths, volumes
from . import frame
from .frame import TEXT, Command


def main() -> int:
    return frame.main_of(lambda argv: frame.dispatch("pvesm", COMMANDS, argv))


def _status(rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    width = max([len(row["storage"]) for row in rows], default=4) + 1
    head = ("Name", "Type", "Status", "Total (KiB)", "Used (KiB)", "Available (KiB)", "%")
    print("%-*s %10s %10s %15s %15s %15s %8s" % (width, *head))
    for row in sorted(rows, key=lambda row: str(row["storage"])):
        status = "active" if row["active"] else "disabled" if not row["enabled"] else "inactive"
        total, used, free = (row.get(key, 0) // 1024 for key in ("total", "used", "avail"))
        share = f"{row['used'] * 100 / row['total']:.2f}%" if row.get("total") else "N/A"
        print(
            "%-*s %10s %10s %15d %15d %15d %8s"
            % (width, row["storage"], row["type"], status, total, used, free, share)
        )


def _list(rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    if not rows:
        return
    rows = sorted(rows, key=lambda row: str(row["volid"]))
    name = max(len(row["volid"]) for row in rows)
    size = max(4, *(len(str(row["size"])) for row in rows))
    print("%-*s %-7s %-9s %*s %s" % (name, "Volid", "Format", "Type", size, "Size", "VMID"))
    for row in rows:
        vmid = row.get("vmid", "")
        print(
            "%-*s %-7s %-9s %*s %s"
            % (name, row["volid"], row["format"], row["content"], size, row["size"], vmid)
        )


def _allocated(volid: str, values: dict[str, Any]) -> None:
    print(f"successfully created '{volid}'")


def _free(values: dict[str, Any]) -> int:
    volid = values["volume"]
    if ":" not in volid:
        if "storage" not in values:
            raise BadParameters({"volume": "no storage specified - incomplete volume ID"})
        volid = f"{values['storage']}:{volid}"
    name = volumes.split(volid)[0]
    volumes.storage(name)
    path = f"/nodes/{paths.node()}/storage/{name}/content/{volid}"
    return frame.print_outcome(tree.call("DELETE", path, {}, access.ROOT))


def _path(values: dict[str, Any]) -> int:
    volumes.storage(volumes.split(values["volume"])[0])
    print(volumes.shown(values["volume"]))
    return 0


_VOLUME = {"volume": {"type": "string"}}
COMMANDS: dict[str, Command] = {
    "add": Command("POST", "/storage", ("type", "storage"), show=lambda result, values: None, rc=255),
    "set": Command("PUT", "/storage/{storage}", ("storage",), show=lambda result, values: None, rc=255),
    "remove": Command("DELETE", "/storage/{storage}", ("storage",)),
    "status": Command("GET", "/nodes/{node}/storage", show=_status),
    "list": Command("GET", "/nodes/{node}/storage/{storage}/content", ("storage",), show=_list),
    "alloc": Command(
        "POST",
        "/nodes/{node}/storage/{storage}/content",
        ("storage", "vmid", "filename", "size"),
        show=_allocated,
    ),
    "free": Command("", "", ("volume",), extra={**_VOLUME, "storage": TEXT}, body=_free),
    "path": Command("", "", ("volume",), extra=_VOLUME, body=_path),
    **{
        name: frame.unsupported(f"pvesm {name}")
        for name in ("apiinfo", "export", "extractconfig", "import", "prune-backups", "scan")
    },
}

if __name__ == "__main__":
    sys.exit(main())
