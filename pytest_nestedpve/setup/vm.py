"""A VM of ours on a PVE host, made, started and waited for: the same for the nested PVE and for the leaf."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import (
    AddressFacts,
    ImageFacts,
    LeafAddressFacts,
    LeafProvisionFacts,
    ProvisionFacts,
    SshFacts,
)
from pytest_nestedpve.ownership.create import Created, create_marked
from pytest_nestedpve.ownership.pool import create_pool, host_clock, pool_name
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve.answers import entries, text
from pytest_nestedpve.pve.api import call_limit, patiently
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import PveError, Running
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.tasks import wait_task
from pytest_nestedpve.setup import image_file, migration, vendor_data
from pytest_nestedpve.setup.checks.storage import disk_format
from pytest_nestedpve.setup.clone import clone_marked

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.environment import Environment

CREATE_LIMIT = 120.0
BRING_LIMIT = 1800.0
IMPORT_LIMIT = 1200.0
START_LIMIT = 120.0
LEAF_DISK = 8  # GiB
LEAF_MEMORY = 1024  # MiB
_DISK_UNITS = {"K": 2**-20, "M": 2**-10, "G": 1.0, "T": 1024.0}


@dataclass(frozen=True)
class Level:
    """A VM of a run by its role: its host, and the facts of its phases.

    `outermost`: its host is the one that the session connects to, which has the run's lease.
    """

    role: str  # nested | leaf
    provision: type[ProvisionFacts]
    wait_ip: type[AddressFacts]
    outermost: bool = False

    def host(self, env: Environment) -> PveHost:
        return migration.outer(env) if self.role == "nested" else env.inner

    def vm(self, env: Environment) -> Created:
        """The VM, at the node where it was last. Raises NotReady."""
        return self.provision.of(env.facts).vm


NESTED = Level("nested", ProvisionFacts, AddressFacts, outermost=True)
LEAF = Level("leaf", LeafProvisionFacts, LeafAddressFacts)
ATTACHED_LEAF = Level("leaf", LeafProvisionFacts, LeafAddressFacts, outermost=True)


@dataclass(frozen=True)
class Shape:
    """What a VM is to be. Memory in MiB, disk in GiB; `options` are qm's and outrank all others."""

    storage: str | None
    bridge: str | None
    cores: int
    memory: int
    disk: int
    keys: tuple[str, ...]
    ipconfig: str = "ip=dhcp"
    image: str | None = None
    brought: str | None = None  # what `image` is brought from, by a setting; None: it is there
    template: int | None = None
    format: str | None = None
    snippets: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def level_settings(env: Environment, level: Level) -> Settings:
    """The settings on the level's host: a nested PVE of the run has no parent for pools."""
    return env.settings if level.outermost else replace(env.settings, pool_parent=None)


