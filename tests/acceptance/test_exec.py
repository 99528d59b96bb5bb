"""--nested-exec and --nested-env-file: any command, or a file of variables, for the ready environment."""

from __future__ import annotations

import re
import shlex
import signal
import stat
import subprocess
from pathlib import Path

import pytest
from acceptance.conftest import CONFTEST, Project
from standin_phases import PHASES
from terminals import on_terminal

pytestmark = pytest.mark.thorough

SECRET = "0f0f0f0f-1111-2222-3333-444455556666"
READY = f"""
from standin_connections import StandinSsh
from pytest_nestedpve.pve.ssh.forward import Forward

def nobody():
    raise OSError("nobody listens on this host")

StandinSsh.forward = lambda self, host, port: Forward(nobody)
_phases = pytest_nestedpve_phases

def pytest_nestedpve_phases(phases, config):
    _phases(phases, config)
    phases[:] = [ready(phase) if phase.name == "setup_repos" else phase for phase in phases]

def ready(phase):
    def do(environment):
        directory, name = environment.run.directory, environment.fact("provision", "name")
        environment.hide({SECRET!r})
        directory.write("api_token", "root@pam!nested={SECRET}\\n")
        lines = ["-----BEGIN CERTIFICATE-----", "ours", "-----END CERTIFICATE-----", ""]
        directory.write("pve-root-ca.pem", "\\n".join(lines))
        directory.pin_host_keys(name, ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA"])
        environment._inner = StandinHost(HERE / "nested", node=name).connect()
        return phase.do(environment)
    return dataclasses.replace(phase, do=do)
"""
READER = """
import os, pathlib

def test_reads(nested_pve):
    file = pathlib.Path("nested.env")
    assert file.stat().st_mode & 0o777 == 0o600
    assert f"NESTED_API_URL={nested_pve.api_url}\\n" in file.read_text()
    pathlib.Path("copy").write_text(file.read_text())
"""


@pytest.fixture
def ready(project: Project) -> Project:
    """A project whose nested PVE has the token and files for other programs."""
    project.write(conftest=CONFTEST + READY, test_reader=READER)
    return project


def read(path: Path) -> dict[str, str]:
    """The variables that `env -0` wrote."""
    pairs = (part.partition("=") for part in path.read_text().split("\0") if part)
    return {name: value for name, _, value in pairs}


@pytest.mark.parametrize(
    ("command", "status"),
    [("true", 0), ("exit 1", 1), ("exit 5", 5), ("exit 255", 255), ("kill -KILL $$", 137)],
)
def test_the_status_of_the_command_is_that_of_the_session(ready: Project, command: str, status: int) -> None:
    result = ready.run("--nested-exec", f"echo told; {command}", "-v", "--junitxml", "out.xml")
    assert result.ret == status, result.output
    assert "\ntold\n" in result.output
    assert ("1 passed" if status == 0 else f"the command ended with status {status}") in result.output
    assert "Traceback" not in result.output
    assert ready.done() == list(PHASES)
    assert 'testcase classname="nested-pve" name="exec"' in (ready.path / "out.xml").read_text()


