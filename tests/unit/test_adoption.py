"""A VM that a project's tool made becomes the run's; one that the tool only named does not."""

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
        made = make()
        yield made
        made.close()


def put(host: MemoryHost, vmid: int, **options: Any) -> None:
    """A VM as anybody may make one."""
    options = {"name": "nested-pve-of-somebody", "net0": NET, **options}
    create_diskless(host.connect().api, "father", vmid, **options)


def tofu(env: Environment, request: VmRequest) -> dict[str, Any]:
    """What a project's tool does, by the name and the id that it was asked for."""
    create_diskless(env.outer.api, request.node, request.vmid, name=request.name, net0=NET, tags="tofu")
    configure(env.outer.api, request.node, request.vmid, scsi0="local:1")
    return {"node": request.node, "vmid": request.vmid}


def do(env: Environment, create: Create) -> dict[str, Any]:
    return dict(provision_phase(create).do(env) or {})


def everything(host: MemoryHost) -> dict[str, Any]:
    with host.open() as model:
        return {vmid: (vm["config"], model.pool_of(int(vmid))) for vmid, vm in model.state["vms"].items()}


def test_what_the_tool_made_is_the_runs_and_goes_with_it(env: Environment, host: MemoryHost) -> None:
    put(host, FOREIGN)
    before = everything(host)
    facts = do(env, tofu)
    vmid = facts["vmid"]
    config = everything(host)[str(vmid)][0]
    assert parse_marker(config["description"]) is not None
    assert config["tags"] == f"nestedpve;npve-{env.run.id};tofu"
    assert facts["mac"] == config["net0"].split("=")[1].split(",")[0].lower()
    assert (facts["bridge"], facts["pool"]) == ("vmbr0", f"npve-{env.run.id}")
    pool = read_pool(env.outer.api, f"npve-{env.run.id}")
    assert pool is not None
    assert pool.vmids == {vmid}
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {vmid}",), ())
    assert everything(host) == before


