"""Storages and their volumes: ids, paths, content. Directory storages only."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any

from ..api import faults
from ..api.errors import PveFailure, Unsupported
from ..machine import disks
from . import members, output, paths, reported, worker
from .store import store

IMPLICIT_CONTENT = "backup,iso,vztmpl,snippets,images,rootdir"
FOLDERS = {
    "iso": "template/iso",
    "vztmpl": "template/cache",
    "backup": "dump",
    "snippets": "snippets",
    "import": "import",
}
ENDINGS = {
    "iso": r"\.(iso|img)",
    "vztmpl": r"\.tar\.(gz|xz|zst)",
    "import": r"\.(qcow2|raw|vmdk|ova|ovf|img)",
    "backup": r"\.(vma|tar)(\.\w+)?",
    "snippets": "",
}


def storages() -> dict[str, dict[str, Any]]:
    """Storage definitions by id; without storage.cfg there is an implicit `local` [basic-024]."""
    definitions = store().all("storage")
    if "local" not in definitions:
        definitions["local"] = {
            "type": "dir",
            "path": "/var/lib/vz",
            "content": IMPLICIT_CONTENT,
            "prune-backups": "keep-all=1",
        }
    return dict(sorted(definitions.items()))


def storage(name: str, *, enabled: bool = True, rc: int = 255) -> dict[str, Any]:
    definition = storages().get(name)
    if definition is None:
        raise PveFailure(f"storage '{name}' does not exist", rc=rc)
    if enabled and str(definition.get("disable", "0")) == "1":
        raise PveFailure(f"storage '{name}' is disabled")
    if enabled and paths.node() not in _nodes_of(definition):
        raise PveFailure(f"storage '{name}' is not available on node '{paths.node()}'")
    return definition


def nodes(name: str) -> list[str]:
    """The nodes that have the storage: all, or those that its definition names."""
    return _nodes_of(storage(name, enabled=False))


def _nodes_of(about: dict[str, Any]) -> list[str]:
    listed = set(filter(None, re.split(r"[,;\s]+", str(about.get("nodes", "")))))
    return [member.name for member in members.every() if not listed or member.name in listed]


def shared(name: str) -> bool:
    """Whether all nodes of the storage see the same volumes."""
    return str(storage(name, enabled=False).get("shared", "0")) == "1"


def content(name: str) -> set[str]:
    return set(filter(None, str(storage(name, enabled=False).get("content", "")).split(",")))


def folder(name: str) -> Path:
    """The directory of a storage's volumes; for a type without a directory one inside the lab."""
    return paths.at(str(storage(name).get("path", f"/var/lib/nestedpve-lab/storages/{name}")))


def has_snapshots(name: str) -> bool:
    """Whether the storage itself has snapshots, regardless of the format of its volumes."""
    return storage(name)["type"] in ("lvmthin", "rbd", "zfspool")


def split(volid: str) -> tuple[str, str]:
    name, colon, rest = volid.partition(":")
    if not colon or not rest:
        raise PveFailure(f"unable to parse volume ID '{volid}'")
    return name, rest


def path(volid: str) -> Path:
    """The path of a volume, which may not exist."""
    name, rest = split(volid)
    base = folder(name)
    kind, _, file = rest.partition("/")
    if kind in FOLDERS and file:
        return base / FOLDERS[kind] / file
    parts = rest.split("/")
    if len(parts) in (2, 4) and parts[-2].isdigit():
        return base / "images" / parts[-2] / parts[-1]
    raise PveFailure(f"unable to parse directory volume name '{rest}'")


def owner(volid: str) -> int | None:
    parts = split(volid)[1].split("/")
    return int(parts[-2]) if len(parts) in (2, 4) and parts[-2].isdigit() else None


def kind(volid: str) -> str:
    first = split(volid)[1].split("/")[0]
    return first if first in FOLDERS else "images"


def shown(volid: str) -> str:
    return paths.shown(path(volid))


def file_format(name: str) -> str:
    ending = name.rpartition(".")[2]
    return ending if ending in ("raw", "qcow2", "vmdk", "iso") else "raw"


def next_name(name: str, vmid: int, fmt: str, *, prefix: str = "vm", what: str = "disk") -> str:
    """The first free `vm-ID-disk-N` of a guest on a storage (with any ending)."""
    folder_of_guest = folder(name) / "images" / str(vmid)
    used = set()
    if folder_of_guest.is_dir():
        for entry in os.listdir(folder_of_guest):
            if match := re.fullmatch(rf"(?:vm|base)-{vmid}-{what}-(\d+)\.\w+", entry):
                used.add(int(match[1]))
    number = next(n for n in range(1000) if n not in used)
    return f"{prefix}-{vmid}-{what}-{number}.{fmt}"


def formatting(file: Path, size: int, fmt: str, extra: str = "") -> str:
    """The line qemu-img prints."""
    place = paths.shown(file)
    if fmt == "qcow2":
        cluster = (
            "cluster_size=131072 extended_l2=on preallocation=off"
            if extra
            else ("cluster_size=65536 extended_l2=off preallocation=metadata")
        )
        return (
            f"Formatting '{place}', fmt=qcow2 {cluster} compression_type=zlib size={size}{extra}"
            " lazy_refcounts=off refcount_bits=16"
        )
    if fmt == "vmdk":
        return f"Formatting '{place}', fmt=vmdk size={size} compat6=off hwversion=undefined"
    return f"Formatting '{place}', fmt=raw size={size} preallocation=off"


