"""Adoption of a VM that a project's own tool creates: into the run's pool, with the run's marker.

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
        what = f"VM {number} on {node} is not taken into the run {env.run.id}, and not touched"
        if number in self._before:
            raise NotAdopted(
                f"{what}: that id was in use before. A VM that was there already is never the run's; "
                "have the tool make a new one"
            )
        api, settings, run = env.outer.api, env.settings, env.run
        config = self._unlocked(node, number, what)
        status = api.get(f"/nodes/{node}/qemu/{number}/status/current")
        uuid = uuid_of(config)
        if uuid is None:
            raise NotAdopted(f"{what}: expected an SMBIOS uuid in its configuration, found none")
        marker = Marker(run.id, number, uuid)
        described = str(config.get("description") or "").rstrip("\n")
        if parse_marker(described) != marker:
            described = f"{described}\n{marker.to_text()}".lstrip("\n")
        judged = judge(settings, number, run.id, {**config, "description": described}, status)
        if not judged.ok:
            raise NotAdopted(f"{what}: {judged.reason}")
        pool = pool_name(settings, run)
        members = read_pool(api, pool)
        inside = members is not None and number in members.vmids
        if not inside and number in ids_in_pools(env.outer):
            raise NotAdopted(f"{what}: it is in another resource pool; have the tool make it in {pool}")
        tags = ";".join(dict.fromkeys((*read_tags(config.get("tags")), TAG, run.tag)))
        # Not by the run's token: it is not in the pool yet, and unmarked nothing is put there.
        env.outer.unfenced().api.put(
            f"/nodes/{node}/qemu/{number}/config",
            description=described,
            tags=tags,
            digest=str(config.get("digest") or ""),
        )
        if not inside:
            # Never with allow-move: PVE refuses what is in another pool by now.
            api.put("/pools", poolid=pool, vms=str(number))
        made = Created(number, node, str(config.get("name")), uuid)
        proof = prove(api, settings, made, run)
        if not proof.ok:
            raise PveError(
                f"VM {number} on {node} was taken into the run, but is not proved its own: {proof.reason}"
            )
        env.audit.write("adopted", vmid=number, cause=f"{made.name} on {node}, into {pool}")
        return made

    def _unlocked(self, node: str, vmid: int, what: str) -> dict[str, Any]:
        """The configuration, once no task works on it."""
        api = self._env.outer.api
        config: dict[str, Any] = {}

        def free() -> dict[str, Any] | None:
            nonlocal config
            config = guest_config(api, node, vmid, current=True)
            return None if config.get("lock") else config

        try:
            return wait_until(
                free, deadline=Deadline(LOCK_LIMIT), what=lambda: f"the lock {config.get('lock')} to go"
            )
        except PveError as e:
            raise NotAdopted(f"{what}: {e}") from e

    def recover(self) -> None:
        """After a tool that failed: what it made by the run's own name is taken, other new VMs are named."""
        env = self._env
        name, others = guest_name(env.settings, env.run, "nested"), []
        for vmid, (node, kind) in sorted(_guests(env).items()):
            if vmid in self._before or kind != "qemu":
                continue
            found = guest_config(env.outer.api, node, vmid).get("name")
            if found != name:
                others.append(f"{vmid} ({found})")
                continue
            try:
                self.adopt(node, vmid)
                env.remark(f"VM {vmid} of a tool that then failed has the run's name: taken into the run")
            except PveError as e:
                env.remark(str(e))
        if others:
            env.remark(
                f"new on {env.outer.name} since the project's tool began, and not touched as nothing says "
                f"whose they are: VM {', '.join(others)}"
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
    from pytest_nestedpve.setup.migration import chosen

    settings, host = env.settings, chosen(env)
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


def made_by(
    create: Callable[[Environment, VmRequest], Mapping[str, Any]],
    *,
    title: str = "have the VM made",
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
            made = adoption.adopt(answer.get("node"), answer.get("vmid"))
        config = guest_config(env.outer.api, made.node, made.vmid)
        pool = pool_name(env.settings, env.run)
        preflight = PreflightFacts.known(env.facts) or PreflightFacts()
        storage, bridge = preflight.storage, _bridge(config)
        vm = ProvisionFacts(made.vmid, made.node, made.uuid, made.name, pool, storage, bridge)
        facts = {**vm.values(), "storage": storage, "bridge": bridge}
        # Recorded at once: the teardown needs them, should anything below fail.
        env.facts[ProvisionFacts.phase] = facts
        did = f"VM {made.vmid} ({made.name}), made by the project, taken into pool {pool}"
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
    """Replace `provision` in a list of phases, for the hook; `create` and `options` as for `made_by`.

    Preflight then requires no image and no snippets, as the needs of the tool are not known.
    """
    from pytest_nestedpve.setup import phases as builtin

    made = made_by(create, **options)
    for number, phase in enumerate(phases):
        if phase.name == made.name:
            phases[number] = made
        elif phase.name == "preflight" and phase.do is builtin.preflight:
            phases[number] = replace(phase, do=builtin.preflight_without_image)


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
    """Every id that a guest has, or that stands in a pool."""
    return frozenset(_guests(env)) | frozenset(ids_in_pools(env.outer))


def _guests(env: Environment) -> dict[int, tuple[str, str]]:
    """All guests: node and kind by id. Nothing is left out: what cannot be read is an error."""
    call = "/cluster/resources"
    found: dict[int, tuple[str, str]] = {}
    for entry in entries(env.outer.api.get(call, type="vm"), call=f"get {call}"):
        vmid = whole(entry.get("vmid"))
        if vmid is None:
            raise PveError(f"expected an id in each entry of {call}, found {str(entry)[:200]}")
        found[vmid] = (str(entry.get("node")), str(entry.get("type")))
    return found


def _bridge(config: Mapping[str, Any]) -> str | None:
    for part in str(config.get("net0") or "").split(","):
        key, _, value = part.partition("=")
        if key == "bridge":
            return value
    return None
