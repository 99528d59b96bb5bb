"""Playbooks run in a process without leftovers, and no secret is in a file, a message or a command line."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.setup.ansible import child
from pytest_nestedpve.setup.ansible.runner import (
    AnsibleArgs,
    Inventory,
    InventoryHost,
    PlaybookEvent,
    PlaybookFailed,
    PlaybookTimeout,
    nested_inventory,
    playbook_path,
    run_playbook,
)

pytestmark = [pytest.mark.usefixtures("private"), pytest.mark.thorough]

SECRET = "hunter2-Zq81xkP"
LOCAL = Inventory(
    (InventoryHost("here", {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}),)
)


def playbook(directory: Path, tasks: str, name: str = "play.yml") -> Path:
    path = directory / name
    head = "- name: A play\n  hosts: all\n  gather_facts: false\n  tasks:\n"
    path.write_text(head + textwrap.indent(textwrap.dedent(tasks), "    "), encoding="utf-8")
    return path


def processes_with(mark: str) -> list[str]:
    lines = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if mark in line:
                lines.append(line)
    return lines


def wait_ended(mark: str) -> None:
    wait_until(
        lambda: not processes_with(mark) or None,
        deadline=Deadline(20),
        what=lambda: f"the end of {processes_with(mark)}",
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The parent of the private directories; the test fails if one is left over."""
    path = Path("/tmp") / f"nt{os.getpid()}"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    try:
        assert list(path.iterdir()) == []
    finally:
        subprocess.run(["rm", "-rf", str(path)], check=True)


def test_the_result_has_recap_events_and_stats(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(
        tmp_path,
        """
        - name: Change
          ansible.builtin.command: "true"
        - name: Check
          ansible.builtin.command: "true"
          changed_when: false
        - name: Skip
          ansible.builtin.command: "true"
          when: false
        - name: Report
          ansible.builtin.set_stats: {data: {numbers: "{{ numbers }}"}}
        """,
    )
    events: list[PlaybookEvent] = []
    result = run_playbook(
        AnsibleArgs(run_dir), path, inventory=LOCAL, variables={"numbers": [True, 1]}, timeout=60,
        on_event=events.append,
    )  # fmt: skip
    assert result.ok
    assert result.changed == 1
    assert str(result.recap["here"]).startswith("ok=3 changed=1 unreachable=0 failed=0 skipped=1")
    assert result.stats == {"numbers": [True, 1]}
    assert [(task.name, task.status) for task in result.tasks] == [
        ("Change", "ok"), ("Check", "ok"), ("Skip", "skipped"), ("Report", "ok"),
    ]  # fmt: skip
    assert PlaybookEvent("ok", "Change", "here", "", True) in events
    assert not result.failures


def test_a_failure_names_task_host_and_reason(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(
        tmp_path,
        """
        - name: Try
          ansible.builtin.command: "false"
          failed_when: true
          ignore_errors: true
        - name: Break
          ansible.builtin.fail: {msg: the reason}
        """,
    )
    with pytest.raises(PlaybookFailed, match=r"Break on here: the reason") as caught:
        run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60)
    result = caught.value.result
    assert result is not None
    assert len(result.failures) == 1
    assert not result.unreachable
    unchecked = run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60, check=False)
    assert unchecked.rc == 2
    assert unchecked.artifacts != result.artifacts


