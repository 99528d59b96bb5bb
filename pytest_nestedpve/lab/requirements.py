"""Whether the lab can run on this machine, by trying it, and the message if it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from . import programs
from .names import LabUnavailable, cache_dir
from .node.machine import cgroups

_WITHOUT = (
    "Without the lab these work: `./dev test --fast` (unit and acceptance tests), and everything on a real "
    "Proxmox VE host (`pytest --pve-host HOST`, root over SSH)"
)

_TRY = """
set -e
mkdir -p "$1/lower" "$1/upper" "$1/work" "$1/root" "$1/sys"
mount -t tmpfs tmpfs "$1/sys"
mount -t overlay -o "lowerdir=$1/lower,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
"""


def unavailable(reason: str, remedy: str = "") -> LabUnavailable:
    """The error for a requirement that is not met."""
    parts = [f"the lab cannot run on this machine: {reason}.", f"{remedy}." if remedy else "", f"{_WITHOUT}."]
    return LabUnavailable(" ".join(part for part in parts if part))


def check(needed: Mapping[str, str] | None = None) -> None:
    """Raise LabUnavailable unless this is Linux, root, with the programs `needed` (default: those that run a
    lab), and supports namespaces, cgroups v2 and an overlay on the cache's file system."""
    if sys.platform != "linux":
        raise unavailable(f"it needs Linux, this is {sys.platform}")
    if os.geteuid() != 0:
        raise unavailable(
            f"it needs root, for namespaces, mounts and bridges; this is uid {os.geteuid()}",
            "Run the same command as root, or by sudo",
        )
    lacking = programs.missing(programs.TO_RUN if needed is None else needed)
    if lacking:
        raise unavailable(
            f"missing programs: {', '.join(sorted(lacking))}",
            "`nestedpve-lab install` installs them by apt; the Debian packages are "
            + " ".join(sorted(set(lacking.values()))),
        )
    try:
        root = cgroups.root()
    except cgroups.CgroupError as e:
        remedy = "Mount one: mount -t cgroup2 none /sys/fs/cgroup"
        raise unavailable(f"it needs a cgroup v2 hierarchy: {e}", remedy) from e
    if not any(root.glob("*/cgroup.kill")) and _kernel_version() < (5, 14):
        raise unavailable("it needs Linux 5.14 or newer (cgroup.kill)")
    _try_namespaces()


def _try_namespaces() -> None:
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="try-", dir=cache_dir()) as scratch:
        namespaces = ["--net", "--uts", "--ipc", "--mount", "--pid", "--cgroup", "--fork", "--kill-child"]
        done = subprocess.run(
            ["unshare", *namespaces, "sh", "-c", _TRY, "sh", scratch],
            capture_output=True,
            text=True,
            env={"PATH": programs.search_path(), "LC_ALL": "C.UTF-8"},
            check=False,
        )
    message = done.stderr.strip()
    if done.returncode == 0:
        return
    if "overlay" in message or scratch + "/root" in message:
        raise unavailable(
            f"{cache_dir()} is on a file system that cannot be the upper side of an overlay, or the kernel "
            f"lacks overlayfs ({message})",
            "Set NESTED_PVE_CACHE to a directory on ext4, xfs or btrfs",
        )
    raise unavailable(f"namespaces cannot be created ({message})", "A container needs --privileged")


def _kernel_version() -> tuple[int, int]:
    major, minor = os.uname().release.split("-")[0].split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)


def check_image(folder: Path) -> None:
    """Raise LabUnavailable if the image has not been built."""
    if not (folder / "ready").exists():
        raise LabUnavailable(
            "the lab's image has not been built yet. `nestedpve-lab install` builds it (as root, about a "
            f"minute, in {cache_dir()}). {_WITHOUT}."
        )