def provision(env: Environment, level: Level, shape: Shape) -> dict[str, Any]:
    """Make pool and VM: diskless and marked, tagged, then its disk and the rest. Facts. Raises PveError."""
    host = level.host(env)
    settings = level_settings(env, level)
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    env.progress("making the run's pool")
    create_pool(host.api, env.run, settings, host_clock(host))
    if level.outermost:
        env.keep_lease()
    env.check_lease()
    if shape.image is not None and shape.brought is not None:
        storage = shape.image.partition(":")[0]
        image_file.bring(host, storage, image_file.read(shape.brought), BRING_LIMIT, env.progress)
        env.check_lease()
    base_options: dict[str, Any] = {
        "memory": shape.memory, "cores": shape.cores, "ostype": "l26", "agent": "1",
    }  # fmt: skip
    env.progress("making the VM")
    if shape.template is not None:
        made = clone_marked(
            host, env.run, settings, shape.template,
            storage=shape.storage, format=shape.format,
            source=node_of(host.api, shape.template) if host.cluster.several else None,
        )  # fmt: skip
    else:
        made = create_marked(host, env.run, settings, level.role, timeout=CREATE_LIMIT, **base_options)
    pool = pool_name(settings, env.run)
    # Recorded at once: the teardown needs them, should anything below fail.
    env.facts.pop(level.provision.phase, None)
    level.provision(made.vmid, made.node, made.uuid, made.name, pool, shape.storage, shape.bridge).record(
        env.facts
    )
    base = f"/nodes/{made.node}/qemu/{made.vmid}"
    snippet = None
    if shape.snippets is not None:
        snippet = vendor_data.write_snippet(
            host, shape.snippets, env.run.id, vendor_data.user_data(env.settings)
        )
    config = host.api.get(f"{base}/config")
    wanted = _config(shape, config if isinstance(config, dict) else {}, snippet)
    if shape.template is not None:
        wanted = {**base_options, **wanted}
    env.progress(f"importing {shape.image}" if shape.image else "configuring the clone")
    with call_limit(IMPORT_LIMIT):
        task(host, host.api.post(f"{base}/config", **wanted), IMPORT_LIMIT)
    size = _grow(host, base, shape)
    mac = mac_of(host.api.get(f"{base}/config"))
    source = shape.image or f"template {shape.template}"
    did = (
        f"VM {made.vmid} ({made.name}) in pool {pool}: {shape.cores} cores, {shape.memory} MiB, "
        f"{size:g} GiB from {source} on {shape.storage}"
    )
    facts = replace(level.provision.of(env.facts), mac=mac)
    return {**facts.values(), "snippet": snippet, "did": did}


def provision_leaf(
    env: Environment, level: Level, *, storage: str | None, snippets: str | None, bridge: str | None
) -> dict[str, Any]:
    """Create the VM inside, from the image that download_image provided. Facts. Raises PveError."""
    inner = env.inner
    storages = entries(inner.api.get(f"/nodes/{inner.node}/storage", storage=storage, format=True))
    login = SshFacts.known(env.facts)
    own = login.root_public_key if login is not None else None
    public = env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    shape = Shape(
        storage=storage,
        bridge=bridge,
        cores=1,
        memory=LEAF_MEMORY,
        disk=LEAF_DISK,
        keys=(public, own) if own else (public,),
        image=ImageFacts.of(env.facts).volid,
        format=disk_format(storages[0]) if storages else None,
        snippets=snippets,
        options=env.settings.leaf_options,
    )
    return provision(env, level, shape)


def probe_provision(env: Environment, level: Level) -> dict[str, Any] | None:
    """The facts, when the VM that they name exists, is proved ours, and has its disk."""
    facts = level.provision.known(env.facts)
    if facts is None or facts.mac is None:
        return None
    proof = prove(level.host(env).entry.api, level_settings(env, level), facts.vm, env.run)
    replace(facts, node=proof.node).record(env.facts)
    whole = proof.ok and proof.config is not None and "scsi0" in proof.config and "lock" not in proof.config
    return dict(env.facts[level.provision.phase]) if whole else None


def task(host: PveHost, answer: Any, limit: float) -> None:
    """Await the task that a call answered with; calls that fork none answer nothing. Raises PveError."""
    if isinstance(answer, str) and answer.strip():
        wait_task(host.api, answer, timeout=limit)


def _config(shape: Shape, now: Mapping[str, Any], snippet: str | None) -> dict[str, Any]:
    from urllib.parse import quote

    slow = shape.options.get("kvm") == "0"
    wanted: dict[str, Any] = {
        "cores": shape.cores,
        "memory": shape.memory,
        "cpu": "max" if slow else "host",
        "agent": "1",
        "ciupgrade": 0,
        "ciuser": "root",
        # The API wants this one URL-encoded, line ends included.
        "sshkeys": quote("\n".join(shape.keys), safe=""),
        "ipconfig0": shape.ipconfig,
        "net0": f"virtio,bridge={shape.bridge},firewall=0",
        "serial0": "socket",
        "onboot": 0,
    }
    if shape.image is not None:
        disk = f"{shape.storage}:0,import-from={shape.image},discard=on"
        wanted["scsi0"] = disk + (f",format={shape.format}" if shape.format else "")
        wanted["scsihw"] = "virtio-scsi-single"
        wanted["boot"] = "order=scsi0"
    if not any("cloudinit" in str(value) for key, value in now.items() if key[:3] in ("ide", "sat", "scs")):
        wanted["ide2"] = f"{shape.storage}:cloudinit"
    if snippet is not None:
        wanted["cicustom"] = f"vendor={snippet}"
    return {**wanted, **shape.options}


