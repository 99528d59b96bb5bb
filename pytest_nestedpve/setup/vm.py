"""Creation, start and probes of a run's VM on a PVE host: the same for the nested PVE and for the leaf."""

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
TRANSFER_LIMIT = 1800.0
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
        return migration.host_of_vm(env) if self.role == "nested" else env.inner

    def vm(self, env: Environment) -> Created:
        """The VM, at the node where it was last. Raises NotReady."""
        return self.provision.of(env.facts).vm


NESTED = Level("nested", ProvisionFacts, AddressFacts, outermost=True)
LEAF = Level("leaf", LeafProvisionFacts, LeafAddressFacts)
ATTACHED_LEAF = Level("leaf", LeafProvisionFacts, LeafAddressFacts, outermost=True)


@dataclass(frozen=True)
class Shape:
    """The properties of a VM to create. Memory in MiB, disk in GiB; `options`, as for qm, override all."""

    storage: str | None
    bridge: str | None
    cores: int
    memory: int
    disk: int
    keys: tuple[str, ...]
    ipconfig: str = "ip=dhcp"
    image: str | None = None
    image_source: str | None = None  # the setting that `image` is transferred from; None: `image` exists
    template: int | None = None
    format: str | None = None
    snippets: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


def level_settings(env: Environment, level: Level) -> Settings:
    """The settings for the level's host: a nested PVE of the run has no parent pool."""
    return env.settings if level.outermost else replace(env.settings, pool_parent=None)