def test_the_command_gets_every_variable_and_no_credentials_of_another_pve(ready: Project) -> None:
    result = ready.run(
        "--nested-exec", "env -0 >seen; cp nested.env kept; stat -c %a nested.env >mode",
        "--nested-env-file", "nested.env",
        PROXMOX_VE_PASSWORD="of-production", PROXMOX_PASSWORD="of-production", PM_PASS="of-production",
        PROXMOX_VE_INSECURE="true", MINE="kept",
    )  # fmt: skip
    assert result.ret == 0, result.output
    seen = read(ready.path / "seen")
    assert seen["MINE"] == "kept"
    assert "of-production" not in seen.values()
    assert "PROXMOX_VE_INSECURE" not in seen
    assert seen["PWD"] == str(ready.path)
    token = f"root@pam!nested={SECRET}"
    assert (seen["NESTED_API_TOKEN"], seen["PROXMOX_VE_API_TOKEN"]) == (token, token)
    assert (seen["PM_API_TOKEN_ID"], seen["PM_API_TOKEN_SECRET"]) == ("root@pam!nested", SECRET)
    assert (seen["PROXMOX_USER"], seen["PROXMOX_TOKEN_ID"]) == ("root@pam", "nested")
    assert seen["NESTED_API_URL"] + "/" == seen["PROXMOX_VE_ENDPOINT"]
    known = Path(seen["NESTED_KNOWN_HOSTS"]).read_text()
    assert f"[127.0.0.1]:{seen['NESTED_SSH_PORT']} ssh-ed25519 " in known
    for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        # The system's roots are still trusted.
        assert Path(seen[variable]).read_text().count("BEGIN CERTIFICATE") > 1
        assert "\nours\n" in Path(seen[variable]).read_text()

    assert (ready.path / "mode").read_text() == "600\n"
    assert not (ready.path / "nested.env").exists()
    shell = ["env", "-i", "sh", "-ec", "set -a; . ./kept; env -0"]
    sourced = read_bytes(subprocess.run(shell, cwd=ready.path, capture_output=True, check=True).stdout)
    written = {name: sourced[name] for name in sourced if name not in ("PWD", "OLDPWD", "_", "SHLVL")}
    assert written == {name: seen[name] for name in written}
    assert {"NESTED_NODE", "NESTED_IP", "PM_API_URL", "PROXMOX_URL", "PROXMOXER_HOST"} <= set(written)
    # docker run --env-file reads each line without unquoting.
    literal = dict(
        line.split("=", 1) for line in (ready.path / "kept").read_text().splitlines() if line[0] != "#"
    )
    assert literal == written


def read_bytes(data: bytes) -> dict[str, str]:
    pairs = (part.partition("=") for part in data.decode().split("\0") if part)
    return {name: value for name, _, value in pairs}


