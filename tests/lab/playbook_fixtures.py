"""Nodes of a lab on which plain `ansible-playbook` ran the playbooks, and their state before and after.

Running the playbooks takes minutes and many tests check their results: so session fixtures run them and
record the node's state, and tests check the records, in any order. One node becomes Proxmox VE with a bridge
(further steps are in `setup_fixtures`); a clone of it gets a static address.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from lab.playbook_node import Node, Played

from pytest_nestedpve.lab import lifecycle
from pytest_nestedpve.lab.lifecycle import LabInfo

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
      addresses: [{address}/24]
      routes: [{{to: default, via: {net}.1}}]
      nameservers: {{addresses: [{net}.1]}}
"""
ADDRESSES = "ip -4 -br address | grep -v ^lo; ip -4 route show default"


@pytest.fixture(scope="session")
def playbook_lab() -> Iterator[LabInfo]:
    name = f"test-{os.getpid()}-play"
    try:
        yield lifecycle.start(name, hand=True, report=lambda _text: None)
    finally:
        lifecycle.stop(name)


@dataclass(frozen=True)
class Fresh:
    """Debian as in the image, and after playbooks that have to fail."""

    node: Node
    hosts: str
    to_remove: str
    managers: str
    before: str
    no_card: Played
    no_address: Played
    no_gateway: Played
    after: str


