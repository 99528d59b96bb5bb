"""pve-install.yml and nested-pve-network.yml: each trap of real hosts met in the lab, and mastered."""

from __future__ import annotations

import re

from lab.playbook_fixtures import Bridged, Changed, Fresh, Installed

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


def test_an_address_that_does_not_reach_the_gateway_fails_before_anything_is_changed(fresh: Fresh) -> None:
    assert fresh.no_gateway.rc != 0
    assert "found it outside: set nested_pve_gateway; nothing was changed" in fresh.no_gateway.output
    assert fresh.no_gateway.changed == 0


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
    assert "nested_pve_identity : Map the name to its address" in tasks
    assert "nested_pve_identity : Restart pmxcfs" in tasks
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
    assert changed.own not in re.findall(r"[0-9.]+", changed.certificate), "as a whole: .25 is no .251"


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
