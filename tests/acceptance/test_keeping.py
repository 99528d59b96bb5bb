"""Environments that outlive their session: kept, resumed, destroyed after they expired."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.conftest import Project, make_project
from standin_phases import PHASES

pytestmark = pytest.mark.thorough

CONFTEST = """
import dataclasses, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from standin_host import StandinHost
from standin_phases import standin_phases
from pytest_nestedpve import setup as builtin
from pytest_nestedpve.setup import phases as real
from pytest_nestedpve.pve.errors import PveError

HERE = Path(__file__).parent

def pytest_nestedpve_host(config, settings):
    return StandinHost(HERE / "host").connect()

def address(environment):
    facts = environment.facts["provision"]
    return f"/nodes/{{facts['node']}}/qemu/{{facts['vmid']}}/config"

def inside(environment):
    # The phases done in the guest are listed in an option that a rollback restores.
    return environment.outer.api.get(address(environment)).get("searchdomain", "").split()

def guest(phase):
    def do(environment):
        with (HERE / "done").open("a") as out:
            out.write(phase.name + "\\n")
        names = inside(environment)
        environment.outer.api.put(address(environment), searchdomain=" ".join([*names, phase.name]))
        if os.environ.get("FAIL") == phase.name:
            raise PveError(phase.name + " went wrong on purpose")
        return {{"did": "did it"}}
    def probe(environment):
        return {{"did": "is there"}} if phase.name in inside(environment) else None
    def inputs(environment):
        path = HERE / "playbooks" / phase.name
        return path.read_text() if path.exists() else ""
    return dataclasses.replace(phase, do=do, probe=probe, inputs=inputs)

def logged(phase):
    def do(environment):
        with (HERE / "done").open("a") as out:
            out.write(phase.name + "\\n")
        return phase.do(environment)
    return dataclasses.replace(phase, do=do)

def probe_provision(environment):
    from pytest_nestedpve.environment.facts import ProvisionFacts
    from pytest_nestedpve.setup import resume
    if environment.resumed and not environment.has_lease and not resume.resume(environment):
        return None
    facts = environment.facts.get("provision")
    if not facts:
        return None
    from pytest_nestedpve.ownership.proof import prove
    vm = ProvisionFacts.read(facts).vm
    ours = prove(environment.outer.api, environment.settings, vm, environment.run).ok
    return dict(facts) if ours else None

def lookup(environment):
    from pytest_nestedpve.teardown import expired_runs as expired
    from pytest_nestedpve.pve.errors import PveError
    if (HERE / "full").exists():
        raise PveError("expected 8 GiB on the storage, found 1")
    expired.sweep(environment)

def pytest_nestedpve_phases(phases, config):
    wrapped = []
    for phase in standin_phases():
        if phase.name == "preflight":
            wrapped.append(logged(dataclasses.replace(phase, do=lookup)))
        elif phase.name == "provision":
            def do(environment, phase=phase):
                facts = phase.do(environment)
                environment.keep_lease()
                return facts
            wrapped.append(logged(dataclasses.replace(phase, do=do, probe=probe_provision)))
        elif phase.name == "start_vm":
            def runs(environment):
                facts = environment.facts["provision"]
                path = f"/nodes/{{facts['node']}}/qemu/{{facts['vmid']}}/status/current"
                return {{}} if environment.outer.api.get(path)["status"] == "running" else None
            wrapped.append(logged(dataclasses.replace(phase, probe=runs)))
        elif phase.name == "wait_ip":
            wrapped.append(logged(dataclasses.replace(phase, probe=lambda e: e.facts.get("wait_ip"))))
        elif phase.name == "verify_ssh_chain":
            wrapped.append(logged(phase))
        else:
            wrapped.append(guest(phase))
    phases[:] = wrapped