def ended(file: Path) -> bool:
    """Whether the process named in the file has exited, or is a zombie."""
    status = Path("/proc", file.read_text().strip(), "stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.parametrize("place", ["preflight", "start_vm"])
def test_the_command_is_not_run_when_the_set_up_fails(ready: Project, place: str) -> None:
    result = ready.run("--nested-exec", "touch ran", "--nested-env-file", "nested.env", FAIL=place)
    assert result.ret == (4 if place == "preflight" else 1), result.output
    assert f"{place} went wrong on purpose" in result.output
    assert not (ready.path / "ran").exists()
    assert not (ready.path / "nested.env").exists()


def test_a_signal_reaches_the_command_first_and_the_teardown_follows(ready: Project) -> None:
    for name, signum in (("TERM", signal.SIGTERM), ("INT", signal.SIGINT)):
        trap = f"trap 'sleep 0.3; echo ended by {name}; exit 7' {name}"
        script = f"{trap}; echo up; while :; do sleep 0.05; done"
        process = ready.start("--nested-exec", script, "-q")
        ready.wait_for(process, event="exec_start")
        assert process.stdout is not None
        for line in process.stdout:
            if line == "up\n":
                break
        process.send_signal(signum)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 128 + signum, output
        assert f"ended by {name}\n" in output
        assert "Traceback" not in output
        events = [line["event"] for line in max(ready.audits(), key=lambda log: log[-1]["ts"])]
        assert events.index("exec_end") < events.index("teardown")


def test_a_command_that_does_not_exit_is_killed_with_its_children(ready: Project) -> None:
    script = "trap '' TERM INT; sleep 300 & echo $! >child; echo up; while :; do sleep 1; done"
    process = ready.start("--nested-exec", script, "-q", "-o", "nested_pve_timeout_scale=0.02")
    ready.wait_for(process, event="exec_start")
    assert process.stdout is not None
    for line in process.stdout:
        if line == "up\n":
            break
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert ended(ready.path / "child")


def test_background_processes_of_the_command_end_with_it(ready: Project) -> None:
    result = ready.run("--nested-exec", "sleep 300 & echo $! >child; exit 3", "-q")
    assert result.ret == 3, result.output
    assert ended(ready.path / "child")


def at_terminal(project: Project, command: str, answers: dict[str, bytes]) -> tuple[int, str]:
    words = project.command("-q", "-p", "no:cacheprovider", "--nested-exec", command)
    return on_terminal(words, cwd=project.path, env=project.environ(TERM="dumb"), answers=answers)


def test_on_a_terminal_the_command_reads_from_it(ready: Project) -> None:
    status, output = at_terminal(ready, "echo ask; read answer; echo got-$answer; exit 3", {"ask": b"this\n"})
    assert "got-this" in output
    assert status == 3, output


def test_on_a_terminal_ctrl_c_reaches_the_command_and_ctrl_z_does_not_stop_it(ready: Project) -> None:
    script = "echo up; n=0; while :; do sleep 0.1; n=$((n+1)); echo still-$n; done"
    status, output = at_terminal(ready, script, {"up": b"\x1a", "still-5": b"\x03"})
    assert status == 130, output
    assert "the command ended with status 130" in output
    assert "Traceback" not in output


def test_no_test_is_collected_or_imported_and_addopts_do_not_matter(ready: Project) -> None:
    ready.write(test_broken="raise RuntimeError('must not be imported')\n")
    ready.plugins = ("xdist", "pytest_rerunfailures")
    lines = "[pytest]\naddopts = -n2 --maxfail=1 -m 'not slow' --reruns 3\nreruns = 2\n"
    (ready.path / "pytest.ini").write_text(lines)
    result = ready.run("--nested-exec", "echo x >>times; exit 9", "-v")
    assert result.ret == 9, result.output
    assert "must not be imported" not in result.output
    assert (ready.path / "times").read_text() == "x\n"


def test_the_fixtures_of_a_project_set_the_options_for_the_command_too(ready: Project) -> None:
    more = """
@pytest.fixture(scope="session")
def nested_pve_cores():
    return 3

@pytest.fixture(autouse=True)
def for_tests_alone(request):
    raise RuntimeError(request.node.name)

def pytest_nestedpve_phase_finished(phase, environment):
    (HERE / "cores").write_text(str(environment.settings.cores))
"""
    ready.write(conftest=CONFTEST + READY + more)
    result = ready.run("--nested-exec", "echo cores-$(cat cores)")
    assert result.ret == 0, result.output
    assert "cores-3\n" in result.output


def test_a_limit_for_tests_does_not_apply_to_the_command(ready: Project) -> None:
    ready.plugins = ("pytest_timeout",)
    result = ready.run("--nested-exec", "sleep 1.5; echo through", "--timeout", "0.5")
    assert result.ret == 0, result.output
    assert "through" in result.output


def test_a_dry_run_prints_the_plan_and_runs_nothing(ready: Project) -> None:
    result = ready.run("--nested-exec", "touch ran", "--nested-dry-run")
    assert result.ret == 0, result.output
    assert all(re.search(rf"^  {name} +to do", result.output, re.MULTILINE) for name in PHASES)
    assert ready.done() == []
    assert not (ready.path / "ran").exists()


def test_leftovers_fail_the_session_of_a_good_command_and_change_no_other_status(
    tmp_path: Path, ready: Project
) -> None:
    del tmp_path
    for command, status in (("true", 1), ("exit 3", 3)):
        text = "403 Permission check failed"
        ready.host().fault("DELETE", "/nodes/father/qemu/*", text=text, times=1000)
        result = ready.run("--nested-exec", command, "-o", "nested_pve_timeout_scale=0.02")
        assert result.ret == status, result.output
        assert "the teardown left something behind" in result.output
        ready.host().clear_faults()
        assert ready.run("--nested-destroy-only").ret == 0


def test_the_environment_is_kept_and_the_file_is_removed_with_its_ports(ready: Project) -> None:
    arguments = ["--nested-exec", "test -s nested.env && exit 3", "--nested-env-file", "nested.env"]
    result = ready.run(*arguments, "--nested-keep")
    assert result.ret == 3, result.output
    assert any(line.startswith("vm ") for line in ready.left())
    assert not (ready.path / "nested.env").exists()
    assert ready.run("--nested-destroy-only").ret == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nested-exec", " "], "--nested-exec: expected a shell command"),
        (["--nested-exec", "true", "-k", "x"], "--nested-exec collects no tests, so -k selects nothing"),
        (["--nested-exec", "true", "-n2"], "--nested-exec collects no tests, so -n distributes nothing"),
        (["--nested-exec", "true", "--collect-only"], "--nested-exec and --collect-only contradict"),
        (["--nested-exec", "true", "--nested-destroy-only"], "--nested-destroy-only and --nested-exec"),
        (["--nested-env-file", "x", "--nested-destroy-only"], "--nested-destroy-only and --nested-env-file"),
        (["--nested-env-file", "."], "is not a file"),
        (["--nested-env-file", "no/where"], "there is no directory"),
        (["--nested-env-file", "conftest.py"], "exists and was not written by a session"),
        (["--nested-env-file", "link"], "is not a file"),
        (["--nested-env-file", "x", "-n2"], "--nested-env-file cannot be used with xdist"),
    ],
)
def test_contradicting_options_are_status_4_before_a_host_is_used(
    ready: Project, arguments: list[str], says: str
) -> None:
    ready.plugins = ("xdist",)
    (ready.path / "link").symlink_to("nowhere")
    result = ready.run(*arguments)
    assert result.ret == 4, result.output
    assert says in result.output
    assert ready.done() == []
    assert (ready.path / "conftest.py").read_text() == CONFTEST + READY


