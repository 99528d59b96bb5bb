"""probe.py and takeover.sh, on the files of a node in a directory, with replaced commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILES = Path(__file__).parents[2] / "playbooks/roles/nested_pve_network/files"
STUB = "../run/systemd/resolve/stub-resolv.conf"
#: A unit is active if its file exists. The bridge gets its address if `leased` exists.
SYSTEMCTL = """\
case "$1 $2" in
"is-active --quiet") test -e active/$3 ;;
"cat "*) test -e active/$2 ;;
"disable --now") shift 2; for unit; do rm -f active/$unit; done ;;
"enable --now") touch active/$3 ;;
"restart "*) touch active/$2 ;;
esac
"""
IP = 'case "$*" in *"-o addr show"*) [ ! -e leased ] || echo "3: vmbr0 inet 192.0.2.5/24" ;; esac'


class Node:
    """A node whose files are below `root`; `state` is the directory of the takeover."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.state = root / "var/lib/nested-pve/network"
        for name in ("etc/netplan", "etc/network", "etc/cloud/cloud.cfg.d", "active", "bin"):
            (root / name).mkdir(parents=True)
        self.state.mkdir(parents=True)
        text = (FILES / "takeover.sh").read_text()
        for place in ("/etc/", "/run/", "/var/lib/"):
            text = text.replace(place, f"{root}{place}")
        (root / "takeover.sh").write_text(text)
        quiet = ("ifdown", "ifquery", "ifreload", "pkill", "arping", "netplan")
        for name, script in {"systemctl": SYSTEMCTL, "ip": IP, **dict.fromkeys(quiet, "")}.items():
            (root / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
            (root / "bin" / name).chmod(0o755)

    def take_over(self, interfaces: str, *, leased: bool, arguments: tuple[str, ...] = ()) -> str:
        """Run the takeover; the text of its result file."""
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

    def network_state(self) -> dict[str, str]:
        """The files of the network configuration, links by their targets, and the active units."""
        files = [path for path in (self.root / "etc").rglob("*") if path.is_symlink() or path.is_file()]
        contents = {
            str(path.relative_to(self.root)): str(path.readlink()) if path.is_symlink() else path.read_text()
            for path in files
        }
        return contents | {"active": " ".join(sorted(path.name for path in (self.root / "active").iterdir()))}


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node after cloud-init: netplan, networkd, resolved; and NetworkManager as well."""
    new = Node(tmp_path)
    (tmp_path / "etc/netplan/50-cloud-init.yaml").write_text("by cloud-init\n")
    (tmp_path / "etc/resolv.conf").symlink_to(STUB)
    for unit in ("NetworkManager.service", "systemd-networkd.service", "systemd-resolved.service"):
        (tmp_path / "active" / unit).touch()
    return new


def test_a_takeover_that_fails_restores_the_former_configuration(node: Node) -> None:
    before = node.network_state()
    # harmless: without interfaces, and not enabled at boot
    before["active"] = " ".join(sorted([*before["active"].split(), "networking.service"]))
    assert node.take_over("the bridge\n", leased=False).startswith("failed the bridge vmbr0 got no address")
    assert node.network_state() == before


def test_a_later_takeover_that_fails_restores_the_result_of_the_former_one(node: Node) -> None:
    assert node.take_over("the bridge\n", leased=True) == "ok 192.0.2.5/24"
    good = node.network_state()
    assert good == {
        "etc/network/interfaces": "the bridge\n",
        "etc/resolv.conf": "nameserver 192.0.2.1\n",
        "active": "networking.service",
    }
    assert node.take_over("another address\n", leased=False).startswith("failed")
    assert node.network_state() == good


def test_an_interrupted_takeover_is_undone_by_the_next_one_that_fails(node: Node) -> None:
    (node.root / "etc/netplan").rename(node.state / "netplan")
    (node.root / "etc/netplan").mkdir()
    node.take_over("the bridge\n", leased=False)
    assert node.network_state()["etc/netplan/50-cloud-init.yaml"] == "by cloud-init\n"


@pytest.mark.parametrize(("arguments", "servers"), [((), "192.0.2.53"), (("names",), "192.0.2.1")])
def test_named_servers_replace_those_of_a_plain_file_and_servers_in_use_do_not(
    node: Node, arguments: tuple[str, ...], servers: str
) -> None:
    (node.root / "active/systemd-resolved.service").unlink()
    file = node.root / "etc/resolv.conf"
    file.unlink()
    file.write_text("nameserver 192.0.2.53\n")
    assert node.take_over("the bridge\n", leased=False, arguments=arguments).startswith("failed")
    assert file.read_text() == "nameserver 192.0.2.53\n"
    assert node.take_over("the bridge\n", leased=True, arguments=arguments).startswith("ok")
    assert file.read_text() == f"nameserver {servers}\n"


@pytest.mark.parametrize(
    ("device", "address", "gateway", "reachable"),
    [
        ("eth0", "192.0.2.9/24", "192.0.2.1", True),
        ("eth0", "198.51.100.9/24", "192.0.2.1", False),
        ("eth0", "auto", "192.0.2.1", False),
        ("eth1", "198.51.100.9/24", "", True),
    ],
    ids=["in the new network", "outside of it", "no address", "by another card"],
)
def test_the_probe_reports_the_cards_gateway_and_whether_the_new_address_reaches_it(
    tmp_path: Path, device: str, address: str, gateway: str, reachable: bool
) -> None:
    links = [{"ifname": name, "address": f"52:54:00:00:00:0{name[-1]}"} for name in ("eth0", "eth1")]
    route = [{"dst": "default", "gateway": "192.0.2.1", "dev": device}]
    script = (
        f"case \"$*\" in *link*) echo '{json.dumps(links)}' ;; *route*) echo '{json.dumps(route)}' ;; esac"
    )
    (tmp_path / "ip").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "ip").chmod(0o755)
    done = subprocess.run(
        [sys.executable, FILES / "probe.py", "vmbr0", "eth0", "", address],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert (report["gateway"], report["gateway_reachable"]) == (gateway, reachable)
