"""Logins and checks of host keys with real OpenSSH servers, which the tests start."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from sshd import MakeServer, Sshd, create_key, free_port

from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import HostKeyMismatch, HostUnreachable, LoginRefused
from pytest_nestedpve.pve.ssh.connection import SshConnection, SshTarget

# -- logging in ---------------------------------------------------------------------------------------


def test_a_host_that_refuses_connections_is_reported_at_once(server: Sshd) -> None:
    began = time.monotonic()
    with (
        pytest.raises(HostUnreachable, match=r"refused.*is sshd running"),
        SshConnection(server.target(port=free_port())) as ssh,
    ):
        ssh.run("true")
    assert time.monotonic() - began < 3


def test_connecting_to_a_host_that_drops_packets_ends_at_the_connect_timeout(server: Sshd) -> None:
    # A listener with a full backlog drops the packets of further connections.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
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


def test_a_login_at_a_silent_service_ends_at_the_connect_timeout(server: Sshd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        target = server.target(port=silent.getsockname()[1], connect_timeout=1.0)
        with (
            pytest.raises(HostUnreachable, match="no SSH session began within 1 s"),
            SshConnection(target) as ssh,
        ):
            ssh.run("true")
        assert time.monotonic() - began < 4


def test_a_login_is_retried_while_sshd_starts(server: Sshd) -> None:
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
    server.write_known_hosts()


def test_a_name_that_does_not_resolve_is_an_unknown_host() -> None:
    with (
        pytest.raises(HostUnreachable, match=r"unknown host.*does not resolve"),
        SshConnection(SshTarget("no-such-host.invalid")) as ssh,
    ):
        ssh.run("true")


def test_a_key_that_is_not_authorized_is_refused_with_advice(server: Sshd, tmp_path: Path) -> None:
    stranger = create_key(tmp_path / "stranger")
    with (
        pytest.raises(LoginRefused, match=r"accepted none of the keys offered: .*stranger.*authorized_keys"),
        SshConnection(server.target(identity_files=(stranger,))) as ssh,
    ):
        ssh.run("true")


def test_a_login_without_any_key_is_refused_with_the_reason(server: Sshd, tmp_path: Path) -> None:
    with (
        pytest.raises(LoginRefused, match="there was none to offer"),
        SshConnection(server.target(identity_files=(tmp_path / "none",))) as ssh,
    ):
        ssh.run("true")


def test_the_error_for_a_key_with_a_passphrase_and_no_agent_advises_ssh_add(
    server: Sshd, tmp_path: Path
) -> None:
    locked = create_key(tmp_path / "locked", passphrase="word")
    with (
        pytest.raises(LoginRefused, match=r"protected by a passphrase.*ssh-add"),
        SshConnection(server.target(identity_files=(locked,))) as ssh,
    ):
        ssh.run("true")


def test_a_key_with_a_passphrase_works_through_an_agent(
    make_server: MakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make_server().start()
    locked = create_key(tmp_path / "locked", passphrase="word")
    server.authorized_keys.write_text(locked.with_suffix(".pub").read_text())
    askpass = tmp_path / "askpass"
    askpass.write_text("#!/bin/sh\necho word\n")
    askpass.chmod(0o700)
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
                "SSH_ASKPASS": str(askpass),
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
        # For a guest the agent is not used, also with SSH_AUTH_SOCK.
        with (
            pytest.raises(LoginRefused),
            SshConnection(server.target(identity_files=(), allow_agent=False)) as ssh,
        ):
            ssh.run("true")
    finally:
        agent.terminate()
        agent.wait()


def test_a_user_certificate_is_used(make_server: MakeServer, tmp_path: Path) -> None:
    ca, key = create_key(tmp_path / "ca"), create_key(tmp_path / "user")
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


def test_a_changed_host_key_is_refused_with_the_place_of_the_old_one(make_server: MakeServer) -> None:
    server = make_server()
    server.replace_host_key()
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
def test_a_key_in_known_hosts_is_requested_before_other_types(
    make_server: MakeServer, known: list[str]
) -> None:
    server = make_server(host_key_types=("ed25519", "rsa", "ecdsa"))
    server.write_known_hosts(known)
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
    # With an alias, the key of the address is not accepted.
    with (
        pytest.raises(HostKeyMismatch, match="of nested-pve is unknown"),
        SshConnection(server.target(host_key_alias="nested-pve")) as ssh,
    ):
        ssh.run("true")
