"""Volumes: files that stand for disks, and that a machine can boot from.

A volume is a file. The file of an imported image is the image itself, a squashfs; any other volume's
file holds one descriptive line. Beside the file is its state, a hidden directory `.<file>.d`:

    meta.json     format, virtual size, the base of a linked clone, the snapshots
    upper/ work/  what the machine wrote over the image (the upper side of an overlay)
    sub/          the machine's /var/lib/vz: a directory of the real file system, because an
                  overlay's upper side cannot be on an overlay, and a machine may have nested machines
    snapshots/    copies of upper and sub, by name

Running machines are not considered: callers stop or freeze the machine first. Runs on a node's Python
(3.11 to 3.13, standard library only).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SQUASHFS_MAGIC = b"hsqs"
FORMATS = ("raw", "qcow2", "vmdk", "subvol")


class DiskError(Exception):
    """A volume cannot be created, copied or read; the text is a line for a task log."""


@dataclass(frozen=True)
class Layers:
    """The layers of a machine's root file system.

    `image` is the squashfs at the bottom of the chain, None for a disk without a system. `lowers` are
    directories above it, topmost first; `upper`, `work` and `sub` are this volume's own directories.
    """

    image: Path | None
    lowers: tuple[Path, ...]
    upper: Path
    work: Path
    sub: Path


def state_dir(path: str | Path) -> Path:
    """The hidden directory beside the volume `path`."""
    path = Path(path)
    return path.with_name(f".{path.name}.d")


def exists(path: str | Path) -> bool:
    """Whether the volume's file exists."""
    return Path(path).is_file()


def create(path: str | Path, size_bytes: int, fmt: str) -> None:
    """Create an empty volume of `size_bytes` (virtual). DiskError if the file exists."""
    path = Path(path)
    _new_file(path)
    path.write_text(f"nestedpve-lab volume, {fmt}\n")
    _write(path, {"format": fmt, "size": int(size_bytes), "parent": None, "snapshots": {}})
    _fresh(path)


def import_image(src: str | Path, dst: str | Path, fmt: str, size_bytes: int | None = None) -> None:
    """Create the volume `dst` with the content of the image file or volume `src`.

    The bytes are shared (hard link, reflink) where the file system can: the image is never written to.
    The virtual size is `size_bytes`, by default that of `src`. DiskError if src is missing or dst exists.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_file():
        raise DiskError(f"unable to open image '{src}': no such file")
    _new_file(dst)
    _share(src, dst)
    size = size_bytes if size_bytes is not None else info(src)["size"]
    if state_dir(src).is_dir():
        meta = _read(src)
        _write(dst, {**meta, "format": fmt, "size": int(size), "snapshots": {}})
        _fresh(dst)
        _copy_trees(state_dir(src), state_dir(dst))
    else:
        _write(dst, {"format": fmt, "size": int(size), "parent": None, "snapshots": {}})
        _fresh(dst)


def full_clone(src: str | Path, dst: str | Path, fmt: str | None = None, snapshot: str | None = None) -> None:
    """Create `dst` as an independent copy of volume `src`, or of its snapshot `snapshot`.

    A copy of a linked clone shares only unchanging files with the clone's base.
    """
    src, dst = Path(src), Path(dst)
    meta = _read(src)
    source = state_dir(src)
    size = meta["size"]
    if snapshot is not None:
        size = _snapshot_meta(src, snapshot)["size"]
        source = source / "snapshots" / snapshot
    chain = _chain(src)
    _new_file(dst)
    _share(chain[-1], dst)
    _write(dst, {"format": fmt or meta["format"], "size": size, "parent": None, "snapshots": {}})
    _fresh(dst)
    if len(chain) == 1:
        _copy_trees(source, state_dir(dst))
        return
    # Flatten: copy every layer to a directory of the copy, so that the base may be removed.
    layers = state_dir(dst) / "layers"
    layers.mkdir()
    names = []
    for number, volume in enumerate(chain[1:]):
        _copy(state_dir(volume) / "upper", layers / str(number))
        names.append(str(number))
        for inner in _own_layers(volume):
            _copy(inner, layers / f"{number}-{inner.name}")
            names.append(f"{number}-{inner.name}")
    copied = [path.name for path in _own_layers(src)]
    for name in copied:
        _copy(state_dir(src) / "layers" / name, layers / f"own-{name}")
    _update(dst, layers=[f"own-{name}" for name in copied] + names)
    _copy_trees(source, state_dir(dst))


def linked_clone(base: str | Path, dst: str | Path, fmt: str | None = None) -> None:
    """Create `dst` as a volume over the template volume `base`; only /var/lib/vz is copied."""
    base, dst = Path(base), Path(dst)
    meta = _read(base)
    _new_file(dst)
    dst.write_text(f"nestedpve-lab volume over {base}\n")
    _write(dst, {"format": fmt or meta["format"], "size": meta["size"], "parent": str(base), "snapshots": {}})
    _fresh(dst)
    shutil.rmtree(state_dir(dst) / "sub")
    _copy(state_dir(base) / "sub", state_dir(dst) / "sub")


def to_template(path: str | Path) -> Path:
    """Rename volume `vm-ID-disk-N` to `base-ID-disk-N`, as PVE does; the new path is returned."""
    path = Path(path)
    if not path.name.startswith("vm-"):
        raise DiskError(f"expected a volume named vm-…, found '{path.name}'")
    new = path.with_name("base-" + path.name.removeprefix("vm-"))
    if new.exists():
        raise DiskError(f"volume '{new}' already exists")
    state_dir(path).rename(state_dir(new))
    path.rename(new)
    return new


def snapshot(path: str | Path, name: str) -> None:
    """Save the volume's content under `name`. Freeze the machine first (machine.frozen)."""
    meta = _read(path)
    if name in meta["snapshots"]:
        raise DiskError(f"snapshot '{name}' already exists")
    target = state_dir(path) / "snapshots" / name
    _remove(target)
    target.mkdir(parents=True)
    _copy_trees(state_dir(path), target)
    _update(path, snapshots={**meta["snapshots"], name: {"size": meta["size"]}})


