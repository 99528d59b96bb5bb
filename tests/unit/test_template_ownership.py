"""Templates of this tool's making: whose they are, what leaves them alone, and what removes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from memory_host import MemoryHost
from standin_environment import environments

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.create import Created, create_marked
from pytest_nestedpve.ownership.marker import Marker, new_uuid
from pytest_nestedpve.ownership.pool import create_pool, host_clock, pool_name
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.deadline import set_scale
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.setup import make_template as making
from pytest_nestedpve.teardown import expired_runs, templates
from pytest_nestedpve.teardown.destroy import BUDGET
from pytest_nestedpve.teardown.plan import execute, plan
from pytest_nestedpve.teardown.plan_row import Row
from pytest_nestedpve.teardown.teardown import teardown
from pytest_nestedpve.teardown.templates import Deed


def begun(env: Environment) -> Created:
    """The run's own VM, with a disk."""
    create_pool(env.outer.api, env.run, env.settings, host_clock(env.outer))
    made = create_marked(env.outer, env.run, env.settings)
    qemu.configure(env.outer.api, made.node, made.vmid, scsi0="local:8,format=qcow2", sshkeys="ssh-ed25519")
    return made


def claimed(env: Environment, made: Created) -> Deed:
    """Its first step towards a template, after which a killed session leaves it."""
    deed = templates.own_deed(env.run.id, made.vmid, made.uuid, host_clock(env.outer))
    making.claim(env.outer, env.settings, deed)
    return deed


def template(env: Environment) -> Deed:
    """A template that is ready; the run that made it is over."""
    made = begun(env)
    deed = claimed(env, made)
    making.convert(env.outer, env.settings, deed, made.node, lambda _: None)
    assert teardown(env).left == ()
    return dataclasses.replace(deed, state=templates.READY)


def vmids(memory: MemoryHost) -> list[int]:
    with memory.open() as model:
        return sorted(int(vmid) for vmid in model.state["vms"])


def pools(memory: MemoryHost) -> list[str]:
    with memory.open() as model:
        return sorted(model.state["pools"])


def rows(env: Environment, named: str | None = None, **settings: Any) -> list[Row]:
    return plan(env.outer, dataclasses.replace(env.settings, run_id=named, **settings))


def clean_up(env: Environment, named: str | None = None) -> dict[str, str]:
    """What a clean-up does that asks nothing: results by name."""
    chosen = dataclasses.replace(env.settings, run_id=named, yes=True)
    done = execute(env.outer, chosen, plan(env.outer, chosen))
    return {row.name: f"{outcome.result} {outcome.reason}".strip() for row, outcome in done.items()}


# -- what leaves it alone ------------------------------------------------------------------------


