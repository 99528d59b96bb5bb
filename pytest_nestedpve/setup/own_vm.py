"""Adoption of a VM that a project's own tool creates: it gets the run's marker, and is put into its pool.

Only a VM that did not exist before the tool ran is adopted. The inventory taken at that time decides, not
the answer of the tool.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import PreflightFacts, ProvisionFacts
from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.ownership.create import Created, NoFreeId, free_ids, guest_name, ids_in_pools
from pytest_nestedpve.ownership.marker import TAG, Marker, new_uuid, parse_marker, uuid_of
from pytest_nestedpve.ownership.pool import create_pool, host_clock, pool_name, read_pool
from pytest_nestedpve.ownership.proof import RunProver, judge, prove
from pytest_nestedpve.pve.answers import entries, whole
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import NODE_NAME
from pytest_nestedpve.pve.qemu import guest_config, read_tags

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

LOCK_LIMIT = 60.0


class NotAdopted(PveError):
    """The run may not adopt the VM that the tool returned; the VM is not changed."""


@dataclass(frozen=True)
class VmRequest:
    """The requested properties of a VM, for the tool that creates it. Memory in MiB, disk in GiB.

    `name`, `vmid` (free and in the range at this moment), `node` and `pool` should be used unchanged. With
    `description` and the SMBIOS `uuid` set at creation, the VM is provably the run's from the first moment.
    `public_key` must be in root's authorized_keys; the guest agent is needed. None: not known.
    """

    name: str
    vmid: int
    node: str
    pool: str
    uuid: str
    description: str
    tags: tuple[str, ...]
    public_key: str
    cores: int
    memory: int
    disk: int
    image: str | None
    storage: str | None
    bridge: str | None


class Adoption:
    """The inventory of the outer host before the project's tool ran; adopts VMs that are new since then."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._before = _inventory(env)

    def adopt(self, node: object, vmid: object) -> Created:
        """Adopt that VM into the run. Raises NotAdopted (the VM is not changed), PveError.

        The marker is written by a call that PVE refuses if the configuration has changed since it was judged.
        """
        env, number = self._env, whole(vmid)
        if number is None or not isinstance(node, str) or not NODE_NAME.match(node):
            raise NotAdopted(f"expected a VM's id and the name of its node, found {vmid!r} and {node!r}")
        env.check_lease()
        what = f"VM {number} on {node} is not adopted into the run {env.run.id}, and not changed"
        if number in self._before:
            raise NotAdopted(
                f"{what}: that id was in use before. A VM that existed before is never adopted; "
                "have the tool create a new one"
            )
        api, settings, run = env.outer.api, env.settings, env.run
        config = self._unlocked(node, number, what)
        status = api.get(f"/nodes/{node}/qemu/{number}/status/current")
        uuid = uuid_of(config)
        if uuid is None:
            raise NotAdopted(f"{what}: expected an SMBIOS uuid in its configuration, found none")
        marker = Marker(run.id, number, uuid)
        description = str(config.get("description") or "").rstrip("\n")
        if parse_marker(description) != marker:
            description = f"{description}\n{marker.to_text()}".lstrip("\n")
        proof = judge(settings, number, run.id, {**config, "description": description}, status)
        if not proof.ok:
            raise NotAdopted(f"{what}: {proof.reason}")
        pool = pool_name(settings, run)
        members = read_pool(api, pool)
        in_pool = members is not None and number in members.vmids
        if not in_pool and number in ids_in_pools(env.outer):
            raise NotAdopted(f"{what}: it is in another resource pool; have the tool create it in {pool}")
        tags = ";".join(dict.fromkeys((*read_tags(config.get("tags")), TAG, run.tag)))
        # Not by the run's token: the VM gets its marker first, and is put into the pool afterwards.
        env.outer.unfenced().api.put(
            f"/nodes/{node}/qemu/{number}/config",
            description=description,
            tags=tags,
            digest=str(config.get("digest") or ""),
        )
        if not in_pool:
            # Never with allow-move: PVE refuses a VM that is in another pool by now.
            api.put("/pools", poolid=pool, vms=str(number))
        vm = Created(number, node, str(config.get("name")), uuid)
        proof = prove(api, settings, vm, run)
        if not proof.ok:
            raise PveError(
                f"VM {number} on {node} was adopted into the run {run.id}, but is not proved: {proof.reason}"
            )
        env.audit.write("adopted", vmid=number, cause=f"{vm.name} on {node}, into {pool}")
        return vm

    def _unlocked(self, node: str, vmid: int, what: str) -> dict[str, Any]:
        """The VM's configuration, once it is not locked. Raises NotAdopted."""
        api = self._env.outer.api
        config: dict[str, Any] = {}

        def unlocked() -> dict[str, Any] | None:
            nonlocal config
            config = guest_config(api, node, vmid, current=True)
            return None if config.get("lock") else config

        try:
            return wait_until(
                unlocked,
                deadline=Deadline(LOCK_LIMIT),
                what=lambda: f"the lock {config.get('lock')} to be released",
            )
        except PveError as e:
            raise NotAdopted(f"{what}: {e}") from e

    def recover(self) -> None:
        """After a failed tool: adopt a new VM that has the run's own name, and report other new VMs."""
        env = self._env
        name, others = guest_name(env.settings, env.run, "nested"), []
        for vmid, (node, kind) in sorted(_guests(env).items()):
            if vmid in self._before or kind != "qemu":
                continue
            other = guest_config(env.outer.api, node, vmid).get("name")
            if other != name:
                others.append(f"{vmid} ({other})")
                continue
            try:
                self.adopt(node, vmid)
                env.remark(f"VM {vmid} of a tool that failed has the run's name: adopted into the run")
            except PveError as e:
                env.remark(str(e))
        if others:
            env.remark(
                f"new on {env.outer.name} since the project's tool began, of unknown owner, and not changed: "
                f"VM {', '.join(others)}"
            )


