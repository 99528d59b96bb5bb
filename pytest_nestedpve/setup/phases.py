"""The list of phases: names, limits, probes and actions, in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import PreflightFacts
from pytest_nestedpve.environment.phases import Phase

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

Action = Callable[["Environment"], Mapping[str, Any] | None]


def default_phases() -> list[Phase]:
    """The fourteen phases of a run that creates its nested PVE. Time limits are nominal seconds."""
    leaf_needs = ("ensure_pve", "download_image")
    return [
        Phase("preflight", "check the outer host", preflight, timeout=600),
        Phase("provision", "create the VM", _provision, _probe_provision, 3300, inputs=_input("shape")),
        Phase("start_vm", "start the VM", _start("nested"), _probe_start("nested"), timeout=180),
        Phase("wait_ip", "wait for the VM's address", _wait("nested", 900), _probe_ip("nested"), 960),
        Phase("ensure_pve", "install Proxmox VE", _ensure_pve, _probe_pve, 3600, inputs=_input("install")),
        Phase("setup_network", "create the bridge", _network, _probe_network, 900, inputs=_input("network")),
        Phase("setup_ssh", "install the SSH keys", _ssh, _probe_ssh, 600, inputs=_input("ssh")),
        Phase("setup_repos", "install sources and token", _repos, _probe_repos, 2700, inputs=_input("repos")),
        Phase(
            "download_image", "provide the leaf's image", _image, _probe_image, 1800,
            inputs=_input("leaf_image"), depends=("ensure_pve",),
        ),
        Phase(
            "leaf_provision", "create the leaf", _leaf, _probe_leaf, 1500,
            inputs=_input("leaf"), depends=leaf_needs,
        ),
        Phase("leaf_start", "start the leaf", _start("leaf"), _probe_start("leaf"), 180, depends=leaf_needs),
        Phase(
            "leaf_wait_ip", "wait for the leaf's address", _wait("leaf", 900), _probe_ip("leaf"), 960,
            depends=leaf_needs,
        ),
        Phase(
            "sync_repos", "copy the sources to the leaf", _sync, _probe_sync, 900,
            inputs=_input("leaf_sources"), depends=("leaf_provision",),
        ),
        Phase("verify_ssh_chain", "log in over every hop", _chain, timeout=300),
    ]  # fmt: skip


# Imports are in the functions: the collection of tests needs only the list, and must remain fast.


def _level(role: str) -> Any:
    from pytest_nestedpve.setup import vm

    return vm.NESTED if role == "nested" else vm.LEAF


def _input(name: str) -> Callable[[Environment], object]:
    def inputs(env: Environment) -> object:
        from pytest_nestedpve.setup import inputs

        return getattr(inputs, name)(env)

    return inputs


def preflight(env: Environment) -> Mapping[str, Any]:
    """Check the outer host; the action of the phase `preflight`. Raises PveError."""
    return _check_host(env, image=True)


def preflight_without_image(env: Environment) -> Mapping[str, Any]:
    """Check the outer host for a VM that the project creates: no image is required. Raises PveError."""
    return _check_host(env, image=False)


def _check_host(env: Environment, *, image: bool) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import preflight

    return sweep_expired(env, preflight.preflight(env, image=image))


def sweep_expired(env: Environment, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """After preflight, destroy expired runs on the host, if it is a PVE already; returns `facts`."""
    from pytest_nestedpve.teardown import expired_runs

    if facts["version"] is not None:
        expired_runs.sweep(env)
    return facts


def _provision(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import vm

    settings, resources = env.settings, PreflightFacts.of(env.facts)
    configured = settings.image if resources.image else None
    shape = vm.Shape(
        storage=resources.storage,
        bridge=resources.bridge,
        cores=settings.cores,
        memory=settings.memory,
        disk=settings.disk,
        keys=(env.run.directory.ensure_key(f"nested-pve run {env.run.id}"),),
        ipconfig=settings.ipconfig,
        image=resources.image,
        image_source=configured if configured and configured != resources.image else None,
        template=resources.template,
        format=resources.format,
        snippets=resources.snippets,
        options=settings.vm_options,
    )
    return vm.provision(env, vm.NESTED, shape)


def _probe_provision(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import resume, vm

    if env.resumed and not env.has_lease and not resume.resume(env):
        return None
    return vm.probe_provision(env, vm.NESTED)


def _leaf(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import leaf_image, vm

    storage = leaf_image.STORAGE
    return vm.provision_leaf(env, vm.LEAF, storage=storage, snippets=storage, bridge="vmbr0")


def _probe_leaf(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import vm

    return vm.probe_provision(env, vm.LEAF)


def _start(role: str) -> Action:
    def start(env: Environment) -> Mapping[str, Any]:
        from pytest_nestedpve.setup import vm

        return vm.start(env, _level(role))

    return start


def _probe_start(role: str) -> Action:
    def probe(env: Environment) -> Mapping[str, Any] | None:
        from pytest_nestedpve.setup import vm

        return vm.probe_start(env, _level(role))

    return probe


def _wait(role: str, limit: float) -> Action:
    def wait(env: Environment) -> Mapping[str, Any]:
        from pytest_nestedpve.setup import address

        return address.wait_ip(env, _level(role), limit)

    return wait


def _probe_ip(role: str) -> Action:
    def probe(env: Environment) -> Mapping[str, Any] | None:
        from pytest_nestedpve.setup import address

        return address.probe_ip(env, _level(role))

    return probe


def _ensure_pve(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import host_phases

    return host_phases.ensure_pve(env, 3400)


def _probe_pve(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import host_phases

    return host_phases.probe_pve(env)


def _network(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import host_phases

    return host_phases.setup_network(env, 600)


def _probe_network(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import host_phases

    return host_phases.probe_network(env)


def _ssh(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import host_phases

    return host_phases.setup_ssh(env, 540)


def _probe_ssh(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import host_phases

    return host_phases.probe_ssh(env)


def _repos(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import host_phases

    return host_phases.setup_repos(env, 2600, outer=env.outer)


def _probe_repos(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import host_phases

    return host_phases.probe_repos(env)


def _image(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import leaf_image

    return leaf_image.download_image(env, 1700)


def _probe_image(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import leaf_image

    return leaf_image.probe_image(env)


def _sync(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import host_phases

    return host_phases.sync_repos(env, 850)


def _probe_sync(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.setup import host_phases

    return host_phases.probe_sync(env)


def _chain(env: Environment) -> Mapping[str, Any]:
    from pytest_nestedpve.setup import ssh_chain

    return ssh_chain.verify_ssh_chain(env, 280)
