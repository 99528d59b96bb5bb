"""Hosts that are no sshd or refuse keys, FIDO keys, ignored options: reported in errors and remarks."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from ssh_host import SshHost, log_in, log_in_twice
from sshd import Sshd

from pytest_nestedpve import plugin
from pytest_nestedpve.config import hosts
from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.pve.errors import HostUnreachable, LoginRefused, SshError
from pytest_nestedpve.pve.ssh import config_options
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.connection import SshConnection
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.session.session import KEY, NestedSession


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    host = SshHost(tmp_path_factory.mktemp("world"))
    host.server.start()
    yield host
    host.server.stop()


# -- other services, other accounts -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greeting", "message"),
    [
        (b"220 mail.example ESMTP\r\n", "220 mail.example ESMTP"),
        (b"HTTP/1.1 400 Bad Request\r\nServer: x\r\n\r\n", "HTTP/1.1 400 Bad Request"),
    ],
)
def test_another_service_at_the_port_is_reported_at_once_with_its_greeting(
    ssh_host: SshHost, greeting: bytes, message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                connection.sendall(greeting)

        served = threading.Thread(target=serve)
        served.start()
        port = listening.getsockname()[1]
        with (
            pytest.raises(HostUnreachable, match=f"expected an sshd at port {port}.*{re.escape(message)}"),
            SshConnection(ssh_host.server.target(port=port)) as ssh,
        ):
            ssh.run("true")
        served.join()


def test_a_host_that_accepts_only_passwords_is_reported(tmp_path: Path) -> None:
    options = ("PubkeyAuthentication no", "PasswordAuthentication yes")
    server = Sshd(tmp_path / "server", options=options).start()
    try:
        with (
            pytest.raises(LoginRefused, match="does not accept keys, only password: allow public keys"),
            SshConnection(server.target()) as ssh,
        ):
            ssh.run("true")
    finally:
        server.stop()


def test_an_account_that_prints_before_each_command_is_refused_with_advice(tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    noisy.write_text('#!/bin/sh\necho Welcome to this host\nexec /bin/sh -c "$SSH_ORIGINAL_COMMAND"\n')
    noisy.chmod(0o700)
    server = Sshd(tmp_path / "server", options=(f"ForceCommand {noisy}",)).start()
    config = tmp_path / "config"
    config.write_text(server.config_block("noisy"))
    try:
        with pytest.raises(
            SshError,
            match=r"expected no output of the command `true`, found 'Welcome to this host': .*~/\.bashrc",
        ):
            hosts.connect(hosts.resolve("noisy", ssh_config=config))
    finally:
        server.stop()


# -- ignored options ----------------------------------------------------------------------------------

NOTED = {
    "PKCS11Provider /usr/lib/none.so": "keys on a smart card are used only through an agent: `ssh-add -s",
    "KnownHostsCommand /usr/bin/true": "it is not run: the host key must be in a known_hosts file",
    "VerifyHostKeyDNS yes": "host keys are not looked up in DNS",
    "SecurityKeyProvider /usr/lib/none.so": "FIDO keys are used only through an agent",
    "HostbasedAuthentication yes": "only keys are offered to log in",
    "CASignatureAlgorithms ssh-ed25519": "a host certificate may be signed with any algorithm but SHA-1",
    "RequiredRSASize 2048": "RSA keys of any size that the host accepts are offered",
    "BindInterface lo": "connections follow the routing table; BindAddress is honoured",
}


@pytest.mark.parametrize("line", list(NOTED))
def test_an_ignored_option_is_reported_with_file_and_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "more").write_text(f"Host *\n  {line}\n")
    config = tmp_path / "config"
    config.write_text(f"Host h\n  HostName 127.0.0.1\nInclude {tmp_path}/mor*\n")
    (note,) = read_ssh_config("h", config, None, None).notes
    assert note == f"{line} ({tmp_path}/more, line 2) is not honoured for h: {note.partition('h: ')[2]}"
    assert NOTED[line] in note


def test_every_ignored_option_has_a_test() -> None:
    assert {line.split()[0] for line in NOTED} == set(config_options.NOT_HONOURED)


def test_options_that_do_not_matter_for_connecting_are_not_reported(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        "Host *\n  SendEnv LANG LC_*\n  SetEnv A=b\n  HashKnownHosts yes\n  GSSAPIAuthentication yes\n"
        "  ControlMaster auto\n  ControlPath ~/.ssh/%C\n  ForwardAgent yes\n  ServerAliveInterval 5\n"
        "  Compression yes\n  UpdateHostKeys yes\n  AddKeysToAgent yes\n  LogLevel DEBUG\n"
        "  PKCS11Provider none\n  VerifyHostKeyDNS no\n  CheckHostIP no\n"
    )
    target = read_ssh_config("h", config, None, None)
    assert (target.notes, target.algorithms, target.ignored_leniency) == ((), (), "")


def test_the_session_reports_ignored_options_of_all_hops_once(
    ssh_host: SshHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_config = ssh_host.write_config(
        ssh_host.server.config_block("far", "ProxyJump near", "VerifyHostKeyDNS yes")
        + ssh_host.server.config_block("near", "KnownHostsCommand /usr/bin/true")
    )
    resolve = hosts.resolve
    monkeypatch.setattr(hosts, "resolve", lambda name: resolve(name, ssh_config=ssh_config))
    config: Any = SimpleNamespace(stash={})
    session: Any = SimpleNamespace(config=config)
    nested = config.stash[KEY] = NestedSession(session, Settings())
    for _ in range(2):
        host = plugin.pytest_nestedpve_host(config, Settings(host="far"))
        assert host is not None
        host.close()
    assert [
        note.partition(" is not honoured for ")[2].partition(":")[0] for note in nested.state.remarks
    ] == [
        "far",
        "near",
    ]


@pytest.mark.parametrize("option", ["StrictHostKeyChecking no", "StrictHostKeyChecking accept-new"])
def test_host_keys_are_checked_under_any_configuration(ssh_host: SshHost, option: str) -> None:
    block = ssh_host.server.config_block("h").replace("StrictHostKeyChecking yes", option)
    known = ssh_host.folder / "not-written"
    text = re.sub("UserKnownHostsFile .*", f"UserKnownHostsFile {known}", block)
    error = log_in(ssh_host.write_config(text), "h")
    assert f"{option} of the ssh configuration is ignored" in error
    assert re.search(r"log in once by hand with `ssh -F \S+ -o StrictHostKeyChecking=ask h`", error)
    assert not known.exists()
    text = re.sub(
        "UserKnownHostsFile .*", "UserKnownHostsFile /dev/null\n    GlobalKnownHostsFile none", block
    )
    error = log_in(ssh_host.write_config(text), "h")
    assert "the configuration names none" in error
    assert "Then name a file (UserKnownHostsFile ~/.ssh/known_hosts)" in error


# -- FIDO keys ----------------------------------------------------------------------------------------

SK = b"sk-ssh-ed25519@openssh.com"


def _encode(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


class SecurityKeyAgent:
    """An agent with a FIDO key in software, which signs as the device does, for one connection."""

    def __init__(self, path: Path) -> None:
        self.key = Ed25519PrivateKey.generate()
        raw = self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.blob = _encode(SK, raw, b"ssh:")
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._listening.accept()
        with connection, connection.makefile("rb") as stream:
            while length := stream.read(4):
                request = stream.read(struct.unpack(">I", length)[0])
                if request[0] == 11:
                    answer = b"\x0c" + struct.pack(">I", 1) + _encode(self.blob, b"my token")
                else:
                    start = 5 + len(self.blob)
                    (size,) = struct.unpack_from(">I", request, start)
                    answer = b"\x0e" + _encode(self._sign(request[start + 4 : start + 4 + size]))
                connection.sendall(_encode(answer))

    def _sign(self, data: bytes) -> bytes:
        tail = b"\x01" + struct.pack(">I", 7)  # flag: the device was touched; its counter
        signed = hashlib.sha256(b"ssh:").digest() + tail + hashlib.sha256(data).digest()
        return _encode(SK, self.key.sign(signed)) + tail

    def close(self) -> None:
        self._listening.close()
        self._thread.join()


def test_a_fido_key_logs_in_through_an_agent(ssh_host: SshHost) -> None:
    path = ssh_host.folder / "token.sock"
    token = SecurityKeyAgent(path)
    with ssh_host.server.authorized_keys.open("a") as file:
        file.write(f"{SK.decode()} {base64.b64encode(token.blob).decode()}\n")
    config = ssh_host.write_config(
        ssh_host.server.config_block("h").replace("IdentityAgent none", f"IdentityAgent {path}")
    )
    text = config.read_text().replace("IdentitiesOnly yes", "").replace(str(ssh_host.good), "/none")
    assert log_in(ssh_host.write_config(text), "h") == ""
    token.close()


def test_a_fido_key_without_an_agent_is_in_the_error(ssh_host: SshHost) -> None:
    public = _encode(SK, bytes(32), b"ssh:")
    body = (
        b"openssh-key-v1\0"
        + _encode(b"none", b"none", b"")
        + struct.pack(">I", 1)
        + _encode(public, bytes(64))
    )
    lines = base64.encodebytes(body).decode()
    key = ssh_host.write(
        "token", f"-----BEGIN OPENSSH PRIVATE KEY-----\n{lines}-----END OPENSSH PRIVATE KEY-----\n"
    )
    error = log_in(
        ssh_host.write_config(ssh_host.server.config_block("h").replace(str(ssh_host.good), str(key))), "h"
    )
    assert f"{key} is a FIDO key (sk-ssh-ed25519@openssh.com), which only an agent can use here" in error


# -- the ssh_config of a run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sshd, Sshd]]:
    """Servers that represent the nested PVE and the leaf."""
    servers = tuple(Sshd(tmp_path_factory.mktemp(name)).start() for name in ("nested", "leaf"))
    yield servers[0], servers[1]
    for sshd in servers:
        sshd.stop()


OUTER = {
    "an alias with a jump host": (("ProxyJump near", "RemoteCommand none"), "far"),
    "an alias with a ProxyCommand": (("ProxyCommand ssh -F {config} -W [%h]:%p near",), "far"),
    "another name in known_hosts": (("HostKeyAlias far-key",), "far"),
    "a user in the name": ((), "{user}@far"),
    "an address with a scheme": ((), "ssh://{user}@far:{port}"),
    "an interactive command": (("RemoteCommand tmux attach", "RequestTTY yes"), "far"),
}


@pytest.mark.parametrize("what", list(OUTER))
def test_openssh_reaches_both_guests_with_the_ssh_config_of_the_run(
    ssh_host: SshHost, guests: tuple[Sshd, Sshd], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    lines, alias = OUTER[what]
    user, port = ssh_host.server.target().user, ssh_host.server.port
    config = tmp_path / "outer"
    filled = [line.replace("{config}", str(config)) for line in lines]
    known = tmp_path / "known"
    known.write_text(ssh_host.server.known_hosts.read_text() + f"far-key {ssh_host.host_key}\n")
    config.write_text(
        ssh_host.server.config_block("far", *filled).replace(str(ssh_host.server.known_hosts), str(known))
        + ssh_host.server.config_block("near")
        + "Match originalhost *,!far,!near,!none-such\n    ProxyJump none-such\n"
        "Host *\n    IdentityFile /none\n    User nobody\n    Port 1\n    UserKnownHostsFile /none\n"
        "Match final originalhost nested,nested-x,leaf-x\n    HostKeyAlias none\n"
    )
    run = Run.create(Settings(run_dir=tmp_path / "runs"), tmp_path)
    nested, leaf = guests
    for name, guest in (("nested-x", nested), ("leaf-x", leaf)):
        guest.authorized_keys.write_text(run.directory.ensure_key("run") + "\n")
        key = guest.host_keys["ed25519"].with_suffix(".pub").read_text()
        run.directory.pin_host_keys(name, [" ".join(key.split()[:2])])
    monkeypatch.chdir(tmp_path)
    written = run.directory.write_ssh_config(
        alias.replace("{user}", user).replace("{port}", str(port)),
        Path("outer"),
        "127.0.0.1",
        "nested-x",
        "127.0.0.1",
        "leaf-x",
    )
    # The file has port 22 and user root; the values of these servers are in front and have precedence.
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(
        f"Host nested nested-x\n    Port {nested.port}\n    User {user}\n"
        f"Host leaf leaf-x\n    Port {leaf.port}\n    User {user}\n"
        f"Host *\n    Include {written}\n"
    )
    assert log_in_twice(wrapper, "leaf") == ("", "")


def test_a_second_reading_of_the_users_file_does_not_apply_to_the_guests(tmp_path: Path) -> None:
    """With `Match final` ssh reads the file again, by the address: `Host` would not exclude the guests."""
    outer = tmp_path / "outer"
    outer.write_text("Host *\n    IdentityFile /theirs\n    Port 1\nMatch final all\n    Compression yes\n")
    run = Run.create(Settings(run_dir=tmp_path / "runs"), tmp_path)
    written = run.directory.write_ssh_config("far", outer, "127.0.0.1", "nested-x", "127.0.0.1", "leaf-x")
    for name in ("nested", "nested-x", "leaf", "leaf-x"):
        target = read_ssh_config(name, written, None, None)
        assert (target.port, target.identity_files) == (22, (run.directory.key,))


def test_ansible_reaches_the_leaf_with_the_ssh_config_of_the_run(
    ssh_host: SshHost, guests: tuple[Sshd, Sshd], tmp_path: Path
) -> None:
    outer = tmp_path / "outer"
    outer.write_text(
        ssh_host.server.config_block("far", "ProxyJump near") + ssh_host.server.config_block("near")
    )
    run = Run.create(Settings(run_dir=tmp_path / "runs"), tmp_path)
    text = ""
    for name, guest in zip(("nested-x", "leaf-x"), guests, strict=True):
        guest.authorized_keys.write_text(run.directory.ensure_key("run") + "\n")
        key = guest.host_keys["ed25519"].with_suffix(".pub").read_text()
        run.directory.pin_host_keys(name, [" ".join(key.split()[:2])])
        text += f"Host {name}\n    Port {guest.port}\n    User {guest.target().user}\n"
    written = run.directory.write_ssh_config("far", outer, "127.0.0.1", "nested-x", "127.0.0.1", "leaf-x")
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f"{text}Host *\n    Include {written}\n")
    (tmp_path / "ansible.cfg").write_text("")
    program = str(Path(sys.executable).with_name("ansible"))
    common = f"-F {wrapper} -o ControlMaster=no"
    argv = [program, "all", "-i", "leaf-x,", "-m", "raw", "-a", "echo in", "--ssh-common-args", common]
    environment = {
        **os.environ,
        "ANSIBLE_CONFIG": str(tmp_path / "ansible.cfg"),
        "ANSIBLE_HOME": str(tmp_path / "ansible"),
        "LC_ALL": "C.UTF-8",
    }
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, "in" in done.stdout.splitlines()) == (0, True), done.stdout + done.stderr
