"""The fourteen phases on the stand-in host: provision and start are real, what needs a guest is quick."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.pool import create_pool, host_clock
from pytest_nestedpve.pve import qemu

PHASES = (
    "preflight",
    "provision",
    "start_vm",
    "wait_ip",
    "ensure_pve",
    "setup_network",
    "setup_ssh",
    "setup_repos",
    "download_image",
    "leaf_provision",
    "leaf_start",
    "leaf_wait_ip",
    "sync_repos",
    "verify_ssh_chain",
)
"""The names of the fourteen phases in order, as tests expect them, independent of the package."""

IMAGE = "local:import/debian-13-genericcloud-amd64.qcow2"


def _provision(env: Environment) -> Mapping[str, Any]:
    host, run = env.outer, env.run
    create_pool(host.api, run, env.settings, host_clock(host))
    made = create_marked(host, run, env.settings, memory=2048, net0="virtio,bridge=vmbr0")
    snippet = f"npve-{run.id}-vendor.yaml"
    host.ssh.put(b"#cloud-config\n", f"/var/lib/vz/snippets/{snippet}")
    qemu.configure(
        host.api,
        made.node,
        made.vmid,
        scsi0=f"local:0,import-from={IMAGE},format=qcow2",
        ide2="local:cloudinit",
        cicustom=f"vendor=local:snippets/{snippet}",
    )
    return {"vmid": made.vmid, "node": made.node, "name": made.name, "uuid": made.uuid}


def _start(env: Environment) -> Mapping[str, Any]:
    qemu.start(env.outer.api, env.fact("provision", "node"), env.fact("provision", "vmid"))
    return {}


def _wait_ip(_env: Environment) -> Mapping[str, Any]:
    return {"ip": "10.77.7.50", "host_keys": []}


def _nothing(_env: Environment) -> Mapping[str, Any]:
    return {"did": "nothing: no machine runs on this host"}


def standin_phases(_path: Path | None = None) -> list[Phase]:
    """The phases by their names, in order."""
    real = {"provision": _provision, "start_vm": _start, "wait_ip": _wait_ip}
    return [Phase(name, name.replace("_", " "), real.get(name, _nothing), timeout=30.0) for name in PHASES]
