"""A VM that a project's tool created is adopted into the run; one that existed before is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from memory_host import MemoryApi, MemoryHost
from standin_environment import environments

from pytest_nestedpve import setup
from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.ownership.marker import parse_marker
from pytest_nestedpve.ownership.pool import read_pool
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.qemu import configure, create_diskless, destroy, start
from pytest_nestedpve.setup.own_vm import NotAdopted, VmRequest, provision_phase, replace_provision
from pytest_nestedpve.teardown.teardown import teardown

FOREIGN = 99950
NET = "virtio,bridge=vmbr0"
Create = Callable[[Environment, VmRequest], Any]


@pytest.fixture
def host(tmp_path: Path) -> MemoryHost:
    return MemoryHost(tmp_path / "host.json")


@pytest.fixture
def env(host: MemoryHost, tmp_path: Path) -> Iterator[Environment]:
    with environments(host, tmp_path) as make:
        environment = make()
        yield environment
        environment.close()


def create_vm(host: MemoryHost, vmid: int, **options: Any) -> None:
    """Create a VM without a marker."""
    options = {"name": "nested-pve-of-somebody", "net0": NET, **options}
    create_diskless(host.connect().api, "father", vmid, **options)


def tofu(env: Environment, request: VmRequest) -> dict[str, Any]:
    """A project's tool: creates a VM with the requested name and id."""
    create_diskless(env.outer.api, request.node, request.vmid, name=request.name, net0=NET, tags="tofu")
    configure(env.outer.api, request.node, request.vmid, scsi0="local:1")
    return {"node": request.node, "vmid": request.vmid}


def do(env: Environment, create: Create) -> dict[str, Any]:
    return dict(provision_phase(create).do(env) or {})


def vms(host: MemoryHost) -> dict[str, Any]:
    with host.open() as model:
        return {vmid: (vm["config"], model.pool_of(int(vmid))) for vmid, vm in model.state["vms"].items()}


def test_the_vm_of_a_tool_is_adopted_and_destroyed_with_the_run(env: Environment, host: MemoryHost) -> None:
    create_vm(host, FOREIGN)
    before = vms(host)
    facts = do(env, tofu)
    vmid = facts["vmid"]
    config = vms(host)[str(vmid)][0]
    assert parse_marker(config["description"]) is not None
    assert config["tags"] == f"nestedpve;npve-{env.run.id};tofu"
    assert facts["mac"] == config["net0"].split("=")[1].split(",")[0].lower()
    assert (facts["bridge"], facts["pool"]) == ("vmbr0", f"npve-{env.run.id}")
    pool = read_pool(env.outer.api, f"npve-{env.run.id}")
    assert pool is not None
    assert pool.vmids == {vmid}
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {vmid}",), ())
    assert vms(host) == before