def rollback(path: str | Path, name: str) -> None:
    """Restore the content of snapshot `name`. The machine must not run."""
    saved = _snapshot_meta(path, name)
    _fresh(path)
    _copy_trees(state_dir(path) / "snapshots" / name, state_dir(path))
    _update(path, size=saved["size"])


def delete_snapshot(path: str | Path, name: str) -> None:
    """Delete snapshot `name`; DiskError if there is none."""
    _snapshot_meta(path, name)
    meta = _read(path)
    _update(path, snapshots={key: value for key, value in meta["snapshots"].items() if key != name})
    _remove(state_dir(path) / "snapshots" / name)


def resize(path: str | Path, size_bytes: int) -> None:
    """Set the virtual size; DiskError when it would shrink."""
    meta = _read(path)
    if size_bytes < meta["size"]:
        raise DiskError("shrinking disks is not supported")
    _update(path, size=int(size_bytes))


def rename(path: str | Path, new: str | Path) -> None:
    """Rename a volume with its state (move_disk to another guest, template back and forth)."""
    path, new = Path(path), Path(new)
    _new_file(new)
    state_dir(path).rename(state_dir(new))
    path.rename(new)


def free(path: str | Path) -> None:
    """Remove the volume with its state. No error if the file does not exist."""
    _remove(state_dir(path))
    Path(path).unlink(missing_ok=True)


def bootable(path: str | Path) -> bool:
    """Whether the volume has a system (an imported image) as its bottom layer."""
    path = Path(path)
    return path.is_file() and layers(path).image is not None


def info(path: str | Path) -> dict[str, Any]:
    """`{"format", "size" (virtual bytes), "used" (bytes of the file), "parent" (path or None),
    "snapshots" (names)}` of a volume or of a bare image file."""
    path = Path(path)
    if not path.is_file():
        raise DiskError(f"volume '{path}' does not exist")
    used = path.stat().st_size
    if not state_dir(path).is_dir():
        suffix = path.suffix.lstrip(".") or "raw"
        return {"format": suffix, "size": used, "used": used, "parent": None, "snapshots": []}
    meta = _read(path)
    return {
        "format": meta["format"],
        "size": meta["size"],
        "used": used,
        "parent": meta["parent"],
        "snapshots": list(meta["snapshots"]),
    }


def layers(path: str | Path) -> Layers:
    """The layers to boot volume `path` from. DiskError if a base of the chain is missing."""
    path = Path(path)
    chain = _chain(path)
    lowers = [*_own_layers(path)]
    for volume in chain[1:]:
        lowers += [state_dir(volume) / "upper", *_own_layers(volume)]
    with open(chain[-1], "rb") as file:
        magic = file.read(len(SQUASHFS_MAGIC))
    own = state_dir(path)
    return Layers(
        image=chain[-1] if magic == SQUASHFS_MAGIC else None,
        lowers=tuple(lowers),
        upper=own / "upper",
        work=own / "work",
        sub=own / "sub",
    )