def test_without_a_host_the_command_is_not_run(project: Project) -> None:
    project.write(conftest="")
    result = project.run("--nested-exec", "touch ran")
    assert result.ret == 4, result.output
    assert "--pve-host HOST" in result.output
    assert not (project.path / "ran").exists()


def test_in_a_session_of_tests_the_file_exists_from_the_first_user_to_the_end(
    ready: Project,
) -> None:
    stale = "# Variables of nested-pve run 0123456789ab: they end with it, and so does this file.\nOLD=1\n"
    (ready.path / "nested.env").write_text(stale)
    result = ready.run("--nested-env-file", "nested.env", "test_reader.py", "test_users.py")
    assert result.ret == 0, result.output
    assert not (ready.path / "nested.env").exists()
    assert "OLD" not in (ready.path / "copy").read_text()


def test_the_file_is_written_for_a_later_test_that_needs_more_phases(ready: Project) -> None:
    first = "@pytest.mark.nested_pve(upto='wait_ip')\ndef test_part(nested_pve):\n    pass\n"
    ready.write(test_reader=f"import pytest\n\n{first}\n{READER}")
    result = ready.run("--nested-env-file", "nested.env", "test_reader.py")
    assert result.ret == 0, result.output


def test_with_the_steps_alone_the_file_is_written_after_the_last_one(ready: Project) -> None:
    ready.write(test_zlast="import os\n\ndef test_after():\n    assert os.path.exists('nested.env')\n")
    result = ready.run("--nested-env-file", "nested.env", "test_steps.py", "test_zlast.py")
    assert result.ret == 0, result.output
    assert not (ready.path / "nested.env").exists()


def test_a_foreign_file_in_its_place_is_kept(ready: Project) -> None:
    command = "echo MINE=1 >other; mv other nested.env"
    result = ready.run("--nested-exec", command, "--nested-env-file", "nested.env")
    assert result.ret == 0, result.output
    assert (ready.path / "nested.env").read_text() == "MINE=1\n"


def test_no_log_report_or_output_contains_the_token(ready: Project) -> None:
    ready.plugins = ("pytest_html.plugin", "pytest_metadata.plugin")
    result = ready.run(
        "--nested-exec", "exit 3", "-vv", "--nested-env-file", "nested.env",
        "--html", "page.html", "--self-contained-html", "--junitxml", "out.xml",
        PYTHONDONTWRITEBYTECODE="1",  # the conftest.py contains the token, and so would its bytecode
    )  # fmt: skip
    assert result.ret == 3, result.output
    assert SECRET not in result.output
    for path in ready.path.rglob("*"):
        if path.is_file() and path.name not in ("api_token", "conftest.py"):
            assert SECRET.encode() not in path.read_bytes(), path
    (token,) = ready.path.rglob("api_token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert shlex.quote(SECRET) == SECRET
