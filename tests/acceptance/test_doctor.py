"""--nested-doctor: missing items with the commands that fix them, and the choices of a run; read only."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from acceptance.conftest import Project, Result, make_project
from standin_host import IMAGE, NESTED, StandinHost
from terminals import on_terminal

DOCTOR = "--nested-doctor"
PROFILE = "/etc/nested-pve.ini"
GIB = 1024**3
State = dict[str, Any]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """A project on a host that has all that is needed."""
    return make_project(tmp_path / "project")


def rows(project: Project, *args: str) -> tuple[Result, list[State]]:
    result = project.run(DOCTOR, "--pve-host", "father", "--nested-json", "out.json", *args)
    findings: list[State] = json.loads((project.path / "out.json").read_text())
    return result, findings


def checks(findings: list[State], level: str) -> dict[str, State]:
    return {row["what"]: row for row in findings if row["row"] == "check" and row["level"] == level}


def test_a_usable_host_is_status_0_and_the_choices_of_a_run_are_printed_with_reasons(
    project: Project,
) -> None:
    result, findings = rows(project)
    assert result.ret == 0, result.output
    assert "nothing is missing" in result.output
    assert not checks(findings, "missing")
    assert not checks(findings, "unknown")
    chosen = {row["what"]: (row["value"], row["why"]) for row in findings if row["row"] == "choice"}
    assert chosen["node"][0] == "father"
    assert chosen["disk"] == ("local (qcow2), 64 GiB", "the only one with content images")
    assert chosen["bridge"] == ("vmbr0", "the default bridge")
    assert "debian-13-genericcloud-amd64" in chosen["made from"][0]
    assert "100 of 100 free" in chosen["id"][1]
    assert set(chosen) >= {"guest agent by", "address", "size", "API"}
    for value, _ in chosen.values():
        assert value.split()[0] in result.output


def test_no_test_is_collected_and_pytests_own_lines_are_not_printed(project: Project) -> None:
    project.write(test_broken="import nosuch_module\n")
    result = project.run(DOCTOR)
    assert result.ret == 0, result.output
    for word in ("collected", "test session starts", "no tests ran", "nosuch_module"):
        assert word not in result.output


def test_only_reads_are_sent_and_the_host_is_unchanged(project: Project) -> None:
    project.host().connect().api.post("/nodes/father/qemu", vmid=99950, name="somebodys")
    project.host().storage("local", content="iso")
    project.host().broadcast()
    project.host().forget_calls()
    before = project.host().state()
    project.plugins = ("xdist.plugin",)
    result = project.run(DOCTOR, "-n", "3")
    assert result.ret == 1, result.output
    sent, shell = project.host().calls(), project.host().commands()
    assert len(sent) == len(set(sent)) > 6  # no call is sent twice
    assert [call for call in sent if not call.startswith("GET ")] == []
    reads = {"id", "cat", "test", "date", "if", "/usr/sbin/sshd"}
    assert {line.split()[0] for line in shell} <= reads
    assert project.host().state() == before
    assert not (project.path / ".nested-pve").exists()


def no_virtualisation(host: StandinHost) -> None:
    host.file(NESTED).unlink()


def not_nested(host: StandinHost) -> None:
    host.file(NESTED).write_text("N\n")


def without_kvm(host: StandinHost) -> None:
    host.file("/dev/kvm").unlink()


def no_images(host: StandinHost) -> None:
    host.storage("local", content="import,iso,snippets")


def no_snippets(host: StandinHost) -> None:
    host.storage("local", content="images,import")


def no_import(host: StandinHost) -> None:
    host.storage("local", content="images,iso,snippets")


def no_image(host: StandinHost) -> None:
    host.remove_volume(IMAGE)


def two_bridges(host: StandinHost) -> None:
    host.bridges(lan="", dmz="")


def no_room(host: StandinHost) -> None:
    host.report(storage={"local": {"avail": GIB}})


def little_memory(host: StandinHost) -> None:
    host.report(memory={"total": 6 * GIB, "available": 5 * GIB})


def one_core(host: StandinHost) -> None:
    host.report(cpuinfo={"cpus": 1})


def another_user(host: StandinHost) -> None:
    host.login(uid=1000)


def old_pve(host: StandinHost) -> None:
    host.report(version={"version": "8.1.4"})


def old_clock(host: StandinHost) -> None:
    host.advance(-4000)


def no_forwarding(host: StandinHost) -> None:
    host.login(sshd="port 22\nallowtcpforwarding no\ndisableforwarding no\n")


def no_quorum(host: StandinHost) -> None:
    host.join("father2")
    host.report(cluster={"name": "prod", "quorate": 0})


def broken_profile(host: StandinHost) -> None:
    host.file(PROFILE).write_text("[nested-pve]\nsources = a=/etc\n")


def all_ids_taken(host: StandinHost) -> None:
    host.set_pool("theirs", vms=range(99900, 100000))


def nothing(host: StandinHost) -> None:
    del host


MISSING: list[tuple[Callable[[StandinHost], None], tuple[str, ...], str, list[str]]] = [
    (
        no_virtualisation,
        (),
        "nested virtualisation",
        ["ssh", "father", "modprobe kvm_intel || modprobe kvm_amd"],
    ),
    (
        not_nested,
        (),
        "nested virtualisation",
        ["ssh", "father", 'echo "options kvm_intel nested=1" > /etc/modprobe.d/kvm-nested.conf'],
    ),
    (without_kvm, (), "nested virtualisation", ["ssh", "father", "modprobe kvm_intel"]),
    (no_images, (), "storage", ["ssh", "father", "pvesm set local --content images,import,iso,snippets"]),
    (no_snippets, (), "snippets", ["ssh", "father", "pvesm set local --content images,import,snippets"]),
    (no_import, (), "image", ["ssh", "father", "pvesm set local --content images,import,iso,snippets"]),
    (no_image, (), "image", ["ssh", "father", "pvesh create /nodes/father/storage/local/download-url"]),
    (two_bridges, (), "bridge", ["pytest", "--pve-host", "father", "-o", "nested_pve_bridge=dmz"]),
    (no_room, (), "space", ["ssh", "father", "pvesm list local"]),
    (little_memory, (), "memory", ["pytest", "--pve-host", "father", "-o", "nested_pve_memory=5120"]),
    (one_core, (), "cores", ["pytest", "--pve-host", "father", "-o", "nested_pve_cores=1"]),
    (another_user, (), "user", ["pytest", "--pve-host", "root@father", DOCTOR]),
    (old_pve, (), "version", ["ssh", "father", "apt update && apt full-upgrade"]),
    (old_clock, (), "clock", ["ssh", "father", "timedatectl set-ntp true"]),
    (no_forwarding, (), "forwarding", ["ssh", "father", "systemctl reload ssh"]),
    (no_quorum, (), "quorum", ["ssh", "father", "pvecm status"]),
    (broken_profile, (), "profile", ["ssh", "father", "editor /etc/nested-pve.ini"]),
    (
        all_ids_taken,
        (),
        "VM id",
        ["pytest", "--pve-host", "father", "--nested-destroy-only", "--nested-dry-run"],
    ),
    (
        nothing,
        ("-o", "nested_pve_pool_parent=team"),
        "pool",
        ["ssh", "father", "pveum pool add team"],
    ),
    (
        nothing,
        ("-o", "nested_pve_storage=tank"),
        "storage",
        ["pytest", "--pve-host", "father", "-o", "nested_pve_storage=local"],
    ),
    (
        nothing,
        ("-o", "nested_pve_image=local:import/nosuch.qcow2"),
        "image",
        ["ssh", "father", "pvesh create /nodes/father/storage/local/download-url"],
    ),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("change", "args", "what", "command"),
    MISSING,
    ids=[f"{row[0].__name__}-{row[2]}".replace(" ", "-") for row in MISSING],
)
def test_a_missing_item_is_reported_with_the_command_that_fixes_it(
    project: Project,
    change: Callable[[StandinHost], None],
    args: tuple[str, ...],
    what: str,
    command: list[str],
) -> None:
    change(project.host())
    result, findings = rows(project, *args)
    assert result.ret == 1, result.output
    missing = checks(findings, "missing")
    assert list(missing) == [what], result.output
    assert all(missing[what][key] for key in ("expected", "found", "advice"))
    lines = [shlex.split(line) for line in missing[what]["commands"]]
    last = command[-1]
    assert any(
        line[:-1] == command[:-1] and line[-1].startswith(last) for line in lines if len(line) == len(command)
    ), lines
    for line in missing[what]["commands"]:
        assert f"       {line}\n" in result.output  # whole, on a line of its own
    assert re.search(rf"^  missing  {re.escape(what)}", result.output, re.MULTILINE)
    assert "To do" in result.output
    assert "1 missing" in result.output


def test_checks_continue_after_a_failed_one_and_all_findings_are_reported(project: Project) -> None:
    for change in (not_nested, two_bridges, no_forwarding, one_core):
        change(project.host())
    project.host().storage("local", content="images")
    project.host().fault("GET", "/nodes/father/status", text="500 got timeout", times=9)
    result, findings = rows(project)
    assert result.ret == 1
    missing = checks(findings, "missing")
    assert list(missing) == ["forwarding", "nested virtualisation", "cores", "snippets", "image", "bridge"]
    assert "got timeout" in missing["cores"]["found"]
    assert "memory" in checks(findings, "unknown")  # its answer is the one that failed
    # Run in order, no command reverts an earlier one.
    commands = [line for row in missing.values() for line in row["commands"] if "pvesm set" in line]
    assert set(commands) == {"ssh father 'pvesm set local --content images,import,snippets'"}


def test_an_unreachable_host_is_status_4_and_checks_of_this_machine_are_shown(project: Project) -> None:
    (project.path / "conftest.py").write_text("")
    result, findings = (
        project.run(DOCTOR, "--pve-host", "nowhere.invalid", "--nested-json", "out.json"),
        json.loads((project.path / "out.json").read_text()),
    )
    assert result.ret == 4, result.output
    assert "Traceback" not in result.output
    assert "this machine" in checks(findings, "ok")
    assert checks(findings, "missing")["SSH"]["commands"] == ["ssh nowhere.invalid true"]
    assert len(checks(findings, "unknown")) > 10
    assert "this host cannot be used" in result.output


def test_without_a_host_it_is_status_4_and_names_both_choices(project: Project) -> None:
    (project.path / "conftest.py").write_text("")
    result = project.run(DOCTOR)
    assert result.ret == 4
    assert "--pve-host HOST" in result.output
    assert "--pve-host lab" in result.output


def test_a_lab_that_does_not_run_is_not_started(project: Project) -> None:
    (project.path / "conftest.py").write_text("")
    cache = project.path / "cache"
    result = project.run(DOCTOR, "--pve-host", "lab:nosuchlab", NESTED_PVE_CACHE=str(cache))
    assert result.ret in (0, 1), result.output  # 1 if no lab can run on this machine
    assert "nestedpve-lab start nosuchlab" in result.output or "nestedpve-lab install" in result.output
    assert not list(cache.glob("labs/*"))


@pytest.mark.parametrize(
    "args",
    [
        ["--nested-destroy-only"],
        ["--nested-dry-run"],
        ["--nested-exec", "true"],
        ["--nested-env-file", "env"],
        ["--nested-keep"],
        ["--nested-skip", "preflight"],
        ["--collect-only"],
        ["--setup-plan"],
        ["-k", "network"],
    ],
)
def test_options_that_conflict_with_the_doctor_are_refused(project: Project, args: list[str]) -> None:
    result = project.run(DOCTOR, *args)
    assert result.ret == 4, result.output
    assert DOCTOR in result.output
    assert args[0] in result.output
    assert project.host().calls() == []


def test_a_projects_options_for_tests_do_not_matter(project: Project) -> None:
    (project.path / "pytest.ini").write_text(
        "[pytest]\naddopts = -n 2 --maxfail=1 --junitxml=report.xml -v --lf\n"
    )
    (project.path / "report.xml").write_text("of the run before")
    project.plugins = ("xdist.plugin",)
    result = project.run(DOCTOR)
    assert result.ret == 0, result.output
    assert (project.path / "report.xml").read_text() == "of the run before"
    assert "16 GiB for 2 workers" in " ".join(result.output.split())


def test_expired_runs_are_a_warning_with_the_command(project: Project) -> None:
    lease = {
        "v": 1, "owner": "bob@elsewhere", "client": "0" * 16, "session": "1" * 16, "state": "live",
        "created": 1000, "expires": 2000, "hard": 3000,
    }  # fmt: skip
    project.host().set_pool("npve-0123456789ab", json.dumps(lease))
    result, findings = rows(project)
    assert result.ret == 0, result.output
    warning = checks(findings, "warning")["runs"]
    assert "0123456789ab (bob@elsewhere's, live)" in warning["found"]
    assert warning["commands"] == ["pytest --pve-host father --nested-destroy-only"]
    assert "nothing is missing, 1 warning" in result.output


def test_secrets_are_masked_on_the_terminal_and_in_the_file(project: Project) -> None:
    profile = "[nested-pve]\nhttp_proxy = http://user:hunter22@proxy port\n"
    project.host().file(PROFILE).write_text(profile)
    result, findings = rows(project)
    assert result.ret == 1, result.output
    assert "profile" in checks(findings, "missing")
    assert "hunter22" not in result.output + (project.path / "out.json").read_text()


@pytest.mark.parametrize("columns", ["200", "80", "44"])
def test_a_narrow_terminal_breaks_no_command_and_no_line_is_too_long(project: Project, columns: str) -> None:
    no_image(project.host())
    two_bridges(project.host())
    command = project.command(DOCTOR, "--pve-host", "father")
    status, output = on_terminal(
        command, cwd=project.path, env=project.environ(COLUMNS=columns, TERM="xterm")
    )
    assert status == 1
    assert "\x1b[31m" in output  # colours
    # The name of the running check is erased.
    seen = re.sub(r"[^\n]*\r\x1b\[2K", "", output.replace("\r\n", "\n"))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen)
    assert "..." not in plain
    commands = [line for line in plain.splitlines() if line.strip().startswith(("ssh ", "pytest "))]
    assert any(
        line.strip().startswith("ssh father 'pvesh create") and line.endswith("'") for line in commands
    )
    others = [line for line in plain.splitlines() if line not in commands and " " in line.strip()]
    assert [line for line in others if len(line) > int(columns) and len(line.split()) > 2] == []


REAL_PREFLIGHT = """
def pytest_nestedpve_phases(phases, config):
    from pytest_nestedpve import setup as builtin
    phases[:] = [phase for phase in builtin.default_phases() if phase.name == "preflight"]
