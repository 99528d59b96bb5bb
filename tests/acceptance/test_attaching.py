"""An existing PVE attached as the nested one: changed only by selected steps, and never destroyed."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from acceptance.conftest import CONFTEST, Project, make_project
from standin_phases import PHASES

pytestmark = pytest.mark.thorough

SET_UP = ("ensure_pve", "setup_network", "setup_ssh", "setup_repos")
VM_PHASES = ("provision", "start_vm", "wait_ip")
PVE = ("--nested-attach", "pve1")
DOWN = "ipcc_send_rec[1] failed: Connection refused"
"""Error of `pvesh` while pmxcfs does not run (recorded on PVE 9.2)."""

# Each set-up phase is a file on the host; the package's phases create the VM inside.
ATTACHED = f"""
import json
SET_UP = {SET_UP!r}
REAL = ("preflight", "download_image", "leaf_provision", "leaf_start")

def guarded(phase):
    path = "/set-up/" + phase.name
    def probe(environment):
        if environment.outer.run(["test", "-e", path]).ok:
            return {{"did": "it is there"}}
        environment.missing[phase.name] = "there is no " + path
    def do(environment):
        environment.outer.ssh.put(b"", path)
        for verb, options in json.loads(os.environ.get("BRINGS", "{{}}")).items():
            getattr(StandinHost(HERE / "host"), verb)(**options)
        lines = os.environ.get("STAYS", "").splitlines()
        environment.undo.append(lambda: environment.outer.run(["rm", "-f", "--", path]) and lines)
    return dataclasses.replace(phase, do=do, probe=probe)

def pytest_nestedpve_phases(phases, config):
    real = {{phase.name: phase for phase in phases}}
    phases[:] = [
        wrapped(real[phase.name] if phase.name in REAL else guarded(phase) if phase.name in SET_UP else phase)
        for phase in standin_phases()
    ]

def pytest_nestedpve_host(config, settings):
    (HERE / "asked").write_text(str(settings.host))
    return StandinHost(HERE / "host").connect()
"""


class Attached:
    """A project whose sessions attach to the only host, which has guests of other owners."""

    def __init__(self, project: Project) -> None:
        self.project = project
        base = CONFTEST.partition("def pytest_nestedpve_phases")[0]
        project.write(conftest=base + ATTACHED)
        api = project.host().connect().api
        api.post("/nodes/father/qemu", vmid=100, name="of-somebody", memory=512)
        api.post("/nodes/father/qemu", vmid=99950, name="nested-pve-of-somebody", memory=512)
        project.host().file("/set-up").mkdir()
        for name in SET_UP:
            project.host().file(f"/set-up/{name}").touch()
        self.before = self.objects()

    def objects(self) -> dict[str, Any]:
        """The objects on the host: configurations of guests, pools, volumes, files of the set-up."""
        host = self.project.host()
        state = host.state()
        set_up = sorted(file.name for file in host.file("/set-up").iterdir())
        return {**{name: state[name] for name in ("guests", "pools", "volumes")}, "set-up": set_up}

    def undo_phases(self, *phases: str) -> None:
        """Remove the set-up of these phases from the host."""
        for name in phases:
            self.project.host().file(f"/set-up/{name}").unlink()
        self.before = self.objects()

    def remove_result(self, step: str) -> str:
        """Remove the bridge or the content type snippets; returns the step's change, for `BRINGS`."""
        self.undo_phases(step)
        if step == "setup_network":
            self.project.host().bridges()
            return json.dumps({"bridges": {"vmbr0": "10.77.7.10/24"}})
        self.project.host().storage("local", content="images,import")
        return json.dumps({"storage": {"name": "local"}})

    def statuses(self) -> dict[str, str]:
        """The final status of each phase, from the audit log of the only run."""
        (log,) = self.project.audits()
        return {line["phase"]: line["status"] for line in log if line["event"] == "phase_end"}


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Attached]:
    attached = Attached(make_project(tmp_path / "project"))
    yield attached
    assert attached.objects() == attached.before


