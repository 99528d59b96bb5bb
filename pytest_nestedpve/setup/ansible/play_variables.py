"""The Ansible variables of each playbook, from settings and facts of the phases.

The configured `extra_vars` override them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.config import yaml_path
from pytest_nestedpve.config.settings import secret_destination
from pytest_nestedpve.environment.facts import AddressFacts, ByPhase, NetworkFacts, ProvisionFacts
from pytest_nestedpve.setup.ansible import sources
from pytest_nestedpve.setup.ansible.sources import Packed

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.run.identity import Run

_REPOSITORY = ("pve_repository_url", "pve_repository_key_url", "pve_repository_key_sha256")


def pve_install(settings: Settings, facts: ByPhase) -> dict[str, Any]:
    """For pve-install.yml: the node's name, its address, and the package repositories."""
    variables = _common(facts)
    for key in _REPOSITORY:
        if value := getattr(settings, key):
            variables[key] = value
    if settings.mirror:
        variables["nested_pve_mirror"] = settings.mirror
    if settings.http_proxy:
        variables["nested_pve_http_proxy"] = settings.http_proxy
    return variables | dict(settings.extra_vars)


def network(settings: Settings, facts: ByPhase) -> dict[str, Any]:
    """For nested-pve-network.yml: the MAC of net0 and the configured `ipconfig`."""
    variables = _common(facts) | {"nested_pve_bridge": "vmbr0"}
    if settings.pve_repository_url:
        variables["pve_repository_url"] = settings.pve_repository_url
    if (vm := ProvisionFacts.known(facts)) is not None and vm.mac:
        variables["nested_pve_mac"] = vm.mac.lower()
    parts = dict(part.partition("=")[::2] for part in settings.ipconfig.split(","))
    if parts.get("ip", "dhcp") == "dhcp":
        variables["nested_pve_network_mode"] = "dhcp"
    else:
        variables |= {
            "nested_pve_network_mode": "static",
            "nested_pve_address": parts["ip"],
            "nested_pve_gateway": parts.get("gw", ""),
        }
    return variables | dict(settings.extra_vars)


def ssh(settings: Settings, facts: ByPhase, run: Run) -> dict[str, Any]:
    """For nested-pve-ssh.yml: the run's key pair. Its private half is a secret."""
    public = (run.dir / "key.pub").read_text(encoding="ascii").strip()
    return (
        _common(facts)
        | {
            "nested_pve_authorized_keys": [public],
            "nested_pve_run_key": (run.dir / "key").read_text(encoding="ascii"),
            "nested_pve_run_public_key": public,
            "nested_pve_leaf_pattern": f"{settings.name_prefix}-leaf-*",
        }
        | dict(settings.extra_vars)
    )


def pack_sources(settings: Settings, run: Run) -> tuple[Packed, ...]:
    """Pack every configured source below the run's directory. Raises SourceError, CommandTimeout.

    Secrets are in no archive: they are copied separately, with their own mode, and not to the leaf.
    """
    return tuple(
        sources.pack(source, run.dir / "sources", without=settings.secrets) for source in settings.sources
    )


def repos(
    settings: Settings, facts: ByPhase, *, packed: Iterable[Packed], outer_keys: Iterable[str] = ()
) -> dict[str, Any]:
    """For nested-pve-repos.yml. `outer_keys`: public keys of the outer host's root, as lines.

    Raises YamlPathError for an invalid token_path.
    """
    variables = source_variables(settings, packed) | _common(facts)
    variables["nested_pve_outer_public_keys"] = list(outer_keys)
    if settings.bootstrap:
        name, _, command = settings.bootstrap.partition(":")
        variables["nested_pve_bootstrap"] = {"name": name.strip(), "command": command.strip()}
    if settings.token_path:
        name, file, path = settings.token_path.split(":", 2)
        variables["nested_pve_token_file"] = f"{settings.sources_dest}/{name}/{file}"
        variables["nested_pve_token_keys"] = list(yaml_path.parse_path(path, _node(facts)))
    return variables | dict(settings.extra_vars)


def source_variables(settings: Settings, packed: Iterable[Packed]) -> dict[str, Any]:
    """Archives and secrets, for nested-pve-repos.yml and nested-pve-leaf.yml alike."""
    return {
        "nested_pve_sources_dest": settings.sources_dest,
        "nested_pve_source_archives": [
            {"name": source.name, "archive": str(source.archive.absolute()), "digest": source.digest}
            for source in packed
        ],
        "nested_pve_secret_files": [
            {"src": str(path), "dest": secret_destination(path, settings)} for path in settings.secrets
        ],
    }


def leaf(settings: Settings, packed: Iterable[Packed]) -> dict[str, Any]:
    """For nested-pve-leaf.yml: the sources without secrets."""
    variables = source_variables(settings, packed)
    variables["nested_pve_secret_files"] = []
    return variables | dict(settings.extra_vars)


def _common(facts: ByPhase) -> dict[str, Any]:
    variables: dict[str, Any] = {"pve_hostname": _node(facts)}
    network, boot = NetworkFacts.known(facts), AddressFacts.known(facts)
    if address := (network and network.ip) or (boot and boot.ip):
        variables["nested_pve_ip"] = address
    return {name: value for name, value in variables.items() if value}


def _node(facts: ByPhase) -> str:
    # cloud-init sets the host name to the VM's name
    vm = ProvisionFacts.known(facts)
    return vm.name if vm is not None else ""