"""


@pytest.mark.parametrize("scope", ["worker", "run", "one file"])
def test_preflight_checks_the_memory_for_all_workers(project: Project, scope: str) -> None:
    head = (project.path / "conftest.py").read_text().partition("def pytest_nestedpve_phases")[0]
    project.write(conftest=head + REAL_PREFLIGHT)
    project.plugins = ("xdist.plugin",)
    project.host().report(memory={"total": 20 * GIB, "available": 18 * GIB})
    (project.path / "test_again.py").write_text("from pytest_nestedpve import steps\n")
    (project.path / "test_third.py").write_text("from pytest_nestedpve import steps\n")
    args = ["-n", "3", "--pve-host", "father", "-k", "steps or again or third"]
    if scope == "run":
        args += ["-o", "nested_pve_scope=run"]
    elif scope == "one file":
        args += [
            "--dist",
            "loadscope",
            "test_steps.py",
        ]  # the other workers get no test that needs a nested PVE
    result = project.run(*args)
    words = " ".join(result.output.split())
    if scope != "worker":
        assert result.ret == 0, result.output
        assert "for a nested PVE each" not in words
        return
    assert result.ret == 4, result.output
    assert "24 GiB for 3 workers, 8 GiB for a nested PVE each; found 18 GiB available of 20 GiB" in words
    assert "pytest --pve-host father -n 2" in words
