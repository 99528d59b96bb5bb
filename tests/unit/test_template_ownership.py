"""Templates that the plugin created: which runs and clean-ups keep them, and which destroy them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import pytest
from standin_environment import environments
from standin_host import StandinHost

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

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFtqOIrGcBOAnmtCJ2tzQH2PoYSfpBUlVDLHIrvPHUyK a@b"


def create_vm(env: Environment) -> Created:
    """Create the run's pool and its own VM, with a disk."""
    create_pool(env.outer.api, env.run, env.settings, host_clock(env.outer))
    vm = create_marked(env.outer, env.run, env.settings)
    keys = quote(KEY, safe="")
    qemu.configure(env.outer.api, vm.node, vm.vmid, scsi0="local:8,format=qcow2", sshkeys=keys)
    return vm


def claim(env: Environment, vm: Created) -> Deed:
    """Take the first step from the VM to a template; a session that is killed now leaves the VM behind."""
    deed = templates.own_deed(env.run.id, vm.vmid, vm.uuid, host_clock(env.outer))
    making.claim(env.outer, env.settings, deed)
    return deed


def create_template(env: Environment) -> Deed:
    """Create a template and end the run that created it."""
    vm = create_vm(env)
    deed = claim(env, vm)
    making.convert(env.outer, env.settings, deed, vm.node, lambda _: None)
    assert teardown(env).left == ()
    return dataclasses.replace(deed, state=templates.READY)


def plan_rows(env: Environment, run_id: str | None = None, **settings: Any) -> list[Row]:
    return plan(env.outer, dataclasses.replace(env.settings, run_id=run_id, **settings))


def clean_up(env: Environment, run_id: str | None = None) -> dict[str, str]:
    """Do a clean-up without questions; results by name."""
    settings = dataclasses.replace(env.settings, run_id=run_id, yes=True)
    outcomes = execute(env.outer, settings, plan(env.outer, settings))
    return {row.name: f"{outcome.result} {outcome.reason}".strip() for row, outcome in outcomes.items()}


# -- what keeps a template -----------------------------------------------------------------------


def test_the_teardown_of_the_run_that_created_a_template_keeps_it(
    env: Environment, host: StandinHost
) -> None:
    deed = create_template(env)
    assert host.vms() == [deed.vmid]
    assert list(host.pools()) == [f"npve-{deed.template}"]


def test_a_clean_up_that_does_not_name_a_template_keeps_it(env: Environment, host: StandinHost) -> None:
    deed = create_template(env)
    before = host.configuration(deed.vmid)
    (row,) = plan_rows(env)
    assert (row.vmid, row.verdict, row.is_leftover) == (deed.vmid, "keep", False)
    assert f"--nested-run {deed.template}" in row.reason
    assert clean_up(env) == {}
    assert clean_up(env, env.run.id) == {}
    assert host.configuration(deed.vmid) == before


def test_a_template_is_not_swept_however_old_it_is(
    env: Environment, host: StandinHost, tmp_path: Path
) -> None:
    deed = create_template(env)
    host.advance(400 * 86400)
    with environments(host, tmp_path / "another") as make:
        later = make()
        create_pool(later.outer.api, later.run, later.settings, host_clock(later.outer))
        expired_runs.sweep(later)
        assert teardown(later).left == ()
    assert host.vms() == [deed.vmid]


def test_a_template_in_a_context_file_is_kept(env: Environment, host: StandinHost) -> None:
    deed = create_template(env)
    (row,) = plan(env.outer, env.settings, extra=[deed.vmid])
    assert row.verdict == "keep"
    assert host.vms() == [deed.vmid]


def test_a_template_contains_no_tag_key_or_snippet_of_its_run(env: Environment, host: StandinHost) -> None:
    deed = create_template(env)
    config = qemu.guest_config(env.outer.api, "father", deed.vmid)
    assert config["name"] == f"nested-pve-{deed.template}"
    assert not {"cicustom", "sshkeys"} & set(config)
    assert pool_name(env.settings, env.run) not in list(host.pools())
    assert f"npve-{env.run.id}" not in str(config["tags"]).split(";")


# -- what destroys a template --------------------------------------------------------------------


def test_a_named_template_is_destroyed_and_another_is_kept(
    env: Environment, host: StandinHost, tmp_path: Path
) -> None:
    deed = create_template(env)
    with environments(host, tmp_path / "another") as make:
        other = create_template(make())
    assert clean_up(env, deed.template) == {f"nested-pve-{deed.template}": "gone"}
    assert host.vms() == [other.vmid]
    assert list(host.pools()) == [f"npve-{other.template}"]
    assert not any(f"-{deed.vmid}-" in volid for volid in host.volumes())


