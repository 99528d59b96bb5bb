"""Against real OpenSSH servers that the tests start: logging in, running, interrupting, coming back."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import paramiko
import pytest
from paramiko.common import MSG_CHANNEL_EOF
from sshd import Sshd, free_port, make_key

from pytest_nestedpve import hosts
from pytest_nestedpve.pve.errors import (
    CommandTimeout,
    HostKeyMismatch,
    HostUnreachable,
    LoginRefused,
    ProfileError,
    PveError,
    SshError,
)
from pytest_nestedpve.pve.ssh import CommandFailed, CommandResult, SshConnection, SshTarget
from pytest_nestedpve.pve.sshconfig import read_ssh_config
from pytest_nestedpve.timing import Deadline, wait_until

MakeServer = Callable[..., Sshd]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    sshd = Sshd(tmp_path_factory.mktemp("sshd")).start()
    yield sshd
    sshd.stop()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    made: list[Sshd] = []

    def make(name: str = "own", **options: object) -> Sshd:
        made.append(Sshd(tmp_path / name, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for sshd in made:
        sshd.stop()


@pytest.fixture
def ssh(server: Sshd) -> Iterator[SshConnection]:
    with SshConnection(server.target()) as connection:
        yield connection


def ours(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- commands -----------------------------------------------------------------------------------------


def test_a_command_gives_its_exit_status_and_both_streams_apart(ssh: SshConnection) -> None:
    result = ssh.run("echo out; echo err >&2; exit 7")
    assert (result.rc, result.stdout, result.stderr, result.ok) == (7, "out\n", "err\n", False)


def test_an_argv_arrives_word_by_word_whatever_is_in_it(ssh: SshConnection) -> None:
    words = ["a b", "$HOME", "'", '"', "*", "", "\n", ";false", "ä€"]
    result = ssh.run(["printf", "%s|", *words])
    assert result.stdout == "".join(f"{word}|" for word in words)


def test_check_names_the_command_and_its_last_words(ssh: SshConnection) -> None:
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


def test_input_that_nobody_reads_is_no_error(ssh: SshConnection) -> None:
    assert ssh.run("exit 4", stdin=bytes(8 * 2**20), timeout=20).rc == 4


def test_without_input_a_command_meets_the_end_of_file(ssh: SshConnection) -> None:
    assert ssh.run("cat; echo done", timeout=10).stdout == "done\n"


def test_a_daemon_left_behind_does_not_hold_the_command(ssh: SshConnection) -> None:
    began = time.monotonic()
    result = ssh.run("sleep 30 & echo $!", timeout=20)
    assert result.ok
    assert time.monotonic() - began < 8
    os.kill(int(result.stdout), 9)


def test_a_limit_interrupts_a_silent_command(ssh: SshConnection) -> None:
    began = time.monotonic()
    with pytest.raises(
        CommandTimeout, match=r"`echo begun; exec sleep 40`.*did not end within 0\.5 s.*begun"
    ):
        ssh.run("echo begun; exec sleep 40", timeout=0.5)
    assert time.monotonic() - began < 4
    assert ssh.run("echo on").stdout == "on\n"


def test_a_limit_interrupts_a_command_that_never_stops_talking(ssh: SshConnection) -> None:
    began = time.monotonic()
    with pytest.raises(CommandTimeout):
        ssh.run("yes", timeout=0.5)
    assert time.monotonic() - began < 6


def test_a_command_ended_by_a_signal_has_no_exit_status(ssh: SshConnection) -> None:
    assert ssh.run("kill -9 $$").rc == -1


def test_the_observer_sees_each_command_and_of_a_secret_one_only_that_it_was(server: Sshd) -> None:
    seen: list[CommandResult] = []
    with SshConnection(server.target(), observer=seen.append) as ssh:
        ssh.run(["echo", "open"])
        result = ssh.run(["echo", "s3cret"], secret=True)
        assert result.stdout == "s3cret\n"
        with pytest.raises(CommandTimeout) as caught:
            ssh.run("echo s3cret; sleep 9", timeout=0.3, secret=True)
        with pytest.raises(CommandFailed) as failed:
            ssh.run(["cat", "/nonexistent/s3cret"], secret=True).check()
    assert (seen[0].command, seen[0].rc) == ("echo open", 0)
    assert len(seen) == 4
    assert "s3cret" not in repr(seen)
    assert "s3cret" not in f"{caught.value} {failed.value}"


def test_twenty_threads_share_one_connection(ssh: SshConnection) -> None:
    def one(number: int) -> str:
        return "".join(ssh.run(f"echo {number}-{step}").stdout for step in range(5))

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(one, range(20)))
    assert results == ["".join(f"{n}-{s}\n" for s in range(5)) for n in range(20)]
    # Below MaxSessions on each transport, and far below a connection per command.
    assert 2 <= len(ssh._links) <= 4


def test_the_end_of_input_is_not_sent_after_the_channel_was_closed(ssh: SshConnection) -> None:
    """sshd ends the whole connection for it, under all commands that run there."""
    ssh.run("true")
    (link,) = ssh._links
    transport: Any = link.transport
    send, sender = transport._send_user_message, threading.current_thread()
    tried = []

    def hold_back_end_of_input(data: paramiko.Message) -> None:
        if data.asbytes()[0] == MSG_CHANNEL_EOF and threading.current_thread() is sender:
            channel = max(transport._channels.values(), key=lambda each: each.chanid)
            tried.append(channel)
            # What the scheduler does on a busy machine: the command's end overtakes us, if it can.
            with contextlib.suppress(CommandTimeout):
                wait_until(lambda: channel.closed, deadline=Deadline(0.5), what="the channel's end")
        send(data)

    transport._send_user_message = hold_back_end_of_input
    assert ssh.run("echo gone").stdout == "gone\n"
    assert ssh.run("echo on").stdout == "on\n"
    assert len(tried) == 2
    assert ssh._links == [link]
    assert link.transport.is_active()


def test_more_commands_than_sessions_wait_for_their_turn(ssh: SshConnection) -> None:
    with ThreadPoolExecutor(30) as pool:
        assert all(pool.map(lambda _: ssh.run("sleep 0.3", timeout=20).ok, range(30)))


# -- logging in ---------------------------------------------------------------------------------------


def test_a_host_that_refuses_connections_is_reported_at_once(server: Sshd) -> None:
    began = time.monotonic()
    with (
        pytest.raises(HostUnreachable, match=r"refused.*is sshd running"),
        SshConnection(server.target(port=free_port())) as ssh,
    ):
        ssh.run("true")
    assert time.monotonic() - began < 3


def test_a_host_that_swallows_packets_is_given_up_at_the_connect_limit(server: Sshd) -> None:
    # A listener with a full backlog drops what comes: the kernel's own black hole.
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        port = hole.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        began = time.monotonic()
        target = server.target(port=port, connect_timeout=1.0)
        with pytest.raises(HostUnreachable), SshConnection(target) as ssh:
            ssh.run("true")
        assert 0.5 < time.monotonic() - began < 4
        for filler in fillers:
            filler.close()


def test_a_service_that_says_nothing_is_given_up_at_the_connect_limit(server: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        began = time.monotonic()
        target = server.target(port=mute.getsockname()[1], connect_timeout=1.0)
        with (
            pytest.raises(HostUnreachable, match="no SSH session began within 1 s"),
            SshConnection(target) as ssh,
        ):
            ssh.run("true")
        assert time.monotonic() - began < 4


def test_an_sshd_that_resets_while_it_boots_is_tried_again(server: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as front:
        port = front.getsockname()[1]
        server.known_hosts.write_text(
            server.known_hosts.read_text()
            + f"[127.0.0.1]:{port} {server.host_keys['ed25519'].with_suffix('.pub').read_text()}"
        )

        def relay() -> None:
            for attempt in range(4):
                near, _ = front.accept()
                if attempt < 2:
                    near.close()  # no banner
                    continue
                if attempt == 2:
                    near.sendall(b"Not yet\r\n" * 3)
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", server.port))
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=(source, sink), daemon=True).start()

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with source, sink:
                try:
                    while data := source.recv(65536):
                        sink.sendall(data)
                except OSError:
                    return

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        with SshConnection(server.target(port=port)) as ssh:
            assert ssh.run("echo up").stdout == "up\n"
        thread.join(5)
    server.trust()


def test_an_unknown_name_is_no_host() -> None:
    with (
        pytest.raises(HostUnreachable, match=r"unknown host.*does not resolve"),
        SshConnection(SshTarget("no-such-host.invalid")) as ssh,
    ):
        ssh.run("true")


def test_a_key_that_is_not_authorized_is_refused_with_advice(server: Sshd, tmp_path: Path) -> None:
    stranger = make_key(tmp_path / "stranger")
    with (
        pytest.raises(LoginRefused, match=r"accepted none of the keys offered: .*stranger.*authorized_keys"),
        SshConnection(server.target(identity_files=(stranger,))) as ssh,
    ):
        ssh.run("true")


def test_no_key_at_all_is_said(server: Sshd, tmp_path: Path) -> None:
    with (
        pytest.raises(LoginRefused, match="there was none to offer"),
        SshConnection(server.target(identity_files=(tmp_path / "none",))) as ssh,
    ):
        ssh.run("true")


def test_a_key_with_a_passphrase_and_no_agent_names_ssh_add(server: Sshd, tmp_path: Path) -> None:
    locked = make_key(tmp_path / "locked", passphrase="word")
    with (
        pytest.raises(LoginRefused, match=r"protected by a passphrase.*ssh-add"),
        SshConnection(server.target(identity_files=(locked,))) as ssh,
    ):
        ssh.run("true")


def test_a_key_with_a_passphrase_works_through_an_agent(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server().start()
    locked = make_key(tmp_path / "locked", passphrase="word")
    server.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    ask = tmp_path / "ask"
    ask.write_text("#!/bin/sh\necho word\n")
    ask.chmod(0o700)
    sock = tmp_path / "agent"
    agent = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_until(sock.exists, deadline=Deadline(5), what="the agent")
        subprocess.run(
            ["ssh-add", "-q", str(locked)],
            env={
                **os.environ,
                "SSH_AUTH_SOCK": str(sock),
                "SSH_ASKPASS": str(ask),
                "SSH_ASKPASS_REQUIRE": "force",
            },
            stdin=subprocess.DEVNULL,
            check=True,
        )
        with SshConnection(
            server.target(identity_files=(locked,), allow_agent=True, identity_agent=str(sock))
        ) as ssh:
            assert ssh.run("echo in").stdout == "in\n"
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        with SshConnection(server.target(identity_files=(), allow_agent=True)) as ssh:
            assert ssh.run("echo in").stdout == "in\n"
        # Towards a guest the agent is not asked, whatever the environment says.
        with (
            pytest.raises(LoginRefused),
            SshConnection(server.target(identity_files=(), allow_agent=False)) as ssh,
        ):
            ssh.run("true")
    finally:
        agent.terminate()
        agent.wait()


def test_a_user_certificate_is_used(make_server: MakeServer, tmp_path: Path) -> None:
    ca, key = make_key(tmp_path / "ca"), make_key(tmp_path / "user")
    server = make_server(options=(f"TrustedUserCAKeys {ca}.pub",))
    server.authorized_keys.write_text("")
    server.start()
    user = server.target().user
    subprocess.run(["ssh-keygen", "-q", "-s", str(ca), "-I", "t", "-n", user, f"{key}.pub"], check=True)
    certificate = Path(f"{key}-cert.pub")
    elsewhere = certificate.rename(tmp_path / "elsewhere.pub")
    with SshConnection(server.target(identity_files=(key,), certificate_files=(elsewhere,))) as ssh:
        assert ssh.run("true").ok


# -- host keys ----------------------------------------------------------------------------------------


def test_an_unknown_host_key_is_refused_with_advice(server: Sshd, tmp_path: Path) -> None:
    with (
        pytest.raises(
            HostKeyMismatch, match=r"is unknown.*SHA256:.*by hand.*ssh-keyscan -p \d+ -t ed25519 127"
        ),
        SshConnection(server.target(known_hosts=(tmp_path / "empty",))) as ssh,
    ):
        ssh.run("true")


def test_a_changed_host_key_says_so_and_where_the_old_one_is(make_server: MakeServer) -> None:
    server = make_server()
    server.new_host_key()
    server.start()
    with (
        pytest.raises(HostKeyMismatch, match=r"CHANGED.*known_hosts, line 1.*ssh-keygen -R"),
        SshConnection(server.target()) as ssh,
    ):
        ssh.run("true")
    assert not isinstance(HostKeyMismatch(""), HostUnreachable)


def test_a_revoked_host_key_is_refused(server: Sshd, tmp_path: Path) -> None:
    known = tmp_path / "known"
    key = server.host_keys["ed25519"].with_suffix(".pub").read_text()
    known.write_text(server.known_hosts.read_text() + f"@revoked * {key}")
    with (
        pytest.raises(HostKeyMismatch, match="revoked"),
        SshConnection(server.target(known_hosts=(known,))) as ssh,
    ):
        ssh.run("true")


@pytest.mark.parametrize("known", [["ed25519"], ["rsa"], ["ecdsa"], ["rsa", "ed25519"]])
def test_the_host_key_that_is_known_is_the_one_asked_for(make_server: MakeServer, known: list[str]) -> None:
    server = make_server(host_key_types=("ed25519", "rsa", "ecdsa"))
    server.trust(known)
    server.start()
    with SshConnection(server.target()) as ssh:
        assert ssh.run("true").ok


def test_hashed_entries_aliases_and_several_files_are_read(server: Sshd, tmp_path: Path) -> None:
    key = server.host_keys["ed25519"].with_suffix(".pub").read_text()
    hashed, alias, wild = tmp_path / "hashed", tmp_path / "alias", tmp_path / "wild"
    hashed.write_text(server.known_hosts.read_text() + f"other {key}")
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", str(hashed)], check=True, capture_output=True)
    assert "127.0.0.1" not in hashed.read_text()
    alias.write_text(f"# a comment\n\nnested-pve {key}")
    wild.write_text(f"!10.*,[127.0.0.?]:* {key}")
    for changes in (
        {"known_hosts": (tmp_path / "missing", hashed)},
        {"known_hosts": (hashed, alias), "host_key_alias": "nested-pve"},
        {"known_hosts": (wild,)},
    ):
        with SshConnection(server.target(**changes)) as ssh:
            assert ssh.run("true").ok
    # An alias is looked up alone: the key of the address does not stand in for it.
    with (
        pytest.raises(HostKeyMismatch, match="of nested-pve is unknown"),
        SshConnection(server.target(host_key_alias="nested-pve")) as ssh,
    ):
        ssh.run("true")


# -- losing and finding the connection ----------------------------------------------------------------


def test_after_a_killed_sshd_the_next_command_connects_anew(make_server: MakeServer) -> None:
    server = make_server().start()
    with SshConnection(server.target()) as ssh:
        assert ssh.run("true").ok
        server.stop()
        with pytest.raises(SshError):
            ssh.run("true")
        server.start()
        assert ssh.run("echo back").stdout == "back\n"


def test_a_connection_that_dies_under_a_command_is_reported_not_repeated(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server().start()
    counter = tmp_path / "count"
    with SshConnection(server.target()) as ssh, ThreadPoolExecutor(1) as pool:
        running = pool.submit(ssh.run, f"echo x >>{shlex.quote(str(counter))}; exec sleep 20")
        wait_until(counter.exists, deadline=Deadline(5), what="the command")
        server.stop()
        with pytest.raises(SshError, match="lost while"):
            running.result(timeout=10)
    assert counter.read_text() == "x\n"


def test_a_connection_that_went_silent_is_noticed_by_its_silence(make_server: MakeServer) -> None:
    server = make_server().start()
    with SshConnection(server.target(connect_timeout=2.0)) as ssh:
        assert ssh.run("true").ok
        stopped = server.children()
        for pid in stopped:
            os.kill(pid, 19)
        try:
            # is_active() stays true for minutes; that no channel is opened is what tells.
            assert ssh._links[0].transport.is_active()
            began = time.monotonic()
            assert ssh.run("echo new way").stdout == "new way\n"
            assert time.monotonic() - began < 8
        finally:
            for pid in stopped:
                os.kill(pid, 18)


def test_many_threads_meet_a_dead_host_together(server: Sshd) -> None:
    began = time.monotonic()
    with SshConnection(server.target(port=free_port())) as ssh, ThreadPoolExecutor(20) as pool:
        for future in [pool.submit(ssh.run, "true") for _ in range(20)]:
            with pytest.raises(HostUnreachable):
                future.result()
    assert time.monotonic() - began < 5


def test_a_closed_connection_stays_closed(server: Sshd) -> None:
    ssh = SshConnection(server.target())
    ssh.run("true")
    ssh.close()
    with pytest.raises(SshError, match="closed by this session"):
        ssh.run("true")


def test_threads_of_the_transport_print_no_tracebacks(
    make_server: MakeServer, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server().start()
    with SshConnection(server.target(connect_timeout=1.0)) as ssh:
        ssh.run("true")
        server.stop()
        with pytest.raises(PveError):
            ssh.run("true")
    assert "Traceback" not in capfd.readouterr().err
    assert "Traceback" not in caplog.text


# -- jumps --------------------------------------------------------------------------------------------


def test_a_jump_over_two_hosts_leads_to_the_third(make_server: MakeServer, tmp_path: Path) -> None:
    first, second, third = (make_server(name).start() for name in ("one", "two", "three"))
    config = tmp_path / "config"
    config.write_text(
        first.config_block("one")
        + second.config_block("two", "ProxyJump one")
        + third.config_block("three", "ProxyJump two")
        + third.config_block("direct", "ProxyJump one,two")
    )
    for alias in ("three", "direct"):
        target = read_ssh_config(alias, config, None, None)
        assert target.jump is not None
        assert target.jump.port == second.port
        assert target.jump.jump is not None
        assert target.jump.jump.port == first.port
        with SshConnection(target) as ssh:
            # The port of the client is one that the second hop opened.
            assert ssh.run("set -- $SSH_CONNECTION; echo $4").stdout.strip() == str(third.port)
            assert ssh.run("true").ok


def test_a_jump_host_with_the_wrong_key_stops_the_journey(make_server: MakeServer) -> None:
    first, second = make_server("one"), make_server("two").start()
    first.new_host_key()
    first.start()
    with (
        pytest.raises(HostKeyMismatch, match=f":{first.port} CHANGED"),
        SshConnection(second.target(jump=first.target())) as ssh,
    ):
        ssh.run("true")


def test_a_target_that_is_down_behind_a_jump_host_is_unreachable(server: Sshd) -> None:
    port = free_port()
    with (
        pytest.raises(HostUnreachable, match=f"cannot connect to 127.0.0.1 port {port}"),
        SshConnection(server.target(port=port, jump=server.target())) as ssh,
    ):
        ssh.run("true")


def test_a_proxy_command_carries_the_connection_and_ends_with_it(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server().start()
    config, pidfile = tmp_path / "config", tmp_path / "pid"
    relay = tmp_path / "relay.py"
    relay.write_text(
        "import os, socket, sys, threading\n"
        f"open({str(pidfile)!r}, 'w').write(str(os.getpid()))\n"
        "s = socket.create_connection((sys.argv[1], int(sys.argv[2])))\n"
        "def back():\n"
        "    while d := s.recv(65536): os.write(1, d)\n"
        "threading.Thread(target=back, daemon=True).start()\n"
        "while d := os.read(0, 65536): s.sendall(d)\n"
    )
    config.write_text(server.config_block("there", f"ProxyCommand python3 {relay} %h %p"))
    with SshConnection(read_ssh_config("there", config, None, None)) as ssh:
        assert ssh.run("true").ok
        pid = int(pidfile.read_text())
        assert ours(pid)
    wait_until(lambda: not ours(pid), deadline=Deadline(5), what="the proxy command's end")


# -- files, pipes, tunnels ----------------------------------------------------------------------------


def test_put_and_get_carry_bytes_streams_and_files(ssh: SshConnection, tmp_path: Path) -> None:
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


def test_put_leaves_the_old_file_or_the_new_one_never_half(ssh: SshConnection, tmp_path: Path) -> None:
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


def test_a_put_whose_connection_dies_leaves_nothing_under_the_name(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server().start()
    remote = tmp_path / "big"

    big = bytes(64 * 2**20)
    with SshConnection(server.target()) as ssh, ThreadPoolExecutor(1) as pool:
        ssh.run("true")
        running = pool.submit(ssh.put, big, str(remote))
        wait_until(
            lambda: bool(list(tmp_path.glob(".big.*.part"))), deadline=Deadline(5), what="the first bytes"
        )
        # As when the line is cut: what runs on the host lives on and has to see for itself.
        server.stop(spare_commands=True)
        with pytest.raises(PveError):
            running.result(timeout=10)
    wait_until(lambda: not list(tmp_path.glob(".big.*.part")), deadline=Deadline(5), what="the part to go")
    assert not remote.exists()


def test_get_refuses_what_is_larger_than_expected(ssh: SshConnection, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1000))
    with pytest.raises(SshError, match="more than the 999 bytes"):
        ssh.get(str(tmp_path / "large"), limit=999)
    assert len(ssh.get(str(tmp_path / "large"), limit=1000)) == 1000
    with pytest.raises(CommandFailed, match="No such file"):
        ssh.get(str(tmp_path / "missing"))


def test_a_pipe_joins_two_hosts(ssh: SshConnection, make_server: MakeServer, tmp_path: Path) -> None:
    other = make_server().start()
    source = tmp_path / "source"
    source.write_bytes(os.urandom(9 * 2**20))
    with SshConnection(other.target()) as there:
        ssh.pipe(["cat", str(source)], there, f"cat >{shlex.quote(str(tmp_path / 'copy'))}", timeout=30)
        assert (tmp_path / "copy").read_bytes() == source.read_bytes()
        with pytest.raises(CommandFailed, match="no-such-file"):
            ssh.pipe(["cat", "/no-such-file"], there, "cat >/dev/null", timeout=10)
        with pytest.raises(CommandFailed, match="exit 9"):
            ssh.pipe(["cat", str(source)], there, "exit 9", timeout=10)
        with pytest.raises(CommandTimeout):
            ssh.pipe("sleep 30", there, "cat >/dev/null", timeout=0.5)


def test_a_forward_makes_connections_on_the_far_side(ssh: SshConnection) -> None:
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


def test_a_forward_to_a_closed_port_closes_the_client(ssh: SshConnection) -> None:
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
    given = read_ssh_config("ops@far", config, None, 2300)
    assert (given.user, given.port) == ("ops", 2300)


@pytest.mark.parametrize(
    ("alias", "text", "said"),
    [
        ("a", "Host a\n  ProxyJump b\nHost b\n  ProxyJump a\n", "circle"),
        ("a", "Host a\n  Porrt 22\n", "Bad configuration option"),
        ("-oProxyCommand=x", "", "expected the name of a host"),
        ("a;reboot", "", "expected the name of a host"),
        ("", "", "expected the name of a host"),
        ("a", "Host a\n  ProxyCommand x\n  ProxyUseFdpass yes\n", "ProxyUseFdpass.*not supported"),
    ],
)
def test_a_name_or_configuration_that_cannot_be_used_is_said(
    tmp_path: Path, alias: str, text: str, said: str
) -> None:
    config = tmp_path / "config"
    config.write_text(text)
    with pytest.raises(SshError, match=said):
        read_ssh_config(alias, config, None, None)


# -- hosts --------------------------------------------------------------------------------------------


def test_a_host_is_resolved_and_connected_and_its_errors_are_typed(
    make_server: MakeServer, tmp_path: Path
) -> None:
    server = make_server().start()
    config = tmp_path / "config"
    config.write_text(
        server.config_block("father")
        + server.config_block("down").replace(str(server.port), str(free_port()))
        + server.config_block("stranger").replace(str(server.known_hosts), str(tmp_path / "none"))
    )
    seen: list[CommandResult] = []
    resolved = hosts.resolve("father", ssh_config=config)
    host = hosts.connect(resolved, seen.append)
    assert host.name == "father"
    assert host.run(["echo", "x"]).stdout == "x\n"
    assert [one.command for one in seen] == ["true", "echo x"]
    host.close()
    for alias, kind in (("down", HostUnreachable), ("stranger", HostKeyMismatch)):
        with pytest.raises(kind):
            hosts.connect(hosts.resolve(alias, ssh_config=config))


PROFILE = b"[nested-pve]\nstorage = local\nbridge=vmbr1\nmirror=http://mirror.test/debian\nimage =\n"


def test_a_host_profile_gives_the_keys_that_a_host_may_set() -> None:
    assert hosts.parse_profile(PROFILE, "father") == {
        "storage": "local",
        "bridge": "vmbr1",
        "mirror": "http://mirror.test/debian",
    }
    assert hosts.parse_profile(b"", "father") == {}
    assert hosts.parse_profile(b"# nothing\n[nested-pve]\n", "father") == {}
    assert hosts.parse_profile(b"[nested-pve]\nimage = a%b\n", "father") == {"image": "a%b"}


@pytest.mark.parametrize(
    ("content", "said"),
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
def test_a_host_profile_that_is_anything_else_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(ProfileError, match=said):
        hosts.parse_profile(content, "father")


# -- speed --------------------------------------------------------------------------------------------


def test_a_command_on_a_warm_connection_takes_milliseconds(ssh: SshConnection) -> None:
    ssh.run("true")
    times = sorted(ssh.run(["true"]).ms for _ in range(30))
    assert times[15] < 30, "without TCP_NODELAY it is more than 40 ms; idle it is 3"
