"""Tests that use the environment in other ways than by an argument, or not at all although they name it."""

from __future__ import annotations

import pytest
from acceptance.conftest import Project
from standin_phases import PHASES

PART = "@pytest.mark.nested_pve(upto='wait_ip')\ndef test_part(nested_pve):\n    assert nested_pve.vmid\n"


@pytest.mark.parametrize("mark", ["skip", "skipif(True, reason='not here')", "xfail(run=False)"])
@pytest.mark.parametrize("fails", ["", "setup_repos"])
def test_one_that_is_not_run_sets_nothing_up_and_is_no_failure(
    project: Project, mark: str, fails: str
) -> None:
    project.write(test_u=f"import pytest\n{PART}\n@pytest.mark.{mark}\ndef test_not(nested_pve): pass\n")
    result = project.run("test_u.py", FAIL=fails)
    assert result.ret == 0, result.output
    assert project.done() == list(PHASES[:4])


def test_one_that_asks_at_run_time_gets_as_much_as_any_other(project: Project) -> None:
    asks = "def test_asks(request):\n    assert request.getfixturevalue('nested_pve').vmid\n"
    project.write(test_u=f"import pytest\n{PART}\n{asks}")
    result = project.run("test_u.py")
    assert result.ret == 0, result.output
    assert project.done() == list(PHASES)


def test_what_fails_for_one_that_asks_at_run_time_is_its_failure_and_not_of_one_that_wants_less(
    project: Project,
) -> None:
    asks = "def test_asks(request):\n    assert request.getfixturevalue('nested_pve').vmid\n"
    less = PART.replace("test_part", "test_less")
    project.write(test_u=f"import pytest\n{asks}\n{less}\n{asks.replace('test_asks', 'test_again')}")
    result = project.run("test_u.py", "-v", FAIL="setup_repos")
    assert result.ret == 1, result.output
    assert result.outcomes() == {"test_asks": "FAILED", "test_less": "PASSED", "test_again": "FAILED"}
    assert result.output.count("went wrong on purpose") > 1


def test_one_that_asks_at_run_time_and_is_skipped_then_verified_nothing(project: Project) -> None:
    asks = (
        "def test_asks(request):\n    request.getfixturevalue('nested_pve')\n    pytest.skip('not today')\n"
    )
    project.write(test_u=f"import pytest\n{asks}")
    result = project.run("test_u.py")
    assert result.ret == 1, result.output
    assert "nothing was verified" in result.output


def test_the_end_of_a_users_fixture_sets_up_nothing_more(project: Project) -> None:
    project.write(
        test_u="""
import pytest

held = []

@pytest.fixture(scope="session", autouse=True)
def last(nested_pve_run):
    yield
    assert held[0].ip

@pytest.mark.nested_pve(upto="wait_ip")
def test_part(nested_pve):
    held.append(nested_pve)

def test_unrelated():
    pass
"""
    )
    result = project.run("test_u.py")
    assert result.ret == 0, result.output
    assert project.done() == list(PHASES[:4])


def test_a_thread_beside_the_tests_sets_up_nothing(project: Project) -> None:
    project.write(
        test_u="""
import threading
import pytest
from pytest_nestedpve.session import hooks

asked, stop = threading.Event(), threading.Event()

@pytest.fixture(scope="session")
def monitor(nested_pve):
    def work():
        while not stop.is_set():
            assert nested_pve.ip
            asked.set()
    thread = threading.Thread(target=work)
    thread.start()
    yield
    stop.set()
    thread.join()

@pytest.mark.nested_pve(upto="wait_ip")
def test_part(monitor):
    pass

def test_unrelated(pytestconfig):
    for _ in range(3):
        asked.clear()
        assert asked.wait(30)
    assert not hooks.of(pytestconfig).open_run.runner.complete()
"""
    )
    result = project.run("test_u.py")
    assert result.ret == 0, result.output
    assert project.done() == list(PHASES[:4])


@pytest.mark.parametrize("method", ["thread", "signal"])
def test_pytest_timeouts_timer_does_not_outlive_its_test(project: Project, method: str) -> None:
    """What still runs after the session would be cut off, and a green run end with 1."""
    project.plugins = ("pytest_timeout",)
    project.write(
        conftest=(project.path / "conftest.py").read_text()
        + """
import signal, threading

def pytest_unconfigure(config):
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    timers = [each for each in timers if not each.finished.is_set()]
    left = signal.getitimer(signal.ITIMER_REAL)[0]
    print(f"timers left: {len(timers)} {left}")
    for each in timers:
        each.cancel()
""",
        test_u="import pytest\n@pytest.mark.timeout(50, func_only=True)\ndef test_u(nested_pve): pass\n",
    )
    result = project.run("test_u.py", "-o", f"timeout_method={method}")
    assert result.ret == 0, result.output
    assert "timers left: 0 0.0" in result.output
