"""A VM that a project's tool created becomes the run's; one that the tool only named does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from standin_host import StandinHost

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


def create_foreign(host: StandinHost, vmid: int, **options: Any) -> None:
    """Create a VM that is not the run's; an option of None is left out."""
    options = {"name": "nested-pve-foreign", "net0": NET, **options}
    host.create_vm(vmid, **options)


def tofu(env: Environment, request: VmRequest) -> dict[str, Any]:
    """Create a VM with the requested name and id, as a project's tool does."""
    create_diskless(env.outer.api, request.node, request.vmid, name=request.name, net0=NET, tags="tofu")
    configure(env.outer.api, request.node, request.vmid, scsi0="local:1")
    return {"node": request.node, "vmid": request.vmid}


def run_create(env: Environment, create: Create) -> dict[str, Any]:
    return dict(provision_phase(create).do(env) or {})


def guests(host: StandinHost) -> dict[int, Any]:
    """Configuration and pool of each VM by its id; nothing of a container but its id."""
    vms = {vmid: (host.config(vmid), host.pool_of(vmid)) for vmid in host.vms()}
    return {**dict.fromkeys(host.containers()), **vms}


def test_a_vm_created_by_the_tool_is_the_runs_and_destroyed_with_it(
    env: Environment, host: StandinHost
) -> None:
    create_foreign(host, FOREIGN)
    before = guests(host)
    facts = run_create(env, tofu)
    vmid = facts["vmid"]
    config = host.config(vmid)
    assert parse_marker(config["description"]) is not None
    assert config["tags"] == f"nestedpve;npve-{env.run.id};tofu"
    assert facts["mac"] == config["net0"].split("=")[1].split(",")[0].lower()
    assert (facts["bridge"], facts["pool"]) == ("vmbr0", f"npve-{env.run.id}")
    pool = read_pool(env.outer.api, f"npve-{env.run.id}")
    assert pool is not None
    assert pool.vmids == {vmid}
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {vmid}",), ())
    assert guests(host) == before


