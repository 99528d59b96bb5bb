"""Commands, files, pipes and forwards with real OpenSSH servers, which the tests start."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import paramiko
import pytest
from logged_calls import Calls
from paramiko.common import MSG_CHANNEL_EOF
from sshd import MakeServer, Sshd, free_port

from pytest_nestedpve.config import hosts
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import (
    CommandTimeout,
    HostKeyMismatch,
    HostUnreachable,
    ProfileError,
    PveError,
    SshError,
)
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.connection import CommandFailed, SshConnection

# -- commands -----------------------------------------------------------------------------------------


def test_a_command_returns_its_exit_status_and_both_streams_separately(ssh: SshConnection) -> None:
    result = ssh.run("echo out; echo err >&2; exit 7")
    assert (result.rc, result.stdout, result.stderr, result.ok) == (7, "out\n", "err\n", False)


def test_words_of_an_argv_arrive_unchanged_with_any_characters(ssh: SshConnection) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "", "\n", ";false", "ä€"]
    result = ssh.run(["printf", "%s|", *words])
    assert result.stdout == "".join(f"{word}|" for word in words)


def test_check_reports_the_end_of_the_output(ssh: SshConnection) -> None:
    with pytest.raises(CommandFailed, match=r"exit status 3, expected 0\n    no disk") as caught:
        ssh.run("echo no disk >&2; exit 3").check()
    assert caught.value.result.rc == 3


def test_output_that_is_no_utf8_is_kept_as_bytes_and_readable(ssh: SshConnection) -> None:
    result = ssh.run(r"printf 'a\377\000b'")
    assert result.stdout_bytes == b"a\xff\x00b"
    assert result.stdout == "a\ufffd\x00b"


def test_five_megabytes_on_both_streams_do_not_deadlock(ssh: SshConnection) -> None:
    script = "head -c 5242880 /dev/zero >&2; head -c 5242880 /dev/zero; head -c 5242880 /dev/zero >&2"
    result = ssh.run(script, timeout=30)
    assert (len(result.stdout_bytes), len(result.stderr_bytes)) == (5 * 2**20, 10 * 2**20)


def test_large_input_and_large_output_at_once_do_not_deadlock(ssh: SshConnection) -> None:
    data = os.urandom(6 * 2**20)
    result = ssh.run("tee /dev/stderr", stdin=data, timeout=30)
    assert result.stdout_bytes == data
    assert result.stderr_bytes == data


def test_input_that_the_command_does_not_read_is_no_error(ssh: SshConnection) -> None:
    assert ssh.run("exit 4", stdin=bytes(8 * 2**20), timeout=20).rc == 4


def test_without_input_a_command_reads_the_end_of_file(ssh: SshConnection) -> None:
    assert ssh.run("cat; echo done", timeout=10).stdout == "done\n"


def test_a_daemon_in_the_background_does_not_delay_the_end_of_the_command(ssh: SshConnection) -> None:
    began = time.monotonic()
    result = ssh.run("sleep 30 & echo $!", timeout=20)
    assert result.ok
    assert time.monotonic() - began < 8
    os.kill(int(result.stdout), 9)


def test_a_limit_interrupts_a_command_without_output(ssh: SshConnection) -> None:
    began = time.monotonic()
    with pytest.raises(
        CommandTimeout, match=r"`echo begun; exec sleep 40`.*did not end within 0\.5 s.*begun"
    ):
        ssh.run("echo begun; exec sleep 40", timeout=0.5)
    assert time.monotonic() - began < 4
    assert ssh.run("echo on").stdout == "on\n"


def test_a_limit_interrupts_a_command_with_endless_output(ssh: SshConnection) -> None:
    began = time.monotonic()
    with pytest.raises(CommandTimeout):
        ssh.run("yes", timeout=0.5)
    assert time.monotonic() - began < 6


def test_a_command_ended_by_a_signal_has_no_exit_status(ssh: SshConnection) -> None:
    assert ssh.run("kill -9 $$").rc == -1


def test_commands_are_logged_and_secret_ones_without_text_and_output(server: Sshd) -> None:
    log = Calls()
    with SshConnection(server.target(), log=log) as ssh:
        ssh.run(["echo", "open"])
        result = ssh.run(["echo", "s3cret"], secret=True)
        assert result.stdout == "s3cret\n"
        with pytest.raises(CommandTimeout) as caught:
            ssh.run("echo s3cret; sleep 9", timeout=0.3, secret=True)
        with pytest.raises(CommandFailed) as failed:
            ssh.run(["cat", "/nonexistent/s3cret"], secret=True).check()
    assert (log.calls[0].transport, log.calls[0].cmd, log.calls[0].rc) == ("ssh", "echo open", 0)
    assert [call.rc for call in log.calls] == [0, 0, -1, 1]
    assert "s3cret" not in repr(log.calls)
    assert "s3cret" not in f"{caught.value} {failed.value}"


def test_twenty_threads_share_one_connection(ssh: SshConnection) -> None:
    def run_five(number: int) -> str:
        return "".join(ssh.run(f"echo {number}-{step}").stdout for step in range(5))

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(run_five, range(20)))
    assert results == ["".join(f"{n}-{s}\n" for s in range(5)) for n in range(20)]
    # Below MaxSessions per transport, and far fewer connections than commands.
    assert 2 <= len(ssh._links) <= 4


def test_the_end_of_input_is_not_sent_after_the_channel_was_closed(ssh: SshConnection) -> None:
    """sshd would end the whole connection, with all its commands."""
    ssh.run("true")
    (link,) = ssh._links
    transport: Any = link.transport
    send, sender = transport._send_user_message, threading.current_thread()
    delayed = []

    def delay_end_of_input(data: paramiko.Message) -> None:
        if data.asbytes()[0] == MSG_CHANNEL_EOF and threading.current_thread() is sender:
            channel = max(transport._channels.values(), key=lambda channel: channel.chanid)
            delayed.append(channel)
            # As on a busy machine: the command may end before its end of input is sent.
            with contextlib.suppress(CommandTimeout):
                wait_until(lambda: channel.closed, deadline=Deadline(0.5), what="the channel's end")
        send(data)

    transport._send_user_message = delay_end_of_input
    assert ssh.run("echo one").stdout == "one\n"
    assert ssh.run("echo two").stdout == "two\n"
    assert len(delayed) == 2
    assert ssh._links == [link]
    assert link.transport.is_active()


def test_more_commands_than_sessions_wait_for_a_free_one(ssh: SshConnection) -> None:
    with ThreadPoolExecutor(30) as pool:
        assert all(pool.map(lambda _: ssh.run("sleep 0.3", timeout=20).ok, range(30)))


# -- files, pipes, tunnels ----------------------------------------------------------------------------


def test_put_and_get_transfer_bytes_streams_and_files(ssh: SshConnection, tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20)
    remote = tmp_path / "far away's $HOME"
    source = tmp_path / "source"
    source.write_bytes(data)
    for form in (data, io.BytesIO(data), source):
        remote.unlink(missing_ok=True)
        ssh.put(form, str(remote), mode=0o640)
        assert remote.read_bytes() == data
        assert remote.stat().st_mode & 0o777 == 0o640
        assert ssh.get(str(remote)) == data
    ssh.put(b"", str(remote))
    assert remote.read_bytes() == b""
    assert remote.stat().st_mode & 0o777 == 0o600


def test_a_failed_put_preserves_the_old_file_and_leaves_no_part(ssh: SshConnection, tmp_path: Path) -> None:
    remote = tmp_path / "file"
    remote.write_text("old")
    with pytest.raises(CommandFailed, match="exit status"):
        ssh.put(b"new", str(tmp_path / "no" / "such" / "file"))
    directory = tmp_path / "directory"
    directory.mkdir()
    with pytest.raises(CommandFailed):
        ssh.put(b"new", str(directory))
    assert remote.read_text() == "old"
    assert not list(directory.iterdir())
    assert not list(tmp_path.glob(".*.part"))


def test_a_put_whose_connection_is_lost_creates_no_file(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server().start()
    remote = tmp_path / "big"

    big = bytes(64 * 2**20)
    with SshConnection(server.target()) as ssh, ThreadPoolExecutor(1) as pool:
        ssh.run("true")
        running = pool.submit(ssh.put, big, str(remote))
        wait_until(
            lambda: bool(list(tmp_path.glob(".big.*.part"))), deadline=Deadline(5), what="the first bytes"
        )
        # As with a lost connection: the commands on the host still run.
        server.stop(spare_commands=True)
        with pytest.raises(PveError):
            running.result(timeout=10)
    wait_until(
        lambda: not list(tmp_path.glob(".big.*.part")), deadline=Deadline(5), what="the deletion of the part"
    )
    assert not remote.exists()


def test_get_refuses_a_file_above_the_limit(ssh: SshConnection, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1000))
    with pytest.raises(SshError, match="expected at most 999 bytes, found more"):
        ssh.get(str(tmp_path / "large"), limit=999)
    assert len(ssh.get(str(tmp_path / "large"), limit=1000)) == 1000
    with pytest.raises(CommandFailed, match="No such file"):
        ssh.get(str(tmp_path / "missing"))


def test_a_pipe_connects_commands_on_two_hosts(
    ssh: SshConnection, make_server: MakeServer, tmp_path: Path
) -> None:
    other = make_server().start()
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9 * 2**20))
    with SshConnection(other.target()) as sink:
        ssh.pipe(["cat", str(source)], sink, f"cat >{shlex.quote(str(tmp_path / 'copy'))}", timeout=30)
        assert (tmp_path / "copy").read_bytes() == source.read_bytes()
        with pytest.raises(CommandFailed, match="no-such-file"):
            ssh.pipe(["cat", "/no-such-file"], sink, "cat >/dev/null", timeout=10)
        with pytest.raises(CommandFailed, match="exit 9"):
            ssh.pipe(["cat", str(source)], sink, "exit 9", timeout=10)
        with pytest.raises(CommandTimeout):
            ssh.pipe("sleep 30", sink, "cat >/dev/null", timeout=0.5)


def test_a_forward_connects_from_the_host(ssh: SshConnection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as service:

        def echo() -> None:
            for _ in range(2):
                near, _ = service.accept()
                with near:
                    while data := near.recv(65536):
                        near.sendall(data.upper())

        threading.Thread(target=echo, daemon=True).start()
        forward = ssh.forward("127.0.0.1", service.getsockname()[1])
        for word in (b"abc", b"xyz"):
            with socket.create_connection(forward.address, timeout=5) as client:
                client.sendall(word)
                client.shutdown(socket.SHUT_WR)
                assert client.recv(100) == word.upper()
                assert client.recv(100) == b""
        forward.close()
        with pytest.raises(OSError):
            socket.create_connection(forward.address, timeout=1)


def test_a_forward_to_a_closed_port_closes_the_clients_connection(ssh: SshConnection) -> None:
    with (
        ssh.forward("127.0.0.1", free_port()) as forward,
        socket.create_connection(forward.address, timeout=5) as client,
    ):
        assert client.recv(10) == b""


# -- the ssh configuration ----------------------------------------------------------------------------


def test_the_ssh_configuration_is_read_as_openssh_reads_it(tmp_path: Path) -> None:
    (tmp_path / "more").write_text("Host far\n  HostName far.example\n  Port 2200\n  User admin\n")
    config = tmp_path / "config"
    config.write_text(
        f"Include {tmp_path}/more\n"
        "Match host far.example\n  HostKeyAlias far-key\n"
        "Host far\n"
        f"  IdentityFile {tmp_path}/%h-key\n  IdentityFile ~/.ssh/second\n"
        f"  CertificateFile {tmp_path}/cert.pub\n  IdentitiesOnly yes\n  IdentityAgent {tmp_path}/agent\n"
        f"  UserKnownHostsFile {tmp_path}/known1 {tmp_path}/known2\n  GlobalKnownHostsFile none\n"
        "  ConnectTimeout 7\n"
    )
    target = read_ssh_config("far", config, None, None)
    assert (target.host, target.port, target.user) == ("far.example", 2200, "admin")
    assert target.identity_files == (tmp_path / "far.example-key", Path("~/.ssh/second").expanduser())
    assert target.certificate_files == (tmp_path / "cert.pub",)
    assert target.known_hosts == (tmp_path / "known1", tmp_path / "known2")
    assert (target.identities_only, target.identity_agent) == (True, str(tmp_path / "agent"))
    assert (target.host_key_alias, target.connect_timeout, target.alias) == ("far-key", 7.0, "far")
    override = read_ssh_config("ops@far", config, None, 2300)
    assert (override.user, override.port) == ("ops", 2300)


@pytest.mark.parametrize(
    ("alias", "text", "message"),
    [
        ("a", "Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n", "circle"),
        ("a", "Host a\n  Porrt 22\n", "Bad configuration option"),
        ("-oProxyCommand=x", "", "expected the name of a host"),
        ("a;reboot", "", "expected the name of a host"),
        ("", "", "expected the name of a host"),
        ("a", "Host a\n  ProxyCommand x\n  ProxyUseFdpass yes\n", "ProxyUseFdpass.*not supported"),
    ],
)
def test_an_unusable_name_or_configuration_is_refused(
    tmp_path: Path, alias: str, text: str, message: str
) -> None:
    config = tmp_path / "config"
    config.write_text(text)
    with pytest.raises(SshError, match=message):
        read_ssh_config(alias, config, None, None)


# -- hosts --------------------------------------------------------------------------------------------


def test_a_closed_host_deletes_its_token_and_releases_the_lab_last_and_once(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server().start()
    config = tmp_path / "config"
    config.write_text(server.config_block("father"))
    ended: list[str] = []
    resolved = replace(hosts.resolve("father", ssh_config=config), release=lambda: ended.append("lab"))
    host = hosts.connect(resolved)
    assert host.ssh_config == config
    assert host.within(lambda: "pool").ssh_config == config
    host.free().close()
    assert ended == []
    monkeypatch.setattr(host.api, "close", lambda: ended.append("token"))
    monkeypatch.setattr(host.ssh, "close", lambda: ended.append("connection"))
    host.close()
    assert ended == ["token", "connection", "lab"]
    host.close()
    assert ended.count("lab") == 1


def test_the_lab_is_released_when_the_host_refuses_the_login(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server().start()
    config = tmp_path / "config"
    config.write_text(server.config_block("father").replace(str(server.known_hosts), str(tmp_path / "none")))
    ended: list[str] = []
    resolved = replace(hosts.resolve("father", ssh_config=config), release=lambda: ended.append("lab"))
    with pytest.raises(HostKeyMismatch):
        hosts.connect(resolved)
    assert ended == ["lab"]


def test_a_host_is_connected_and_errors_have_types(make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server().start()
    config = tmp_path / "config"
    config.write_text(
        server.config_block("father")
        + server.config_block("down").replace(str(server.port), str(free_port()))
        + server.config_block("stranger").replace(str(server.known_hosts), str(tmp_path / "none"))
    )
    log = Calls()
    resolved = hosts.resolve("father", ssh_config=config)
    host = hosts.connect(resolved, log)
    assert host.name == "father"
    assert host.run(["echo", "x"]).stdout == "x\n"
    assert [call.cmd for call in log.calls] == ["true", "echo x"]
    host.close()
    for alias, kind in (("down", HostUnreachable), ("stranger", HostKeyMismatch)):
        with pytest.raises(kind):
            hosts.connect(hosts.resolve(alias, ssh_config=config))


PROFILE = b"[nested-pve]\nstorage = local\nbridge=vmbr1\nmirror=http://mirror.test/debian\nimage =\n"


def test_a_host_profile_has_the_keys_that_a_host_may_set() -> None:
    assert hosts.parse_profile(PROFILE, "father") == {
        "storage": "local",
        "bridge": "vmbr1",
        "mirror": "http://mirror.test/debian",
    }
    assert hosts.parse_profile(b"", "father") == {}
    assert hosts.parse_profile(b"# nothing\n[nested-pve]\n", "father") == {}
    assert hosts.parse_profile(b"[nested-pve]\nimage = a%b\n", "father") == {"image": "a%b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"storage = local\n", "malformed"),
        (b"[nested-pve\n", "malformed"),
        (b"[nested-pve]\nstorage\n", "malformed"),
        (b"[nested-pve]\nstorage = a\nstorage = b\n", "malformed"),
        (b"\xff\xfe", "malformed"),
        (b"[nested-pve]\nbootstrap = rm -rf /\n", "bootstrap, which a host may not"),
        (b"[nested-pve]\nvm_options = args=x\n", "which a host may not"),
        (b"[DEFAULT]\nstorage = x\n", "expected only the section"),
        (b"[nested-pve]\nstorage = a\n  b\n", "more than one line"),
        (b"[nested-pve]\nstorage = a\x00b\n", "control character"),
        (b"#" * 70_000, "expected a few lines"),
    ],
)
def test_an_invalid_host_profile_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        hosts.parse_profile(content, "father")


# -- speed --------------------------------------------------------------------------------------------


def test_a_command_on_an_open_connection_takes_milliseconds(ssh: SshConnection) -> None:
    ssh.run("true")
    times = sorted(ssh.run(["true"]).ms for _ in range(30))
    assert times[15] < 30, "without TCP_NODELAY it is more than 40 ms; idle it is 3"