@pytest.fixture(scope="session")
def fresh(playbook_lab: LabInfo, tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    # A short name, as the path of the control socket is limited.
    node = Node(playbook_lab, 9911, "playbooks", tmp_path_factory.mktemp("n"))
    node.create()
    node.start()
    return Fresh(
        node,
        hosts=node.sh("getent hosts $(hostname); cat /etc/hosts"),
        to_remove=node.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n' linux-image-amd64 os-prober"),
        managers=node.sh("ls /etc/netplan; systemctl is-active systemd-networkd systemd-resolved"),
        before=node.sh(LOOK),
        no_card=node.play("nested-pve-network.yml", nested_pve_nic="eth7"),
        no_address=node.play(
            "nested-pve-network.yml", nested_pve_network_mode="static", nested_pve_address="auto"
        ),
        no_gateway=node.play(
            "nested-pve-network.yml", nested_pve_network_mode="static", nested_pve_address="203.0.113.9/24"
        ),
        after=node.sh(LOOK),
    )


@dataclass(frozen=True)
class Installed:
    """After two runs of pve-install.yml, with a snapshot named installed."""

    node: Node
    first: Played
    second: Played
    version: str
    services: str
    packages: str
    repositories: str
    update: str
    hosts: str


@pytest.fixture(scope="session")
def installed(fresh: Fresh) -> Installed:
    node = fresh.node
    first = node.play_successfully("pve-install.yml")
    result = Installed(
        node,
        first,
        second=node.play_successfully("pve-install.yml"),
        version=node.sh("pveversion"),
        services=node.sh("systemctl is-active pve-cluster pvedaemon pveproxy"),
        packages=node.sh("dpkg-query -W -f '${Package} ${db:Status-Status}\\n'"),
        repositories=node.sh("dpkg -L pve-manager | grep sources.list.d; echo; ls /etc/apt/sources.list.d"),
        update=node.sh("apt-get update 2>&1"),
        hosts=node.sh("getent ahostsv4 $(hostname)"),
    )
    node.snapshot("installed")
    return result


@dataclass(frozen=True)
class Bridged:
    """After nested-pve-network.yml by DHCP, after a reboot, and after a second run."""

    node: Node
    old_ip: str
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


@pytest.fixture(scope="session")
def bridged(installed: Installed) -> Bridged:
    node = installed.node
    old_ip = node.ip
    node.play_successfully("nested-pve-network.yml", pve_repository_url=node.variables["pve_repository_url"])
    state = {
        "address": node.sh("ip -4 -br address show dev vmbr0"),
        "cards": node.sh("ip -br link show master vmbr0; ip -4 -br address show dev eth0"),
        "client": node.sh(
            "pgrep -a -F /run/dhclient.vmbr0.pid; cat /proc/$(cat /run/dhclient.vmbr0.pid)/cgroup"
        ),
        "names": node.sh("getent ahostsv4 download.proxmox.com"),
        "resolver": node.sh("test -L /etc/resolv.conf && echo a link; cat /etc/resolv.conf"),
        "managers": node.sh(
            "for unit in systemd-networkd.service systemd-networkd.socket systemd-resolved NetworkManager; do"
            " echo $unit $(systemctl is-active $unit) $(systemctl is-enabled $unit 2>/dev/null); done;"
            " ls /etc/netplan"
        ),
    }
    run_network = node.succeeds("test -d /run/network")
    node.sh("echo 192.0.2.7 of-an-earlier-boot >> /etc/hosts")
    node.reboot()
    return Bridged(
        node,
        old_ip,
        **state,
        run_network=run_network,
        after_reboot=node.sh("ip -4 -br address show dev vmbr0; ip -4 route show default"),
        services=node.sh("systemctl is-active pve-cluster pveproxy networking; ls -d /run/network"),
        names_after=node.sh("getent ahostsv4 download.proxmox.com"),
        hosts_after=node.sh("getent ahostsv4 $(hostname); cat /etc/hosts"),
        second=node.play_successfully("nested-pve-network.yml"),
    )


@dataclass(frozen=True)
class Changed:
    """A clone of the installed node: with a bridge by netplan, then with another, static address."""

    node: Node
    old_ip: str
    new_ip: str
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


@pytest.fixture(scope="session")
def changed(installed: Installed) -> Changed:
    node = installed.node.clone(9912, "elsewhere", "installed")
    node.start()
    address, net = node.ip, node.ip.rpartition(".")[0]
    node.sh(
        "rm /etc/netplan/*; umask 077; cat > /etc/netplan/10-own.yaml;"
        " echo 'network: {config: disabled}' > /etc/cloud/cloud.cfg.d/10-own.cfg; netplan generate",
        data=NETPLAN.format(address=address, net=net),
    )
    node.sh(
        "systemd-run --on-active=0.2 --timer-property=AccuracySec=50ms systemctl restart systemd-networkd"
    )
    node.await_success("ip -4 -br address show dev vmbr0 | grep -q . && getent hosts download.proxmox.com")
    kept = node.play_successfully("nested-pve-network.yml")
    kept_network = node.sh("ls /etc/netplan /etc/network; systemctl is-active systemd-networkd; " + ADDRESSES)
    lock = node.sh(
        "export IFUPDOWN2_NO_IFRELOAD=1; apt-get -qy install ifupdown2 isc-dhcp-client >/dev/null 2>&1;"
        " test -e /run/network || echo missing; ifreload -a 2>&1; echo rc $?"
    )
    # Outside the range of father's DHCP server, which the other node may use.
    new_ip = f"{net}.251"
    # Without nested_pve_gateway the present gateway is kept.
    static = {
        "nested_pve_network_mode": "static",
        "nested_pve_address": f"{new_ip}/24",
        "pve_repository_url": node.variables["pve_repository_url"],
    }
    cut = node.play("nested-pve-network.yml", **static, nested_pve_network_reconnect_timeout=2)
    node.await_login()
    second = node.play_successfully("nested-pve-network.yml", **static)
    state = {
        "network": node.sh(ADDRESSES),
        "hosts": node.sh("getent ahostsv4 $(hostname)"),
        "certificate": node.sh("openssl x509 -in /etc/pve/local/pve-ssl.pem -noout -ext subjectAltName"),
    }
    third = node.play_successfully("nested-pve-network.yml", **static)
    node.reboot()
    after_reboot = node.sh(
        "systemctl is-active pve-cluster; getent hosts download.proxmox.com; getent ahostsv4 $(hostname);"
        + ADDRESSES
    )
    # Too long for a link's name: fails only after the old network was stopped.
    refused = node.play(
        "nested-pve-network.yml",
        nested_pve_bridge="vmbr-much-too-long",
        nested_pve_network_takeover_timeout=2,
    )
    put_back = node.sh(ADDRESSES)
    return Changed(
        node, address, new_ip, lock, kept, kept_network, cut, second, **state, third=third,
        after_reboot=after_reboot, refused=refused, put_back=put_back,
    )  # fmt: skip
