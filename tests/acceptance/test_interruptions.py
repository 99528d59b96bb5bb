"""An interrupted session leaves nothing on the host, in whatever phase it is interrupted.

Real processes, ended by real signals when a line of the audit log appears; all of them once, four at a time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from acceptance.conftest import Project, Result, make_project
from standin_phases import PHASES

pytestmark = pytest.mark.thorough

SIGNALS = {"INT": signal.SIGINT, "TERM": signal.SIGTERM, "HUP": signal.SIGHUP}
PLACES = (*PHASES, "test", "teardown")
CASES = [(name, place) for place in PLACES for name in SIGNALS] + [
    (case, place) for case in ("INT twice", "INT then TERM") for place in ("provision", "test", "teardown")
]
Ended = dict[tuple[str, str], tuple[Project, Result]]


def interrupt(path: Path, case: str, place: str) -> tuple[Project, Result]:
    """A run that gets the signals of `case` at `place`."""
    project = make_project(path)
    names = {"INT twice": ["INT", "INT"], "INT then TERM": ["INT", "TERM"]}.get(case, [case])
    project.slow(qmdestroy=0.4)
    arguments = ["-q", "-p", "no:cacheprovider", "test_users.py" if place == "test" else "test_steps.py"]
    process = project.start(*arguments, HANG=place)
    if place == "teardown":
        project.wait_for(process, event="teardown", status="found")
    else:
        project.wait_for(process, cmd="hanging")
    for number, name in enumerate(names):
        if number:
            # The second one while the teardown is under way, if it still is.
            threading.Event().wait(0.15)
        if process.poll() is None:
            process.send_signal(SIGNALS[name])
    output, _ = process.communicate(timeout=60)
    return project, Result(process.returncode, output)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], tuple[Project, Result]]]:
    base = tmp_path_factory.mktemp("interrupted")
    futures: dict[tuple[str, str], Future[tuple[Project, Result]]] = {}
    with ThreadPoolExecutor(4) as pool:
        for number, (case, place) in enumerate(CASES):
            futures[case, place] = pool.submit(interrupt, base / str(number), case, place)
        yield lambda case, place: futures[case, place].result()


@pytest.mark.parametrize(("case", "place"), CASES)
def test_an_interrupted_session_leaves_nothing(
    ended: Callable[[str, str], tuple[Project, Result]], case: str, place: str
) -> None:
    project, result = ended(case, place)
    assert project.left() == [], result.output
    assert result.ret == 128 + SIGNALS[case.split()[0]], result.output
    assert "Traceback" not in result.output


def test_the_third_interrupt_gives_up_and_prints_the_command(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    project.slow(qmdestroy=3)
    process = project.start("-q", "test_steps.py", HANG="start_vm")
    project.wait_for(process, cmd="hanging")
    process.send_signal(signal.SIGINT)
    project.wait_for(process, event="teardown", status="found")
    process.send_signal(signal.SIGINT)
    threading.Event().wait(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "giving up on the teardown; this finishes it:" in output
    assert "--nested-destroy-only --nested-run " in output
    command = output.split("this finishes it:")[1].split("--nested-run")[1].split()[0]
    finished = project.run("--nested-destroy-only", "--nested-run", command)
    assert finished.ret == 0, finished.output
    assert project.left() == []


def test_under_nohup_a_hang_up_does_not_end_the_session(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    plain = project.command

    def ignoring(*args: str) -> list[str]:
        return ["nohup", *plain(*args)]

    project.command = ignoring  # type: ignore[method-assign]
    process = project.start("-q", "test_steps.py", "-k", "start_vm", HANG="provision")
    project.wait_for(process, cmd="hanging")
    process.send_signal(signal.SIGHUP)
    threading.Event().wait(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert project.left() == []


def test_an_interrupted_controller_leaves_nothing_of_its_workers(tmp_path: Path) -> None:
    project = make_project(tmp_path / "project")
    project.plugins = ("xdist",)
    process = project.start(
        "-q", "-n2", "--pve-host", "standin", "test_steps.py", "test_users.py", HANG="leaf_start"
    )
    project.wait_for(process, cmd="hanging")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 143, output
    assert project.left() == [], output