@contextlib.contextmanager
def adopt_vms(env: Environment) -> Iterator[Adoption]:
    """Create the run's pool if needed and take the inventory; create VMs and `adopt` them inside the block.

    If the block ends with an exception, a new VM with the run's own name is adopted as well, so that the
    teardown destroys it.
    """
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    if not env.has_lease:
        create_pool(env.outer.api, env.run, env.settings, host_clock(env.outer))
        env.keep_lease()
    adoption = Adoption(env)
    try:
        yield adoption
    except BaseException:
        # The tool's error is the one to report.
        with contextlib.suppress(PveError):
            adoption.recover()
        raise


def vm_request(env: Environment) -> VmRequest:
    """The requested properties of the nested VM. Raises NoFreeId, PveError."""
    from pytest_nestedpve.setup.migration import selected_host

    settings, host = env.settings, selected_host(env)
    preflight = PreflightFacts.known(env.facts) or PreflightFacts()
    vmid = next(free_ids(host, settings), None)
    if vmid is None:
        raise NoFreeId(
            f"expected a free VM id of the range on {host.name}, found none; widen nested_pve_vmid_range"
        )
    marker = Marker(env.run.id, vmid, new_uuid())
    return VmRequest(
        name=guest_name(settings, env.run, "nested"),
        vmid=vmid,
        node=host.node,
        pool=pool_name(settings, env.run),
        uuid=marker.uuid,
        description=marker.to_text(),
        tags=(TAG, env.run.tag),
        public_key=env.run.directory.ensure_key(f"nested-pve run {env.run.id}"),
        cores=settings.cores,
        memory=settings.memory,
        disk=settings.disk,
        image=settings.image,
        storage=preflight.storage or settings.storage,
        bridge=preflight.bridge or settings.bridge,
    )


