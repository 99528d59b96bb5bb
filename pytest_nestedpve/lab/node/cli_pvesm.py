# ruff: noqa: ARG001, ARG005, UP031 (printers have one signature)
"""pvesm: storages and volumes at the prompt."""

from __future__ import annotations

import sys
from typing import Any

from . import access, checks, cli, paths, tree, volumes
from .cli import TEXT, Command
from .errors import Unsupported


def main() -> int:
    return cli.door(lambda argv: cli.dispatch("pvesm", COMMANDS, argv))


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


def _alloc(argv: list[str]) -> int:
    command = Command("", "", args=("storage", "vmid", "filename", "size"), extra={"format": TEXT})
    values = cli.parse(argv, command, "pvesm alloc <storage> <vmid> <filename> <size> [OPTIONS]\n")
    if checks.size(values["size"]) is None:
        words = "value does not match the regex pattern"
        sys.stderr.write(
            f"400 Parameter verification failed.\nsize: {words}\n"
            "pvesm alloc <storage> <vmid> <filename> <size> [OPTIONS]\n"
        )
        return 2
    call: dict[str, Any] = {
        key: values[key] for key in ("vmid", "filename", "size", "format") if key in values
    }
    volid = tree.call("POST", f"/nodes/{paths.node()}/storage/{values['storage']}/content", call, access.ROOT)
    print(f"successfully created '{volid}'")
    return 0


def _free(argv: list[str]) -> int:
    values = cli.parse(
        argv, Command("", "", args=("volume",), extra={"storage": TEXT}), "pvesm free <volume> [OPTIONS]\n"
    )
    volid = values["volume"] if ":" in values["volume"] else f"{values.get('storage')}:{values['volume']}"
    name = volumes.split(volid)[0]
    volumes.storage(name)
    path = f"/nodes/{paths.node()}/storage/{name}/content/{volid}"
    return cli.outcome(tree.call("DELETE", path, {}, access.ROOT))


def _path(argv: list[str]) -> int:
    values = cli.parse(argv, Command("", "", args=("volume",)), "pvesm path <volume>\n")
    volumes.storage(volumes.split(values["volume"])[0])
    print(volumes.shown(values["volume"]))
    return 0


def _scan(argv: list[str]) -> int:
    raise Unsupported("pvesm scan")


COMMANDS: dict[str, Any] = {
    "add": Command("POST", "/storage", ("type", "storage"), show=lambda found, values: None),
    "set": Command("PUT", "/storage/{storage}", ("storage",), show=lambda found, values: None),
    "remove": Command("DELETE", "/storage/{storage}", ("storage",)),
    "status": Command("GET", "/nodes/{node}/storage", show=_status),
    "list": Command("GET", "/nodes/{node}/storage/{storage}/content", ("storage",), show=_list),
    "alloc": _alloc,
    "free": _free,
    "path": _path,
    "scan": _scan,
    "export": _scan,
    "import": _scan,
}

if __name__ == "__main__":
    sys.exit(main())
