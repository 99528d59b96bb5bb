"""Whatever ends a session on a lab, the lab itself and this machine have nothing of it afterwards.

Real pytest processes, ended when a line of their audit log appears; four at a time, each with its own ids.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import pytest
from lab.on_lab import HandLab, Line, Project

from pytest_nestedpve.pve.deadline import Deadline, wait_until

WIDTH = 4
IDS = 10
INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
# What comes between the installation of PVE and the VM inside, and that one does without.
SHORT = {"WITHOUT": "setup_ssh setup_repos sync_repos verify_ssh_chain"}


def line(pattern: str, **fields: str) -> Callable[[Line], bool]:
    """A line of the audit log with these fields and such a command."""
    return lambda found: (
        all(found.get(key) == value for key, value in fields.items())
        and re.search(pattern, str(found.get("cmd", ""))) is not None
    )


def task(pattern: str, **fields: str) -> Callable[[Line], bool]:
    """The line of a task that such a call started."""
    return line(pattern, event="task", **fields)


TEARDOWN = line("", event="phase_start", phase="discover")
FOUND = line("", event="teardown", status="found")


@dataclass(frozen=True)
class Case:
    """One session. `blows`: signals, each with the line, or the playbook at work, that it comes after."""

    name: str
    args: tuple[str, ...]
    status: int
    blows: tuple[tuple[signal.Signals, Callable[[Line], bool] | str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    shows: str = ""


def ended_by(
    name: str,
    until: str,
    *blows: tuple[signal.Signals, Callable[[Line], bool] | str],
    env: dict[str, str] | None = None,
) -> Case:
    """A session up to the phase `until`, or of the test that hangs."""
    args = ("test_users.py", "-k", "hangs") if until == "test" else ("test_steps.py", "-k", f"test_{until}")
    return Case(name, args, 128 + blows[0][0], blows, tuple((env or {}).items()))


CREATE_COMES = line(r"^get /nodes/father/storage/local/content", phase="provision")
HANGING = line("^hanging$")
CASES = (
    # The long one first.
    ended_by(
        "TERM-leaf_provision-task", "leaf_provision",
        (TERM, task(r"^post /nodes/\S+/qemu$", phase="leaf_provision")), env=SHORT,
    ),
    ended_by(
        "HUP-setup_network-ansible", "setup_network",
        (HUP, "nested-pve-network"), env={"WITHOUT": "ensure_pve"},
    ),
    ended_by("TERM-ensure_pve-ansible", "ensure_pve", (TERM, "pve-install")),
    ended_by("INT-twice-ensure_pve-ansible", "ensure_pve", (INT, "pve-install"), (INT, FOUND)),
    Case(
        "failure-ensure_pve-x", ("-x", "test_steps.py", "-k", "test_ensure_pve or test_setup_network",
        "-o", "nested_pve_playbook_dir=playbooks"), 1, shows="this playbook fails on purpose",
    ),
    ended_by("INT-twice-wait_ip", "wait_ip", (INT, line("agent/ping$")), (INT, FOUND)),
    ended_by("TERM-wait_ip", "wait_ip", (TERM, line("agent/ping$"))),
    ended_by("INT-preflight", "wait_ip", (INT, line("^get /version"))),
    ended_by("TERM-provision-create-under-way", "provision", (TERM, CREATE_COMES)),
    ended_by("INT-provision-create-task", "provision", (INT, task(r"^post /nodes/\S+/qemu$"))),
    ended_by("HUP-provision-import-task", "provision", (HUP, task(r"^post /nodes/\S+/config$"))),
    ended_by("INT-twice-provision", "provision", (INT, line("^post /pools")), (INT, TEARDOWN)),
    ended_by("HUP-start_vm-start-under-way", "wait_ip", (HUP, line("status/current$", phase="start_vm"))),
    ended_by("INT-test", "test", (INT, HANGING)),
    ended_by("TERM-test", "test", (TERM, HANGING), (INT, FOUND)),
    ended_by("HUP-test", "test", (HUP, HANGING)),
    ended_by("INT-teardown", "provision", (INT, FOUND)),
    ended_by("INT-twice-teardown", "start_vm", (INT, FOUND), (INT, task("^delete /nodes"))),
    ended_by("TERM-teardown", "start_vm", (TERM, task("status/stop$"))),
    ended_by("HUP-teardown", "provision", (HUP, task("^delete /nodes"))),
    Case("failure-test", ("test_users.py", "-k", "bad"), 1, shows="1 failed"),
    Case("failure-test-x", ("-x", "test_users.py", "-k", "bad or not_reached"), 1, shows="stopping after 1"),
    Case("error-before-test", ("test_users.py", "-k", "not_reached"), 1, shows="1 error"),
    Case("error-after-test", ("test_users.py", "-k", "breaks_after"), 1, shows="1 error"),
    Case(
        "failure-provision", ("test_steps.py", "-k", "provision and not leaf",
        "-o", "nested_pve_vm_options=scsi1=nosuch:1"), 1, shows="storage 'nosuch' does not exist",
    ),
    Case("failure-start_vm", ("test_steps.py", "-k", "test_start_vm"), 1, env=(("FAIL", "start_vm"),),
        shows="start_vm went wrong on purpose"),
)  # fmt: skip


def strike(process_group: int, signum: signal.Signals) -> None:
    """Ctrl-C and a lost terminal reach the whole group in the foreground; `kill` one process."""
    if signum is TERM:
        os.kill(process_group, signum)
    else:
        os.killpg(process_group, signum)


def play(case: Case, project: Project) -> None:
    books = project.path / "playbooks"
    books.mkdir()
    (books / "pve-install.yml").write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n"
        "    - ansible.builtin.fail:\n        msg: this playbook fails on purpose\n"
    )
    process = project.start("-q", *case.args, env=dict(case.env))
    for signum, trigger in case.blows:
        project.wait_until(process, trigger)
        project.watch(process)
        strike(process.pid, signum)
    status = project.end(process)
    assert project.left() == [], project.output()
    said = project.output()
    assert status == case.status, said
    assert "Traceback" not in said, said
    assert "INTERNALERROR" not in said, said
    assert case.shows in said


KILLED: dict[str, tuple[str, Callable[[Line], bool] | str]] = {
    "create-under-way": ("provision", CREATE_COMES),
    "import": ("provision", task(r"^post /nodes/\S+/config$")),
    "ansible": ("ensure_pve", "pve-install"),
    "teardown": ("start_vm", task("status/stop$")),
}


def kill(place: str, project: Project) -> None:
    until, trigger = KILLED[place]
    process = project.start("-q", "test_steps.py", "-k", f"test_{until}")
    project.wait_until(process, trigger)
    project.watch(process)
    os.kill(process.pid, signal.SIGKILL)
    assert project.end(process) == -signal.SIGKILL
    wait_until(
        lambda: not project.left_here(),
        deadline=Deadline(20),
        what=lambda: f"what the killed session ran here to end: {project.left_here()}",
    )
    (run_id,) = project.runs()
    assert any(f"npve-{run_id}" in line for line in project.left())
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()
    assert project.left() == [], project.output()
    assert "Traceback" not in project.output()
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()


def live(project: Project) -> None:
    lab = project.lab
    process = project.start("-q", "test_users.py", "-k", "hangs")
    project.wait_for(process, HANGING)
    (alive,) = project.runs()
    before = project.configurations(), lab.lease(alive)
    assert len(before[0]) == 1
    killed = project.start("-q", "test_users.py", "-k", "hangs")
    project.wait_for(killed, lambda found: found.get("run") != alive and HANGING(found))
    os.kill(killed.pid, signal.SIGKILL)
    project.end(killed)
    (dead,) = set(project.runs()) - {alive}
    assert len(project.configurations()) == 2

    # By one who cannot see the lock of the live one, by one who can, and by one who names it.
    elsewhere = replace(project, state=project.path / "elsewhere")
    assert elsewhere.run("--nested-destroy-only", "-q") == 0, project.output()
    assert len(project.configurations()) == 2
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()
    assert dead not in lab.ask("qm list; pvesh get /pools; ls /var/lib/vz/snippets")
    assert project.run("--nested-destroy-only", "--nested-run", alive, "-rs") == 0, project.output()
    assert "a session on this machine is working on it" in project.output()
    assert (project.configurations(), lab.lease(alive)) == before
    assert process.poll() is None

    strike(process.pid, INT)
    assert project.end(process) == 128 + INT
    assert project.left() == []


def give_up(project: Project) -> None:
    process = project.start("-q", "test_users.py", "-k", "hangs")
    for trigger in (HANGING, FOUND):
        project.wait_for(process, trigger)
        strike(process.pid, INT)
    # As soon as it says so: the destroying takes a second or two only.
    project.wait_for_output(process, "1 more Ctrl-C would abort it")
    strike(process.pid, INT)
    assert project.end(process) == 128 + INT
    said = project.output()
    assert "giving up on the teardown; this finishes it:" in said
    command = shlex.split(said.partition("this finishes it:")[2].splitlines()[1])
    assert command[:3] == ["pytest", "--pve-host", f"lab:{project.lab.name}"]
    assert project.left() != []
    assert project.run(*command[3:]) == 0, project.output()
    assert project.left() == [], project.output()


WORKS: dict[str, Callable[[Project], None]] = {
    **{case.name: partial(play, case) for case in CASES},
    **{f"killed-{place}": partial(kill, place) for place in KILLED},
    "live": live,
    "give-up": give_up,
}


@pytest.fixture(scope="module")
def done(
    request: pytest.FixtureRequest, hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], None]]:
    """Waits for one of the chosen works, and raises what it raised; they run side by side from now on."""
    base = tmp_path_factory.mktemp("ended")
    chosen = {item.callspec.params.get("work") for item in request.session.items if hasattr(item, "callspec")}
    futures: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(WIDTH) as pool:
        for number, (name, work) in enumerate(WORKS.items()):
            if name in chosen:
                path, low = base / name, 98000 + number * IDS
                project = Project(path, hand_lab, low, low + IDS - 1, path / "state")
                project.write()
                futures[name] = pool.submit(work, project)
        try:
            yield lambda name: futures[name].result()
        finally:
            pool.shutdown(cancel_futures=True)


Done = Callable[[str], None]


@pytest.mark.parametrize("work", [case.name for case in CASES])
def test_an_ended_session_leaves_nothing_on_the_lab_or_here(done: Done, work: str) -> None:
    done(work)


@pytest.mark.parametrize("work", [f"killed-{place}" for place in KILLED])
def test_what_a_killed_session_left_is_cleared_by_destroy_only(done: Done, work: str) -> None:
    done(work)


@pytest.mark.parametrize("work", ["live"])
def test_a_live_session_is_untouched_by_the_destroy_only_of_others(done: Done, work: str) -> None:
    done(work)


@pytest.mark.parametrize("work", ["give-up"])
def test_the_third_interrupt_gives_up_and_the_command_that_it_prints_finishes(done: Done, work: str) -> None:
    done(work)