def _grow(host: PveHost, base: str, shape: Shape) -> float:
    config = host.api.get(f"{base}/config")
    disk = text(config.get("scsi0")) if isinstance(config, dict) else None
    size = disk_size(disk or "")
    if size is None or size >= shape.disk:
        return size if size is not None else float(shape.disk)
    with call_limit(START_LIMIT):
        task(host, host.api.put(f"{base}/resize", disk="scsi0", size=f"{shape.disk}G"), START_LIMIT)
    return float(shape.disk)


def disk_size(disk: str) -> float | None:
    """GiB of a disk line such as `local:100/vm-100-disk-0.qcow2,size=3G`; None when it does not say."""
    for part in disk.split(","):
        key, _, value = part.partition("=")
        if key == "size" and value[:-1].isdigit() and value[-1] in _DISK_UNITS:
            return int(value[:-1]) * _DISK_UNITS[value[-1]]
    return None


def mac_of(config: object) -> str:
    """The MAC address of net0, lower case. Raises PveError."""
    net0 = str(config.get("net0") or "") if isinstance(config, dict) else ""
    for part in net0.split(","):
        _, _, value = part.partition("=")
        if value.count(":") == 5:
            return value.lower()
    raise PveError(f"expected a MAC address in the VM's net0, found {net0[:200]!r}")


def start(env: Environment, level: Level) -> dict[str, Any]:
    """Start the VM and await it."""
    vmid = level.vm(env).vmid
    try:
        starting(env, level, "status/start", START_LIMIT)
    except PveError as e:
        # A task's reason is its cause: one that was started meanwhile is what was wanted.
        if isinstance(e, Running) or isinstance(e.__cause__, Running):
            return {"did": f"VM {vmid} runs already"}
        raise
    return {"did": f"VM {vmid} started on {level.host(env).name}"}


def starting(env: Environment, level: Level, how: str, limit: float, **params: Any) -> None:
    """Await a task of the VM that starts it. Raises PveError.

    A snippet on a storage that is not shared stays behind when the VM is moved, and PVE refuses then: it is
    written where the VM is, and the task begun again.
    """
    snippet = level.provision.of(env.facts).snippet

    def begin() -> None:
        host, made = level.host(env), level.vm(env)
        with call_limit(limit):
            task(host, host.api.post(f"/nodes/{made.node}/qemu/{made.vmid}/{how}", **params), limit)

    try:
        patiently(begin)
    except PveError as e:
        if snippet is None or f"volume '{snippet}' does not exist" not in str(e):
            raise
        host = level.host(env)
        env.remark(f"the snippet of VM {level.vm(env).vmid} was not on {host.node}; it is written there")
        storage = snippet.partition(":")[0]
        vendor_data.write_snippet(host, storage, env.run.id, vendor_data.user_data(env.settings))
        patiently(begin)


def probe_start(env: Environment, level: Level) -> dict[str, Any] | None:
    """Whether it runs."""
    facts = level.provision.known(env.facts)
    if facts is None:
        return None
    made = facts.vm
    status = level.host(env).api.get(f"/nodes/{made.node}/qemu/{made.vmid}/status/current")
    running = isinstance(status, dict) and status.get("status") == "running"
    return {"did": f"VM {made.vmid} runs"} if running else None
