"""Lost connections, jump hosts and proxy commands with real OpenSSH servers, which the tests start."""

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


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- lost connections ---------------------------------------------------------------------------------


def test_after_the_loss_of_a_connection_the_next_command_connects_again(make_server: MakeServer) -> None:
    server = make_server().start()
    with SshConnection(server.target()) as ssh:
        assert ssh.run("true").ok
        server.stop()
        with pytest.raises(SshError):
            ssh.run("true")
        server.start()
        assert ssh.run("echo back").stdout == "back\n"


def test_a_command_whose_connection_is_lost_fails_and_is_not_repeated(
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


def test_a_silent_connection_is_replaced(make_server: MakeServer) -> None:
    server = make_server().start()
    with SshConnection(server.target(connect_timeout=2.0)) as ssh:
        assert ssh.run("true").ok
        stopped = server.children()
        for pid in stopped:
            os.kill(pid, 19)
        try:
            # is_active() remains true for minutes; only opening a channel fails.
            assert ssh._links[0].transport.is_active()
            began = time.monotonic()
            assert ssh.run("echo again").stdout == "again\n"
            assert time.monotonic() - began < 8
        finally:
            for pid in stopped:
                os.kill(pid, 18)


def test_all_threads_get_the_error_of_an_unreachable_host(server: Sshd) -> None:
    began = time.monotonic()
    with SshConnection(server.target(port=free_port())) as ssh, ThreadPoolExecutor(20) as pool:
        for future in [pool.submit(ssh.run, "true") for _ in range(20)]:
            with pytest.raises(HostUnreachable):
                future.result()
    assert time.monotonic() - began < 5


def test_a_closed_connection_is_not_opened_again(server: Sshd) -> None:
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
            # The server's port as the target sees it.
            assert ssh.run("set -- $SSH_CONNECTION; echo $4").stdout.strip() == str(third.port)
            assert ssh.run("true").ok


def test_a_jump_host_with_a_wrong_key_is_refused(make_server: MakeServer) -> None:
    first, second = make_server("one"), make_server("two").start()
    first.replace_host_key()
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


def test_a_proxy_command_ends_with_its_connection(make_server: MakeServer, tmp_path: Path) -> None:
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
    config.write_text(server.config_block("proxied", f"ProxyCommand python3 {relay} %h %p"))
    with SshConnection(read_ssh_config("proxied", config, None, None)) as ssh:
        assert ssh.run("true").ok
        pid = int(pidfile.read_text())
        assert is_running(pid)
    wait_until(lambda: not is_running(pid), deadline=Deadline(5), what="the proxy command's end")