def provision(env: Environment, level: Level, shape: Shape) -> dict[str, Any]:
    """Create pool and VM: first diskless with its marker, then disk and options; facts. Raises PveError."""
    host = level.host(env)
    settings = level_settings(env, level)
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    env.progress("creating the run's pool")
    create_pool(host.api, env.run, settings, host_clock(host))
    if level.outermost:
        env.keep_lease()
    env.check_lease()
    if shape.image is not None and shape.image_source is not None:
        storage = shape.image.partition(":")[0]
        image_file.provide(host, storage, image_file.read(shape.image_source), TRANSFER_LIMIT, env.progress)
        env.check_lease()
    base_options: dict[str, Any] = {
        "memory": shape.memory, "cores": shape.cores, "ostype": "l26", "agent": "1",
    }  # fmt: skip
    env.progress("creating the VM")
    if shape.template is not None:
        created = clone_marked(
            host, env.run, settings, shape.template,
            storage=shape.storage, format=shape.format,
            source=node_of(host.api, shape.template) if host.cluster.several else None,
        )  # fmt: skip
    else:
        created = create_marked(host, env.run, settings, level.role, timeout=CREATE_LIMIT, **base_options)
    pool = pool_name(settings, env.run)
    # Recorded at once: the teardown needs the facts if a later step fails.
    env.facts.pop(level.provision.phase, None)
    facts = level.provision(
        created.vmid, created.node, created.uuid, created.name, pool, shape.storage, shape.bridge
    )
    facts.record(env.facts)
    base = f"/nodes/{created.node}/qemu/{created.vmid}"
    snippet = None
    if shape.snippets is not None:
        snippet = vendor_data.write_snippet(
            host, shape.snippets, env.run.id, vendor_data.user_data(env.settings)
        )
    config = host.api.get(f"{base}/config")
    options = _config(shape, config if isinstance(config, dict) else {}, snippet)
    if shape.template is not None:
        options = {**base_options, **options}
    env.progress(f"importing {shape.image}" if shape.image else "configuring the clone")
    with call_limit(IMPORT_LIMIT):
        await_task(host, host.api.post(f"{base}/config", **options), IMPORT_LIMIT)
    size = _grow(host, base, shape)
    mac = mac_of(host.api.get(f"{base}/config"))
    source = shape.image or f"template {shape.template}"
    did = (
        f"VM {created.vmid} ({created.name}) in pool {pool}: {shape.cores} cores, {shape.memory} MiB, "
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
    root_key = login.root_public_key if login is not None else None
    public = env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    shape = Shape(
        storage=storage,
        bridge=bridge,
        cores=1,
        memory=LEAF_MEMORY,
        disk=LEAF_DISK,
        keys=(public, root_key) if root_key else (public,),
        image=ImageFacts.of(env.facts).volid,
        format=disk_format(storages[0]) if storages else None,
        snippets=snippets,
        options=env.settings.leaf_options,
    )
    return provision(env, level, shape)


def probe_provision(env: Environment, level: Level) -> dict[str, Any] | None:
    """Proved when the VM of the recorded facts exists, is proved the run's own, and has its disk."""
    facts = level.provision.known(env.facts)
    if facts is None or facts.mac is None:
        return None
    proof = prove(level.host(env).entry.api, level_settings(env, level), facts.vm, env.run)
    replace(facts, node=proof.node).record(env.facts)
    whole = proof.ok and proof.config is not None and "scsi0" in proof.config and "lock" not in proof.config
    return dict(env.facts[level.provision.phase]) if whole else None


def await_task(host: PveHost, answer: Any, limit: float) -> None:
    """Wait for the task whose UPID is the answer of a call; without one, return at once. Raises PveError."""
    if isinstance(answer, str) and answer.strip():
        wait_task(host.api, answer, timeout=limit)


def _config(shape: Shape, current: Mapping[str, Any], snippet: str | None) -> dict[str, Any]:
    from urllib.parse import quote

    emulated = shape.options.get("kvm") == "0"
    options: dict[str, Any] = {
        "cores": shape.cores,
        "memory": shape.memory,
        "cpu": "max" if emulated else "host",
        "agent": "1",
        "ciupgrade": 0,
        "ciuser": "root",
        # The API requires this value URL-encoded, including line ends.
        "sshkeys": quote("\n".join(shape.keys), safe=""),
        "ipconfig0": shape.ipconfig,
        "net0": f"virtio,bridge={shape.bridge},firewall=0",
        "serial0": "socket",
        "onboot": 0,
    }
    if shape.image is not None:
        disk = f"{shape.storage}:0,import-from={shape.image},discard=on"
        options["scsi0"] = disk + (f",format={shape.format}" if shape.format else "")
        options["scsihw"] = "virtio-scsi-single"
        options["boot"] = "order=scsi0"
    if not any(
        "cloudinit" in str(value) for key, value in current.items() if key[:3] in ("ide", "sat", "scs")
    ):
        options["ide2"] = f"{shape.storage}:cloudinit"
    if snippet is not None:
        options["cicustom"] = f"vendor={snippet}"
    return {**options, **shape.options}


def _grow(host: PveHost, base: str, shape: Shape) -> float:
    config = host.api.get(f"{base}/config")
    disk = text(config.get("scsi0")) if isinstance(config, dict) else None
    size = disk_size(disk or "")
    if size is None or size >= shape.disk:
        return size if size is not None else float(shape.disk)
    with call_limit(START_LIMIT):
        await_task(host, host.api.put(f"{base}/resize", disk="scsi0", size=f"{shape.disk}G"), START_LIMIT)
    return float(shape.disk)


def disk_size(disk: str) -> float | None:
    """GiB of a disk line such as `local:100/vm-100-disk-0.qcow2,size=3G`; None without a size."""
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
    """Start the VM and wait for the task. Raises PveError."""
    vmid = level.vm(env).vmid
    try:
        run_start_task(env, level, "status/start", START_LIMIT)
    except PveError as e:
        # The cause of a failed task: the VM was started meanwhile, which is the requested result.
        if isinstance(e, Running) or isinstance(e.__cause__, Running):
            return {"did": f"VM {vmid} runs already"}
        raise
    return {"did": f"VM {vmid} started on {level.host(env).name}"}


def run_start_task(env: Environment, level: Level, call: str, limit: float, **params: Any) -> None:
    """Begin a task that starts the VM (`call` below its path), and wait for it. Raises PveError.

    A snippet on a storage that is not shared is not moved with the VM, and PVE then refuses to start it: the
    snippet is written on the VM's node, and the task is repeated.
    """
    snippet = level.provision.of(env.facts).snippet

    def begin() -> None:
        host, vm = level.host(env), level.vm(env)
        with call_limit(limit):
            await_task(host, host.api.post(f"/nodes/{vm.node}/qemu/{vm.vmid}/{call}", **params), limit)

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
    """Proved when the VM runs."""
    facts = level.provision.known(env.facts)
    if facts is None:
        return None
    vm = facts.vm
    status = level.host(env).api.get(f"/nodes/{vm.node}/qemu/{vm.vmid}/status/current")
    running = isinstance(status, dict) and status.get("status") == "running"
    return {"did": f"VM {vm.vmid} runs"} if running else None
