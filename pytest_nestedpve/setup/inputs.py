"""The inputs of phases beside the phases before them: after a change of its inputs a phase is done again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.config import vm_shape
from pytest_nestedpve.setup.ansible import play_variables
from pytest_nestedpve.setup.ansible.dependencies import digest_of
from pytest_nestedpve.setup.ansible.runner import playbook_path, project_config

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

# Changes by itself, after a reboot: no change of the configuration.
_VOLATILE = ("nested_pve_ip",)


def _playbook(env: Environment, name: str, variables: Mapping[str, Any]) -> dict[str, Any]:
    path = playbook_path(name, env.settings)
    config = project_config(env.rootdir)
    roles = (*env.settings.roles_path, *(config.roles if config is not None else ()))
    return {
        "playbook": digest_of(path, roles),
        "ansible.cfg": _hash(config.path) if config is not None else None,
        "variables": {key: value for key, value in variables.items() if key not in _VOLATILE},
    }


def shape(env: Environment) -> object:
    return vm_shape.shape(env.initial_settings)


def install(env: Environment) -> object:
    return _playbook(env, "pve-install.yml", play_variables.pve_install(env.settings, env.facts))


def network(env: Environment) -> object:
    return _playbook(env, "nested-pve-network.yml", play_variables.network(env.settings, env.facts))


def ssh(env: Environment) -> object:
    # All inputs are recorded as a hash only: no key gets into the record.
    return _playbook(env, "nested-pve-ssh.yml", play_variables.ssh(env.settings, env.facts, env.run))


def repos(env: Environment) -> object:
    packed = play_variables.pack_sources(env.settings, env.run)
    variables = play_variables.repos(env.settings, env.facts, packed=packed)
    return {
        **_playbook(env, "nested-pve-repos.yml", _without_paths(variables)),
        "secrets": [_hash(path) for path in env.settings.secrets],
    }


def leaf_sources(env: Environment) -> object:
    packed = play_variables.pack_sources(env.settings, env.run)
    return _playbook(env, "nested-pve-leaf.yml", _without_paths(play_variables.leaf(env.settings, packed)))


def leaf_image(env: Environment) -> object:
    return env.settings.leaf_image


def leaf(env: Environment) -> object:
    return dict(env.settings.leaf_options)


def _without_paths(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with the digests of the archives in place of their paths on this machine."""
    archives = variables["nested_pve_source_archives"]
    archives = [{"name": archive["name"], "digest": archive["digest"]} for archive in archives]
    return {**variables, "nested_pve_source_archives": archives}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