def test_a_template_with_linked_clones_is_kept_until_they_are_destroyed(
    env: Environment, host: StandinHost
) -> None:
    deed = create_template(env)
    env.outer.api.post(f"/nodes/father/qemu/{deed.vmid}/clone", newid=500, name="somebodys")
    result = clean_up(env, deed.template)[f"nested-pve-{deed.template}"]
    assert result.startswith("left ")
    assert "destroy the VMs that were cloned from it first" in result
    assert host.vms() == [500, deed.vmid]
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
def test_a_vm_that_is_no_longer_the_template_is_kept_though_it_is_named(
    env: Environment, host: StandinHost, change: dict[str, Any]
) -> None:
    deed = create_template(env)
    host.edit_vm(deed.vmid, **change)
    (row,) = plan_rows(env, deed.template)
    assert row.verdict == "keep"
    assert "not proved" in row.reason
    assert host.vms() == [deed.vmid]


def test_another_vm_with_the_templates_id_is_kept(env: Environment, host: StandinHost) -> None:
    deed = create_template(env)
    (row,) = plan_rows(env, deed.template)
    qemu.destroy(env.outer.api, "father", deed.vmid)
    env.outer.api.post("/nodes/father/qemu", vmid=deed.vmid, name="nested-pve-other", scsi0="local:4")
    outcome = templates.destroy_template(env.outer, env.settings, row)
    assert outcome.result == "foreign"
    assert host.vms() == [deed.vmid]


def test_the_lock_of_a_template_is_never_removed(env: Environment, host: StandinHost) -> None:
    deed = create_template(env)
    host.edit_vm(deed.vmid, lock="backup")
    before = host.configuration(deed.vmid)
    set_scale(1.0 / BUDGET)
    try:
        outcomes = clean_up(env, deed.template)
    finally:
        set_scale(1.0)
    assert outcomes == {f"nested-pve-{deed.template}": "left VM is locked (backup)"}
    assert host.configuration(deed.vmid) == before


def test_a_running_template_is_kept_when_force_stop_is_off(env: Environment, host: StandinHost) -> None:
    vm = create_vm(env)
    deed = claim(env, vm)
    qemu.start(env.outer.api, vm.node, vm.vmid)
    (row,) = plan_rows(env, deed.template)
    settings = dataclasses.replace(env.settings, force_stop=False)
    outcome = templates.destroy_template(env.outer, settings, row)
    assert (outcome.result, outcome.reason) == ("left", "it runs, and force_stop is off")
    assert host.is_running(vm.vmid)


def test_a_template_that_was_migrated_since_the_plan_is_destroyed_on_its_node(
    env: Environment, host: StandinHost
) -> None:
    host.join("father2")
    deed = create_template(env)
    (row,) = plan_rows(env, deed.template)
    host.migrate(deed.vmid, "father2")
    assert templates.destroy_template(env.outer, env.settings, row).result == "gone"
    assert host.vms() == []
    assert list(host.pools()) == []


def test_a_templates_pool_with_another_vm_is_kept_with_that_vm(env: Environment, host: StandinHost) -> None:
    deed = create_template(env)
    env.outer.api.post("/nodes/father/qemu", vmid=500, name="somebodys")
    env.outer.api.put("/pools", poolid=f"npve-{deed.template}", vms="500")
    assert "still contains 500" in clean_up(env, deed.template)[f"nested-pve-{deed.template}"]
    assert host.vms() == [500]


def test_a_templates_pool_with_another_comment_is_kept(env: Environment) -> None:
    deed = create_template(env)
    env.outer.api.put("/pools", poolid=f"npve-{deed.template}", comment="ours")
    (row,) = plan_rows(env, deed.template)
    assert row.verdict == "keep"
    assert "by hand" in row.reason


# -- a creation that was interrupted -------------------------------------------------------------


def test_a_template_whose_creation_was_killed_is_destroyed_once_its_session_has_exited(
    env: Environment, host: StandinHost
) -> None:
    lock = SessionLock(env.run.id)
    lock.acquire()
    claim(env, create_vm(env))
    assert {row.verdict for row in plan_rows(env)} == {"keep"}
    lock.release(remove=False)
    assert "gone" in clean_up(env).values()
    clean_up(env, env.run.id)
    assert host.vms() == []
    assert list(host.pools()) == []