def test_the_run_that_made_a_template_leaves_it_when_it_goes(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    assert vmids(memory) == [deed.vmid]
    assert pools(memory) == [f"npve-{deed.template}"]


def test_a_clean_up_that_does_not_name_a_template_leaves_it(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    before = memory.configuration(deed.vmid)
    (row,) = rows(env)
    assert (row.vmid, row.verdict, row.is_leftover) == (deed.vmid, "keep", False)
    assert f"--nested-run {deed.template}" in row.reason
    assert clean_up(env) == {}
    assert clean_up(env, env.run.id) == {}
    assert memory.configuration(deed.vmid) == before


def test_a_template_is_not_swept_however_old_it_is(
    env: Environment, memory: MemoryHost, tmp_path: Path
) -> None:
    deed = template(env)
    with memory.open() as model:
        model.state["offset"] = model.state.get("offset", 0) + 400 * 86400
    with environments(memory, tmp_path / "another") as make:
        later = make()
        create_pool(later.outer.api, later.run, later.settings, host_clock(later.outer))
        expired_runs.sweep(later)
        assert teardown(later).left == ()
    assert vmids(memory) == [deed.vmid]


def test_a_context_file_that_names_a_template_does_not_take_it(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    (row,) = plan(env.outer, env.settings, extra=[deed.vmid])
    assert row.verdict == "keep"
    assert vmids(memory) == [deed.vmid]


def test_a_template_carries_nothing_of_its_run(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    config = qemu.guest_config(env.outer.api, "father", deed.vmid)
    assert config["name"] == f"nested-pve-{deed.template}"
    assert not {"cicustom", "sshkeys"} & set(config)
    assert pool_name(env.settings, env.run) not in pools(memory)
    assert f"npve-{env.run.id}" not in str(config["tags"]).split(";")


# -- what takes it -------------------------------------------------------------------------------


def test_a_template_that_is_named_goes_and_another_stays(
    env: Environment, memory: MemoryHost, tmp_path: Path
) -> None:
    deed = template(env)
    with environments(memory, tmp_path / "another") as make:
        other = template(make())
    assert clean_up(env, deed.template) == {f"nested-pve-{deed.template}": "gone"}
    assert vmids(memory) == [other.vmid]
    assert pools(memory) == [f"npve-{other.template}"]
    with memory.open() as model:
        assert not any(f"-{deed.vmid}-" in volid for volid in model.state["volumes"])


def test_a_template_that_vms_hang_on_stays_until_they_are_gone(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    env.outer.api.post(f"/nodes/father/qemu/{deed.vmid}/clone", newid=500, name="somebodys")
    said = clean_up(env, deed.template)[f"nested-pve-{deed.template}"]
    assert said.startswith("left ")
    assert "destroy the VMs that were cloned from it first" in said
    assert vmids(memory) == [500, deed.vmid]
    qemu.destroy(env.outer.api, "father", 500)
    assert clean_up(env, deed.template) == {f"nested-pve-{deed.template}": "gone"}


@pytest.mark.parametrize(
    "change",
    [
        {"description": "mine now"},
        {"description": Marker("0" * 12, 99999, new_uuid()).to_text()},
        {"smbios1": f"uuid={new_uuid()}"},
        {"name": "somebodys"},
        {"protection": 1},
    ],
)
def test_what_is_not_the_template_any_more_stays_though_it_is_named(
    env: Environment, memory: MemoryHost, change: dict[str, Any]
) -> None:
    deed = template(env)
    with memory.open() as model:
        model.state["vms"][str(deed.vmid)]["config"] |= change
    (row,) = rows(env, deed.template)
    assert row.verdict == "keep"
    assert "not proved" in row.reason
    assert vmids(memory) == [deed.vmid]


def test_another_vm_of_the_templates_id_stays(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    (row,) = rows(env, deed.template)
    qemu.destroy(env.outer.api, "father", deed.vmid)
    env.outer.api.post("/nodes/father/qemu", vmid=deed.vmid, name="nested-pve-other", scsi0="local:4")
    outcome = templates.destroy_template(env.outer, env.settings, row)
    assert outcome.result == "foreign"
    assert vmids(memory) == [deed.vmid]


def test_the_lock_of_a_template_is_never_removed(env: Environment, memory: MemoryHost) -> None:
    deed = template(env)
    with memory.open() as model:
        model.state["vms"][str(deed.vmid)]["config"]["lock"] = "backup"
    before = memory.configuration(deed.vmid)
    set_scale(1.0 / BUDGET)
    try:
        outcomes = clean_up(env, deed.template)
    finally:
        set_scale(1.0)
    assert outcomes == {f"nested-pve-{deed.template}": "left VM is locked (backup)"}
    assert memory.configuration(deed.vmid) == before


def test_a_template_that_runs_is_left_when_force_stop_is_off(env: Environment, memory: MemoryHost) -> None:
    made = begun(env)
    deed = claimed(env, made)
    qemu.start(env.outer.api, made.node, made.vmid)
    (row,) = rows(env, deed.template)
    settings = dataclasses.replace(env.settings, force_stop=False)
    outcome = templates.destroy_template(env.outer, settings, row)
    assert (outcome.result, outcome.reason) == ("left", "it runs, and force_stop is off")
    with memory.open() as model:
        assert model.state["vms"][str(made.vmid)]["running"]


def test_a_template_that_was_moved_since_the_plan_is_destroyed_where_it_is(
    env: Environment, memory: MemoryHost
) -> None:
    with memory.open() as model:
        model.join("father2")
    deed = template(env)
    (row,) = rows(env, deed.template)
    with memory.open() as model:
        model.migrate(deed.vmid, "father2")
    assert templates.destroy_template(env.outer, env.settings, row).result == "gone"
    assert vmids(memory) == []
    assert pools(memory) == []


def test_a_vm_that_somebody_put_into_the_templates_pool_keeps_the_pool(
    env: Environment, memory: MemoryHost
) -> None:
    deed = template(env)
    env.outer.api.post("/nodes/father/qemu", vmid=500, name="somebodys")
    env.outer.api.put("/pools", poolid=f"npve-{deed.template}", vms="500")
    assert "still contains 500" in clean_up(env, deed.template)[f"nested-pve-{deed.template}"]
    assert vmids(memory) == [500]


def test_a_pool_that_does_not_say_which_vm_it_is_stays(env: Environment) -> None:
    deed = template(env)
    env.outer.api.put("/pools", poolid=f"npve-{deed.template}", comment="ours")
    (row,) = rows(env, deed.template)
    assert row.verdict == "keep"
    assert "by hand" in row.reason


# -- a making that was cut off -------------------------------------------------------------------


def test_a_template_whose_making_was_killed_goes_unnamed_once_its_session_is_dead(
    env: Environment, memory: MemoryHost
) -> None:
    lock = SessionLock(env.run.id)
    lock.acquire()
    claimed(env, begun(env))
    assert {row.verdict for row in rows(env)} == {"keep"}
    lock.release(remove=False)
    assert "gone" in clean_up(env).values()
    clean_up(env, env.run.id)
    assert vmids(memory) == []
    assert pools(memory) == []


def test_a_half_made_template_of_somebody_else_stays(env: Environment, memory: MemoryHost) -> None:
    deed = claimed(env, begun(env))
    strange = dataclasses.replace(deed, client="0" * 16, owner="bob@elsewhere").to_text()
    env.outer.api.put("/pools", poolid=f"npve-{deed.template}", comment=strange)
    SessionLock(env.run.id).acquire()
    (row,) = [row for row in rows(env) if row.run == deed.template]
    assert row.verdict == "keep"
    assert vmids(memory) == [deed.vmid]


def test_a_making_waits_for_locks(env: Environment, memory: MemoryHost) -> None:
    made = begun(env)
    for method in ("POST", "PUT"):
        memory.fault(method, "/pools", text="cfs-lock 'file-user_cfg' error: got lock request timeout")
    deed = claimed(env, made)
    path = f"/nodes/father/qemu/{made.vmid}/config"
    lock = f"/var/lock/qemu-server/lock-{made.vmid}.conf"
    memory.fault("PUT", path, text=f"can't lock file '{lock}' - got timeout")
    memory.fault("PUT", "/pools", text="cfs-lock 'file-user_cfg' error: got lock request timeout")
    making.convert(env.outer, env.settings, deed, made.node, lambda _: None)
    with memory.open() as model:
        assert model.state["faults"] == [] or all(each["times"] == 0 for each in model.state["faults"])
        assert model.state["vms"][str(made.vmid)]["config"]["template"] == 1


@pytest.mark.parametrize(
    "fails", ["PUT /nodes/father/qemu/\\d+/config", "POST /nodes/father/qemu/\\d+/template"]
)
def test_a_making_that_fails_leaves_nothing(env: Environment, memory: MemoryHost, fails: str) -> None:
    made = begun(env)
    env.facts["provision"] = dataclasses.asdict(made)
    inner = SimpleNamespace(ssh=None, run=lambda command, **_: CommandResult(str(command), 0, b"", b"", 1.0))
    cast(Any, env)._inner = inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qemu, "shutdown", lambda *_, **__: None)
        method, _, path = fails.partition(" ")
        memory.fault(method, path, text="no space left", times=1)
        with pytest.raises(PveError, match="no space left"):
            making.create_template(env)
    assert teardown(env).left == ()
    assert vmids(memory) == []
    assert pools(memory) == []


@pytest.mark.parametrize("when", ["before", "while it is generalised"])
def test_a_vm_that_was_moved_becomes_a_template_where_it_is(
    env: Environment, memory: MemoryHost, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move() -> None:
        with memory.open() as model:
            model.migrate(made.vmid, "father2")

    def run(command: object, **_: object) -> CommandResult:
        if when != "before":
            move()
        return CommandResult(str(command), 0, b"", b"", 1.0)

    def shutdown(api: Any, node: str, vmid: int, **_: object) -> None:
        api.get(f"/nodes/{node}/qemu/{vmid}/status/current")

    with memory.open() as model:
        model.join("father2")
    made = begun(env)
    env.facts["provision"] = dataclasses.asdict(made)
    if when == "before":
        move()
    cast(Any, env)._inner = SimpleNamespace(ssh=None, run=run)
    monkeypatch.setattr(qemu, "shutdown", shutdown)
    assert making.create_template(env).vmid == made.vmid
    with memory.open() as model:
        vm = model.state["vms"][str(made.vmid)]
        assert (vm["node"], vm["config"]["template"]) == ("father2", 1)


def test_a_run_that_is_not_proved_is_not_made_a_template(env: Environment, memory: MemoryHost) -> None:
    made = begun(env)
    env.facts["provision"] = dataclasses.asdict(made)
    with memory.open() as model:
        model.state["vms"][str(made.vmid)]["config"]["description"] = "somebody's"
    with pytest.raises(PveError, match="to be the run's own"):
        making.create_template(env)
    assert pools(memory) == [f"npve-{env.run.id}"]


# -- the deed ------------------------------------------------------------------------------------

DEED = Deed("template-0123456789ab", 100, new_uuid(), "a@b", "c", 1_800_000_000, templates.READY)


def test_a_deed_survives_its_text() -> None:
    assert templates.parse_deed(DEED.to_text()) == DEED


@pytest.mark.parametrize(
    "change",
    [
        {"vmid": "100"}, {"vmid": True}, {"vmid": 7}, {"template": "0123456789ab"}, {"uuid": "x"}, {"v": 2},
        {"state": "live"}, {"owner": None}, {"more": 1},
    ],
)  # fmt: skip
def test_what_is_no_deed_is_none(change: dict[str, Any]) -> None:
    assert templates.parse_deed(json.dumps(json.loads(DEED.to_text()) | change)) is None


def test_what_is_no_json_is_no_deed() -> None:
    for comment in (None, "", "[]", "{", "[" * 100_000):
        assert templates.parse_deed(comment) is None


def test_a_templates_pool_lies_below_the_parent() -> None:
    assert templates.pool_name(Settings(pool_parent="ci"), DEED.template) == f"ci/npve-{DEED.template}"