def test_a_description_of_the_tools_stays_above_the_marker(env: Environment, host: MemoryHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        put(host, request.vmid, description="made by tofu\n\ndo not edit\n")
        return {"node": request.node, "vmid": str(request.vmid)}

    facts = do(env, create)
    described = everything(host)[str(facts["vmid"])][0]["description"]
    assert described.startswith("made by tofu\n\ndo not edit\nnestedpve: {")


def test_a_tool_may_write_the_marker_itself(env: Environment, host: MemoryHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        uuid = f"uuid={request.uuid}"
        put(
            host,
            request.vmid,
            name=request.name,
            description=request.description,
            smbios1=uuid,
            pool=request.pool,
        )
        return {"node": request.node, "vmid": request.vmid}

    facts = do(env, create)
    assert everything(host)[str(facts["vmid"])][0]["description"].count("nestedpve:") == 1


def test_a_vm_that_runs_already_is_taken(env: Environment) -> None:
    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        made = tofu(env, request)
        start(env.outer.api, request.node, request.vmid)
        return made

    do(env, create)
    assert teardown(env).left == ()


def _another(vmid: int) -> Create:
    return lambda _env, request: {"node": request.node, "vmid": vmid}


def test_a_vm_that_was_there_before_is_refused_and_stays(env: Environment, host: MemoryHost) -> None:
    """Its name, its range, everything fits: only the inventory says that it is somebody else's."""
    put(host, FOREIGN, name="nested-pve-production")
    before = everything(host)
    with pytest.raises(NotAdopted, match="that id was in use before"):
        do(env, _another(FOREIGN))
    assert everything(host) == before
    assert teardown(env).destroyed == ()
    assert everything(host) == before


def test_a_vm_made_anew_under_an_id_that_was_in_use_is_refused(env: Environment, host: MemoryHost) -> None:
    put(host, FOREIGN)

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        destroy(env.outer.api, request.node, FOREIGN)
        put(host, FOREIGN, name=request.name)
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="that id was in use before"):
        do(env, create)
    teardown(env)
    assert str(FOREIGN) in everything(host)


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
def test_a_new_vm_that_may_not_be_ours_is_refused_untouched(
    env: Environment, host: MemoryHost, what: str
) -> None:
    options, vmid, reason = REFUSED[what]
    host.connect().api.post("/pools", poolid="production")

    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        put(host, vmid, **options)
        return {"node": request.node, "vmid": vmid}

    with pytest.raises(NotAdopted, match=reason):
        do(env, create)
    now = everything(host)
    assert "npve-" not in str(now[str(vmid)])
    assert teardown(env).destroyed == ()
    assert everything(host) == now


@pytest.mark.parametrize(
    "answer", [None, {}, {"vmid": True, "node": "father"}, {"vmid": 99950, "node": "a/b"}]
)
def test_an_answer_that_names_no_vm_is_refused(env: Environment, answer: Any) -> None:
    with pytest.raises(NotAdopted, match="expected a"):
        do(env, lambda _env, _request: answer)


def test_a_vm_that_is_not_there_or_on_another_node_is_refused(env: Environment, host: MemoryHost) -> None:
    with pytest.raises(NotAdopted, match="does not exist"):
        do(env, _another(FOREIGN))

    def create(_env: Environment, _request: VmRequest) -> dict[str, Any]:
        put(host, FOREIGN)
        return {"node": "mother", "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="does not exist"):
        do(env, create)


def test_a_container_is_refused(env: Environment, host: MemoryHost) -> None:
    def create(_env: Environment, request: VmRequest) -> dict[str, Any]:
        put(host, FOREIGN)
        with host.open() as model:
            model.state["vms"][str(FOREIGN)]["kind"] = "lxc"
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted, match="does not exist"):
        do(env, create)
    assert "npve" not in str(everything(host))


def test_a_vm_that_changed_hands_between_look_and_mark_is_not_marked(
    env: Environment, host: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tool's VM went, somebody made another of that id: PVE's digest tells them apart."""
    plain = MemoryApi.put

    def late(self: MemoryApi, path: str, /, **params: Any) -> Any:
        if path.endswith("/config") and "description" in params:
            vmid = int(path.split("/")[-2])
            with host.open() as model:
                model.forget(vmid)
            put(host, vmid)
        return plain(self, path, **params)

    monkeypatch.setattr(MemoryApi, "put", late)
    with pytest.raises(PveError, match="checksum mismatch"):
        do(env, tofu)
    monkeypatch.undo()
    now = everything(host)
    assert "npve" not in str(now)
    assert teardown(env).destroyed == ()
    assert everything(host) == now


@pytest.mark.parametrize("end", [PveError("no"), KeyboardInterrupt()])
def test_a_tool_that_fails_after_making_its_vm_leaves_nothing(
    env: Environment, host: MemoryHost, end: BaseException
) -> None:
    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        tofu(env, request)
        put(host, FOREIGN, name="nested-pve-of-somebody")
        raise end

    with pytest.raises(type(end)):
        do(env, create)
    assert any("99950 (nested-pve-of-somebody)" in line for line in env.remarks)
    assert len(teardown(env).destroyed) == 1
    assert list(everything(host)) == [str(FOREIGN)]


def test_a_tool_that_names_the_wrong_vm_still_leaves_nothing_of_its_own(
    env: Environment, host: MemoryHost
) -> None:
    put(host, FOREIGN)

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        tofu(env, request)
        return {"node": request.node, "vmid": FOREIGN}

    with pytest.raises(NotAdopted):
        do(env, create)
    assert len(teardown(env).destroyed) == 1
    assert list(everything(host)) == [str(FOREIGN)]


def test_a_vm_is_proved_and_on_a_kept_run_made_anew_its_former_one_goes(
    env: Environment, host: MemoryHost
) -> None:
    phase = provision_phase(tofu)
    first = dict(phase.do(env) or {})
    env.facts["provision"] = first
    assert phase.probe is not None
    assert phase.probe(env) == first
    env.resumed = True  # and its lease is being renewed
    second = dict(phase.do(env) or {})
    assert list(everything(host)) == [str(second["vmid"])]
    assert not prove(env.outer.api, env.settings, _Place(first), env.run).ok


class _Place:
    def __init__(self, facts: dict[str, Any]) -> None:
        self.vmid, self.node = int(facts["vmid"]), str(facts["node"])


def test_a_wish_says_what_the_settings_say(env: Environment) -> None:
    env.settings = replace(Settings(), cores=3, memory=4096, disk=40, bridge="vmbr7", pool_parent="ci")
    env.outer.api.post("/pools", poolid="ci")
    seen: list[VmRequest] = []

    def create(env: Environment, request: VmRequest) -> dict[str, Any]:
        seen.append(request)
        return tofu(env, request)

    do(env, create)
    (request,) = seen
    assert (request.cores, request.memory, request.disk, request.bridge) == (3, 4096, 40, "vmbr7")
    assert request.pool == f"ci/npve-{env.run.id}"
    assert request.name == f"nested-pve-{env.run.id}"
    assert 99900 <= request.vmid <= 99999
    assert request.public_key.startswith("ssh-ed25519 ")


def test_in_the_list_of_phases_it_takes_the_place_of_provision() -> None:
    phases: list[Phase] = list(setup.default_phases())
    names = [phase.name for phase in phases]
    replace_provision(phases, tofu, title="by tofu", timeout=99)
    assert [phase.name for phase in phases] == names
    (made,) = [phase for phase in phases if phase.name == "provision"]
    assert (made.title, made.timeout) == ("by tofu", 99)
    assert phases[0].do is not setup.default_phases()[0].do
