"""Storages and their volumes: ids, paths, what lies there. Directory storages only."""

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
    found = store().all("storage")
    if "local" not in found:
        found["local"] = {
            "type": "dir",
            "path": "/var/lib/vz",
            "content": IMPLICIT_CONTENT,
            "prune-backups": "keep-all=1",
        }
    return dict(sorted(found.items()))


def storage(name: str, *, enabled: bool = True, rc: int = 255) -> dict[str, Any]:
    found = storages().get(name)
    if found is None:
        raise PveFailure(f"storage '{name}' does not exist", rc=rc)
    if enabled and str(found.get("disable", "0")) == "1":
        raise PveFailure(f"storage '{name}' is disabled")
    if enabled and paths.node() not in _nodes_of(found):
        raise PveFailure(f"storage '{name}' is not available on node '{paths.node()}'")
    return found


def nodes(name: str) -> list[str]:
    """The nodes that have the storage: all, or those that its definition names."""
    return _nodes_of(storage(name, enabled=False))


def _nodes_of(about: dict[str, Any]) -> list[str]:
    given = set(filter(None, re.split(r"[,;\s]+", str(about.get("nodes", "")))))
    return [each.name for each in members.every() if not given or each.name in given]


def shared(name: str) -> bool:
    """Whether what lies on the storage is the same on all of its nodes."""
    return str(storage(name, enabled=False).get("shared", "0")) == "1"


def content(name: str) -> set[str]:
    return set(filter(None, str(storage(name, enabled=False).get("content", "")).split(",")))


def folder(name: str) -> Path:
    """Where a storage's volumes lie; one of a type that is no directory has a place that it does not show."""
    return paths.at(str(storage(name).get("path", f"/var/lib/nestedpve-lab/storages/{name}")))


def has_snapshots(name: str) -> bool:
    """Whether the storage itself keeps snapshots, whatever the format of its volumes."""
    return storage(name)["type"] in ("lvmthin", "rbd", "zfspool")


def split(volid: str) -> tuple[str, str]:
    name, colon, rest = volid.partition(":")
    if not colon or not rest:
        raise PveFailure(f"unable to parse volume ID '{volid}'")
    return name, rest


def path(volid: str) -> Path:
    """Where a volume lies; nothing is said about whether it is there."""
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
    place = folder(name) / "images" / str(vmid)
    taken = set()
    if place.is_dir():
        for entry in os.listdir(place):
            if match := re.fullmatch(rf"(?:vm|base)-{vmid}-{what}-(\d+)\.\w+", entry):
                taken.add(int(match[1]))
    number = next(n for n in range(1000) if n not in taken)
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
    """Make an empty volume, with qemu-img's line on stdout."""
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
    found = []
    images = folder(name) / "images"
    for file in images.glob("*/*"):
        if (
            not file.name.startswith(".")
            and disks.state_dir(file).is_dir()
            and disks.info(file)["parent"] == str(base)
        ):
            found.append(file)
    return found


def free(volid: str) -> None:
    """Remove a volume; says so if it is not there [storage-027]."""
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
            # Volumes come and go while others are listed: what is gone by now is no row.
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
    """`1.0 GiB` as the copy's progress says it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            return f"{number:.1f} {unit}"
        number /= 1024
    return ""


def short_size(number: int) -> str:
    """`1G`, `64M`, `512`: as in a configuration."""
    units = ["", "K", "M", "G", "T"]
    index = 0
    while index < 4 and number and number % 1024 == 0:
        number //= 1024
        index += 1
    return f"{number}{units[index]}"


def transferred(size: int) -> None:
    """The progress of a copy that is done."""
    output.line(f"transferred 0.0 B of {human(size)} (0.00%)")
    for _ in range(2):
        output.line(f"transferred {human(size)} of {human(size)} (100.00%)")