def test_the_tools_description_is_kept_above_the_marker(env: Environment, host: StandinHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        create_foreign(host, request.vmid, description="created by tofu\n\ndo not edit\n")
        return {"node": request.node, "vmid": str(request.vmid)}

    facts = run_create(env, create)
    description = host.config(facts["vmid"])["description"]
    assert description.startswith("created by tofu\n\ndo not edit\nnestedpve: {")


def test_a_tool_may_write_the_marker_itself(env: Environment, host: StandinHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        uuid = f"uuid={request.uuid}"
        create_foreign(
            host,
            request.vmid,
            name=request.name,
            description=request.description,
            smbios1=uuid,
            pool=request.pool,
        )
        return {"node": request.node, "vmid": request.vmid}

    facts = run_create(env, create)
    assert host.config(facts["vmid"])["description"].count("nestedpve:") == 1


def test_a_vm_that_runs_already_is_adopted(env: Environment) -> None:
    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        answer = tofu(env, request)
        start(env.outer.api, request.node, request.vmid)
        return answer

    run_create(env, create)
    assert teardown(env).left == ()


def name_vm(vmid: int) -> Create:
    """A tool that creates nothing and names that VM."""
    return lambda _env, request: {"node": request.node, "vmid": vmid}


def test_a_vm_that_existed_before_is_refused_and_kept(env: Environment, host: StandinHost) -> None:
    """Name and id range fit: only the inventory of before shows that the VM is not the run's."""
    create_foreign(host, FOREIGN, name="nested-pve-production")
    before = guests(host)
    with pytest.raises(NotAdopted, match="that id was in use before"):
        run_create(env, name_vm(FOREIGN))
    assert guests(host) == before
    assert teardown(env).destroyed == ()
    assert guests(host) == before


def test_a_vm_created_again_with_an_id_that_was_in_use_is_refused(
    env: Environment, host: StandinHost
) -> None:
    create_foreign(host, FOREIGN)

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        destroy(env.outer.api, request.node, FOREIGN)
        create_foreign(host, FOREIGN, name=request.name)
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="that id was in use before"):
        run_create(env, create)
    teardown(env)
    assert FOREIGN in guests(host)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "range": ({}, 4711, "outside the range"),
    "name": ({"name": "database"}, FOREIGN, "does not match the pattern"),
    "no name": ({"name": None}, FOREIGN, "does not match the pattern"),
    "protected": ({"protection": 1}, FOREIGN, "it is protected"),
    "a copy": (
        {"description": 'nestedpve: {"v":1,"run":"0123456789ab","vmid":99901,'
         '"uuid":"6e1f0a52-1c1f-4f5e-9a37-0c2b5d8e4a11","role":"nested"}'},
        FOREIGN, "its marker is malformed",
    ),
    "a pool": ({"pool": "production"}, FOREIGN, "it is in another resource pool"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_new_vm_that_may_not_be_ours_is_refused_and_unchanged(
    env: Environment, host: StandinHost, case: str
) -> None:
    options, vmid, reason = REFUSED[case]
    host.connect().api.post("/pools", poolid="production")

    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        create_foreign(host, vmid, **options)
        return {"node": request.node, "vmid": vmid}

    with pytest.raises(NotAdopted, match=reason):
        run_create(env, create)
    before = guests(host)
    assert "npve-" not in str(before[vmid])
    assert teardown(env).destroyed == ()
    assert guests(host) == before


@pytest.mark.parametrize(
    "answer", [None, {}, {"vmid": True, "node": "father"}, {"vmid": 99950, "node": "a/b"}]
)
def test_an_answer_that_names_no_vm_is_refused(env: Environment, answer: Any) -> None:
    with pytest.raises(NotAdopted, match="expected a"):
        run_create(env, lambda _env, _request: answer)


def test_a_vm_that_does_not_exist_or_is_on_another_node_is_refused(
    env: Environment, host: StandinHost
) -> None:
    with pytest.raises(NotAdopted, match="does not exist"):
        run_create(env, name_vm(FOREIGN))

    def create(_env: Environment, _request: VmRequest) -> dict[str, Any]:
        create_foreign(host, FOREIGN)
        return {"node": "mother", "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="hostname lookup 'mother' failed"):
        run_create(env, create)
    host.forget_vm(FOREIGN)
    host.join("mother")
    with pytest.raises(NotAdopted, match="does not exist"):
        run_create(env, create)


def test_a_container_is_refused(env: Environment, host: StandinHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        host.container(FOREIGN, hostname="nested-pve-foreign")
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="does not exist"):
        run_create(env, create)
    assert "npve" not in str(guests(host))
    assert (host.containers(), host.pool_of(FOREIGN)) == ([FOREIGN], None)


def test_a_vm_replaced_between_its_check_and_its_marking_is_not_marked(
    env: Environment, host: StandinHost
) -> None:
    """The tool's VM disappeared and a foreign one has its id: PVE's digest differs."""

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        answer = tofu(env, request)

        def replace_vm() -> None:
            host.forget_vm(request.vmid)
            create_foreign(host, request.vmid)

        host.before("PUT", f"/nodes/father/qemu/{request.vmid}/config", replace_vm)
        return answer

    with pytest.raises(PveError, match="checksum mismatch"):
        run_create(env, create)
    before = guests(host)
    assert "npve" not in str(before)
    assert teardown(env).destroyed == ()
    assert guests(host) == before


@pytest.mark.parametrize("end", [PveError("no"), KeyboardInterrupt()])
def test_a_tool_that_fails_after_creating_its_vm_leaves_nothing(
    env: Environment, host: StandinHost, end: BaseException
) -> None:
    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        tofu(env, request)
        create_foreign(host, FOREIGN, name="nested-pve-foreign")
        raise end

    with pytest.raises(type(end)):
        run_create(env, create)
    assert any("99950 (nested-pve-foreign)" in line for line in env.remarks)
    assert len(teardown(env).destroyed) == 1
    assert list(guests(host)) == [FOREIGN]


def test_the_vm_of_a_tool_that_names_another_one_is_destroyed(env: Environment, host: StandinHost) -> None:
    create_foreign(host, FOREIGN)

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        tofu(env, request)
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted):
        run_create(env, create)
    assert len(teardown(env).destroyed) == 1
    assert list(guests(host)) == [FOREIGN]


class Created:
    """A created VM as `prove` expects it."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.vmid, self.node = int(facts["vmid"]), str(facts["node"])


def test_a_vm_is_proved_and_replaced_when_a_kept_run_creates_it_again(
    env: Environment, host: StandinHost
) -> None:
    phase = provision_phase(tofu)
    first = dict(phase.do(env) or {})
    env.facts["provision"] = first
    assert phase.probe is not None
    assert phase.probe(env) == first
    env.resumed = True  # and its lease is being renewed
    second = dict(phase.do(env) or {})
    assert list(guests(host)) == [second["vmid"]]
    assert not prove(env.outer.api, env.settings, Created(first), env.run).ok


def test_a_request_has_the_values_of_the_settings(env: Environment) -> None:
    env.settings = replace(Settings(), cores=3, memory=4096, disk=40, bridge="vmbr7", pool_parent="ci")
    env.outer.api.post("/pools", poolid="ci")
    requests: list[VmRequest] = []

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        requests.append(request)
        return tofu(env, request)

    run_create(env, create)
    (request,) = requests
    assert (request.cores, request.memory, request.disk, request.bridge) == (3, 4096, 40, "vmbr7")
    assert request.pool == f"ci/npve-{env.run.id}"
    assert request.name == f"nested-pve-{env.run.id}"
    assert 99900 <= request.vmid <= 99999
    assert request.public_key.startswith("ssh-ed25519 ")


def test_the_tools_phase_replaces_provision_in_the_list_of_phases() -> None:
    phases: list[Phase] = list(setup.default_phases())
    names = [phase.name for phase in phases]
    replace_provision(phases, tofu, title="by tofu", timeout=99)
    assert [phase.name for phase in phases] == names
    (provision,) = [phase for phase in phases if phase.name == "provision"]
    assert (provision.title, provision.timeout) == ("by tofu", 99)
    assert phases[0].do is not setup.default_phases()[0].do