def test_the_tools_description_is_kept_above_the_marker(env: Environment, host: MemoryHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        create_vm(host, request.vmid, description="made by tofu\n\ndo not edit\n")
        return {"node": request.node, "vmid": str(request.vmid)}

    facts = do(env, create)
    described = vms(host)[str(facts["vmid"])][0]["description"]
    assert described.startswith("made by tofu\n\ndo not edit\nnestedpve: {")


def test_a_tool_may_write_the_marker_itself(env: Environment, host: MemoryHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        uuid = f"uuid={request.uuid}"
        create_vm(
            host,
            request.vmid,
            name=request.name,
            description=request.description,
            smbios1=uuid,
            pool=request.pool,
        )
        return {"node": request.node, "vmid": request.vmid}

    facts = do(env, create)
    assert vms(host)[str(facts["vmid"])][0]["description"].count("nestedpve:") == 1


def test_a_running_vm_is_adopted(env: Environment) -> None:
    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        answer = tofu(env, request)
        start(env.outer.api, request.node, request.vmid)
        return answer

    do(env, create)
    assert teardown(env).left == ()


def answer_with(vmid: int) -> Create:
    return lambda _env, request: {"node": request.node, "vmid": vmid}


def test_a_vm_that_existed_before_is_refused_and_kept(env: Environment, host: MemoryHost) -> None:
    """Name and range match: only the inventory shows that the VM is foreign."""
    create_vm(host, FOREIGN, name="nested-pve-production")
    before = vms(host)
    with pytest.raises(NotAdopted, match="that id was in use before"):
        do(env, answer_with(FOREIGN))
    assert vms(host) == before
    assert teardown(env).destroyed == ()
    assert vms(host) == before


def test_a_new_vm_under_an_id_that_was_in_use_is_refused(env: Environment, host: MemoryHost) -> None:
    create_vm(host, FOREIGN)

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        destroy(env.outer.api, request.node, FOREIGN)
        create_vm(host, FOREIGN, name=request.name)
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="that id was in use before"):
        do(env, create)
    teardown(env)
    assert str(FOREIGN) in vms(host)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "range": ({}, 4711, "outside the range"),
    "name": ({"name": "database"}, FOREIGN, "does not match the pattern"),
    "no name": ({"name": ""}, FOREIGN, "does not match the pattern"),
    "protected": ({"protection": 1}, FOREIGN, "it is protected"),
    "a copy": (
        {"description": 'nestedpve: {"v":1,"run":"0123456789ab","vmid":99901,'
         '"uuid":"6e1f0a52-1c1f-4f5e-9a37-0c2b5d8e4a11","role":"nested"}'},
        FOREIGN, "its marker is malformed",
    ),
    "a pool": ({"pool": "production"}, FOREIGN, "it is in another resource pool"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_new_vm_that_is_not_adopted_is_not_changed(env: Environment, host: MemoryHost, what: str) -> None:
    options, vmid, reason = REFUSED[what]
    host.connect().api.post("/pools", poolid="production")

    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        create_vm(host, vmid, **options)
        return {"node": request.node, "vmid": vmid}

    with pytest.raises(NotAdopted, match=reason):
        do(env, create)
    after = vms(host)
    assert "npve-" not in str(after[str(vmid)])
    assert teardown(env).destroyed == ()
    assert vms(host) == after


@pytest.mark.parametrize(
    "answer", [None, {}, {"vmid": True, "node": "father"}, {"vmid": 99950, "node": "a/b"}]
)
def test_an_answer_that_names_no_vm_is_refused(env: Environment, answer: Any) -> None:
    with pytest.raises(NotAdopted, match="expected a"):
        do(env, lambda _env, _request: answer)


def test_a_vm_that_is_absent_or_on_another_node_is_refused(env: Environment, host: MemoryHost) -> None:
    with pytest.raises(NotAdopted, match="does not exist"):
        do(env, answer_with(FOREIGN))

    def create(_env: Environment, _request: VmRequest) -> dict[str, Any]:
        create_vm(host, FOREIGN)
        return {"node": "mother", "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="does not exist"):
        do(env, create)


def test_a_container_is_refused(env: Environment, host: MemoryHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        create_vm(host, FOREIGN)
        with host.open() as model:
            model.state["vms"][str(FOREIGN)]["kind"] = "lxc"
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="does not exist"):
        do(env, create)
    assert "npve" not in str(vms(host))


def test_a_vm_that_is_replaced_before_it_is_marked_is_not_marked(
    env: Environment, host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's VM is destroyed, and another one created under its id: PVE's digest distinguishes them."""
    original = MemoryApi.put

    def put(self: MemoryApi, path: str, /, **params: Any) -> Any:
        if path.endswith("/config") and "description" in params:
            vmid = int(path.split("/")[-2])
            with host.open() as model:
                model.forget(vmid)
            create_vm(host, vmid)
        return original(self, path, **params)

    monkeypatch.setattr(MemoryApi, "put", put)
    with pytest.raises(PveError, match="checksum mismatch"):
        do(env, tofu)
    monkeypatch.undo()
    after = vms(host)
    assert "npve" not in str(after)
    assert teardown(env).destroyed == ()
    assert vms(host) == after


@pytest.mark.parametrize("end", [PveError("no"), KeyboardInterrupt()])
def test_the_vm_of_a_tool_that_failed_afterwards_is_destroyed(
    env: Environment, host: MemoryHost, end: BaseException
) -> None:
    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        tofu(env, request)
        create_vm(host, FOREIGN, name="nested-pve-of-somebody")
        raise end

    with pytest.raises(type(end)):
        do(env, create)
    assert any("99950 (nested-pve-of-somebody)" in line for line in env.remarks)
    assert len(teardown(env).destroyed) == 1
    assert list(vms(host)) == [str(FOREIGN)]


def test_the_vm_of_a_tool_that_returns_a_foreign_one_is_destroyed(env: Environment, host: MemoryHost) -> None:
    create_vm(host, FOREIGN)

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        tofu(env, request)
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted):
        do(env, create)
    assert len(teardown(env).destroyed) == 1
    assert list(vms(host)) == [str(FOREIGN)]


def test_in_a_kept_run_the_former_vm_is_destroyed_when_a_new_one_is_created(
    env: Environment, host: MemoryHost
) -> None:
    phase = provision_phase(tofu)
    first = dict(phase.do(env) or {})
    env.facts["provision"] = first
    assert phase.probe is not None
    assert phase.probe(env) == first
    env.resumed = True  # and its lease is renewed
    second = dict(phase.do(env) or {})
    assert list(vms(host)) == [str(second["vmid"])]
    assert not prove(env.outer.api, env.settings, Location(first), env.run).ok


class Location:
    def __init__(self, facts: dict[str, Any]) -> None:
        self.vmid, self.node = int(facts["vmid"]), str(facts["node"])


def test_a_request_has_the_values_of_the_settings(env: Environment) -> None:
    env.settings = replace(Settings(), cores=3, memory=4096, disk=40, bridge="vmbr7", pool_parent="ci")
    env.outer.api.post("/pools", poolid="ci")
    requests: list[VmRequest] = []

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        requests.append(request)
        return tofu(env, request)

    do(env, create)
    (request,) = requests
    assert (request.cores, request.memory, request.disk, request.bridge) == (3, 4096, 40, "vmbr7")
    assert request.pool == f"ci/npve-{env.run.id}"
    assert request.name == f"nested-pve-{env.run.id}"
    assert 99900 <= request.vmid <= 99999
    assert request.public_key.startswith("ssh-ed25519 ")


def test_the_phase_replaces_provision_in_the_list() -> None:
    phases: list[Phase] = list(setup.default_phases())
    names = [phase.name for phase in phases]
    replace_provision(phases, tofu, title="by tofu", timeout=99)
    assert [phase.name for phase in phases] == names
    (provision,) = [phase for phase in phases if phase.name == "provision"]
    assert (provision.title, provision.timeout) == ("by tofu", 99)
    assert phases[0].do is not setup.default_phases()[0].do