"""

SETUP = list(PHASES[4:-1])  # phases that run in the guest


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path / "project")
    project.write(conftest=CONFTEST.format(tests=str(Path(__file__).parents[1])))
    (project.path / "playbooks").mkdir()
    yield project
    for record in (project.path / "state" / "nested-pve" / "kept").glob("*"):
        raise AssertionError(f"the record of a run that does not exist any more: {record}")
    assert project.left() == []


def new_phases(project: Project) -> list[str]:
    """The phases done since the last call."""
    done = project.done()
    (project.path / "done").write_text("")
    return done


def keep(project: Project, *args: str, **env: str) -> str:
    result = project.run("--nested-keep", *(args or ("test_steps.py",)), **env)
    assert result.ret == (1 if env else 0), result.output
    return result.output


def destroy(project: Project) -> None:
    result = project.run("--nested-destroy-only")
    assert result.ret == 0, result.output


def pool_comment(project: Project) -> dict[str, object]:
    pools = project.host().connect().api.get("/pools")
    (comment,) = [pool["comment"] for pool in pools if pool["poolid"].startswith("npve-")]
    lease: dict[str, object] = json.loads(comment)
    return lease


def test_a_kept_environment_remains_and_the_commands_are_reported(project: Project) -> None:
    output = keep(project)
    run = next((project.path / ".nested-pve" / "runs").glob("*/audit.jsonl")).parent.name
    assert f"nested-pve: run {run} is kept until" in output
    assert f"log in:  ssh -F {project.path}/.nested-pve/runs/{run}/ssh_config nested" in output
    assert "resume:  pytest --nested-keep" in output
    assert f"destroy: pytest --nested-destroy-only --nested-run {run}" in output
    lease = pool_comment(project)
    assert lease["state"] == "kept"
    assert project.left() != []
    destroy(project)


def test_the_reported_resume_command_resumes_the_run(project: Project) -> None:
    options = ("-o", "nested_pve_cores=4", "-o", "nested_pve_vm_options=kvm=0 cpu=max")
    output = keep(project, "test_steps.py", *options)
    new_phases(project)
    (line,) = [line for line in output.splitlines() if "resume: " in line]
    _, *arguments = shlex.split(line.partition("resume: ")[2])
    result = project.run(*arguments)
    assert result.ret == 0, result.output
    assert "other settings" not in result.output
    assert new_phases(project) == ["preflight", "verify_ssh_chain"]
    destroy(project)


def test_a_dry_run_reports_the_phases_and_the_end_of_the_kept_run(project: Project) -> None:
    keep(project, "test_steps.py", FAIL="setup_repos")
    args = ("--nested-dry-run", "-k", "leaf_start", "--nested-skip=setup_ssh", "--nested-json", "plan.json")
    result = project.run("--nested-keep", *args)
    assert result.ret == 0, result.output
    plan = {row["phase"]: row["what"] for row in json.loads((project.path / "plan.json").read_text())}
    assert plan.pop("setup_ssh") == "taken as done"
    assert [name for name, what in plan.items() if what == "done, if unchanged"] == list(PHASES[1:6])
    assert [name for name, what in plan.items() if what.startswith("to do")] == ["preflight", *PHASES[7:11]]
    assert "resuming the kept run" in result.output
    assert "then everything is kept" in result.output
    assert "then everything is destroyed; " in project.run(*args).output
    assert "destroyed, unless something failed; " in project.run("--nested-keep=on-failure", *args).output
    destroy(project)


def test_the_controller_of_xdist_reports_the_kept_run_of_a_worker(project: Project) -> None:
    project.plugins = ("xdist",)
    result = project.run("-n1", "--nested-keep", "-k", "start_vm")
    assert result.ret == 0, result.output
    assert result.output.count("is kept until") == 1
    assert "  destroy: pytest --nested-destroy-only --nested-run " in result.output
    destroy(project)


def test_a_second_session_proves_what_the_first_did(project: Project) -> None:
    keep(project)
    assert new_phases(project) == list(PHASES)
    result = project.run("--nested-keep", "-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert new_phases(project) == ["preflight", "verify_ssh_chain"]
    assert set(result.outcomes().values()) == {"PASSED"}
    assert len(project.audits()) == 1
    destroy(project)


def test_a_selected_step_of_a_kept_environment_is_proved(project: Project) -> None:
    keep(project)
    new_phases(project)
    result = project.run("--nested-keep", "-v", "-k", "setup_repos")
    assert result.outcomes() == {"test_setup_repos": "PASSED"}
    assert new_phases(project) == ["preflight"]
    destroy(project)


def test_after_an_edit_only_the_edited_step_runs(project: Project) -> None:
    keep(project)
    new_phases(project)
    (project.path / "playbooks" / "setup_repos").write_text("edited")
    result = project.run("--nested-keep", "-k", "setup_repos")
    assert result.ret == 0, result.output
    assert new_phases(project) == ["preflight", "setup_repos"]
    result = project.run("--nested-keep", "-k", "setup_repos")
    assert new_phases(project) == ["preflight"]
    destroy(project)


def test_a_whole_run_after_an_edit_continues_at_the_edited_phase(project: Project) -> None:
    keep(project)
    new_phases(project)
    (project.path / "playbooks" / "setup_repos").write_text("edited")
    keep(project)
    assert new_phases(project) == ["preflight", *PHASES[PHASES.index("setup_repos") :]]
    destroy(project)


def test_an_edited_phase_that_was_not_selected_is_done_for_the_later_one(project: Project) -> None:
    keep(project)
    new_phases(project)
    (project.path / "playbooks" / "setup_network").write_text("edited")
    assert project.run("--nested-keep", "-k", "setup_ssh").ret == 0
    assert new_phases(project) == ["preflight", "setup_network", "setup_ssh"]
    destroy(project)


def test_redo_does_a_selected_step_again_and_only_that(project: Project) -> None:
    keep(project)
    new_phases(project)
    assert project.run("--nested-keep", "-k", "setup_ssh", "-o", "nested_pve_redo=true").ret == 0
    assert new_phases(project) == ["preflight", "setup_ssh"]
    destroy(project)


def test_a_phase_that_is_undone_between_sessions_is_done_again(project: Project) -> None:
    keep(project)
    new_phases(project)
    (vmid,) = project.host().vms()
    names = project.host().config(vmid)["searchdomain"].split()
    project.host().edit_vm(vmid, searchdomain=" ".join(name for name in names if name != "setup_ssh"))
    keep(project)
    assert new_phases(project) == ["preflight", "setup_ssh", "verify_ssh_chain"]
    destroy(project)


def test_without_keep_a_resumed_session_destroys_and_reports_it(project: Project) -> None:
    keep(project)
    result = project.run("test_steps.py")
    assert result.ret == 0, result.output
    assert "had been kept; torn down, as --nested-keep was not given" in result.output
    assert project.left() == []


def test_keep_on_failure_keeps_a_failed_run_and_no_other(project: Project) -> None:
    result = project.run("--nested-keep=on-failure", "test_steps.py", FAIL="setup_ssh")
    assert result.ret == 1
    assert "is kept until" in result.output
    assert project.left() != []
    result = project.run("--nested-keep=on-failure", "test_steps.py")
    assert result.ret == 0, result.output
    assert "had been kept; torn down, as nothing failed" in result.output
    assert project.left() == []


@pytest.mark.parametrize("option", ["--nested-keep", "--nested-keep=on-failure"])
def test_a_kept_environment_outlives_a_session_whose_preflight_failed(project: Project, option: str) -> None:
    keep(project)
    before = project.left(), pool_comment(project)
    (project.path / "full").touch()
    result = project.run(option, "test_steps.py")
    assert result.ret != 0
    assert "found 1" in result.output
    assert "is kept until" in result.output
    assert (project.left(), pool_comment(project)) == before
    (project.path / "full").unlink()
    new_phases(project)
    keep(project)
    assert new_phases(project) == ["preflight", "verify_ssh_chain"]
    (project.path / "full").touch()
    result = project.run("test_steps.py")
    assert "torn down, as --nested-keep was not given" in result.output


def test_a_phase_that_broke_half_way_is_undone_by_a_rollback(project: Project) -> None:
    keep(project, FAIL="setup_ssh")
    new_phases(project)
    result = project.run("--nested-keep", "test_steps.py")
    assert result.ret == 0, result.output
    message = "setup_ssh broke half-way last time: rolled back to the snapshot after setup_network"
    assert message in result.output
    assert new_phases(project) == ["preflight", *PHASES[PHASES.index("setup_ssh") :]]
    (vmid,) = project.host().vms()
    # Each name once: the rollback removed the partial work of the broken phase.
    assert project.host().config(vmid)["searchdomain"].split() == SETUP
    destroy(project)


def test_without_a_snapshot_the_broken_phase_is_done_on_its_partial_work(project: Project) -> None:
    keep(project, FAIL="setup_ssh")
    new_phases(project)
    (vmid,) = project.host().vms()
    project.host().drop_snapshots(vmid)
    result = project.run("--nested-keep", "test_steps.py")
    assert result.ret == 0, result.output
    assert "without a snapshot it is repeated on its unfinished state" in result.output
    assert new_phases(project) == ["preflight", *PHASES[PHASES.index("setup_ssh") :]]
    destroy(project)


@pytest.mark.parametrize(
    ("lost", "done"),
    [("", ["setup_ssh"]), ("npve_", ["setup_ssh"]), ("npve_setup_network", ["setup_network", "setup_ssh"])],
)
def test_an_edited_phase_that_broke_is_never_proved(project: Project, lost: str, done: list[str]) -> None:
    """Its probe finds the work of the unedited playbook. Neither is a phase proved that a rollback undid."""
    keep(project)
    for name in ("setup_network", "setup_ssh"):
        (project.path / "playbooks" / name).write_text("edited")
    keep(project, "-k", "setup_network or setup_ssh", FAIL="setup_ssh")
    new_phases(project)
    (vmid,) = project.host().vms()
    if lost:
        project.host().drop_snapshots(vmid, lost)
    keep(project, "test_users.py")
    rest = PHASES[PHASES.index("setup_ssh") + 1 :]
    assert new_phases(project) == ["preflight", *done, *rest]
    keep(project, "-k", "setup_ssh")
    assert new_phases(project) == ["preflight"]
    destroy(project)


@pytest.mark.parametrize("change", ["nested_pve_cores=4", "nested_pve_leaf_options=cores=2"])
def test_another_shape_is_reported_and_not_reused(project: Project, change: str) -> None:
    keep(project)
    result = project.run("test_steps.py", "-o", change)
    assert result.ret == 0, result.output
    name = change.removeprefix("nested_pve_").partition("=")[0]
    assert "is not resumed: it was created with other settings" in result.output
    assert f"{name}: " in result.output
    assert len(project.audits()) == 2
    assert len([line for line in project.left() if line.startswith("vm")]) == 1
    destroy(project)


def test_two_sessions_never_adopt_one_run(project: Project) -> None:
    keep(project)
    (project.path / "test_slow.py").write_text(
        "import threading\n"
        "def test_slow(nested_pve_run, nested_pve):\n"
        "    nested_pve_run.environment.audit.write('call', phase='test', cmd='hanging')\n"
        "    open('gate').read()\n"
    )
    os.mkfifo(project.path / "gate")
    first = project.start("--nested-keep", "test_slow.py")
    project.wait_for(first, cmd="hanging")
    second = project.run("test_steps.py")
    assert second.ret == 0, second.output
    assert "another session works on this run" in second.output
    (project.path / "gate").write_text("")
    output, _ = first.communicate(timeout=60)
    assert first.returncode == 0, output
    assert len(project.audits()) == 2
    destroy(project)


def test_a_resumed_run_is_no_longer_marked_as_finished(project: Project) -> None:
    """Otherwise no session would destroy the run of an xdist worker that was killed."""
    keep(project)
    (finished,) = (project.path / ".nested-pve" / "runs").glob("*/finished")
    process = project.start("--nested-keep", "-q", "test_users.py", HANG="test")
    project.wait_for(process, cmd="hanging")
    was_finished = finished.exists()
    process.terminate()
    process.communicate(timeout=60)
    assert not was_finished
    assert finished.exists()
    destroy(project)


def test_a_kept_run_that_was_destroyed_is_created_again(project: Project) -> None:
    keep(project)
    new_phases(project)
    project.host().clear()
    result = project.run("test_steps.py")
    assert result.ret == 0, result.output
    assert "does not exist on father: it is created again" in result.output
    assert new_phases(project) == list(PHASES)


def test_past_its_expiry_the_next_session_destroys_it_and_reports_it(project: Project) -> None:
    keep(project, "test_steps.py", "-o", "nested_pve_keep_expiry=1s")
    (run,) = [path.parent.name for path in (project.path / ".nested-pve" / "runs").glob("*/audit.jsonl")]
    lease = pool_comment(project)
    for pool in project.host().pools():
        comment = json.dumps({**lease, "created": 1, "expires": int(time.time()) - 100})
        project.host().set_pool(pool, comment)
    record = project.path / "state" / "nested-pve" / "kept" / run / "kept.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "expires": int(time.time()) - 90}))
    result = project.run("test_steps.py")
    assert result.ret == 0, result.output
    assert f"the kept run {run} is not resumed: it has expired" in result.output
    assert f"of run {run}" in result.output
    assert "destroyed, its lease expired" in result.output
    assert project.left() == []


def test_an_expired_run_of_another_owner_is_destroyed_and_an_unexpired_one_is_not(project: Project) -> None:
    keep(project)
    lease = pool_comment(project)
    other = {**lease, "owner": "bob@desk", "client": "0" * 16}
    for pool in project.host().pools():
        project.host().set_pool(pool, json.dumps(other))
    project.run("test_steps.py", XDG_STATE_HOME=str(project.path / "elsewhere"))
    assert len([line for line in project.left() if line.startswith("vm")]) == 1
    for pool in project.host().pools():
        project.host().set_pool(pool, json.dumps({**other, "created": 1, "expires": 2}))
    result = project.run("test_steps.py", XDG_STATE_HOME=str(project.path / "elsewhere"))
    assert "owner bob@desk: destroyed" in result.output
    assert project.left() == []
    project.run("test_steps.py")  # deletes the record of the destroyed run


def test_the_record_holds_the_keys_and_is_for_its_owner_alone(project: Project) -> None:
    keep(project)
    (record,) = (project.path / "state" / "nested-pve" / "kept").iterdir()
    assert record.stat().st_mode & 0o777 == 0o700
    for path in record.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600, path
    destroy(project)
    assert not record.exists()


def test_a_lost_run_directory_does_not_lose_the_environment(project: Project) -> None:
    keep(project)
    new_phases(project)
    shutil.rmtree(project.path / ".nested-pve")
    result = project.run("test_steps.py")
    assert result.ret == 0, result.output
    assert new_phases(project) == ["preflight", "verify_ssh_chain"]


def test_skip_treats_a_phase_as_done_without_a_probe(project: Project) -> None:
    result = project.run("test_steps.py", "--nested-skip", "setup_ssh", "-v")
    assert result.ret == 0, result.output
    assert "setup_ssh" not in project.done()
    # Neither done nor proved, so the step did not pass; later steps run.
    assert result.outcomes()["test_setup_ssh"] == "SKIPPED"
    assert "1 skipped" in result.output
    assert "taken as done (--nested-skip)" in result.output


def test_a_run_of_nothing_but_a_skipped_phase_is_not_green(project: Project) -> None:
    result = project.run("test_steps.py", "--nested-skip", "setup_ssh", "-k", "setup_ssh")
    assert result.ret == 1, result.output
    assert "nothing was verified" in result.output


def test_skipping_an_unknown_phase_is_a_usage_error(project: Project) -> None:
    result = project.run("test_steps.py", "--nested-skip", "setup_nothing")
    assert result.ret == 4
    assert "--nested-skip: expected the name of a phase" in result.output
    assert project.done() == []


def test_the_limit_of_the_whole_set_up_interrupts_it(project: Project) -> None:
    project.write(
        conftest=(project.path / "conftest.py").read_text()
        + "\nSLOW = True\ninner = pytest_nestedpve_phases\n"
        "def pytest_nestedpve_phases(phases, config):\n"
        "    inner(phases, config)\n"
        "    at = [phase.name for phase in phases].index('setup_ssh')\n"
        "    def hang(environment):\n        import threading; threading.Event().wait(60)\n"
        "    phases[at] = dataclasses.replace(phases[at], do=hang, probe=None)\n"
    )
    began = time.monotonic()
    result = project.run("test_steps.py", "-o", "nested_pve_timeout=6")
    assert result.ret == 1, result.output
    assert "the set-up, at setup_ssh (nested_pve_timeout) did not end within its limit of" in result.output
    assert time.monotonic() - began < 30
