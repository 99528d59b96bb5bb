"""--nested-destroy-only: what killed sessions left goes, item by item; what is somebody else's stays."""

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
    """A copy of it: nothing in it says where it is."""
    return Project(shutil.copytree(killed_once.path, tmp_path / "project", symlinks=True))


def run_id(project: Project) -> str:
    return next((project.path / ".nested-pve" / "runs").glob("????????????")).name


def rows(project: Project, result: Result) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((project.path / "out.json").read_text())
    assert all(
        set(row)
        == {"vmid", "node", "name", "run", "owner", "created", "expires", "verdict", "reason", "outcome"}
        for row in found
    ), result.output
    return found


def lease(project: Project, **changes: Any) -> None:
    """Change the lease of the only run on the host."""
    pool, (comment, _) = next(each for each in project.host().pools().items() if "npve-" in each[0])
    found = {k: v for k, v in json.loads(comment).items() if k != "v"}
    project.host().set_pool(pool, dataclasses.replace(Lease(**found), **changes).to_text())


def stranger(project: Project, vmid: int, **config: Any) -> None:
    """A VM of somebody else."""
    project.host().connect().api.post("/nodes/father/qemu", vmid=vmid, **config)
    project.host().broadcast()


def test_what_a_killed_session_left_goes_and_the_second_time_there_is_nothing(killed: Project) -> None:
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


def test_a_dry_run_prints_the_same_plan_and_touches_nothing(killed: Project) -> None:
    before = killed.host().state()
    result = killed.run(ONLY, "--nested-dry-run", "--nested-json", "out.json")
    assert result.ret == 0, result.output
    (row,) = rows(killed, result)
    assert (row["verdict"], row["outcome"]) == ("destroy", "planned")
    assert str(row["vmid"]) in result.output
    assert "its session on this machine has exited" in result.output
    assert killed.host().state() == before


def test_a_live_session_is_never_touched_not_even_by_name(project: Project) -> None:
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


def test_another_owners_run_stays_until_it_lapses_or_is_named(killed: Project) -> None:
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


def test_a_lapsed_lease_of_anybody_goes_unasked(killed: Project) -> None:
    (killed.path / "state" / "nested-pve" / "locks" / f"{run_id(killed)}.lock").unlink()
    lease(killed, owner="bob@elsewhere", client="0" * 16, created=1000, expires=2000)
    result = killed.run(ONLY, "-v")
    assert result.ret == 0, result.output
    assert killed.left() == []


def test_my_own_kept_run_goes(killed: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a machine without a machine-id keeps one of its own.
    monkeypatch.setenv("XDG_STATE_HOME", str(killed.path / "state"))
    (killed.path / "state" / "nested-pve" / "locks" / f"{run_id(killed)}.lock").unlink()
    lease(killed, state="kept", client=client_hash())
    assert killed.run(ONLY).ret == 0
    assert killed.left() == []


def test_an_empty_pool_of_a_dead_run_goes_too(killed: Project) -> None:
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
    assert "is still there: " in result.output
    assert "Traceback" not in result.output
    assert rows(killed, result)[0]["outcome"] == "left"
    # What is known of it, wherever the failure is told.
    for told in (result.output, (killed.path / "out.xml").read_text()):
        assert "known: linked clones still need that disk" in told
        assert "destroy them first, then pytest --nested-destroy-only" in told
    assert result.output.count("known: ") == 1


def test_one_of_ours_that_somebody_protected_stays_and_what_mends_it_is_said(killed: Project) -> None:
    (vmid,) = killed.host().vms()
    killed.host().edit_vm(vmid, protection=1)
    stranger(killed, 99950, name="nested-pve-old", protection=1)
    result = killed.run(ONLY)
    assert result.ret == 1, result.output
    assert "2 skipped" in result.output
    assert "known: the VM is protected" in result.output
    assert f"fix:   qm set {vmid} --protection 0" in result.output
    # Nothing of the kind about a VM that nobody knows to be ours.
    assert result.output.count("known: ") == 1
    assert any(line.startswith(f"vm {vmid}") for line in killed.left())


@pytest.mark.parametrize(
    "why", ["nested_pve_vmid_range=98000-98009", "nested_pve_name_pattern=child-pve*", "no marker"]
)
def test_a_dead_run_whose_vm_is_not_proved_is_left_and_is_status_1(killed: Project, why: str) -> None:
    """Other settings than those it was made with, or a VM that somebody rewrote: its pool stays with it."""
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


def test_an_interrupted_clean_up_ends_at_once_and_says_how_far_it_came(killed: Project) -> None:
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


def test_an_unmarked_vm_that_looks_like_ours_needs_a_yes(project: Project) -> None:
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
    ("typed", "status", "goes"),
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
def test_on_a_terminal_it_is_asked_and_only_a_yes_is_one(
    project: Project, typed: bytes, status: int, goes: bool
) -> None:
    stranger(project, 99950, name="nested-pve-old")
    stranger(project, 99953, name="nested-pve-boots", onboot=1)
    before = {vmid: project.host().configuration(vmid) for vmid in (99950, 99953)}
    found, output = on_terminal(
        project.command(ONLY, "-v"),
        cwd=project.path,
        env=project.environ(TERM="dumb"),
        answers={"Destroy them? [y/N] ": typed},
    )
    assert found == status, output
    assert "99950 nested-pve-old on father" in output
    assert "99953 nested-pve-boots on father" not in output  # it stays anyway, so that is not asked
    assert "Traceback" not in output
    assert (99950 not in project.host().vms()) is goes
    kept = (99953,) if goes else (99950, 99953)
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


def test_with_force_stop_off_a_running_vm_stays_and_is_named(killed: Project) -> None:
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


def test_the_memory_of_failed_tests_is_not_touched(killed: Project) -> None:
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
def test_a_host_that_is_no_pve_or_a_sick_one_is_status_4_and_says_what_to_do(
    project: Project, words: str, says: str
) -> None:
    project.host().fault("GET", "/pools", text=words, times=10)
    result = project.run(ONLY)
    assert result.ret == 4
    assert says in result.output
    assert "Traceback" not in result.output