def test_a_set_up_pve_is_used_unchanged_and_the_vm_inside_is_destroyed(attached: Attached) -> None:
    result = attached.project.run(*PVE, "-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert result.outcomes() == {f"test_{name}": "PASSED" for name in PHASES}
    statuses = attached.statuses()
    assert {name: statuses[name] for name in (*VM_PHASES, *SET_UP)} == {
        **dict.fromkeys(VM_PHASES, "attached"), **dict.fromkeys(SET_UP, "proved")
    }  # fmt: skip
    assert not {*VM_PHASES, *SET_UP} & set(attached.project.done())
    (log,) = attached.project.audits()
    assert [line["vmid"] for line in log if line.get("status") == "gone"] != []
    creations = [line["cmd"] for line in log if line["event"] == "call" and line["cmd"].startswith("post")]
    assert sum(" /pools" in call or "/qemu " in call for call in creations) == 2
    assert "attached: that PVE is used as the nested one and kept" in result.output


def test_a_missing_phase_is_not_done_unless_its_step_is_selected(attached: Attached) -> None:
    attached.undo_phases("setup_network")
    result = attached.project.run(*PVE, "-v", "test_steps.py")
    assert result.ret == 1, result.output
    assert result.outcomes()["test_ensure_pve"] == "PASSED"
    assert result.outcomes()["test_setup_network"] == "FAILED"
    assert "found: there is no /set-up/setup_network" in result.output
    assert "`pytest --nested-attach pve1 -k setup_network` runs that step" in result.output
    assert "setup_network" not in attached.project.done()


@pytest.mark.parametrize(
    "choice",
    [
        ("-k", "setup_network"),
        ("test_steps.py::test_setup_network",),
        pytest.param(
            ("test_steps.py::test_setup_network", "test_steps.py::test_preflight"), marks=pytest.mark.thorough
        ),
        pytest.param(("-k", "network and not leaf"), marks=pytest.mark.thorough),
    ],
)
def test_a_selected_step_is_done(attached: Attached, choice: tuple[str, ...]) -> None:
    attached.undo_phases("setup_network")
    result = attached.project.run(*PVE, "-v", *choice)
    assert result.ret == 0, result.output
    assert attached.statuses()["setup_network"] == "done"


@pytest.mark.parametrize(
    "choice",
    [
        ("-k", "not leaf"),
        *(pytest.param(("-k", word), marks=pytest.mark.thorough) for word in ("test", "steps")),
    ],
)
def test_an_option_that_only_deselects_selects_no_step(attached: Attached, choice: tuple[str, ...]) -> None:
    attached.undo_phases("setup_network")
    result = attached.project.run(*PVE, "-v", "test_steps.py", *choice)
    assert result.outcomes()["test_setup_network"] == "FAILED", result.output
    assert "setup_network" not in attached.project.done()


@pytest.mark.thorough
def test_selecting_a_later_step_does_not_select_the_earlier_ones(attached: Attached) -> None:
    attached.undo_phases("setup_network")
    result = attached.project.run(*PVE, "-v", "-k", "setup_repos")
    assert result.ret == 1, result.output
    assert "setup_repos needs setup_network, which failed: expected setup_network to be done" in result.output
    assert attached.project.done() == ["preflight"]


@pytest.mark.thorough
def test_lf_does_not_select_the_step_that_failed(attached: Attached) -> None:
    attached.undo_phases("setup_network")
    assert attached.project.run(*PVE, "test_steps.py").ret == 1
    result = attached.project.run(*PVE, "-v", "--lf", "test_steps.py")
    assert result.outcomes()["test_setup_network"] == "FAILED", result.output
    assert "setup_network" not in attached.project.done()


@pytest.mark.thorough
def test_a_selected_step_that_is_done_already_is_proved_without_redo(attached: Attached) -> None:
    assert attached.project.run(*PVE, "-k", "setup_network").ret == 0
    assert "setup_network" not in attached.project.done()
    result = attached.project.run(*PVE, "-k", "setup_network", "-o", "nested_pve_redo=true")
    assert result.ret == 0, result.output
    assert "setup_network" in attached.project.done()
    attached.project.host().file("/set-up/setup_network").touch()  # the end of the session removed it


@pytest.mark.parametrize("step", ["setup_network", "setup_repos"])
def test_the_result_of_a_selected_step_may_be_missing_before(attached: Attached, step: str) -> None:
    brings = attached.remove_result(step)
    result = attached.project.run(*PVE, "-k", f"{step} or leaf_start", BRINGS=brings)
    assert result.ret == 0, result.output
    assert (attached.statuses()[step], attached.statuses()["leaf_start"]) == ("done", "done")


@pytest.mark.parametrize("step", ["setup_network", "setup_repos"])
def test_a_missing_result_of_another_step_is_reported_with_the_step(attached: Attached, step: str) -> None:
    attached.remove_result(step)
    other = {"setup_network": "setup_repos", "setup_repos": "setup_network"}[step]
    result = attached.project.run(*PVE, "-k", f"{other} or leaf_start")
    assert result.ret == 4, result.output
    assert re.search(rf"Or select the step that (provides it|adds that content): -k {step}\.", result.output)
    assert "--nested-keep" not in result.output  # not permitted with --nested-attach
    assert attached.statuses() == {"preflight": "failed"}


def test_a_selected_step_without_its_result_fails_before_the_vm_inside(attached: Attached) -> None:
    attached.remove_result("setup_repos")
    result = attached.project.run(*PVE, "-k", "setup_repos or leaf_start")
    assert result.ret == 1, result.output
    assert "snippets: expected an active storage with content snippets" in result.output
    assert attached.statuses()["download_image"] == "failed"


@pytest.mark.thorough
def test_redo_alone_repeats_no_attached_phase(attached: Attached) -> None:
    result = attached.project.run(*PVE, "test_steps.py", "-o", "nested_pve_redo=true")
    assert result.ret == 0, result.output
    assert not {*VM_PHASES, *SET_UP} & set(attached.project.done())


def test_a_test_that_needs_a_missing_phase_fails_and_a_test_that_does_not_passes(
    attached: Attached,
) -> None:
    attached.undo_phases("setup_repos")
    attached.project.write(
        test_users="""
import pytest
from pytest_nestedpve.environment.attached import NotOurs

@pytest.mark.nested_pve(upto="setup_ssh")
def test_part(nested_pve):
    assert (nested_pve.name, nested_pve.node, nested_pve.ip) == ("father", "father", "10.77.7.10")
    assert "attached" in repr(nested_pve)
    assert nested_pve.inner.api.get("/version")["version"]
    for what in ("vmid", "host", "root_password"):
        with pytest.raises(NotOurs, match="attached"):
            getattr(nested_pve, what)

def test_whole(nested_pve): pass
"""
    )
    result = attached.project.run(*PVE, "-v", "test_users.py")
    assert result.outcomes() == {"test_part": "PASSED", "test_whole": "ERROR"}, result.output
    assert "expected setup_repos to be done on the attached PVE pve1" in result.output


@pytest.mark.thorough
def test_a_skipped_phase_counts_as_done(attached: Attached) -> None:
    attached.undo_phases("setup_repos")
    result = attached.project.run(*PVE, "--nested-skip", "setup_repos", "test_steps.py")
    assert result.ret == 0, result.output


def test_the_outer_host_of_the_ini_is_not_contacted(attached: Attached) -> None:
    ini = attached.project.path / "pytest.ini"
    ini.write_text(ini.read_text() + "nested_pve_host = father\n")
    result = attached.project.run(*PVE, "-k", "wait_ip and not leaf")
    assert result.ret == 0, result.output
    assert (attached.project.path / "asked").read_text() == "pve1"
    assert "host pve1 (--nested-attach)" in result.output


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--pve-host", "father"), "--nested-attach and --pve-host contradict each other"),
        pytest.param(
            ("-o", "nested_pve_host=father"),
            "--nested-attach and -o nested_pve_host contradict each other",
            marks=pytest.mark.thorough,
        ),
        (("--nested-destroy-only",), "use `pytest --nested-destroy-only --pve-host pve1`"),
        (("--nested-keep",), "--nested-attach and --nested-keep contradict each other"),
        pytest.param(
            ("--nested-keep=on-failure",),
            "--nested-attach and --nested-keep contradict each other",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_a_contradicting_option_is_a_usage_error(
    attached: Attached, more: tuple[str, ...], text: str
) -> None:
    result = attached.project.run(*PVE, *more)
    assert result.ret == 4, result.output
    assert text in result.output
    assert not (attached.project.path / "asked").exists()


def test_a_name_that_is_no_host_is_a_usage_error(attached: Attached) -> None:
    result = attached.project.run("--nested-attach", "-oProxyCommand=x")
    assert result.ret == 4
    result = attached.project.run("--nested-attach=lab:Not_A_Name")
    assert result.ret == 4
    assert "--nested-attach: expected 'lab' or 'lab:NAME'" in result.output


def test_a_dry_run_reports_the_plan_and_contacts_no_host(attached: Attached) -> None:
    result = attached.project.run(
        *PVE, "--nested-dry-run", "--nested-json", "plan.json", "-k", "setup_network or leaf_start"
    )
    assert result.ret == 0, result.output
    rows = json.loads((attached.project.path / "plan.json").read_text())
    plan = {row["phase"]: row["what"] for row in rows}
    assert plan["provision"] == plan["wait_ip"] == "attached"
    assert plan["setup_network"] == "probed; done if need be"
    assert plan["setup_repos"] == "probed; not done"
    assert "then everything created inside is destroyed" in result.output
    assert not (attached.project.path / "asked").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.thorough)])
