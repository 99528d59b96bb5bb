"""The list of phases for an attached PVE, and the phases that a session may run there.

Three phases describe what exists, seven only check or work on the VM inside, and all others change the PVE:
those are guarded, also where a project replaced or added them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.attached import Guard
from pytest_nestedpve.environment.phases import ATTACHED, Phase
from pytest_nestedpve.setup.phases import Action, default_phases, sweep_expired

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

HARMLESS = frozenset(
    {
        "preflight",
        "download_image",
        "leaf_provision",
        "leaf_start",
        "leaf_wait_ip",
        "sync_repos",
        "verify_ssh_chain",
    }
)
"""Phases that only check, or that work on the VM inside, which is the run's own."""


def attached_phases() -> list[Phase]:
    """The fourteen phases, with their actions and probes for an attached PVE."""
    replaced: dict[str, tuple[Action, Action | None]] = {
        "preflight": (_preflight, None),
        "ensure_pve": (_ensure_pve, _probe_pve),
        "setup_network": (_setup_network, _probe_network),
        "setup_ssh": (_setup_ssh, _probe_ssh),
        "setup_repos": (_setup_repos, _probe_repos),
        "download_image": (_download_image, _probe_image),
        "leaf_provision": (_provision_leaf, _probe_leaf),
        "verify_ssh_chain": (_verify_chain, None),
    }
    phases = []
    for phase in default_phases():
        if phase.name in replaced:
            do, probe = replaced[phase.name]
            phase = replace(phase, do=do, probe=probe)
        phases.append(_describing(phase) if phase.name in _DESCRIBING else phase)
    return phases


def permitted(
    phases: Iterable[Phase], host: str, selected: frozenset[str], *, several: bool = False
) -> tuple[Phase, ...]:
    """The phases as a session may run them on the attached PVE `host`, by their names.

    `selected`: the phases whose steps were selected by name. `several`: workers of xdist share the PVE.
    """
    result = []
    for phase in phases:
        if phase.name in _DESCRIBING:
            phase = _describing(phase)
        elif phase.name not in HARMLESS:
            phase = replace(phase, guard=Guard(host, phase.name in selected, several))
        result.append(phase)
    return tuple(result)


def _describing(phase: Phase) -> Phase:
    """The phase with the packaged action, which describes what exists, even if a project replaced it."""
    return replace(phase, do=_DESCRIBING[phase.name], probe=None, inputs=None, outcome=ATTACHED)


# Imports are in the functions, as in the other list.


def _preflight(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return sweep_expired(env, attached.preflight(env))


def _describe_pve(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.describe_pve(env)


def _describe_start(_env: Environment) -> Mapping[str, Any]:
    return {"did": "attached: it answers, so it runs"}


def _describe_address(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.describe_address(env)


_DESCRIBING: dict[str, Action] = {
    "provision": _describe_pve,
    "start_vm": _describe_start,
    "wait_ip": _describe_address,
}
"""The actions of phases whose result exists already."""


def _ensure_pve(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.ensure_pve(env, 3400)


def _probe_pve(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import attached

    return attached.probe_pve(env)


def _setup_network(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.setup_network(env, 600)


def _probe_network(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import attached

    return attached.probe_network(env)


def _setup_ssh(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.setup_ssh(env, 540)


def _probe_ssh(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import attached

    return attached.probe_ssh(env)


def _setup_repos(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.setup_repos(env, 2600)


def _probe_repos(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import attached

    return attached.probe_repos(env)


def _download_image(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.download_image(env, 1700)


def _probe_image(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import attached

    return attached.probe_image(env)


def _provision_leaf(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.provision_leaf(env)


def _probe_leaf(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import vm

    return vm.probe_provision(env, vm.ATTACHED_LEAF)


def _verify_chain(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import attached

    return attached.verify_chain(env, 280)
