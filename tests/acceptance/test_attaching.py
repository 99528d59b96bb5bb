"""A PVE that exists as the nested one: used, changed only where somebody chose that, and never destroyed."""

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
TAKEN = ("provision", "start_vm", "wait_ip")
PVE = ("--nested-attach", "pve1")
DOWN = "ipcc_send_rec[1] failed: Connection refused"
"""What `pvesh` says when pmxcfs does not run (recorded of PVE 9.2)."""

# The set-up is files on the host; what makes the VM inside is the package's own code.
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
    own = {{phase.name: phase for phase in phases}}
    phases[:] = [
        wrapped(own[each.name] if each.name in REAL else guarded(each) if each.name in SET_UP else each)
        for each in standin_phases()
    ]

def pytest_nestedpve_host(config, settings):
    (HERE / "asked").write_text(str(settings.host))
    return StandinHost(HERE / "host").connect()
"""


class Attached:
    """A project whose sessions attach to the one host there is, with guests of other people on it."""

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
        self.before = self.seen()

    def seen(self) -> dict[str, Any]:
        """All that there is on the host: guests by their configurations, pools, volumes, files."""
        host = self.project.host()
        state = host.state()
        set_up = sorted(file.name for file in host.file("/set-up").iterdir())
        return {**{name: state[name] for name in ("guests", "pools", "volumes")}, "set-up": set_up}

    def lacks(self, *phases: str) -> None:
        """These phases have not been done there."""
        for name in phases:
            self.project.host().file(f"/set-up/{name}").unlink()
        self.before = self.seen()

    def without(self, step: str) -> str:
        """The bridge or the storage's snippets are not there yet; what the step brings, for `BRINGS`."""
        self.lacks(step)
        if step == "setup_network":
            self.project.host().bridges()
            return json.dumps({"bridges": {"vmbr0": "10.77.7.10/24"}})
        self.project.host().storage("local", content="images,import")
        return json.dumps({"storage": {"name": "local"}})

    def statuses(self) -> dict[str, str]:
        """How the phases ended, by the audit log of the one run."""
        (log,) = self.project.audits()
        return {line["phase"]: line["status"] for line in log if line["event"] == "phase_end"}


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[Attached]:
    made = Attached(make_project(tmp_path / "project"))
    yield made
    assert made.seen() == made.before


