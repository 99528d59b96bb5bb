"""Script that runs on the nested PVE: prints its state as JSON, a hash per area.

Standard library only. Files that change by themselves are excluded: logs, caches, leases, disks of running
guests.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
from collections.abc import Iterator

PSEUDO = {
    "proc", "sysfs", "devtmpfs", "devpts", "tmpfs", "cgroup", "cgroup2", "mqueue", "debugfs", "tracefs",
    "securityfs", "pstore", "bpf", "configfs", "fusectl", "hugetlbfs", "ramfs", "autofs", "binfmt_misc",
    "fuse", "fuse.lxcfs", "rpc_pipefs", "nsfs", "efivarfs", "squashfs",
}  # fmt: skip
VOLATILE = (
    "/proc", "/sys", "/dev", "/run", "/etc/pve", "/var/log", "/var/cache", "/var/spool", "/root/.ansible",
    "/var/lib/systemd", "/var/lib/dhcp", "/var/lib/rrdcached", "/var/lib/pve-cluster", "/var/lib/pve-manager",
    "/var/lib/pve-firewall", "/var/lib/chrony", "/var/lib/logrotate", "/var/lib/apt/periodic",
    "/var/lib/apt/daily_lock", "/var/lib/lxcfs", "/var/lib/dbus", "/var/lib/cloud", "/var/lib/postfix",
    "/var/tmp", "/lost+found",
)  # fmt: skip
PVE_VOLATILE = {
    "lrm_status",
    "authkey.pub",
    "authkey.pub.old",
    "authkey.key",
    "pve-www.key",
    "lock",
    "crm_commands",
}
TEXT = 256 * 1024


def main() -> None:
    areas: dict[str, hashlib._Hash] = {}

    def add(area: str, *fields: object) -> None:
        line = "\0".join(str(field) for field in fields) + "\n"
        areas.setdefault(area, hashlib.sha256()).update(line.encode("utf-8", "surrogateescape"))

    guests = json.loads(
        _output("pvesh", "get", "/cluster/resources", "--type", "vm", "--output-format", "json")
    )
    running = set()
    for guest in sorted(guests, key=lambda guest: guest.get("vmid", 0)):
        add("guests", guest.get("vmid"), guest.get("type"), guest.get("name"), guest.get("status"))
        if guest.get("status") == "running":
            running.add(str(guest.get("vmid")))
    for line in sorted(_output("ip", "-o", "-4", "addr", "show").splitlines()):
        words = line.split()
        add("network", words[1], words[3])
    for path, content in _pve_files():
        add("/etc/pve", path, hashlib.sha256(content).hexdigest())
    for root in _mounts():
        for path, entry in _walk(root, os.lstat(root).st_dev, running):
            area = "/".join(path.split("/")[:3])
            add(
                area,
                path,
                stat.S_IFMT(entry.st_mode) | stat.S_IMODE(entry.st_mode),
                entry.st_uid,
                entry.st_gid,
                _content(path, entry),
            )
    print(json.dumps({area: digest.hexdigest() for area, digest in sorted(areas.items())}))


def _output(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=120, text=True).stdout


def _pve_files() -> Iterator[tuple[str, bytes]]:
    for directory, below, files in os.walk("/etc/pve"):
        below[:] = sorted(name for name in below if name not in PVE_VOLATILE)
        for name in sorted(files):
            path = os.path.join(directory, name)
            if name.startswith(".") or name in PVE_VOLATILE or os.path.islink(path):
                continue
            try:
                with open(path, "rb") as file:
                    yield path, file.read(TEXT)
            except OSError:
                continue


def _mounts() -> list[str]:
    roots = ["/"]
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            _, directory, kind, *_ = line.split(" ")
            directory = directory.replace("\\040", " ")
            if (
                kind not in PSEUDO
                and directory != "/"
                and not directory.startswith(VOLATILE)
                and os.path.isdir(directory)
            ):
                roots.append(directory)
    return sorted(set(roots))


def _walk(root: str, device: int, running: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    for directory, below, files in os.walk(root):
        keep = []
        for name in sorted(below):
            path = os.path.join(directory, name)
            try:
                entry = os.lstat(path)
            except OSError:
                continue
            if path.startswith(VOLATILE) or name.startswith("systemd-private-") or "__pycache__" in name:
                continue
            # The disks of running guests change all the time; logins at the leaf are recorded by the session.
            if os.path.basename(directory) == "images" and name in running:
                continue
            if entry.st_dev != device and not stat.S_ISLNK(entry.st_mode):
                continue
            keep.append(name)
            yield path, entry
        below[:] = keep
        for name in sorted(files):
            path = os.path.join(directory, name)
            try:
                entry = os.lstat(path)
            except OSError:
                continue
            yield path, entry


def _content(path: str, entry: os.stat_result) -> str:
    """The state of a file: a hash for configuration (often rewritten unchanged), else size and time."""
    if stat.S_ISLNK(entry.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(entry.st_mode):
        return ""
    if path.startswith("/etc/") and entry.st_size < TEXT:
        try:
            with open(path, "rb") as file:
                return hashlib.sha256(file.read()).hexdigest()
        except OSError:
            return "unreadable"
    return f"{entry.st_size} {entry.st_mtime_ns}"


if __name__ == "__main__":
    main()