def test_a_signal_leaves_no_vm_inside(attached: Attached, number: int) -> None:
    process = attached.project.start(*PVE, "-k", "leaf_start", HANG="leaf_start")
    attached.project.wait_for(process, cmd="hanging")
    assert len(attached.objects()["guests"]) == 3
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output


def test_after_a_crash_only_the_vm_inside_is_destroyed_from_the_host(attached: Attached) -> None:
    process = attached.project.start(*PVE, "-k", "leaf_start", HANG="leaf_start")
    attached.project.wait_for(process, cmd="hanging")
    process.kill()
    process.communicate()
    assert len(attached.objects()["guests"]) == 3
    result = attached.project.run("--nested-destroy-only", "--pve-host", "pve1", "-v")
    assert result.ret in (0, 1), result.output  # 1: the VM with a name of ours was not confirmed
    assert "PASSED" in result.output


def test_a_failure_names_the_command_that_finishes_the_job(attached: Attached) -> None:
    attached.project.host().fault("DELETE", "/pools", text="got no worker upid", times=9)
    result = attached.project.run(*PVE, "-k", "leaf_provision")
    assert result.ret == 1, result.output
    assert "pytest --pve-host pve1 --nested-destroy-only --nested-run" in result.output
    attached.project.host().clear_faults()
    attached.before["pools"] = attached.project.host().pools()