def test_a_set_up_pve_is_used_as_it_is_and_the_vm_inside_goes(attached: Attached) -> None:
    result = attached.project.run(*PVE, "-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert result.outcomes() == {f"test_{name}": "PASSED" for name in PHASES}
    found = attached.statuses()
    assert {name: found[name] for name in (*TAKEN, *SET_UP)} == {
        **dict.fromkeys(TAKEN, "attached"), **dict.fromkeys(SET_UP, "proved")
    }  # fmt: skip
    assert not {*TAKEN, *SET_UP} & set(attached.project.done())
    (log,) = attached.project.audits()
    assert [line["vmid"] for line in log if line.get("status") == "gone"] != []
    made = [line["cmd"] for line in log if line["event"] == "call" and line["cmd"].startswith("post")]
    assert sum(" /pools" in call or "/qemu " in call for call in made) == 2
    assert "attached: that PVE is used as the nested one and kept" in result.output


def test_what_is_missing_is_not_done_because_nobody_chose_it(attached: Attached) -> None:
    attached.lacks("setup_network")
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
def test_a_chosen_step_is_done(attached: Attached, choice: tuple[str, ...]) -> None:
    attached.lacks("setup_network")
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
def test_what_only_leaves_something_out_chooses_nothing(attached: Attached, choice: tuple[str, ...]) -> None:
    attached.lacks("setup_network")
    result = attached.project.run(*PVE, "-v", "test_steps.py", *choice)
    assert result.outcomes()["test_setup_network"] == "FAILED", result.output
    assert "setup_network" not in attached.project.done()


@pytest.mark.thorough
def test_to_choose_a_later_step_does_not_choose_what_it_needs(attached: Attached) -> None:
    attached.lacks("setup_network")
    result = attached.project.run(*PVE, "-v", "-k", "setup_repos")
    assert result.ret == 1, result.output
    assert "setup_repos needs setup_network, which failed: expected setup_network to be done" in result.output
    assert attached.project.done() == ["preflight"]


@pytest.mark.thorough
def test_that_it_failed_last_time_is_no_choice(attached: Attached) -> None:
    attached.lacks("setup_network")
    assert attached.project.run(*PVE, "test_steps.py").ret == 1
    result = attached.project.run(*PVE, "-v", "--lf", "test_steps.py")
    assert result.outcomes()["test_setup_network"] == "FAILED", result.output
    assert "setup_network" not in attached.project.done()


@pytest.mark.thorough
def test_a_chosen_step_that_is_done_already_is_proved_unless_told_to_redo(attached: Attached) -> None:
    assert attached.project.run(*PVE, "-k", "setup_network").ret == 0
    assert "setup_network" not in attached.project.done()
    result = attached.project.run(*PVE, "-k", "setup_network", "-o", "nested_pve_redo=true")
    assert result.ret == 0, result.output
    assert "setup_network" in attached.project.done()
    attached.project.host().file("/set-up/setup_network").touch()  # the end took it away again


@pytest.mark.parametrize("step", ["setup_network", "setup_repos"])
def test_what_a_chosen_step_brings_may_be_missing_before(attached: Attached, step: str) -> None:
    brings = attached.without(step)
    result = attached.project.run(*PVE, "-k", f"{step} or leaf_start", BRINGS=brings)
    assert result.ret == 0, result.output
    assert (attached.statuses()[step], attached.statuses()["leaf_start"]) == ("done", "done")


@pytest.mark.parametrize("step", ["setup_network", "setup_repos"])
def test_what_no_chosen_step_brings_is_missing_and_the_step_is_named(attached: Attached, step: str) -> None:
    attached.without(step)
    other = {"setup_network": "setup_repos", "setup_repos": "setup_network"}[step]
    result = attached.project.run(*PVE, "-k", f"{other} or leaf_start")
    assert result.ret == 4, result.output
    assert re.search(rf"Or select the step that (provides it|adds that content): -k {step}\.", result.output)
    assert "--nested-keep" not in result.output  # which does not go with it
    assert attached.statuses() == {"preflight": "failed"}


def test_what_a_chosen_step_did_not_bring_is_missing_before_the_vm_inside(attached: Attached) -> None:
    attached.without("setup_repos")
    result = attached.project.run(*PVE, "-k", "setup_repos or leaf_start")
    assert result.ret == 1, result.output
    assert "snippets: expected an active storage with content snippets" in result.output
    assert attached.statuses()["download_image"] == "failed"


@pytest.mark.thorough
def test_redo_alone_does_nothing_to_what_is_there(attached: Attached) -> None:
    result = attached.project.run(*PVE, "test_steps.py", "-o", "nested_pve_redo=true")
    assert result.ret == 0, result.output
    assert not {*TAKEN, *SET_UP} & set(attached.project.done())


def test_a_test_that_needs_what_is_missing_fails_by_that_and_one_that_does_not_passes(
    attached: Attached,
) -> None:
    attached.lacks("setup_repos")
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
def test_a_skipped_phase_is_taken_as_done(attached: Attached) -> None:
    attached.lacks("setup_repos")
    result = attached.project.run(*PVE, "--nested-skip", "setup_repos", "test_steps.py")
    assert result.ret == 0, result.output


def test_the_outer_host_of_the_ini_is_not_asked(attached: Attached) -> None:
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
def test_what_does_not_go_with_it_is_a_usage_error(
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


def test_a_dry_run_says_what_would_be_done_and_asks_nobody(attached: Attached) -> None:
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
    assert len(attached.seen()["guests"]) == 3
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output


def test_after_a_crash_the_vm_inside_is_found_from_the_host_and_nothing_else_goes(attached: Attached) -> None:
    process = attached.project.start(*PVE, "-k", "leaf_start", HANG="leaf_start")
    attached.project.wait_for(process, cmd="hanging")
    process.kill()
    process.communicate()
    assert len(attached.seen()["guests"]) == 3
    result = attached.project.run("--nested-destroy-only", "--pve-host", "pve1", "-v")
    assert result.ret in (0, 1), result.output  # 1: the one that looks like ours was not confirmed
    assert "PASSED" in result.output


def test_a_failure_names_the_command_that_finishes_the_job(attached: Attached) -> None:
    attached.project.host().fault("DELETE", "/pools", text="got no worker upid", times=9)
    result = attached.project.run(*PVE, "-k", "leaf_provision")
    assert result.ret == 1, result.output
    assert "pytest --pve-host pve1 --nested-destroy-only --nested-run" in result.output
    attached.project.host().clear_faults()
    attached.before["pools"] = attached.project.host().pools()


def test_what_steps_placed_goes_when_the_api_is_down_at_the_end(attached: Attached) -> None:
    attached.lacks("setup_ssh")
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
    made = [f["facts"]["vmid"] for log in attached.project.audits() for f in log if _made(f)]
    assert len(made) == len(set(made)) == 2
    attached.lacks("setup_network")
    result = attached.project.run(*PVE, "-n2", "-k", "setup_network")
    assert result.ret == 1, result.output
    assert "select the step without -n" in result.output
    result = attached.project.run(*PVE, "-n2", "-o", "nested_pve_scope=run")
    assert result.ret == 4


def _made(line: dict[str, Any]) -> bool:
    return bool(line["event"] == "phase_end" and line["phase"] == "leaf_provision")