def provision_phase(
    create: Callable[[Environment, VmRequest], Mapping[str, Any]],
    *,
    title: str = "create the VM by the project's function",
    timeout: float = 1500.0,
    usual: float | None = None,
    inputs: Callable[[Environment], object] | None = None,
) -> Phase:
    """The phase `provision` with a VM created by `create`, which returns at least its `node` and `vmid`.

    `inputs`: further inputs of the VM beside the settings of its shape; see Phase.
    """

    def do(env: Environment) -> Mapping[str, Any]:
        from pytest_nestedpve.setup.resume import resume
        from pytest_nestedpve.setup.vm import mac_of

        if env.resumed and (env.has_lease or resume(env)):
            _destroy_former(env)
        with adopt_vms(env) as adoption:
            answer = create(env, vm_request(env))
            if not isinstance(answer, Mapping):
                raise NotAdopted(f"expected a map with the VM's node and vmid, found {answer!r}")
            vm = adoption.adopt(answer.get("node"), answer.get("vmid"))
        config = guest_config(env.outer.api, vm.node, vm.vmid)
        pool = pool_name(env.settings, env.run)
        preflight = PreflightFacts.known(env.facts) or PreflightFacts()
        storage, bridge = preflight.storage, _bridge(config)
        known = ProvisionFacts(vm.vmid, vm.node, vm.uuid, vm.name, pool, storage, bridge)
        facts = {**known.values(), "storage": storage, "bridge": bridge}
        # Recorded at once: the teardown needs the facts if a later step fails.
        env.facts[ProvisionFacts.phase] = facts
        did = f"VM {vm.vmid} ({vm.name}), created by the project, adopted into pool {pool}"
        return {"did": did, **answer, **facts, "mac": mac_of(config)}

    def probe(env: Environment) -> Mapping[str, Any] | None:
        from pytest_nestedpve.setup.resume import resume

        if env.resumed and not env.has_lease and not resume(env):
            return None
        facts = ProvisionFacts.known(env.facts)
        if facts is None or facts.mac is None:
            return None
        proof = prove(env.outer.api, env.settings, facts.vm, env.run)
        return {**facts.recorded, "node": proof.node} if proof.ok else None

    def depends(env: Environment) -> object:
        from pytest_nestedpve.setup.inputs import shape

        return [shape(env), inputs(env) if inputs is not None else None]

    return Phase("provision", title, do, probe, timeout=timeout, usual=usual, inputs=depends)


def replace_provision(
    phases: list[Phase],
    create: Callable[[Environment, VmRequest], Mapping[str, Any]],
    **options: Any,
) -> None:
    """Replace `provision` in a list of phases, for the hook; `create` and `options` as for `provision_phase`.

    Preflight then requires no image and no snippets, as the needs of the tool are not known.
    """
    from pytest_nestedpve.setup import phases as packaged

    provision = provision_phase(create, **options)
    for number, phase in enumerate(phases):
        if phase.name == provision.name:
            phases[number] = provision
        elif phase.name == "preflight" and phase.do is packaged.preflight:
            phases[number] = replace(phase, do=packaged.preflight_without_image)


def _destroy_former(env: Environment) -> None:
    """Destroy the previous VM of a kept run, proved, before its replacement is created."""
    from pytest_nestedpve.ownership.discover import discover
    from pytest_nestedpve.teardown.destroy import destroy

    host, settings, run = env.outer, env.settings, env.run
    prover = RunProver(host.api, settings, run.id)
    candidates = discover(host, settings, run.id)
    for outcome in destroy(host, prover, candidates, force_stop=settings.force_stop):
        if outcome.result != "gone":
            raise PveError(f"VM {outcome.vmid}, the run's previous one, still exists: {outcome.reason}")
    env.facts.pop(ProvisionFacts.phase, None)
    env.forget_connections()


def _inventory(env: Environment) -> frozenset[int]:
    """The ids of all guests, and those that pools list."""
    return frozenset(_guests(env)) | frozenset(ids_in_pools(env.outer))


def _guests(env: Environment) -> dict[int, tuple[str, str]]:
    """Node and kind of every guest, by id. Raises PveError for an entry without an id."""
    call = "/cluster/resources"
    guests: dict[int, tuple[str, str]] = {}
    for entry in entries(env.outer.api.get(call, type="vm"), call=f"get {call}"):
        vmid = whole(entry.get("vmid"))
        if vmid is None:
            raise PveError(f"expected an id in each entry of {call}, found {str(entry)[:200]}")
        guests[vmid] = (str(entry.get("node")), str(entry.get("type")))
    return guests


def _bridge(config: Mapping[str, Any]) -> str | None:
    for part in str(config.get("net0") or "").split(","):
        key, _, value = part.partition("=")
        if key == "bridge":
            return value
    return None