def test_an_unfinished_template_of_another_user_is_kept(env: Environment, host: StandinHost) -> None:
    deed = claim(env, create_vm(env))
    strange = dataclasses.replace(deed, client="0" * 16, owner="bob@elsewhere").to_text()
    env.outer.api.put("/pools", poolid=f"npve-{deed.template}", comment=strange)
    SessionLock(env.run.id).acquire()
    (row,) = [row for row in plan_rows(env) if row.run == deed.template]
    assert row.verdict == "keep"
    assert host.vms() == [deed.vmid]


def test_the_creation_waits_for_locks(env: Environment, host: StandinHost) -> None:
    vm = create_vm(env)
    for method in ("POST", "PUT"):
        host.fault(method, "/pools", text="cfs-lock 'file-user_cfg' error: got lock request timeout")
    deed = claim(env, vm)
    path = f"/nodes/father/qemu/{vm.vmid}/config"
    lock = f"/var/lock/qemu-server/lock-{vm.vmid}.conf"
    host.fault("PUT", path, text=f"can't lock file '{lock}' - got timeout")
    host.fault("PUT", "/pools", text="cfs-lock 'file-user_cfg' error: got lock request timeout")
    making.convert(env.outer, env.settings, deed, vm.node, lambda _: None)
    assert host.faults() == []
    assert host.config(vm.vmid)["template"] == "1"


@pytest.mark.parametrize("call", ["PUT /nodes/father/qemu/*/config", "POST /nodes/father/qemu/*/template"])
def test_a_failed_creation_leaves_nothing(env: Environment, host: StandinHost, call: str) -> None:
    vm = create_vm(env)
    env.facts["provision"] = dataclasses.asdict(vm)
    inner = SimpleNamespace(ssh=None, run=lambda command, **_: CommandResult(str(command), 0, b"", b"", 1.0))
    cast(Any, env)._inner = inner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qemu, "shutdown", lambda *_, **__: None)
        method, _, path = call.partition(" ")
        host.fault(method, path, text="no space left", times=1)
        with pytest.raises(PveError, match="no space left"):
            making.create_template(env)
    assert teardown(env).left == ()
    assert host.vms() == []
    assert list(host.pools()) == []


@pytest.mark.parametrize("when", ["before", "while it is generalised"])
def test_a_migrated_vm_becomes_a_template_on_its_node(
    env: Environment, host: StandinHost, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move() -> None:
        host.migrate(vm.vmid, "father2")

    def run(command: object, **_: object) -> CommandResult:
        if when != "before":
            move()
        return CommandResult(str(command), 0, b"", b"", 1.0)

    def shutdown(api: Any, node: str, vmid: int, **_: object) -> None:
        api.get(f"/nodes/{node}/qemu/{vmid}/status/current")

    host.join("father2")
    vm = create_vm(env)
    env.facts["provision"] = dataclasses.asdict(vm)
    if when == "before":
        move()
    cast(Any, env)._inner = SimpleNamespace(ssh=None, run=run)
    monkeypatch.setattr(qemu, "shutdown", shutdown)
    assert making.create_template(env).vmid == vm.vmid
    assert (host.guest(vm.vmid).node, host.config(vm.vmid)["template"]) == ("father2", "1")


def test_a_vm_that_is_not_proved_is_not_converted(env: Environment, host: StandinHost) -> None:
    vm = create_vm(env)
    env.facts["provision"] = dataclasses.asdict(vm)
    host.edit_vm(vm.vmid, description="somebody's")
    with pytest.raises(PveError, match="to be the run's own"):
        making.create_template(env)
    assert list(host.pools()) == [f"npve-{env.run.id}"]


# -- the deed ------------------------------------------------------------------------------------

DEED = Deed("template-0123456789ab", 100, new_uuid(), "a@b", "c", 1_800_000_000, templates.READY)


def test_a_deed_is_read_back_as_written() -> None:
    assert templates.parse_deed(DEED.to_text()) == DEED


@pytest.mark.parametrize(
    "change",
    [
        {"vmid": "100"}, {"vmid": True}, {"vmid": 7}, {"template": "0123456789ab"}, {"uuid": "x"}, {"v": 2},
        {"state": "live"}, {"owner": None}, {"more": 1},
    ],
)  # fmt: skip
def test_a_malformed_deed_is_none(change: dict[str, Any]) -> None:
    assert templates.parse_deed(json.dumps(json.loads(DEED.to_text()) | change)) is None


def test_a_comment_that_is_no_json_is_no_deed() -> None:
    for comment in (None, "", "[]", "{", "[" * 100_000):
        assert templates.parse_deed(comment) is None


def test_a_templates_pool_lies_below_the_parent() -> None:
    assert templates.pool_name(Settings(pool_parent="ci"), DEED.template) == f"ci/npve-{DEED.template}"
