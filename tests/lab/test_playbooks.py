"""The playbooks by plain `ansible-playbook`, each trap of real hosts met in the lab.

What happens to a node costs minutes, what is to be seen afterwards is a dozen promises: so fixtures play and
look, tests judge what they saw, and the order of the tests does not matter. One node goes the whole way
(Debian, Proxmox VE, bridge, consumer's set-up), a clone of it the way with a static address.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from lab.playbook_node import Node, Played

from pytest_nestedpve.lab import world
from pytest_nestedpve.lab.world import LabInfo

LOOK = """
dpkg-query -W | sha256sum
find /etc /root -type f ! -path '*/.ansible/*' | sort | xargs sha256sum | sha256sum; ls /var/lib
ip -4 -br address; ip -4 route
systemctl is-active systemd-networkd systemd-resolved; resolvectl dns eth0
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[LabInfo]:
    name = f"test-{os.getpid()}-play"
    try:
        yield world.start(name, hand=True, say=lambda _text: None)
    finally:
        world.stop(name)


@dataclass(frozen=True)
class Fresh:
    """Debian as the image has it, and after playbooks that had to refuse."""

    node: Node
    hosts: str
    unwanted: str
    managers: str
    before: str
    no_card: Played
    no_address: Played
    after: str


@pytest.fixture(scope="module")
def fresh(lab: LabInfo, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    # Short: the control socket's path has to fit.
    node = Node(lab, 9911, "playbooks", tmp_path_factory.mktemp("n"))
    node.create()
    node.start()
    return Fresh(
        node,
        hosts=node.sh("getent hosts $(hostname); cat /etc/hosts"),
        unwanted=node.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n' linux-image-amd64 os-prober"),
        managers=node.sh("ls /etc/netplan; systemctl is-active systemd-networkd systemd-resolved"),
        before=node.sh(LOOK),
        no_card=node.play("nested-pve-network.yml", nested_pve_nic="eth7"),
        no_address=node.play(
            "nested-pve-network.yml", nested_pve_network_mode="static", nested_pve_address="auto"
        ),
        after=node.sh(LOOK),
    )


@dataclass(frozen=True)
class Installed:
    """After pve-install.yml, twice; a snapshot of that name is there."""

    node: Node
    first: Played
    second: Played
    version: str
    services: str
    packages: str
    repositories: str
    update: str
    hosts: str


@pytest.fixture(scope="module")
def installed(fresh: Fresh) -> Installed:
    node = fresh.node
    first = node.done("pve-install.yml")
    seen = Installed(
        node,
        first,
        second=node.done("pve-install.yml"),
        version=node.sh("pveversion"),
        services=node.sh("systemctl is-active pve-cluster pvedaemon pveproxy"),
        packages=node.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n'"),
        repositories=node.sh("dpkg -L pve-manager | grep sources.list.d; echo; ls /etc/apt/sources.list.d"),
        update=node.sh("apt-get update 2>&1"),
        hosts=node.sh("getent ahostsv4 $(hostname)"),
    )
    node.snapshot("installed")
    return seen


@dataclass(frozen=True)
class Bridged:
    """After nested-pve-network.yml by DHCP, after a reboot, and after a second run."""

    node: Node
    old: str
    address: str
    cards: str
    client: str
    names: str
    resolver: str
    managers: str
    run_network: bool
    after_reboot: str
    services: str
    names_after: str
    hosts_after: str
    second: Played


@pytest.fixture(scope="module")
def bridged(installed: Installed) -> Bridged:
    node = installed.node
    old = node.ip
    node.done("nested-pve-network.yml", pve_repository_url=node.variables["pve_repository_url"])
    seen = {
        "address": node.sh("ip -4 -br address show dev vmbr0"),
        "cards": node.sh("ip -br link show master vmbr0; ip -4 -br address show dev eth0"),
        "client": node.sh(
            "pgrep -a -F /run/dhclient.vmbr0.pid; cat /proc/$(cat /run/dhclient.vmbr0.pid)/cgroup"
        ),
        "names": node.sh("getent ahostsv4 download.proxmox.com"),
        "resolver": node.sh("test -L /etc/resolv.conf && echo a link; cat /etc/resolv.conf"),
        "managers": node.sh(
            "for each in systemd-networkd.service systemd-networkd.socket systemd-resolved NetworkManager; do"
            " echo $each $(systemctl is-active $each) $(systemctl is-enabled $each 2>/dev/null); done;"
            " ls /etc/netplan"
        ),
    }
    run_network = node.true("test -d /run/network")
    node.sh("echo 192.0.2.7 of-an-earlier-boot >> /etc/hosts")
    node.reboot()
    return Bridged(
        node,
        old,
        **seen,
        run_network=run_network,
        after_reboot=node.sh("ip -4 -br address show dev vmbr0; ip -4 route show default"),
        services=node.sh("systemctl is-active pve-cluster pveproxy networking; ls -d /run/network"),
        names_after=node.sh("getent ahostsv4 download.proxmox.com"),
        hosts_after=node.sh("getent ahostsv4 $(hostname); cat /etc/hosts"),
        second=node.done("nested-pve-network.yml"),
    )


# -- the traps themselves: the lab has them


def test_the_image_puts_the_name_at_a_loopback_address_as_cloud_init_does(fresh: Fresh) -> None:
    assert fresh.hosts.startswith("127.0.1.1")
    assert "manage_etc_hosts" in fresh.hosts


def test_the_image_has_debians_kernel_os_prober_and_netplan(fresh: Fresh) -> None:
    assert fresh.unwanted.split() == ["linux-image-amd64", "installed", "os-prober", "installed"]
    assert fresh.managers.splitlines()[-2:] == ["active", "active"]
    assert ".yaml" in fresh.managers


# -- what cannot work is refused


def test_a_card_that_does_not_exist_fails_before_anything_is_changed(fresh: Fresh) -> None:
    assert fresh.no_card.rc != 0
    assert "expected the network card eth7, found eth0" in fresh.no_card.output
    assert fresh.no_card.changed == 0
    assert fresh.after == fresh.before


def test_a_static_mode_without_an_address_fails_before_anything_is_changed(fresh: Fresh) -> None:
    assert fresh.no_address.rc != 0
    assert "static with nested_pve_address like 192.0.2.9/24" in fresh.no_address.output
    assert fresh.no_address.changed == 0


# -- pve-install.yml


def test_debian_becomes_a_proxmox_ve_that_answers(installed: Installed) -> None:
    assert installed.version.startswith("pve-manager/9.")
    assert installed.services.split() == ["active"] * 3
    assert installed.node.true("pvesh get /version")


def test_the_name_leads_to_the_real_address_so_that_pmxcfs_starts(installed: Installed) -> None:
    assert {line.split()[0] for line in installed.hosts.splitlines()} == {installed.node.ip}


def test_the_enterprise_repository_that_pve_brings_is_removed_and_apt_updates(installed: Installed) -> None:
    brought, _, there = installed.repositories.partition("\n\n")
    assert "pve-enterprise.sources" in brought
    assert "pve-enterprise" not in there
    assert "proxmox.sources" in there
    assert "enterprise.proxmox.com" not in installed.update


def test_debians_kernel_and_os_prober_are_removed(installed: Installed) -> None:
    lines = installed.packages.splitlines()
    assert "proxmox-default-kernel installed" in lines
    assert "linux-image-amd64 installed" not in lines
    assert "os-prober installed" not in lines


def test_a_second_run_of_pve_install_changes_nothing(installed: Installed) -> None:
    assert installed.first.changed > 0
    assert installed.second.told_changes() == []
    assert installed.second.changed == 0


# -- nested-pve-network.yml by DHCP


def test_the_bridge_takes_the_address_over_and_the_card_is_its_port(bridged: Bridged) -> None:
    assert f" {bridged.old}/" in bridged.address
    card, *addresses = bridged.cards.splitlines()
    assert card.startswith("eth0")
    assert not any(bridged.old in line for line in addresses)


def test_the_dhcp_client_is_alive_after_the_takeover(bridged: Bridged) -> None:
    assert "dhclient" in bridged.client
    assert "networking.service" in bridged.client


def test_names_resolve_after_resolveds_link_is_gone(bridged: Bridged) -> None:
    assert bridged.names
    assert "127.0.0.53" not in bridged.resolver
    assert "a link" not in bridged.resolver


def test_other_managers_of_the_network_are_off_for_good(bridged: Bridged) -> None:
    lines = bridged.managers.splitlines()
    assert lines[0] == "systemd-networkd.service inactive disabled"
    assert lines[1] == "systemd-networkd.socket inactive disabled"
    assert lines[2] == "systemd-resolved inactive disabled"
    assert lines[3].startswith("NetworkManager inactive")
    assert lines[4:] == []  # netplan's files


def test_a_node_survives_a_reboot_after_the_takeover_with_its_address_and_names(bridged: Bridged) -> None:
    assert f" {bridged.old}/" in bridged.after_reboot
    assert "default via" in bridged.after_reboot
    assert bridged.names_after
    assert bridged.run_network
    assert bridged.services.split() == ["active", "active", "active", "/run/network"]


def test_pve_cluster_starts_though_cloud_init_wrote_the_hosts_file_anew(bridged: Bridged) -> None:
    assert "of-an-earlier-boot" not in bridged.hosts_after
    assert bridged.hosts_after.startswith(bridged.old)
    assert bridged.services.startswith("active")


def test_a_second_run_of_the_network_changes_nothing(bridged: Bridged) -> None:
    assert bridged.second.told_changes() == []
    assert bridged.second.changed == 0
