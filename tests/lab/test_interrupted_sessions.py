"""Sessions on a lab that are interrupted, killed or fail: the lab and this machine have no leftovers of them.

Real pytest processes get signals when a line of their audit log appears; four at a time, with separate ids.
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
# Phases between the installation of PVE and the VM inside, which a session can omit.
SHORT = {"WITHOUT": "setup_ssh setup_repos sync_repos verify_ssh_chain"}


def line(pattern: str, **fields: str) -> Callable[[Line], bool]:
    """Matches lines of the audit log with these fields and a command that matches `pattern`."""
    return lambda entry: (
        all(entry.get(key) == value for key, value in fields.items())
        and re.search(pattern, str(entry.get("cmd", ""))) is not None
    )


def task(pattern: str, **fields: str) -> Callable[[Line], bool]:
    """Matches the line of a task that was started by such a call."""
    return line(pattern, event="task", **fields)


TEARDOWN = line("", event="phase_start", phase="discover")
LISTED = line("", event="teardown", status="found")


@dataclass(frozen=True)
class Case:
    """One session. `signals`: each with its trigger, a line of the audit log or the name of a playbook."""

    name: str
    args: tuple[str, ...]
    status: int
    signals: tuple[tuple[signal.Signals, Callable[[Line], bool] | str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    message: str = ""


def interrupted(
    name: str,
    until: str,
    *signals: tuple[signal.Signals, Callable[[Line], bool] | str],
    env: dict[str, str] | None = None,
) -> Case:
    """A session up to the phase `until`, or with the test that hangs, which gets signals."""
    args = ("test_users.py", "-k", "hangs") if until == "test" else ("test_steps.py", "-k", f"test_{until}")
    return Case(name, args, 128 + signals[0][0], signals, tuple((env or {}).items()))


BEFORE_CREATE = line(r"^get /nodes/father/storage/local/content", phase="provision")
HANGING = line("^hanging$")
CASES = (
    # The longest case first.
    interrupted(
        "TERM-leaf_provision-task", "leaf_provision",
        (TERM, task(r"^post /nodes/\S+/qemu$", phase="leaf_provision")), env=SHORT,
    ),
    interrupted(
        "HUP-setup_network-ansible", "setup_network",
        (HUP, "nested-pve-network"), env={"WITHOUT": "ensure_pve"},
    ),
    interrupted("TERM-ensure_pve-ansible", "ensure_pve", (TERM, "pve-install")),
    interrupted("INT-twice-ensure_pve-ansible", "ensure_pve", (INT, "pve-install"), (INT, LISTED)),
    Case(
        "failure-ensure_pve-x", ("-x", "test_steps.py", "-k", "test_ensure_pve or test_setup_network",
        "-o", "nested_pve_playbook_dir=playbooks"), 1, message="this playbook fails on purpose",
    ),
    interrupted("INT-twice-wait_ip", "wait_ip", (INT, line("agent/ping$")), (INT, LISTED)),
    interrupted("TERM-wait_ip", "wait_ip", (TERM, line("agent/ping$"))),
    interrupted("INT-preflight", "wait_ip", (INT, line("^get /version"))),
    interrupted("TERM-provision-create-under-way", "provision", (TERM, BEFORE_CREATE)),
    interrupted("INT-provision-create-task", "provision", (INT, task(r"^post /nodes/\S+/qemu$"))),
    interrupted("HUP-provision-import-task", "provision", (HUP, task(r"^post /nodes/\S+/config$"))),
    interrupted("INT-twice-provision", "provision", (INT, line("^post /pools")), (INT, TEARDOWN)),
    interrupted("HUP-start_vm-start-under-way", "wait_ip", (HUP, line("status/current$", phase="start_vm"))),
    interrupted("INT-test", "test", (INT, HANGING)),
    interrupted("TERM-test", "test", (TERM, HANGING), (INT, LISTED)),
    interrupted("HUP-test", "test", (HUP, HANGING)),
    interrupted("INT-teardown", "provision", (INT, LISTED)),
    interrupted("INT-twice-teardown", "start_vm", (INT, LISTED), (INT, task("^delete /nodes"))),
    interrupted("TERM-teardown", "start_vm", (TERM, task("status/stop$"))),
    interrupted("HUP-teardown", "provision", (HUP, task("^delete /nodes"))),
    Case("failure-test", ("test_users.py", "-k", "bad"), 1, message="1 failed"),
    Case(
        "failure-test-x", ("-x", "test_users.py", "-k", "bad or not_reached"), 1, message="stopping after 1"
    ),
    Case("error-before-test", ("test_users.py", "-k", "not_reached"), 1, message="1 error"),
    Case("error-after-test", ("test_users.py", "-k", "breaks_after"), 1, message="1 error"),
    Case(
        "failure-provision", ("test_steps.py", "-k", "provision and not leaf",
        "-o", "nested_pve_vm_options=scsi1=nosuch:1"), 1, message="storage 'nosuch' does not exist",
    ),
    Case("failure-start_vm", ("test_steps.py", "-k", "test_start_vm"), 1, env=(("FAIL", "start_vm"),),
        message="start_vm failed on purpose"),
)  # fmt: skip


def send_signal(process_group: int, signum: signal.Signals) -> None:
    """Send SIGTERM to the process, as `kill` does; SIGINT and SIGHUP to its group, as a terminal does."""
    if signum is TERM:
        os.kill(process_group, signum)
    else:
        os.killpg(process_group, signum)


def run_case(case: Case, project: Project) -> None:
    playbooks = project.path / "playbooks"
    playbooks.mkdir()
    (playbooks / "pve-install.yml").write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n"
        "    - ansible.builtin.fail:\n        msg: this playbook fails on purpose\n"
    )
    process = project.start("-q", *case.args, env=dict(case.env))
    for signum, trigger in case.signals:
        project.wait_for_trigger(process, trigger)
        project.watch(process)
        send_signal(process.pid, signum)
    status = project.wait_for_exit(process)
    assert project.leftovers() == [], project.output()
    output = project.output()
    assert status == case.status, output
    assert "Traceback" not in output, output
    assert "INTERNALERROR" not in output, output
    assert case.message in output


KILLED: dict[str, tuple[str, Callable[[Line], bool] | str]] = {
    "create-under-way": ("provision", BEFORE_CREATE),
    "import": ("provision", task(r"^post /nodes/\S+/config$")),
    "ansible": ("ensure_pve", "pve-install"),
    "teardown": ("start_vm", task("status/stop$")),
}


def kill_session(place: str, project: Project) -> None:
    until, trigger = KILLED[place]
    process = project.start("-q", "test_steps.py", "-k", f"test_{until}")
    project.wait_for_trigger(process, trigger)
    project.watch(process)
    os.kill(process.pid, signal.SIGKILL)
    assert project.wait_for_exit(process) == -signal.SIGKILL
    wait_until(
        lambda: not project.local_leftovers(),
        deadline=Deadline(20),
        what=lambda: f"processes of the killed session to end: {project.local_leftovers()}",
    )
    (run_id,) = project.runs()
    assert any(f"npve-{run_id}" in line for line in project.leftovers())
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()
    assert project.leftovers() == [], project.output()
    assert "Traceback" not in project.output()
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()


def run_beside_destroy_only(project: Project) -> None:
    lab = project.lab
    process = project.start("-q", "test_users.py", "-k", "hangs")
    project.wait_for_line(process, HANGING)
    (alive,) = project.runs()
    before = project.configurations(), lab.lease(alive)
    assert len(before[0]) == 1
    killed = project.start("-q", "test_users.py", "-k", "hangs")
    project.wait_for_line(killed, lambda entry: entry.get("run") != alive and HANGING(entry))
    os.kill(killed.pid, signal.SIGKILL)
    project.wait_for_exit(killed)
    (dead,) = set(project.runs()) - {alive}
    assert len(project.configurations()) == 2

    # By a session without the live session's lock file, by one with it, and by one that names the run.
    elsewhere = replace(project, state=project.path / "elsewhere")
    assert elsewhere.run("--nested-destroy-only", "-q") == 0, project.output()
    assert len(project.configurations()) == 2
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()
    assert dead not in lab.run("qm list; pvesh get /pools; ls /var/lib/vz/snippets")
    assert project.run("--nested-destroy-only", "--nested-run", alive, "-rs") == 0, project.output()
    assert "a session on this machine is working on it" in project.output()
    assert (project.configurations(), lab.lease(alive)) == before
    assert process.poll() is None

    send_signal(process.pid, INT)
    assert project.wait_for_exit(process) == 128 + INT
    assert project.leftovers() == []


def interrupt_three_times(project: Project) -> None:
    process = project.start("-q", "test_users.py", "-k", "hangs")
    for trigger in (HANGING, LISTED):
        project.wait_for_line(process, trigger)
        send_signal(process.pid, INT)
    # At once after the message, as destroying takes a second or two only.
    project.wait_for_output(process, "1 more Ctrl-C would abort it")
    send_signal(process.pid, INT)
    assert project.wait_for_exit(process) == 128 + INT
    output = project.output()
    assert "giving up on the teardown; this finishes it:" in output
    command = shlex.split(output.partition("this finishes it:")[2].splitlines()[1])
    assert command[:3] == ["pytest", "--pve-host", f"lab:{project.lab.name}"]
    assert project.leftovers() != []
    assert project.run(*command[3:]) == 0, project.output()
    assert project.leftovers() == [], project.output()


SCENARIOS: dict[str, Callable[[Project], None]] = {
    **{case.name: partial(run_case, case) for case in CASES},
    **{f"killed-{place}": partial(kill_session, place) for place in KILLED},
    "live": run_beside_destroy_only,
    "give-up": interrupt_three_times,
}


@pytest.fixture(scope="module")
def wait_for(
    request: pytest.FixtureRequest, hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], None]]:
    """Start the selected scenarios in parallel; the function waits for one of them and raises its error."""
    base = tmp_path_factory.mktemp("interrupted")
    selected = {
        item.callspec.params.get("scenario") for item in request.session.items if hasattr(item, "callspec")
    }
    futures: dict[str, Future[None]] = {}
    with ThreadPoolExecutor(WIDTH) as pool:
        for number, (name, scenario) in enumerate(SCENARIOS.items()):
            if name in selected:
                path, low = base / name, 98000 + number * IDS
                project = Project(path, hand_lab, low, low + IDS - 1, path / "state")
                project.create()
                futures[name] = pool.submit(scenario, project)
        try:
            yield lambda name: futures[name].result()
        finally:
            pool.shutdown(cancel_futures=True)


WaitFor = Callable[[str], None]


@pytest.mark.parametrize("scenario", [case.name for case in CASES])
def test_an_interrupted_or_failed_session_leaves_nothing_behind(wait_for: WaitFor, scenario: str) -> None:
    wait_for(scenario)


@pytest.mark.parametrize("scenario", [f"killed-{place}" for place in KILLED])
def test_leftovers_of_a_killed_session_are_deleted_by_destroy_only(wait_for: WaitFor, scenario: str) -> None:
    wait_for(scenario)


@pytest.mark.parametrize("scenario", ["live"])
def test_destroy_only_does_not_touch_a_live_session(wait_for: WaitFor, scenario: str) -> None:
    wait_for(scenario)


@pytest.mark.parametrize("scenario", ["give-up"])
def test_the_third_interrupt_ends_the_teardown_and_the_printed_command_finishes_it(
    wait_for: WaitFor, scenario: str
) -> None:
    wait_for(scenario)
