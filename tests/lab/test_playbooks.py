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

NETPLAN = """\
network:
  version: 2
  ethernets: {{eth0: {{}}}}
  bridges:
    vmbr0:
      interfaces: [eth0]
      addresses: [{own}/24]
      routes: [{{to: default, via: {net}.1}}]
      nameservers: {{addresses: [{net}.1]}}
"""
ADDRESSES = "ip -4 -br address | grep -v ^lo; ip -4 route show default"


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


@dataclass(frozen=True)
class Changed:
    """A clone of the installed node: a bridge that netplan made, then another address, a static one."""

    node: Node
    own: str
    wanted: str
    lock: str
    kept: Played
    kept_network: str
    cut: Played
    second: Played
    network: str
    hosts: str
    certificate: str
    third: Played
    after_reboot: str
    refused: Played
    put_back: str


@pytest.fixture(scope="module")
def changed(installed: Installed) -> Changed:
    node = installed.node.clone(9912, "elsewhere", "installed")
    node.start()
    own, net = node.ip, node.ip.rpartition(".")[0]
    node.sh(
        "rm /etc/netplan/*; umask 077; cat > /etc/netplan/10-own.yaml;"
        " echo 'network: {config: disabled}' > /etc/cloud/cloud.cfg.d/10-own.cfg; netplan generate",
        data=NETPLAN.format(own=own, net=net),
    )
    node.sh(
        "systemd-run --on-active=0.2 --timer-property=AccuracySec=50ms systemctl restart systemd-networkd"
    )
    node.await_answer("ip -4 -br address show dev vmbr0 | grep -q . && getent hosts download.proxmox.com")
    kept = node.done("nested-pve-network.yml")
    kept_network = node.sh("ls /etc/netplan /etc/network; systemctl is-active systemd-networkd; " + ADDRESSES)
    lock = node.sh(
        "export IFUPDOWN2_NO_IFRELOAD=1; apt-get -qy install ifupdown2 isc-dhcp-client >/dev/null 2>&1;"
        " test -e /run/network || echo missing; ifreload -a 2>&1; echo rc $?"
    )
    wanted = f"{net}.{240 if own != f'{net}.240' else 241}"
    static = {
        "nested_pve_network_mode": "static",
        "nested_pve_address": f"{wanted}/24",
        "nested_pve_gateway": f"{net}.1",
        "pve_repository_url": node.variables["pve_repository_url"],
    }
    cut = node.play("nested-pve-network.yml", **static, nested_pve_network_reconnect_timeout=2)
    node.arrive()
    second = node.done("nested-pve-network.yml", **static)
    seen = {
        "network": node.sh(ADDRESSES),
        "hosts": node.sh("getent ahostsv4 $(hostname)"),
        "certificate": node.sh("openssl x509 -in /etc/pve/local/pve-ssl.pem -noout -ext subjectAltName"),
    }
    third = node.done("nested-pve-network.yml", **static)
    node.reboot()
    after_reboot = node.sh(
        "systemctl is-active pve-cluster; getent hosts download.proxmox.com; getent ahostsv4 $(hostname);"
        + ADDRESSES
    )
    # Too long for a link's name, which nobody notices before the old network is gone.
    refused = node.play(
        "nested-pve-network.yml",
        nested_pve_bridge="vmbr-much-too-long",
        nested_pve_network_takeover_timeout=2,
    )
    put_back = node.sh(ADDRESSES)
    return Changed(
        node, own, wanted, lock, kept, kept_network, cut, second, **seen, third=third,
        after_reboot=after_reboot, refused=refused, put_back=put_back,
    )  # fmt: skip


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


# -- nested-pve-network.yml where a bridge is there already; by a static address


def test_a_bridge_that_is_there_with_the_address_is_left_alone(changed: Changed) -> None:
    assert [task for task in changed.kept.told_changes() if "nested_pve_network" in task] == []
    assert "10-own.yaml" in changed.kept_network
    assert "\nactive\n" in changed.kept_network
    assert f"vmbr0            UP             {changed.own}/24" in changed.kept_network
    assert "interfaces\n" not in changed.kept_network


def test_a_clone_with_a_new_name_and_address_is_mended(changed: Changed) -> None:
    tasks = changed.kept.told_changes()
    assert "nested_pve_identity : Put the name at its address" in tasks
    assert "nested_pve_identity : Start pmxcfs anew" in tasks
    assert "nested_pve_identity : Renew the certificate" in tasks


def test_ifreload_takes_a_missing_run_network_for_another_instance_and_the_takeover_does_not(
    changed: Changed,
) -> None:
    """The trap as it is met, without the cure; with it, the same packages took the network over."""
    assert changed.lock.splitlines()[0] == "missing"
    assert "Another instance of this program is already running" in changed.lock
    assert changed.lock.endswith("rc 89")
    assert changed.wanted in changed.network


def test_a_static_address_replaces_the_one_before(changed: Changed) -> None:
    assert changed.node.ip == changed.wanted
    address, route = changed.network.splitlines()
    assert address.split() == ["vmbr0", "UP", f"{changed.wanted}/24"]
    assert "dev vmbr0" in route


def test_with_the_address_the_playbook_loses_the_node_and_a_second_run_goes_on(changed: Changed) -> None:
    assert changed.cut.rc != 0
    assert "Wait for the node to answer" in changed.cut.output
    assert [task for task in changed.second.told_changes() if "nested_pve_network" in task] == []


def test_hosts_file_and_certificate_follow_a_changed_address(changed: Changed) -> None:
    assert {line.split()[0] for line in changed.hosts.splitlines()} == {changed.wanted}
    assert f"IP Address:{changed.wanted}," in changed.certificate
    assert changed.own not in changed.certificate


def test_a_second_run_with_a_static_address_changes_nothing(changed: Changed) -> None:
    assert changed.third.told_changes() == []
    assert changed.third.changed == 0


def test_a_static_address_and_its_names_survive_a_reboot(changed: Changed) -> None:
    lines = changed.after_reboot.splitlines()
    assert lines[0] == "active"
    assert "download.proxmox.com" in lines[1]
    assert lines[2].split()[0] == changed.wanted
    assert lines[-2].split() == ["vmbr0", "UP", f"{changed.wanted}/24"]
    assert lines[-1].startswith("default via")


def test_a_takeover_that_fails_puts_the_old_network_back(changed: Changed) -> None:
    assert changed.refused.rc != 0
    assert "got no address within 2 s" in changed.refused.output
    assert changed.put_back == "\n".join(changed.after_reboot.splitlines()[-2:])
