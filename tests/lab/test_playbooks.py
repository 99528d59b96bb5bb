"""pve-install.yml and nested-pve-network.yml on a lab that has the known problems of real hosts."""

from __future__ import annotations

import re

from lab.playbook_fixtures import Bridged, Changed, Fresh, Installed

# -- problems of real hosts that the lab has too


def test_the_image_maps_the_host_name_to_a_loopback_address_as_cloud_init_does(fresh: Fresh) -> None:
    assert fresh.hosts.startswith("127.0.1.1")
    assert "manage_etc_hosts" in fresh.hosts


def test_the_image_has_debians_kernel_os_prober_and_netplan(fresh: Fresh) -> None:
    assert fresh.to_remove.split() == ["linux-image-amd64", "installed", "os-prober", "installed"]
    assert fresh.managers.splitlines()[-2:] == ["active", "active"]
    assert ".yaml" in fresh.managers


# -- impossible settings are refused


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


def test_debian_becomes_a_working_proxmox_ve(installed: Installed) -> None:
    assert installed.version.startswith("pve-manager/9.")
    assert installed.services.split() == ["active"] * 3
    assert installed.node.succeeds("pvesh get /version")


def test_the_host_name_resolves_to_the_real_address_so_that_pmxcfs_starts(installed: Installed) -> None:
    assert {line.split()[0] for line in installed.hosts.splitlines()} == {installed.node.ip}


def test_the_enterprise_repository_of_pve_is_removed_and_apt_update_works(installed: Installed) -> None:
    packaged, _, present = installed.repositories.partition("\n\n")
    assert "pve-enterprise.sources" in packaged
    assert "pve-enterprise" not in present
    assert "proxmox.sources" in present
    assert "enterprise.proxmox.com" not in installed.update


def test_debians_kernel_and_os_prober_are_removed(installed: Installed) -> None:
    lines = installed.packages.splitlines()
    assert "proxmox-default-kernel installed" in lines
    assert "linux-image-amd64 installed" not in lines
    assert "os-prober installed" not in lines


def test_a_second_run_of_pve_install_changes_nothing(installed: Installed) -> None:
    assert installed.first.changed > 0
    assert installed.second.changed_tasks() == []
    assert installed.second.changed == 0


# -- nested-pve-network.yml by DHCP


def test_the_bridge_takes_the_address_over_and_the_card_is_its_port(bridged: Bridged) -> None:
    assert f" {bridged.old_ip}/" in bridged.address
    card, *addresses = bridged.cards.splitlines()
    assert card.startswith("eth0")
    assert not any(bridged.old_ip in line for line in addresses)


def test_the_dhcp_client_runs_after_the_takeover(bridged: Bridged) -> None:
    assert "dhclient" in bridged.client
    assert "networking.service" in bridged.client


def test_names_resolve_without_systemd_resolved(bridged: Bridged) -> None:
    assert bridged.names
    assert "127.0.0.53" not in bridged.resolver
    assert "a link" not in bridged.resolver


def test_other_network_managers_are_disabled(bridged: Bridged) -> None:
    lines = bridged.managers.splitlines()
    assert lines[0] == "systemd-networkd.service inactive disabled"
    assert lines[1] == "systemd-networkd.socket inactive disabled"
    assert lines[2] == "systemd-resolved inactive disabled"
    assert lines[3].startswith("NetworkManager inactive")
    assert lines[4:] == []  # netplan's files


def test_a_node_survives_a_reboot_after_the_takeover_with_its_address_and_names(bridged: Bridged) -> None:
    assert f" {bridged.old_ip}/" in bridged.after_reboot
    assert "default via" in bridged.after_reboot
    assert bridged.names_after
    assert bridged.run_network
    assert bridged.services.split() == ["active", "active", "active", "/run/network"]


def test_pve_cluster_starts_after_cloud_init_rewrote_the_hosts_file(bridged: Bridged) -> None:
    assert "of-an-earlier-boot" not in bridged.hosts_after
    assert bridged.hosts_after.startswith(bridged.old_ip)
    assert bridged.services.startswith("active")


def test_a_second_run_of_the_network_playbook_changes_nothing(bridged: Bridged) -> None:
    assert bridged.second.changed_tasks() == []
    assert bridged.second.changed == 0


# -- nested-pve-network.yml with an existing bridge, and with a static address


def test_an_existing_bridge_with_the_address_is_not_changed(changed: Changed) -> None:
    assert [task for task in changed.kept.changed_tasks() if "nested_pve_network" in task] == []
    assert "10-own.yaml" in changed.kept_network
    assert "\nactive\n" in changed.kept_network
    assert f"vmbr0            UP             {changed.old_ip}/24" in changed.kept_network
    assert "interfaces\n" not in changed.kept_network


def test_the_identity_of_a_clone_follows_its_new_name_and_address(changed: Changed) -> None:
    tasks = changed.kept.changed_tasks()
    assert "nested_pve_identity : Map the name to its address" in tasks
    assert "nested_pve_identity : Restart pmxcfs" in tasks
    assert "nested_pve_identity : Renew the certificate" in tasks


def test_ifreload_fails_without_run_network_and_the_takeover_does_not(
    changed: Changed,
) -> None:
    """ifreload alone fails with these packages; the playbook uses them and takes the network over."""
    assert changed.lock.splitlines()[0] == "missing"
    assert "Another instance of this program is already running" in changed.lock
    assert changed.lock.endswith("rc 89")
    assert changed.new_ip in changed.network


def test_a_static_address_replaces_the_former_one(changed: Changed) -> None:
    assert changed.node.ip == changed.new_ip
    address, route = changed.network.splitlines()
    assert address.split() == ["vmbr0", "UP", f"{changed.new_ip}/24"]
    assert "dev vmbr0" in route


def test_after_a_change_of_address_the_playbook_fails_and_a_second_run_continues(changed: Changed) -> None:
    assert changed.cut.rc != 0
    assert "Wait for the node to answer" in changed.cut.output
    assert [task for task in changed.second.changed_tasks() if "nested_pve_network" in task] == []


def test_hosts_file_and_certificate_follow_a_changed_address(changed: Changed) -> None:
    assert {line.split()[0] for line in changed.hosts.splitlines()} == {changed.new_ip}
    assert f"IP Address:{changed.new_ip}," in changed.certificate
    assert changed.old_ip not in re.findall(r"[0-9.]+", changed.certificate), "compared as whole addresses"


def test_a_second_run_with_a_static_address_changes_nothing(changed: Changed) -> None:
    assert changed.third.changed_tasks() == []
    assert changed.third.changed == 0


def test_a_static_address_and_its_names_survive_a_reboot(changed: Changed) -> None:
    lines = changed.after_reboot.splitlines()
    assert lines[0] == "active"
    assert "download.proxmox.com" in lines[1]
    assert lines[2].split()[0] == changed.new_ip
    assert lines[-2].split() == ["vmbr0", "UP", f"{changed.new_ip}/24"]
    assert lines[-1].startswith("default via")


def test_a_failed_takeover_restores_the_old_network(changed: Changed) -> None:
    assert changed.refused.rc != 0
    assert "got no address within 2 s" in changed.refused.output
    assert changed.put_back == "\n".join(changed.after_reboot.splitlines()[-2:])
