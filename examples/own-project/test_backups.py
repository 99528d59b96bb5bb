"""Tests of our playbook on a real PVE, through its API."""

import pytest
import requests


def test_the_storage_takes_backups(api):
    storage = api.storage("backups").get()
    assert storage["type"] == "dir"
    assert set(storage["content"].split(",")) == {"backup", "iso"}


def test_a_vm_can_be_created_and_deleted(api, nested_pve):
    guests = api.nodes(nested_pve.node).qemu
    guests.create(vmid=4711, name="created-by-a-test", memory=512)
    try:
        assert guests(4711).config.get()["name"] == "created-by-a-test"
    finally:
        guests(4711).delete()


def test_the_certificate_is_checked(nested_pve):
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(nested_pve.api_url, timeout=30)


def test_a_second_run_of_the_playbook_changes_nothing(nested_pve):
    assert nested_pve.run_playbook("playbooks/backup-storage.yml").changed == 0
