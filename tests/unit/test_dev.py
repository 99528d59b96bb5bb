"""The two commands of the README, as far as they can be asked without installing anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with `dev`, `.ci/run` and a Python environment that only prints its arguments."""
    shutil.copy(ROOT / "dev", tmp_path / "dev")
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    python = programs / "python"
    python.write_text(
        '#!/bin/sh\n[ "$1" = -m ] || exit 0\necho "CALLED $*"\n'
        'echo "=== 3 passed in 0.12s ==="\nexit ${STATUS:-0}\n'
    )
    lab = programs / "nestedpve-lab"
    lab.write_text('#!/bin/sh\necho "LAB $*"\nexit ${LAB_STATUS:-0}\n')
    for program in (python, lab):
        program.chmod(0o755)
    ready = subprocess.run(
        ["sh", "-c", "(cat pyproject.toml; python3 -V) | cksum"],
        cwd=tmp_path,
        capture_output=True,
        check=True,
    )
    (tmp_path / ".venv" / ".ready").write_bytes(ready.stdout)
    return tmp_path


def run(clone: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("NESTED_PVE_")}
    return subprocess.run(
        command,
        cwd=clone,
        env={**clean, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_says_what_there_is_and_an_unknown_command_is_a_usage_error(clone: Path) -> None:
    shown = run(clone, "./dev", "help")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("roundtrip", "test --fast", "lint"))
    wrong = run(clone, "./dev", "tset")
    assert wrong.returncode == 4
    assert "unknown command 'tset'" in wrong.stderr


def test_arguments_go_to_pytest_and_its_status_comes_back(clone: Path) -> None:
    done = run(clone, "./dev", "test", "--fast", "-x", "-k", "a or b", STATUS="3")
    assert done.returncode == 3
    assert (
        "CALLED -m pytest -n 2 --dist worksteal -m not thorough -x -k a or b tests/unit tests/acceptance\n"
        in done.stdout
    )
    assert "LAB" not in done.stdout


@pytest.mark.usefixtures("_root")
def test_without_fast_the_whole_suite_runs_and_the_lab_is_prepared(clone: Path) -> None:
    done = run(clone, "./dev", "test", "-x")
    whole = "-n 2 --dist loadscope -x tests/unit tests/acceptance tests/lab tests/test_round_trip.py\n"
    assert f"CALLED -m pytest {whole}" in done.stdout
    assert "LAB install" in done.stdout


@pytest.mark.usefixtures("_root")
def test_the_round_trip_prepares_the_lab_and_writes_a_report(clone: Path) -> None:
    done = run(clone, "./dev", "roundtrip", "-k", "setup_network")
    assert "LAB install" in done.stdout
    assert "--html=.nested-pve/report.html --self-contained-html -k setup_network" in done.stdout
    assert "--html" not in run(clone, "./dev", "roundtrip", "--collect-only").stdout


@pytest.fixture
def _root() -> None:
    assert os.geteuid() == 0, "the lab, and so this test, needs root"


@pytest.mark.parametrize("arguments", [("--pve-host", "root@pve1"), ("--pve-host=pve1",)])
def test_a_real_host_needs_no_lab(clone: Path, arguments: tuple[str, ...]) -> None:
    done = run(clone, "./dev", "roundtrip", *arguments, LAB_STATUS="1")
    assert done.returncode == 0
    assert "LAB" not in done.stdout


@pytest.mark.usefixtures("_root")
def test_without_a_lab_the_message_says_what_works(clone: Path) -> None:
    done = run(clone, "./dev", "roundtrip", "--pve-host=lab", LAB_STATUS="1")
    assert done.returncode == 4
    assert "./dev test --fast" in done.stderr
    assert "--pve-host HOST" in done.stderr
    assert "CALLED" not in done.stdout


@pytest.mark.usefixtures("_root")
def test_ci_keeps_the_reports_and_ends_with_pytests_closing_line(clone: Path) -> None:
    old = clone / ".nested-pve" / "runs" / "0123456789ab"
    old.mkdir(parents=True)
    (old / "report.html").write_text("page")
    (old / "audit.jsonl").write_text("{}")
    done = run(clone, ".ci/run", CI="true", STATUS="1")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "=== 3 passed in 0.12s ==="
    kept = clone / ".nested-pve" / "ci"
    assert (kept / "runs" / "0123456789ab" / "report.html").read_text() == "page"
    output = (kept / "output.txt").read_text()
    assert "tests/unit tests/acceptance tests/lab tests/test_round_trip.py\n" in output
    assert "LAB install" in output


@pytest.mark.parametrize(
    ("title", "status"),
    [
        ("teardown: retry when the VM lock is held", 0),
        ("pve/ssh: read files of all hosts by one module", 0),
        ("run, config: name settings plainly", 0),
        ("The teardown retries when a lock is held", 1),
        ("teardown: Retry when the VM lock is held", 1),
        ("teardown: " + "x" * 63, 1),
    ],
)
def test_lint_refuses_a_commit_title_without_an_area_or_above_72_characters(title: str, status: int) -> None:
    script = ROOT / ".ci" / "commit-titles"
    good = "lab: add fault rules\n"
    result = subprocess.run([script], input=f"{good}{title}\n", capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert (title in result.stdout) == bool(status)
