"""--nested-destroy-only: leftovers of killed sessions are destroyed, one item each; foreign VMs are kept."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from acceptance.conftest import CONFTEST, Project, Result, make_project
from terminals import on_terminal

from pytest_nestedpve.ownership.lease import Lease
from pytest_nestedpve.run.identity import client_hash, owner

ONLY = "--nested-destroy-only"


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return make_project(tmp_path / "project")


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose last session was killed while its VM ran."""
    project = make_project(tmp_path_factory.mktemp("killed") / "project")
    process = project.start("-q", "test_steps.py", HANG="wait_ip")
    project.wait_for(process, cmd="hanging")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert len(project.left()) > 2
    return project


@pytest.fixture
def killed(killed_once: Project, tmp_path: Path) -> Project:
    """A copy of that project, which contains no absolute path."""
    return Project(shutil.copytree(killed_once.path, tmp_path / "project", symlinks=True))


def run_id(project: Project) -> str:
    return next((project.path / ".nested-pve" / "runs").glob("????????????")).name


def rows(project: Project, result: Result) -> list[dict[str, Any]]:
    plan: list[dict[str, Any]] = json.loads((project.path / "out.json").read_text())
    assert all(
        set(row)
        == {"vmid", "node", "name", "run", "owner", "created", "expires", "verdict", "reason", "outcome"}
        for row in plan
    ), result.output
    return plan


def lease(project: Project, **changes: Any) -> None:
    """Change the lease of the only run on the host."""
    pool, (comment, _) = next(pool for pool in project.host().pools().items() if "npve-" in pool[0])
    fields = {k: v for k, v in json.loads(comment).items() if k != "v"}
    project.host().set_pool(pool, dataclasses.replace(Lease(**fields), **changes).to_text())


def stranger(project: Project, vmid: int, **config: Any) -> None:
    """A VM of somebody else."""
    project.host().connect().api.post("/nodes/father/qemu", vmid=vmid, **config)
    project.host().broadcast()


def test_leftovers_of_a_killed_session_are_destroyed_and_a_second_call_finds_none(killed: Project) -> None:
    result = killed.run(ONLY, "-v", "--nested-json", "out.json", "--junitxml", "out.xml")
    assert result.ret == 0, result.output
    assert "1 passed" in result.output
    assert killed.left() == []
    (row,) = rows(killed, result)
    assert (row["verdict"], row["outcome"], row["run"]) == ("destroy", "gone", run_id(killed))
    assert row["owner"] == owner()
    assert str(row["vmid"]) in (killed.path / "out.xml").read_text()
    (log,) = killed.audits()
    assert (log[-1]["event"], log[-1]["status"]) == ("teardown", "clean")
    assert killed.run(ONLY).ret == 0


def test_a_dry_run_prints_the_same_plan_and_destroys_nothing(killed: Project) -> None:
    before = killed.host().state()
    result = killed.run(ONLY, "--nested-dry-run", "--nested-json", "out.json")
    assert result.ret == 0, result.output
    (row,) = rows(killed, result)
    assert (row["verdict"], row["outcome"]) == ("destroy", "planned")
    assert str(row["vmid"]) in result.output
    assert "its session on this machine has exited" in result.output
    assert killed.host().state() == before


def test_the_run_of_a_live_session_is_kept_even_if_selected(project: Project) -> None:
    process = project.start("-q", "test_steps.py", HANG="start_vm")
    try:
        project.wait_for(process, cmd="hanging")
        for arguments in ([], ["--nested-run", run_id(project)]):
            result = project.run(ONLY, "-v", *arguments)
            assert result.ret == 0, result.output
            assert "1 skipped" in result.output
            assert "a session on this machine is working on it" in result.output
        assert any(line.startswith("vm ") for line in project.left())
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert project.left() == []


def test_another_owners_run_is_kept_until_it_expires_or_is_selected(killed: Project) -> None:
    (killed.path / "state" / "nested-pve" / "locks" / f"{run_id(killed)}.lock").unlink()
    lease(killed, owner="bob@elsewhere", client="0" * 16)
    result = killed.run(ONLY, "-v")
    assert (result.ret, "1 skipped" in result.output) == (0, True), result.output
    assert "bob@elsewhere's" in result.output
    assert killed.run(ONLY, "--nested-run", "0" * 12).ret == 0
    assert killed.left() != []
    result = killed.run(ONLY, "--nested-run", run_id(killed))
    assert result.ret == 0, result.output
    assert killed.left() == []


def test_a_run_with_an_expired_lease_of_any_owner_is_destroyed(killed: Project) -> None:
    (killed.path / "state" / "nested-pve" / "locks" / f"{run_id(killed)}.lock").unlink()
    lease(killed, owner="bob@elsewhere", client="0" * 16, created=1000, expires=2000)
    result = killed.run(ONLY, "-v")
    assert result.ret == 0, result.output
    assert killed.left() == []