def allocate(volid: str, size: int, fmt: str) -> None:
    """Create an empty volume, with qemu-img's line on stdout."""
    file = path(volid)
    if fmt not in ("raw", "qcow2", "vmdk"):
        raise Unsupported(f"volume format '{fmt}'")
    if file.exists():
        raise PveFailure(f"disk image '{paths.shown(file)}' already exists", rc=25)
    output.line(formatting(file, size, fmt))
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        disks.create(file, size, fmt)
    except disks.DiskError as e:
        raise PveFailure(str(e)) from e


def users_of(volid: str) -> list[Path]:
    """Linked clones of a base volume."""
    base = path(volid)
    name, _ = split(volid)
    clones = []
    images = folder(name) / "images"
    for file in images.glob("*/*"):
        if (
            not file.name.startswith(".")
            and disks.state_dir(file).is_dir()
            and disks.info(file)["parent"] == str(base)
        ):
            clones.append(file)
    return clones


def free(volid: str) -> None:
    """Remove a volume; prints a line if it does not exist [storage-027]."""
    file = path(volid)
    if (rule := faults.on_volume(volid, worker.kind())) is not None:
        faults.before(rule, owner(volid))
        return
    if file.name.startswith("base-") and users_of(volid):
        raise PveFailure(f"base volume '{volid}' is still in use by linked cloned")
    if not file.exists():
        output.line(f"disk image '{paths.shown(file)}' does not exist")
        return
    disks.free(file)
    if kind(volid) == "images" and file.parent.is_dir() and not any(file.parent.iterdir()):
        file.parent.rmdir()


def listing(name: str, *, vmid: int | None = None, of: str | None = None) -> list[dict[str, Any]]:
    """Rows of a storage's content."""
    base = folder(name)
    rows: list[dict[str, Any]] = []
    if of in (None, "images", "rootdir") and "images" in content(name) | {"images"}:
        for file in sorted((base / "images").glob("*/*")):
            if file.name.startswith(".") or not file.is_file() or not file.parent.name.isdigit():
                continue
            if not re.fullmatch(r"(vm|base)-\d+-[\w-]+\.(raw|qcow2|vmdk)", file.name):
                continue
            guest = int(file.parent.name)
            if vmid is not None and guest != vmid:
                continue
            # A volume may be removed while the directory is listed: it gets no row.
            with contextlib.suppress(disks.DiskError, FileNotFoundError):
                rows.append(_row(name, guest, file))
    for what, place in FOLDERS.items():
        if of not in (None, what) or (what not in content(name)) or not (base / place).is_dir():
            continue
        for file in sorted((base / place).iterdir()):
            if (
                not file.is_file()
                or file.name.startswith(".")
                or not re.search(ENDINGS[what] + "$", file.name)
            ):
                continue
            fmt = {"snippets": "snippet", "vztmpl": "t" + file.suffix[1:]}.get(what) or file_format(file.name)
            with contextlib.suppress(FileNotFoundError):
                about = file.stat()
                row = {
                    "content": what,
                    "ctime": int(about.st_ctime),
                    "format": fmt,
                    "size": about.st_size,
                    "volid": f"{name}:{what}/{file.name}",
                }
                rows.append(row)
    return rows


def _row(name: str, guest: int, file: Path) -> dict[str, Any]:
    about = disks.info(file)
    parent = Path(about["parent"]) if about["parent"] else None
    below = f"{parent.parent.name}/{parent.name}/" if parent else ""
    return {
        "content": "images",
        "ctime": int(file.stat().st_ctime),
        "format": about["format"],
        "parent": f"../{parent.parent.name}/{parent.name}" if parent else None,
        "size": about["size"],
        "used": file.stat().st_blocks * 512,
        "vmid": guest,
        "volid": f"{name}:{below}{guest}/{file.name}",
    }


def usage(name: str) -> tuple[int, int, int]:
    """(total, used, free) bytes of the file system below a storage."""
    place = folder(name)
    place.mkdir(parents=True, exist_ok=True)
    about = os.statvfs(place)
    total, free = about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize
    used = total - about.f_bfree * about.f_frsize
    measured = {"total": total, "used": used, "avail": free} | reported.of("storage", name)
    return measured["total"], measured["used"], measured["avail"]


def human(number: float) -> str:
    """A number of bytes as in the progress of a copy: `1.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.1f} {unit}"
        number /= 1024
    return ""


def short_size(number: int) -> str:
    """A number of bytes as in a configuration: `1G`, `64M`, `512`."""
    units = ["", "K", "M", "G", "T"]
    index = 0
    while index < 4 and number and number % 1024 == 0:
        number //= 1024
        index += 1
    return f"{number}{units[index]}"


def transferred(size: int) -> None:
    """Print the progress of a copy that has ended."""
    output.line(f"transferred 0.0 B of {human(size)} (0.00%)")
    for _ in range(2):
        output.line(f"transferred {human(size)} of {human(size)} (100.00%)")