def test_files_of_steps_are_removed_though_the_api_is_down_at_the_end(attached: Attached) -> None:
    attached.undo_phases("setup_ssh")
    down = {"method": "GET", "text": DOWN, "times": 9999}
    stays = "the run's key on pve1: read-only"
    result = attached.project.run(*PVE, "-k", "setup_ssh", BRINGS=json.dumps({"fault": down}), STAYS=stays)
    assert result.ret == 1, result.output
    assert "unknown, the teardown itself failed: ClusterFilesystemDown: " in result.output
    assert f"\n{stays}\n" in result.output
    attached.project.host().clear_faults()


@pytest.mark.thorough
def test_under_xdist_each_worker_has_its_own_vm_inside_and_none_sets_up(attached: Attached) -> None:
    attached.project.plugins = ("xdist",)
    attached.project.write(
        test_users="""
import pytest
@pytest.mark.nested_pve(upto="leaf_start")
@pytest.mark.parametrize("number", range(4))
def test_it(nested_pve, number): pass
"""
    )
    result = attached.project.run(*PVE, "-n2", "test_users.py")
    assert result.ret == 0, result.output
    vmids = [f["facts"]["vmid"] for log in attached.project.audits() for f in log if _creates_vm(f)]
    assert len(vmids) == len(set(vmids)) == 2
    attached.undo_phases("setup_network")
    result = attached.project.run(*PVE, "-n2", "-k", "setup_network")
    assert result.ret == 1, result.output
    assert "select the step without -n" in result.output
    result = attached.project.run(*PVE, "-n2", "-o", "nested_pve_scope=run")
    assert result.ret == 4


def _creates_vm(line: dict[str, Any]) -> bool:
    return bool(line["event"] == "phase_end" and line["phase"] == "leaf_provision")
