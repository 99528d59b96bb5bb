"""The nested PVE of this project: its size, its set-up, and the API client of our tests."""

from pathlib import Path

import pytest
from proxmoxer import ProxmoxAPI

from pytest_nestedpve import NestedPve, Phase, PveError, digest_of

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
        Phase(
            "backup_storage", "add our storage", add_storage, find_storage, timeout=300, inputs=storage_inputs
        )
    )


def add_storage(environment):
    result = NestedPve(environment).run_playbook(PLAYBOOK)
    return {"did": f"{result.changed} changed", **find_storage(environment)}


def find_storage(environment):
    try:
        return {"content": environment.inner.api.get("/storage/backups")["content"]}
    except PveError:
        return None


def storage_inputs(environment):
    # On a kept environment the phase runs again if one of these has changed.
    return [digest_of(PLAYBOOK, [HERE / "roles"]), dict(environment.settings.extra_vars)]


@pytest.fixture(scope="session")
def api(nested_pve):
    """A proxmoxer client, as for any PVE; the certificate is verified."""
    host = nested_pve.api_url.removeprefix("https://")
    account, _, secret = nested_pve.api_token.partition("=")
    user, _, name = account.partition("!")
    return ProxmoxAPI(
        host, user=user, token_name=name, token_value=secret, verify_ssl=str(nested_pve.ca_file), timeout=30
    )