def test_my_own_kept_run_is_destroyed(killed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    # The directory in which a machine without a machine-id stores a generated one.
    monkeypatch.setenv("XDG_STATE_HOME", str(killed.path / "state"))
    (killed.path / "state" / "nested-pve" / "locks" / f"{run_id(killed)}.lock").unlink()
    lease(killed, state="kept", client=client_hash())
    assert killed.run(ONLY).ret == 0
    assert killed.left() == []


def test_the_empty_pool_of_an_exited_session_is_removed(killed: Project) -> None:
    api = killed.host().connect().api
    for vm in api.get("/cluster/resources", type="vm"):
        api.post(f"/nodes/father/qemu/{vm['vmid']}/status/stop")
        api.delete(f"/nodes/father/qemu/{vm['vmid']}")
    result = killed.run(ONLY, "-v")
    assert result.ret == 0, result.output
    assert "1 passed" in result.output
    assert killed.left() == []


def test_a_vm_that_cannot_be_destroyed_fails_and_is_status_1(killed: Project) -> None:
    words = "base volume 'local:99999/base-99999-disk-0.raw' is still in use by linked cloned"
    killed.host().fault("DELETE", "/nodes/father/qemu/*", text=words, times=1000)
    scale = "nested_pve_timeout_scale=0.02"
    result = killed.run(ONLY, "-v", "--nested-json", "out.json", "--junitxml", "out.xml", "-o", scale)
    assert result.ret == 1, result.output
    assert "1 failed" in result.output
    assert "still exists: " in result.output
    assert "Traceback" not in result.output
    assert rows(killed, result)[0]["outcome"] == "left"
    # The known symptom is in each report of the failure.
    for report in (result.output, (killed.path / "out.xml").read_text()):
        assert "known: linked clones need that disk" in report
        assert "destroy them first, then pytest --nested-destroy-only" in report
    assert result.output.count("known: ") == 1


def test_a_vm_of_ours_that_somebody_protected_is_kept_and_the_fix_is_printed(killed: Project) -> None:
    (vmid,) = killed.host().vms()
    killed.host().edit_vm(vmid, protection=1)
    stranger(killed, 99950, name="nested-pve-old", protection=1)
    result = killed.run(ONLY)
    assert result.ret == 1, result.output
    assert "2 skipped" in result.output
    assert "known: the VM is protected" in result.output
    assert f"fix:   qm set {vmid} --protection 0" in result.output
    # No symptom is printed for a VM that is not proved to be ours.
    assert result.output.count("known: ") == 1
    assert any(line.startswith(f"vm {vmid}") for line in killed.left())


@pytest.mark.parametrize(
    "why", ["nested_pve_vmid_range=98000-98009", "nested_pve_name_pattern=child-pve*", "no marker"]
)
def test_the_run_of_an_exited_session_whose_vm_is_not_proved_is_kept_and_is_status_1(
    killed: Project, why: str
) -> None:
    """With other settings than at its creation, or a changed VM, VM and pool are kept."""
    options = ["-o", why] if "=" in why else []
    if not options:
        (vmid,) = killed.host().vms()
        killed.host().edit_vm(vmid, description="mine now")
    before = killed.left()
    result = killed.run(ONLY, *options)
    assert result.ret == 1, result.output
    assert "1 skipped" in result.output
    assert "not proved to be the run's" in result.output
    assert killed.left() == before


def test_an_interrupted_clean_up_ends_at_once_and_reports_its_outcomes(killed: Project) -> None:
    stranger(killed, 99950, name="nested-pve-old")
    killed.slow(qmdestroy=600)
    mine = next(vmid for vmid in killed.host().vms() if vmid != 99950)
    process = killed.start(ONLY, "--nested-yes", "--nested-json", "out.json")
    pause = threading.Event()
    for vmid in (mine, 99950):
        sent = f"DELETE /nodes/father/qemu/{vmid}"
        for _ in range(600):
            if sent in killed.host().calls():
                break
            assert process.poll() is None, process.communicate()[0]
            pause.wait(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    result = Result(process.returncode, output)
    assert result.ret == 2, output
    assert {row["vmid"]: row["outcome"] for row in rows(killed, result)} == {mine: "left", 99950: "left"}


def test_an_unmarked_vm_with_a_matching_name_and_id_needs_a_confirmation(project: Project) -> None:
    stranger(project, 99950, name="nested-pve-old")
    stranger(project, 99951, name="nested-pve-noted", description="mine, Alice")
    stranger(project, 99952, name="web", memory=512)
    stranger(project, 99953, name="nested-pve-boots", onboot=1)
    stranger(project, 105, name="nested-pve-elsewhere")
    others = {vmid: project.host().configuration(vmid) for vmid in (99951, 99952, 99953, 105)}
    result = project.run(ONLY, "-v")
    assert result.ret == 1, result.output
    assert "not confirmed (--nested-yes)" in result.output
    assert "3 skipped" in result.output
    result = project.run(ONLY, "-v", "--nested-yes", "--nested-json", "out.json")
    assert result.ret == 0, result.output
    assert "1 passed, 2 skipped" in result.output
    assert {row["vmid"]: row["verdict"] for row in rows(project, result)} == {
        99950: "destroy",
        99951: "keep",
        99953: "keep",
    }
    assert {vmid: project.host().configuration(vmid) for vmid in others} == others
    assert "vm 99950" not in project.left()


@pytest.mark.parametrize(
    ("typed", "status", "destroyed"),
    [
        (b"y\n", 0, True),
        (b"yes\n", 0, True),
        (b"n\n", 1, False),
        (b"\n", 1, False),
        (b"\x04", 1, False),
        (b"\x03", 2, False),
    ],
    ids=["y", "yes", "n", "nothing", "end of file", "Ctrl-C"],
)
def test_on_a_terminal_only_a_yes_confirms(
    project: Project, typed: bytes, status: int, destroyed: bool
) -> None:
    stranger(project, 99950, name="nested-pve-old")
    stranger(project, 99953, name="nested-pve-boots", onboot=1)
    before = {vmid: project.host().configuration(vmid) for vmid in (99950, 99953)}
    returned, output = on_terminal(
        project.command(ONLY, "-v"),
        cwd=project.path,
        env=project.environ(TERM="dumb"),
        answers={"Destroy them? [y/N] ": typed},
    )
    assert returned == status, output
    assert "99950 nested-pve-old on father" in output
    assert "99953 nested-pve-boots on father" not in output  # it is kept anyway and needs no confirmation
    assert "Traceback" not in output
    assert (99950 not in project.host().vms()) is destroyed
    kept = (99953,) if destroyed else (99950, 99953)
    assert {vmid: project.host().configuration(vmid) for vmid in kept} == {v: before[v] for v in kept}


@pytest.mark.parametrize("args", [[], ["--nested-dry-run"]], ids=["for good", "dry run"])
def test_the_hosts_connection_is_closed_at_the_end(project: Project, args: list[str]) -> None:
    made = 'return StandinHost(HERE / "host").connect()'
    closes = "host.close = (HERE / 'closed').touch"
    assert made in CONFTEST
    project.write(conftest=CONFTEST.replace(made, f"host = {made[7:]}; {closes}; return host"))
    assert project.run(ONLY, *args).ret == 0
    assert (project.path / "closed").exists()


def test_a_context_file_adds_candidates_beyond_pattern_and_range(project: Project) -> None:
    stranger(project, 105, name="from-earlier")
    context = project.path / "ctx.json"
    context.write_text(
        json.dumps({"test_vm_id": 105, "other": {"kept": True}, "provisioned_vms": [{"vmid": 777}]})
    )
    assert project.run(ONLY).ret == 0
    result = project.run(ONLY, "--context-file", "ctx.json", "--nested-yes")
    assert result.ret == 0, result.output
    assert "1 passed" in result.output
    assert project.left() == []


def test_with_force_stop_off_a_running_vm_is_kept_and_named(killed: Project) -> None:
    result = killed.run(ONLY, "-v", "-o", "nested_pve_force_stop=false")
    assert result.ret == 1, result.output
    assert "it runs, and force_stop is off" in result.output


def test_no_test_is_collected_or_imported_and_addopts_do_not_matter(killed: Project) -> None:
    killed.write(test_broken="raise RuntimeError('must not be imported')\n")
    killed.plugins = ("xdist",)
    (killed.path / "pytest.ini").write_text("[pytest]\naddopts = -n2 --maxfail=1 -m 'not slow'\n")
    result = killed.run(ONLY, "-v")
    assert result.ret == 0, result.output
    assert "1 passed" in result.output
    assert "must not be imported" not in result.output


def test_the_cache_of_failed_tests_is_unchanged(killed: Project) -> None:
    cache = killed.path / ".pytest_cache" / "v" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / "lastfailed").write_text('{"test_x.py::test_x": true}')
    assert killed.run(ONLY, "--lf").ret == 0
    assert (cache / "lastfailed").read_text() == '{"test_x.py::test_x": true}'


def test_no_host_or_an_unusable_one_is_status_4(project: Project) -> None:
    project.write(conftest="")
    result = project.run(ONLY)
    assert result.ret == 4
    assert "--pve-host HOST" in result.output
    result = project.run(ONLY, "--pve-host", "nowhere.invalid")
    assert result.ret == 4
    assert "nowhere.invalid" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("env: 'pvesh': No such file or directory", "expected a Proxmox VE host at the outer host, found no"),
        ("ipcc_send_rec[1] failed: Connection refused", "expected the API of the outer host to answer root"),
    ],
)
def test_a_host_that_is_no_pve_or_is_broken_is_status_4_with_the_action(
    project: Project, words: str, says: str
) -> None:
    project.host().fault("GET", "/pools", text=words, times=10)
    result = project.run(ONLY)
    assert result.ret == 4
    assert says in result.output
    assert "Traceback" not in result.output
