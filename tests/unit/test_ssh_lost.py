"""Against real OpenSSH servers that the tests start: connections that end, and ways over other hosts."""

from __future__ import annotations

import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sshd import MakeServer, Sshd, free_port

from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import HostKeyMismatch, HostUnreachable, PveError, SshError
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.connection import SshConnection


def ours(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
