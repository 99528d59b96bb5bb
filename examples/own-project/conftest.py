"""The nested PVE of this project: its size, its set-up, and how our tests talk to it."""

from pathlib import Path

import pytest
from proxmoxer import ProxmoxAPI

from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.session.nested_pve import NestedPve
from pytest_nestedpve.setup.ansible.dependencies import digest_of

HERE = Path(__file__).parent
PLAYBOOK = HERE / "playbooks" / "backup-storage.yml"

# No test of ours needs a VM inside the nested PVE.
UNUSED = {"download_image", "leaf_provision", "leaf_start", "leaf_wait_ip", "sync_repos", "verify_ssh_chain"}


@pytest.fixture(scope="session")
def nested_pve_memory():
    return "4G"


def pytest_nestedpve_phases(phases):
    phases[:] = [phase for phase in phases if phase.name not in UNUSED]
    phases.append(
        Phase("backup_storage", "add our storage", add_storage, find_storage, timeout=300, inputs=what_counts)
    )


def add_storage(environment):
    result = NestedPve(environment).run_playbook(PLAYBOOK)
    return {"did": f"{result.changed} changed", **find_storage(environment)}


def find_storage(environment):
    try:
        return {"content": environment.inner.api.get("/storage/backups")["content"]}
    except PveError:
        return None


def what_counts(environment):
    # On a kept environment the phase is done again when one of these has changed.
    return [digest_of(PLAYBOOK, [HERE / "roles"]), dict(environment.settings.extra_vars)]


@pytest.fixture(scope="session")
def api(nested_pve):
    """proxmoxer, as it would talk to any PVE: the certificate is checked."""
    host = nested_pve.api_url.removeprefix("https://")
    account, _, secret = nested_pve.api_token.partition("=")
    user, _, name = account.partition("!")
    return ProxmoxAPI(
        host, user=user, token_name=name, token_value=secret, verify_ssl=str(nested_pve.ca_file), timeout=30
    )