def test_an_unreachable_host_is_distinguished_from_a_failed_task(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(tmp_path, "- name: Ping\n  ansible.builtin.ping:\n")
    config = tmp_path / "ssh_config"
    config.write_text("Host nested\n  HostName 127.0.0.1\n  Port 9\n  ConnectTimeout 2\n", encoding="utf-8")
    with pytest.raises(PlaybookFailed) as caught:
        run_playbook(
            AnsibleArgs(run_dir, ssh_config=config), path,
            inventory=nested_inventory("n1", address="192.0.2.1", alias="nested"), timeout=60,
        )  # fmt: skip
    assert caught.value.result is not None
    assert caught.value.result.unreachable


def test_a_secret_is_in_no_file_no_command_line_and_no_message(
    run_dir: Path, tmp_path: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", SECRET)
    path = playbook(
        tmp_path,
        """
        - name: Handle it
          ansible.builtin.command: {cmd: cat, stdin: "{{ secret }}"}
          no_log: true
        - name: Print it by mistake
          ansible.builtin.debug: {var: secret}
        - name: Wait for the inspection
          ansible.builtin.wait_for: {path: "{{ look }}", timeout: 30}
        - name: Fail with it
          ansible.builtin.command: {cmd: "sh -c 'cat; exit 3'", stdin: "{{ secret }}"}
          no_log: true
        """,
    )
    leaks: list[str] = []

    def on_event(event: PlaybookEvent) -> None:
        if event.kind == "task" and event.name == "Wait for the inspection":
            leaks.extend(processes_with(SECRET))
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    try:
                        environment = (entry / "environ").read_bytes()
                        command = (entry / "cmdline").read_bytes()
                    except OSError:
                        continue
                    if SECRET.encode() in environment and b"ansible" in command:
                        leaks.append(entry.name)
            leaks.extend(
                str(path) for path in private.rglob("*") if path.is_file() and path.stat().st_mode & 0o077
            )
            (tmp_path / "look").touch()

    with pytest.raises(PlaybookFailed) as caught:
        run_playbook(
            AnsibleArgs(run_dir, secrets=(SECRET,)), path, inventory=LOCAL,
            variables={"secret": SECRET, "look": str(tmp_path / "look")}, timeout=60, on_event=on_event,
        )  # fmt: skip
    assert leaks == []
    assert SECRET not in str(caught.value)
    assert "no_log" in str(caught.value)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if SECRET in path.read_text(errors="replace")] == []


def test_a_password_in_an_address_is_in_no_file_and_no_message(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(
        tmp_path,
        """
        - name: Show it
          ansible.builtin.debug: {msg: "URIs: {{ mirror }}, and for {{ name }}"}
        - name: Fail with it
          ansible.builtin.fail: {msg: "no answer from {{ mirror }}/dists"}
        """,
    )
    mirror = f"http://user:p@{SECRET}@mirror.test/debian"
    with pytest.raises(PlaybookFailed) as caught:
        run_playbook(
            AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60,
            variables={"mirror": mirror, "name": "one@mirror.test"},
        )  # fmt: skip
    assert "http://user:********@mirror.test/debian/dists" in str(caught.value)
    texts = [path.read_text(errors="replace") for path in run_dir.rglob("*") if path.is_file()]
    assert not any(SECRET in text for text in texts)
    assert any("http://user:********@mirror.test/debian, and for one@mirror.test" in text for text in texts)


def test_artifacts_are_readable_by_their_owner_only(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(tmp_path, "- name: Nothing\n  ansible.builtin.meta: noop\n")
    run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (run_dir / "artifacts").rglob("*")}
    assert modes <= {0o700, 0o600}
    assert stat.S_IMODE((run_dir / "artifacts").stat().st_mode) == 0o700


SLEEPER = """
- name: Sleep
  ansible.builtin.shell: "setsid sleep {mark} & sleep {mark}"
"""


def test_at_its_limit_a_playbook_is_killed_with_all_its_processes(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(tmp_path, SLEEPER.format(mark="98765.1"))
    with pytest.raises(PlaybookTimeout, match=r"within 4 s in the task 'Sleep'"):
        run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=4)
    assert processes_with("sleep 98765.1") == []


def test_an_interrupted_caller_leaves_no_process(run_dir: Path, tmp_path: Path) -> None:
    path = playbook(tmp_path, SLEEPER.format(mark="98765.2"))

    def on_event(event: PlaybookEvent) -> None:
        if event.kind == "task":
            wait_until(
                lambda: processes_with("sleep 98765.2") or None, deadline=Deadline(20), what="the sleep"
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60, on_event=on_event)
    assert processes_with("sleep 98765.2") == []


def test_a_killed_caller_leaves_no_process(run_dir: Path, tmp_path: Path, private: Path) -> None:
    path = playbook(tmp_path, SLEEPER.format(mark="98765.3"))
    program = (
        "import sys; from pathlib import Path; from pytest_nestedpve.setup.ansible.runner import *\n"
        "here = Inventory((InventoryHost('here', {'ansible_connection': 'local',"
        " 'ansible_python_interpreter': sys.executable}),))\n"
        f"args, path = AnsibleArgs(Path({str(run_dir)!r})), Path({str(path)!r})\n"
        "run_playbook(args, path, inventory=here, timeout=60)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until(lambda: processes_with("sleep 98765.3") or None, deadline=Deadline(30), what="the sleep")
    finally:
        caller.send_signal(signal.SIGKILL)
        caller.wait()
    wait_ended("sleep 98765.3")
    wait_until(lambda: not list(private.iterdir()) or None, deadline=Deadline(20), what="the clean-up")


def test_two_simultaneous_playbooks_do_not_affect_each_other(tmp_path: Path) -> None:
    path = playbook(tmp_path, "- name: Report\n  ansible.builtin.set_stats: {data: {label: '{{ label }}'}}\n")
    reported: dict[str, object] = {}

    def play(name: str, directory: Path) -> None:
        result = run_playbook(
            AnsibleArgs(directory), path, inventory=LOCAL, variables={"label": name}, timeout=60
        )
        reported[name] = result.stats["label"]

    threads = []
    for name in ("a", "b"):
        directory = tmp_path / name
        directory.mkdir()
        threads.append(threading.Thread(target=play, args=(name, directory)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reported == {"a": "a", "b": "b"}


def test_ansible_settings_of_the_user_do_not_apply(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "ansible.cfg"
    config.write_text("[defaults]\nhost_key_checking = False\n", encoding="utf-8")
    monkeypatch.setenv("ANSIBLE_CONFIG", str(config))
    monkeypatch.setenv("ANSIBLE_HOST_KEY_CHECKING", "False")
    path = playbook(
        tmp_path,
        """
        - name: Ask
          ansible.builtin.set_stats:
            data:
              checking: "{{ lookup('ansible.builtin.config', 'HOST_KEY_CHECKING') }}"
        """,
    )
    result = run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60)
    assert result.stats == {"checking": True}


def test_the_message_names_a_playbook_that_cannot_be_read(run_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.yml"
    path.write_text("- hosts: [\n", encoding="utf-8")
    with pytest.raises(PlaybookFailed, match=r"bad\.yml"):
        run_playbook(AnsibleArgs(run_dir), path, inventory=LOCAL, timeout=60)
    with pytest.raises(PlaybookFailed, match="found no file"):
        run_playbook(AnsibleArgs(run_dir), tmp_path / "none.yml", inventory=LOCAL, timeout=60)


def test_a_projects_own_playbook_comes_before_the_packaged_one(tmp_path: Path) -> None:
    (tmp_path / "nested-pve-ssh.yml").touch()
    settings = Settings(playbook_dir=tmp_path)
    assert playbook_path("nested-pve-ssh.yml", settings) == tmp_path / "nested-pve-ssh.yml"
    assert playbook_path("pve-install.yml", settings).parent.name == "playbooks"
    with pytest.raises(PlaybookFailed, match="found it in none"):
        playbook_path("nosuch.yml", settings)


def test_a_group_of_unknown_hosts_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown"):
        Inventory((InventoryHost("a"),), {"g": ("unknown",)}).to_data()


def test_a_long_temporary_directory_leaves_room_for_the_names_of_ssh_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # as with TMPDIR
    private = child.private_directory()
    private.rmdir()
    assert private.parent == Path("/tmp")
