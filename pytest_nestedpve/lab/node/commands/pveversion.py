"""pveversion: works without the cluster file system (facts 8)."""

from __future__ import annotations

import sys

from .. import packages
from ..state import paths
from . import frame


def main() -> int:
    return frame.main_of(_main, needs_cluster=False)


def _main(argv: list[str]) -> int:
    for word in argv:
        if word not in ("-v", "--verbose", "-verbose"):
            name = word.lstrip("-")
            sys.stderr.write(f"Unknown option: {name}\nUSAGE: pveversion [--verbose]\n")
            return 255
    if not argv:
        print(f"pve-manager/{paths.VERSION}/{paths.REPOID} (running kernel: {paths.KERNEL})")
        return 0
    print(f"proxmox-ve: {packages.VERSIONS['proxmox-ve']} (running kernel: {paths.KERNEL})")
    print(f"pve-manager: {paths.VERSION} (running version: {paths.VERSION}/{paths.REPOID})")
    for name in ("libpve-access-control", "libpve-storage-perl", "pve-cluster", "qemu-server"):
        print(f"{name}: {packages.VERSIONS[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
