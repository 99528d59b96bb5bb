"""Debian 12 with PVE 8, Debian 13 with PVE 9, and sites without the internet: the values of the variables.

The playbooks' variables are rendered by Ansible itself. There are no recordings of PVE 8: only its
packaging is tested.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_nestedpve.config.settings import PROFILE_KEYS, Settings
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.setup import host_phases, vendor_data
from pytest_nestedpve.setup.ansible import play_variables

pytestmark = pytest.mark.thorough

ROLES = Path(__file__).parents[2] / "playbooks" / "roles"
NAMES = (
    "pve_install_release", "pve_install_repository_url", "pve_install_key_url", "pve_install_key_checksum",
    "pve_install_mirror", "pve_install_http_proxy",
)  # fmt: skip
SITE = {
    "image": "local:import/debian-13-genericcloud-amd64.qcow2",
    "mirror": "http://mirror.site.example/debian",
    "http_proxy": "http://proxy.site.example:3128",
    "pve_repository_url": "http://mirror.site.example/pve",
    "pve_repository_key_url": "http://mirror.site.example/pve.gpg",
    "pve_repository_key_sha256": "ab" * 32,
}
Render = Callable[[str, Mapping[str, Any]], dict[str, Any]]


@pytest.fixture
def render(tmp_path: Path) -> Render:
    """Render the role's variables on a Debian release, with the variables of the phase."""

    def render(release: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        pairs = ", ".join(f"'{name}': {name}" for name in NAMES)
        tasks = [
            {"set_fact": {"distribution_major_version": release, "cacheable": True}},
            {"copy": {"dest": str(tmp_path / "rendered"), "content": f"{{{{ {{ {pairs} }} | to_json }}}}"}},
        ]
        defaults = [str(ROLES / "pve_install" / "defaults" / "main.yml")]
        play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars_files": defaults}
        (tmp_path / "play.yml").write_text(json.dumps([{**play, "tasks": tasks}]))
        (tmp_path / "variables.json").write_text(json.dumps(dict(variables)))
        ansible = str(Path(sys.executable).parent / "ansible-playbook")
        subprocess.run(
            [ansible, "-i", "localhost,", "-e", f"@{tmp_path}/variables.json", str(tmp_path / "play.yml")],
            check=True, capture_output=True, cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"], "HOME": str(tmp_path), "LC_ALL": "C.UTF-8",
                "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
            },
        )  # fmt: skip
        return cast("dict[str, Any]", json.loads((tmp_path / "rendered").read_text()))

    return render


@pytest.mark.parametrize(
    ("release", "suite", "key", "checksum", "keyring"),
    [
        ("12", "bookworm", "proxmox-release-bookworm.gpg", "sha512:", "proxmox-release-bookworm.gpg"),
        ("13", "trixie", "proxmox-archive-keyring-trixie.gpg", "sha256:", "proxmox-archive-keyring.gpg"),
    ],
)
def test_each_debian_release_gets_the_pve_that_belongs_to_it(
    render: Render, release: str, suite: str, key: str, checksum: str, keyring: str
) -> None:
    rendered = render(release, play_variables.pve_install(Settings(), {}))
    assert rendered["pve_install_release"]["suite"] == suite
    assert rendered["pve_install_release"]["keyring"].endswith(f"/{keyring}")
    assert rendered["pve_install_key_url"].endswith(f"/{key}")
    digits = rendered["pve_install_key_checksum"].strip().removeprefix(checksum)
    assert len(digits) == {"sha512:": 128, "sha256:": 64}[checksum]
    assert rendered["pve_install_repository_url"] == "http://download.proxmox.com/debian/pve"
    # The enterprise repository: a list file before PVE 9, deb822 since.
    (enterprise,) = rendered["pve_install_release"]["enterprise"]
    assert enterprise.endswith(".list" if release == "12" else ".sources")


@pytest.mark.parametrize("release", ["12", "13"])
def test_values_of_the_host_profile_are_variables_of_the_installation(render: Render, release: str) -> None:
    settings = Settings().with_profile(SITE)
    rendered = render(release, play_variables.pve_install(settings, {}))
    assert rendered["pve_install_repository_url"] == SITE["pve_repository_url"]
    assert rendered["pve_install_key_url"] == SITE["pve_repository_key_url"]
    assert rendered["pve_install_key_checksum"].strip() == f"sha256:{SITE['pve_repository_key_sha256']}"
    assert rendered["pve_install_mirror"] == SITE["mirror"]
    assert rendered["pve_install_http_proxy"] == SITE["http_proxy"]
    assert settings.image == SITE["image"]


def test_mirror_and_proxy_are_used_at_the_first_boot() -> None:
    settings = Settings().with_profile(SITE)
    data = json.loads(vendor_data.user_data(settings).partition("\n")[2])
    assert data["apt"]["primary"] == [{"arches": ["default"], "uri": SITE["mirror"]}]
    assert data["apt"]["http_proxy"] == data["apt"]["https_proxy"] == SITE["http_proxy"]


def test_the_name_that_must_resolve_behind_the_bridge_is_that_of_the_sites_mirror() -> None:
    variables = play_variables.network(Settings().with_profile(SITE), {})
    assert variables["pve_repository_url"] == SITE["pve_repository_url"]


def test_a_site_without_the_internet_needs_only_keys_of_a_host_profile() -> None:
    assert set(SITE) <= PROFILE_KEYS


# -- the minimum version ---------------------------------------------------------------------------


class Node:
    """A healthy node of that version."""

    def __init__(self, version: str) -> None:
        self.version = version

    def run(self, command: Any, **_options: Any) -> CommandResult:
        return CommandResult(str(command), 0, b"active\n", b"", 1.0)

    def get(self, _path: str, /, **_params: Any) -> Any:
        return {"version": self.version}


@pytest.mark.parametrize(("version", "healthy"), [("9.2.11", True), ("8.2.2", True), ("8.10.0", True)])
def test_a_supported_version_is_healthy(version: str, healthy: bool) -> None:
    node = cast(Any, Node(version))
    assert (host_phases.health(PveHost("nested", node, node, "nested"))[0] == version) is healthy


@pytest.mark.parametrize("version", ["8.1.4", "7.4-3"])
def test_the_fault_of_an_old_pve_names_the_required_version(version: str) -> None:
    node = cast(Any, Node(version))
    known, fault = host_phases.health(PveHost("nested", node, node, "nested"))
    assert known is None
    assert version in fault
    assert "8.2" in fault


def test_a_clone_with_an_old_pve_is_not_proved() -> None:
    node = cast(Any, Node("8.1.4"))
    env = SimpleNamespace(inner=PveHost("nested", node, node, "nested"), ip="10.0.0.5")
    assert host_phases.probe_pve(cast(Any, env)) is None