# -- implementation


def _meta_file(path: str | Path) -> Path:
    return state_dir(path) / "meta.json"


def _read(path: str | Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(_meta_file(path).read_text())
    except FileNotFoundError as e:
        raise DiskError(f"volume '{path}' does not exist") from e
    return loaded


def _write(path: str | Path, meta: dict[str, Any]) -> None:
    target = _meta_file(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".new")
    temporary.write_text(json.dumps(meta))
    temporary.rename(target)


def _update(path: str | Path, **changes: Any) -> None:
    _write(path, {**_read(path), **changes})


def _snapshot_meta(path: str | Path, name: str) -> dict[str, Any]:
    try:
        snapshot: dict[str, Any] = _read(path)["snapshots"][name]
    except KeyError as e:
        raise DiskError(f"snapshot '{name}' does not exist") from e
    return snapshot


def _own_layers(path: Path) -> list[Path]:
    return [state_dir(path) / "layers" / name for name in _read(path).get("layers", [])]


def _chain(path: Path) -> list[Path]:
    """The volume itself, its base, the base's base …"""
    volumes = [path]
    while (parent := _read(volumes[-1])["parent"]) is not None:
        if not Path(parent).is_file():
            raise DiskError(f"volume '{volumes[-1]}': its base '{parent}' does not exist")
        volumes.append(Path(parent))
    return volumes


def _new_file(path: Path) -> None:
    if path.exists():
        raise DiskError(f"volume '{path}' already exists")
    path.parent.mkdir(parents=True, exist_ok=True)


def _share(src: Path, dst: Path) -> None:
    """Create `dst` with the bytes of `src`, which never change: a hard link, else a copy."""
    try:
        os.link(src, dst)
    except OSError:
        subprocess.run(["cp", "--reflink=auto", "--", str(src), str(dst)], check=True)


def _fresh(path: str | Path) -> None:
    own = state_dir(path)
    for name in ("upper", "work", "sub"):
        _remove(own / name)
        (own / name).mkdir(mode=0o755)


def _copy_trees(source: Path, target: Path) -> None:
    for name in ("upper", "sub"):
        _remove(target / name)
        _copy(source / name, target / name)


def _copy(source: Path, target: Path) -> None:
    """Copy a tree with owners, device nodes and extended attributes, which carry an overlay's meaning.

    Images inside it (the volumes of a nested node) are shared, not copied.
    """
    images = list(_images(source))
    copy = ["cp", "-a", "--reflink=auto", "--", str(source), str(target)]
    tar = ["tar", "-C", str(source), "--xattrs", "--xattrs-include=*", "--sparse"]
    tar += ["--null", "--no-wildcards", "--anchored", "--exclude-from=/dev/stdin", "-cf", "-", "."]
    process = subprocess.run(
        tar if images else copy,
        input=None if not images else "".join(f"./{image}\0" for image in images).encode(),
        capture_output=True,
        check=False,
    )
    if process.returncode == 0 and images:
        target.mkdir(exist_ok=True)
        process = subprocess.run(
            ["tar", "-C", str(target), "--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", "-"],
            input=process.stdout,
            capture_output=True,
            check=False,
        )
        for image in images:
            _share(source / image, target / image)
    if process.returncode != 0:
        raise DiskError(f"copying '{source}' failed: {process.stderr.decode(errors='replace').strip()}")


def _images(root: Path) -> Iterator[Path]:
    """Squashfs files of a tree, relative to it; only files with endings of volumes are read."""
    for folder, _, files in os.walk(root):
        for name in files:
            if name.endswith((".raw", ".qcow2", ".img")):
                file = Path(folder) / name
                with contextlib.suppress(OSError), open(file, "rb") as opened:
                    if opened.read(len(SQUASHFS_MAGIC)) == SQUASHFS_MAGIC:
                        yield file.relative_to(root)


def _remove(tree: Path) -> None:
    if tree.is_dir() and not tree.is_symlink():
        # An overlay's work directory has mode 000: without root it must be made accessible first.
        for folder, names, _ in os.walk(tree):
            for name in names:
                with contextlib.suppress(OSError):
                    if not os.path.islink(os.path.join(folder, name)):
                        os.chmod(os.path.join(folder, name), 0o700)
        shutil.rmtree(tree)
