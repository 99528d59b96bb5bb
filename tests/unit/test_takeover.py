"""takeover.sh on a directory that stands for a node's files, with commands that do nothing but answer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "playbooks/roles/nested_pve_network/files/takeover.sh"
STUB = "../run/systemd/resolve/stub-resolv.conf"
#: A unit is active if its file is there. The bridge gets its address if `leased` is there.
SYSTEMCTL = """\
case "$1 $2" in
"is-active --quiet") test -e active/$3 ;;
"cat "*) exit 1 ;;
"disable --now") shift 2; for unit; do rm -f active/$unit; done ;;
"enable --now") touch active/$3 ;;
"restart "*) touch active/$2 ;;
esac
"""
IP = 'case "$*" in *"-o addr show"*) [ ! -e leased ] || echo "3: vmbr0 inet 192.0.2.5/24" ;; esac'


class Node:
    """Below `root`; `state` is where a takeover keeps what it needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "var/lib/nested-pve/network"
        for name in ("etc/netplan", "etc/network", "etc/cloud/cloud.cfg.d", "active", "bin"):
            (root / name).mkdir(parents=True)
        self.state.mkdir(parents=True)
        text = SCRIPT.read_text()
        for place in ("/etc/", "/run/", "/var/lib/"):
            text = text.replace(place, f"{root}{place}")
        (root / "takeover.sh").write_text(text)
        quiet = ("ifdown", "ifquery", "ifreload", "pkill", "arping", "netplan")
        for name, does in {"systemctl": SYSTEMCTL, "ip": IP, **dict.fromkeys(quiet, "")}.items():
            (root / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
            (root / "bin" / name).chmod(0o755)

    def take_over(self, interfaces: str, *, leased: bool, arguments: tuple[str, ...] = ()) -> str:
        """What the takeover says as its result."""
        (self.state / "resolv.conf").write_text("nameserver 192.0.2.1\n")
        (self.state / "interfaces.new").write_text(interfaces)
        (self.root / "leased").unlink(missing_ok=True)
        if leased:
            (self.root / "leased").touch()
        subprocess.run(
            ["sh", "takeover.sh", "eth0", "vmbr0", "0", *arguments],
            cwd=self.root, env={"PATH": f"{self.root}/bin:/usr/bin:/bin"}, capture_output=True, check=False,
        )  # fmt: skip
        return (self.state / "result").read_text().strip()

    def seen(self) -> dict[str, str]:
        """The files of the network's set-up, a link by where it leads, and the units that are active."""
        files = [path for path in (self.root / "etc").rglob("*") if path.is_symlink() or path.is_file()]
        found = {
            str(path.relative_to(self.root)): str(path.readlink()) if path.is_symlink() else path.read_text()
            for path in files
        }
        return found | {"active": " ".join(sorted(path.name for path in (self.root / "active").iterdir()))}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """As cloud-init leaves one: netplan, networkd, resolved."""
    made = Node(tmp_path)
    (tmp_path / "etc/netplan/50-cloud-init.yaml").write_text("by cloud-init\n")
    (tmp_path / "etc/resolv.conf").symlink_to(STUB)
    for unit in ("systemd-networkd.service", "systemd-resolved.service"):
        (tmp_path / "active" / unit).touch()
    return made


def test_a_takeover_that_fails_puts_back_what_it_found(node: Node) -> None:
    before = node.seen()
    before["active"] = f"networking.service {before['active']}"  # of nothing, and not at the next boot
    assert node.take_over("the bridge\n", leased=False).startswith("failed the bridge vmbr0 got no address")
    assert node.seen() == before


def test_a_later_takeover_that_fails_puts_back_what_the_one_before_made(node: Node) -> None:
    assert node.take_over("the bridge\n", leased=True) == "ok 192.0.2.5/24"
    good = node.seen()
    assert good == {
        "etc/network/interfaces": "the bridge\n",
        "etc/resolv.conf": "nameserver 192.0.2.1\n",
        "active": "networking.service",
    }
    assert node.take_over("another address\n", leased=False).startswith("failed")
    assert node.seen() == good


def test_a_takeover_that_was_cut_off_is_put_back_by_the_next_one_that_fails(node: Node) -> None:
    (node.root / "etc/netplan").rename(node.state / "netplan")
    (node.root / "etc/netplan").mkdir()
    node.take_over("the bridge\n", leased=False)
    assert node.seen()["etc/netplan/50-cloud-init.yaml"] == "by cloud-init\n"
