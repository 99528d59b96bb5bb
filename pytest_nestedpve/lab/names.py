"""Names and numbers of the lab: what its nodes, networks and directories are called."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pytest_nestedpve.pve.errors import PveError

DOMAIN = "nested-pve.test"
FATHER = "father"
UNCLE = "uncle"  # the second outer node, of a lab that has two
MIRROR_HOST = f"mirror.{DOMAIN}"
PVE_HOST = "download.proxmox.com"
MIRROR_URL = f"http://{MIRROR_HOST}/debian"
PVE_URL = f"http://{PVE_HOST}/debian/pve"
PVE_KEY_FILE = "proxmox-archive-keyring-trixie.gpg"
PVE_KEY_URL = f"http://{PVE_HOST}/debian/{PVE_KEY_FILE}"
IMAGE_FILE = "debian-13-genericcloud-amd64.raw"
SUITE = "trixie"

# Where the lab's own Python package lies on every node.
NODE_LIBRARY = "/usr/share/nestedpve-lab"

DEFAULT_LAB = "default"
MAX_LABS = 250
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")


class LabError(PveError):
    """Something about a lab went wrong; the text says what to do."""


class LabUnavailable(LabError):
    """The lab cannot run here; the text says what is missing and what works without the lab."""


class LabUsage(LabError):
    """Something was asked of a lab that it does not know; the text says what it knows."""


def check_name(name: str) -> str:
    """The lab name itself. LabError unless it is up to 32 lower-case letters, digits and inner hyphens."""
    if not _NAME.fullmatch(name):
        raise LabError(
            f"lab name: expected 1 to 32 lower-case letters, digits and inner hyphens, found {name!r}"
        )
    return name


def cache_dir() -> Path:
    """$NESTED_PVE_CACHE, by default ~/.cache/nested-pve; absolute, not necessarily there."""
    given = os.environ.get("NESTED_PVE_CACHE")
    chosen = Path(given).expanduser() if given else Path.home() / ".cache" / "nested-pve"
    chosen = chosen.absolute()
    if re.search(r"[:,\\\s]", str(chosen)):
        # The path stands in the options of an overlay mount, where these separate.
        raise LabError(
            f"the cache directory {str(chosen)!r} contains a colon, comma, backslash or white space; "
            "choose another one by NESTED_PVE_CACHE"
        )
    return chosen


def labs_dir() -> Path:
    """Where each lab has its directory."""
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
        self.uncle_address = f"10.211.{number}.2"
        self.bridge = f"10.211.{number}.0/24"
        self.dhcp_range = (f"10.211.{number}.10", f"10.211.{number}.250")
        self.link = f"npvelab{number}"
        self.cgroup = f"nestedpve-lab.{number}"
