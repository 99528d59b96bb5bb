"""The directory, lock, audit log and masking of a run."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin_host import StandinHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run.audit_log import AuditLog, task_ids
from pytest_nestedpve.run.directory import BadHostKey, RunDirectory, RunDirectoryError
from pytest_nestedpve.run.identity import Run, client_hash
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.run.masking import MASK, Masker

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIIII"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Run.create(Settings(run_dir=Path("runs")), tmp_path)


@pytest.fixture
def audit(run: Run) -> Iterator[AuditLog]:
    log = AuditLog(run.directory.audit, run.id)
    yield log
    log.close()


def test_the_directory_of_a_run_is_private_and_ignored_by_git(run: Run, tmp_path: Path) -> None:
    run.directory.ensure_key("test")
    run.directory.save_state({"provision": {"vmid": 1}})
    assert run.dir == tmp_path / "runs" / run.id
    assert stat.S_IMODE(run.dir.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in run.dir.iterdir() if path.is_file()} == {0o600}
    assert (tmp_path / "runs" / ".gitignore").read_text() == "*\n"
    assert run.directory.load_state() == {"provision": {"vmid": 1}}
    assert len(run.id) == 12
    assert run.tag == f"npve-{run.id}"


def test_the_key_is_created_once(run: Run) -> None:
    first = run.directory.ensure_key("test")
    assert first.startswith("ssh-ed25519 ")
    assert run.directory.ensure_key("other") == first


def test_the_users_ssh_options_do_not_apply_to_guests(run: Run, tmp_path: Path) -> None:
    outer = tmp_path / "outer config"
    outer.write_text(
        "Host father\n  HostName 192.0.2.1\n  User admin\n"
        "Host *\n  IdentityFile /home/me/.ssh/id\n  ForwardAgent yes\n  StrictHostKeyChecking no\n"
    )
    config = run.directory.write_ssh_config("father", outer, "192.0.2.9", "nested-x", "192.0.2.10", "leaf-x")

    def read_options(host: str) -> dict[str, list[str]]:
        out = subprocess.run(
            ["ssh", "-G", "-F", str(config), host], capture_output=True, text=True, check=True
        )
        options: dict[str, list[str]] = {}
        for line in out.stdout.splitlines():
            key, _, value = line.partition(" ")
            options.setdefault(key, []).append(value)
        return options

    nested, leaf, father = read_options("nested"), read_options("leaf-x"), read_options("father")
    assert nested["hostname"] == ["192.0.2.9"]
    assert nested["identityfile"] == [str(run.directory.key)]
    assert nested["stricthostkeychecking"] == ["true"]
    assert nested["forwardagent"] == ["no"]
    assert nested["proxyjump"] == ["father"]
    assert (leaf["hostname"], leaf["proxyjump"]) == (["192.0.2.10"], ["nested-x"])
    assert father["user"] == ["admin"]
    assert father["identityfile"] == ["/home/me/.ssh/id"]


@pytest.mark.parametrize("path", ['a"b', "a\\b", "a\nb"])
def test_a_path_that_cannot_be_quoted_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(RunDirectoryError, match="expected a path without quotes"):
        RunDirectory(tmp_path / path).write_ssh_config("father", None, "192.0.2.9", "nested-x")


def test_a_pinned_key_replaces_the_previous_one(run: Run) -> None:
    run.directory.pin_host_keys("nested", [KEY + " root@old\n"])
    run.directory.pin_host_keys("leaf", [KEY])
    run.directory.pin_host_keys("nested", [KEY.replace("III", "JJJ")])
    assert run.directory.known_hosts.read_text() == f"leaf {KEY}\nnested {KEY.replace('III', 'JJJ')}\n"


@pytest.mark.parametrize(
    "key",
    [
        f"{KEY}\n* {KEY}",
        f"x {KEY}",
        "ssh-ed25519",
        "",
        f"@cert-authority {KEY}",
        "ssh-dss AAAA",
        f"{KEY}\r* {KEY}",
    ],
)
def test_a_host_key_of_another_form_is_refused(run: Run, key: str) -> None:
    with pytest.raises(BadHostKey):
        run.directory.pin_host_keys("nested", [key])
    assert not run.directory.known_hosts.exists()


@given(st.text(max_size=300))
def test_no_text_of_a_guest_adds_a_line_to_known_hosts(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    directory = RunDirectory(tmp_path_factory.mktemp("run"))
    try:
        directory.pin_host_keys("nested", [text])
    except BadHostKey:
        return
    assert len(directory.known_hosts.read_text().splitlines()) == 1


# -- the lock ------------------------------------------------------------------------------------


def test_a_lock_shows_whether_its_session_is_running_or_has_exited(run: Run) -> None:
    assert SessionLock.alive(run.id) is None
    lock = SessionLock(run.id)
    lock.acquire()
    assert SessionLock.alive(run.id) is True
    with pytest.raises(RunDirectoryError, match="another session"):
        SessionLock(run.id).acquire()
    lock.release(remove=False)
    assert SessionLock.alive(run.id) is False


def test_a_lock_is_held_once_although_its_file_is_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between open and lock, the holder deletes the file and another session creates a new one."""
    first, second = SessionLock(run.id), SessionLock(run.id)
    original = fcntl.flock

    def flock(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", original)
        first.release()
        second.acquire()
        original(fd, how)

    first.acquire()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(RunDirectoryError, match="another session"):
        SessionLock(run.id).acquire()
    first, second = second, SessionLock(run.id)
    monkeypatch.setattr(fcntl, "flock", flock)
    assert SessionLock.alive(run.id) is True
    second.release()
    assert SessionLock.alive(run.id) is None


def test_the_lock_of_a_killed_process_is_free(run: Run) -> None:
    script = (
        "import sys; from pytest_nestedpve.run.lock import SessionLock\n"
        f"lock = SessionLock({run.id!r}); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdin is not None
    assert child.stdout.readline() == "held\n"
    assert SessionLock.alive(run.id) is True
    child.kill()
    child.wait()
    child.stdin.close()
    child.stdout.close()
    assert SessionLock.alive(run.id) is False


def test_the_client_hash_is_the_same_for_all_sessions_of_a_user() -> None:
    assert client_hash() == client_hash()
    assert len(client_hash()) == 16


# -- audit log and masking -----------------------------------------------------------------------


def test_the_log_has_a_line_per_event_and_no_secret(run: Run, audit: AuditLog) -> None:
    audit.masker.add("hunter2-hunter2")
    audit.write("phase_start", phase="setup_repos")
    audit.write("call", cmd="login hunter2-hunter2", data={"password": "short", "list": ["hunter2-hunter2"]})
    audit.write("phase_end", phase="setup_repos", status="done")
    audit.write("teardown", status="clean")
    audit.close()
    audit.write("call", cmd="too late")
    text = run.directory.audit.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["phase_start", "call", "phase_end", "teardown"]
    assert lines[1]["phase"] == "setup_repos"
    assert "phase" not in lines[3]
    assert "hunter2" not in text
    assert "short" not in text
    assert stat.S_IMODE(run.directory.audit.stat().st_mode) == 0o600


def test_lines_of_several_threads_are_not_mixed(run: Run, audit: AuditLog) -> None:
    def write_lines() -> None:
        for _ in range(50):
            audit.write("call", cmd="x" * 200)

    threads = [threading.Thread(target=write_lines) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([json.loads(line) for line in run.directory.audit.read_text().splitlines()]) == 400


def test_tasks_of_a_run_are_read_from_an_incomplete_log(
    run: Run, audit: AuditLog, tmp_path: Path, host: StandinHost
) -> None:
    api = host.connect().logged(audit.calls("father")).api
    upid = api.post("/nodes/father/qemu", vmid=500, name="x")
    with run.directory.audit.open("a") as log:
        log.write('{"event":"task","upid":"UPID:father:1')
    assert task_ids(run.directory.audit) == {upid}
    assert task_ids(tmp_path / "none") == frozenset()


def test_a_failed_call_is_logged_without_the_values_of_its_parameters(
    run: Run, audit: AuditLog, host: StandinHost
) -> None:
    api = host.connect().logged(audit.calls("father")).api
    with pytest.raises(PveError):
        api.put("/nodes/father/qemu/500/config", cipassword="geheim")
    line = json.loads(run.directory.audit.read_text())
    assert (line["event"], line["transport"], line["cmd"]) == (
        "call",
        "stand-in",
        "put /nodes/father/qemu/500/config cipassword",
    )
    assert "does not exist" in line["error"]


@pytest.mark.parametrize(
    "text",
    [
        "PVEAPIToken=root@pam!npve=01234567-89ab-cdef-0123-456789abcdef",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----",
        "--cipassword 01234567-89ab",
        "https://me:01234567-89ab@git.test/x",
        "http://me:p@01234567-89ab@proxy.test:3128",
        'http://me:p"\\01234567-89ab@proxy.test:3128',
        "root:$6$salt$01234567-89ab:1::",
    ],
    ids=lambda text: text[:16],
)
def test_secrets_are_masked_by_their_form(text: str) -> None:
    masked = Masker().mask(f"before {text} after")
    assert "01234567-89ab" not in masked
    assert "abc\n" not in masked
    assert MASK in masked
    assert masked.startswith("before ")


@given(st.text(min_size=4, max_size=40).filter(lambda text: len(text.strip()) >= 4 and "*" not in text))
def test_a_secret_is_masked_in_every_encoding(secret: str) -> None:
    from base64 import b64encode
    from urllib.parse import quote

    masker = Masker()
    masker.add(secret)
    for encoded in (
        secret,
        quote(secret),
        quote(secret, safe=""),
        json.dumps(secret),
        b64encode(secret.encode()).decode(),
    ):
        assert secret not in masker.mask(f"<{encoded}>").replace(MASK, "")


def test_the_directory_is_private_under_any_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        run = Run.create(dataclasses.replace(Settings(), run_dir=tmp_path / "r"), tmp_path)
        run.directory.write("x", "y")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(run.dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((run.dir / "x").stat().st_mode) == 0o600
