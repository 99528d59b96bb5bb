"""The first-boot script of a clone, on files in a directory: the bridge of its network configuration."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pytest_nestedpve.setup.generalise import FIRST_BOOT, GENERALISE

MAC = "bc:24:11:00:00:01"
INTERFACES = """\
auto lo
iface lo inet loopback

iface eth0 inet manual

auto vmbr0
iface vmbr0 inet {was}
        bridge-ports eth0
        bridge-stp off

source /etc/network/interfaces.d/*
"""
DHCP = "      subnets:\n      - type: dhcp4\n"
STATIC = """\
      subnets:
      - type: static
        address: '10.0.0.5'
        netmask: '255.255.254.0'
        gateway: '10.0.0.1'
"""
DRIVE = """\
version: 1
config:
    - type: physical
      name: eth0
      mac_address: '{mac}'
{subnets}    - type: nameserver
      address:
      - '10.0.0.2'
"""


class Clone:
    """The files of a clone that boots for the first time; the name of its only card is `card`."""

    def __init__(self, path: Path, card: str = "eth0", was: str = "dhcp", subnets: str = DHCP) -> None:
        self.path = path
        for name in (
            "etc/network",
            "etc/systemd/network",
            "var/lib/cloud/seed/nocloud",
            f"sys/class/net/{card}",
        ):
            (path / name).mkdir(parents=True)
        (path / "etc/network/interfaces").write_text(INTERFACES.format(was=was))
        (path / f"sys/class/net/{card}/address").write_text(MAC + "\n")
        drive = path / "var/lib/cloud/seed/nocloud/network-config"
        drive.write_text(DRIVE.format(mac=MAC, subnets=subnets))

    def boot(self, part: str) -> int:
        script = self.path / "first-boot"
        text = FIRST_BOOT
        for place in ("/etc/", "/var/", "/sys/"):
            text = text.replace(f'"{place}', f'"{self.path}{place}')
        script.write_text(text)
        (self.path / f"first-boot.{part}").touch()
        return subprocess.run([sys.executable, str(script), part], check=False).returncode

    def read(self, name: str) -> str:
        return (self.path / name).read_text()


def test_a_clone_in_a_network_with_dhcp_keeps_its_bridge(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    assert clone.boot("network") == 0
    assert clone.read("etc/network/interfaces") == INTERFACES.format(was="dhcp")
    assert f"MACAddress={MAC}" in clone.read("etc/systemd/network/10-nested-pve-eth0.link")


def test_a_clone_gets_the_static_address_of_its_cloud_init_drive(tmp_path: Path) -> None:
    clone = Clone(tmp_path, subnets=STATIC)
    assert clone.boot("network") == 0
    static = "static\n        address 10.0.0.5/23\n        gateway 10.0.0.1"
    assert clone.read("etc/network/interfaces") == INTERFACES.format(was=static)
    assert clone.read("etc/resolv.conf") == "nameserver 10.0.0.2\n"


def test_a_clone_of_a_template_with_a_static_address_uses_dhcp(tmp_path: Path) -> None:
    was = "static\n        address 10.9.9.9/24\n        gateway 10.9.9.1"
    clone = Clone(tmp_path, was=was)
    assert clone.boot("network") == 0
    assert clone.read("etc/network/interfaces") == INTERFACES.format(was="dhcp")


def test_the_port_of_the_bridge_is_the_card_under_its_new_name(tmp_path: Path) -> None:
    clone = Clone(tmp_path, card="ens18")
    assert clone.boot("network") == 0
    assert clone.read("etc/network/interfaces") == INTERFACES.format(was="dhcp").replace("eth0", "ens18")
    assert (tmp_path / "etc/systemd/network/10-nested-pve-ens18.link").exists()


def test_the_script_runs_at_the_first_boot_only(tmp_path: Path) -> None:
    clone = Clone(tmp_path)
    clone.boot("network")
    assert not (tmp_path / "first-boot.network").exists()


@pytest.mark.parametrize("drive", ["", "version: 1\nconfig: []\n"])
def test_without_a_network_configuration_no_file_is_changed(tmp_path: Path, drive: str) -> None:
    clone = Clone(tmp_path)
    (tmp_path / "var/lib/cloud/seed/nocloud/network-config").write_text(drive)
    assert clone.boot("network") == 0
    assert clone.read("etc/network/interfaces") == INTERFACES.format(was="dhcp")


def test_the_scripts_have_no_syntax_errors(tmp_path: Path) -> None:
    compile(FIRST_BOOT, "first-boot", "exec")
    script = tmp_path / "generalise"
    script.write_text(GENERALISE)
    subprocess.run(["sh", "-n", script], check=True)
