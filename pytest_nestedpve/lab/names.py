"""Names and addresses of the lab's nodes, networks and directories."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pytest_nestedpve.pve.errors import PveError

DOMAIN = "nested-pve.test"
FATHER = "father"
SECOND_NODE = "father2"  # the second outer node of a lab with two
MIRROR_HOST = f"mirror.{DOMAIN}"
PVE_HOST = "download.proxmox.com"
MIRROR_URL = f"http://{MIRROR_HOST}/debian"
PVE_URL = f"http://{PVE_HOST}/debian/pve"
PVE_KEY_FILE = "proxmox-archive-keyring-trixie.gpg"
PVE_KEY_URL = f"http://{PVE_HOST}/debian/{PVE_KEY_FILE}"
IMAGE_FILE = "debian-13-genericcloud-amd64.raw"
SUITE = "trixie"

# Directory of the lab's own Python package on every node.
NODE_LIBRARY = "/usr/share/nestedpve-lab"

DEFAULT_LAB = "default"
MAX_LABS = 250
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


class LabError(PveError):
    """An operation on a lab failed."""


class LabUnavailable(LabError):
    """The lab cannot run on this machine; the message names the missing part and what works without a lab."""


class LabUsage(LabError):
    """An unknown key, value or node; the message lists the known ones."""


def check_name(name: str) -> str:
    """Return the name. LabError unless it is up to 32 lower-case letters, digits and inner hyphens."""
    if not _NAME.fullmatch(name):
        raise LabError(
            f"lab name: expected 1 to 32 lower-case letters, digits and inner hyphens, found {name!r}"
        )
    return name


def cache_dir() -> Path:
    """$NESTED_PVE_CACHE, by default ~/.cache/nested-pve; absolute; it may not exist."""
    configured = os.environ.get("NESTED_PVE_CACHE")
    path = Path(configured).expanduser() if configured else Path.home() / ".cache" / "nested-pve"
    path = path.absolute()
    if re.search(r"[:,\\\s]", str(path)):
        # The path is part of the options of an overlay mount, where these characters separate.
        raise LabError(
            f"the cache directory {str(path)!r} contains a colon, comma, backslash or white space; "
            "set NESTED_PVE_CACHE to another one"
        )
    return path


def labs_dir() -> Path:
    """The parent of all labs' directories."""
    return cache_dir() / "labs"


def lab_dir(name: str) -> Path:
    """The directory of lab `name`."""
    return labs_dir() / check_name(name)


class Subnets:
    """The addresses of the lab with the number N (0 to 249)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.uplink_machine = f"10.210.{number}.1"
        self.uplink_father = f"10.210.{number}.2"
        self.uplink = f"10.210.{number}.0/30"
        self.bridge_address = f"10.211.{number}.1"
        self.second_address = f"10.211.{number}.2"
        self.bridge = f"10.211.{number}.0/24"
        self.dhcp_range = (f"10.211.{number}.10", f"10.211.{number}.250")
        self.link = f"npvelab{number}"
        self.cgroup = f"nestedpve-lab.{number}"
