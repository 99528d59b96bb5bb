"""What the tests of ssh configurations share: a host with keys, certificates and an agent, and real ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sshd import Sshd, make_key

from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.connection import SshConnection


def sign(authority: Path, key: Path, *options: str) -> Path:
    """A certificate for `key`, beside it."""
    argv = ["ssh-keygen", "-q", "-s", str(authority), "-I", key.name, *options, f"{key}.pub"]
    subprocess.run(argv, check=True, capture_output=True)
    return Path(f"{key}-cert.pub")


@dataclass
class World:
    """A server that accepts `good` and certificates of `ca`; its host key has a certificate of `ca`, too."""

    folder: Path
    server: Sshd = field(init=False)

    def __post_init__(self) -> None:
        self.ca = make_key(self.folder / "ca")
        self.server = Sshd(
            self.folder / "server",
            options=(
                f"TrustedUserCAKeys {self.ca}.pub",
                f"HostCertificate {self.folder}/server/host_ed25519-cert.pub",
                "MaxAuthTries 4",
            ),
        )
        self.good = self.server.user_key
        self.certify_host("-n", "127.0.0.1")

    def certify_host(self, *options: str) -> None:
        sign(self.ca, self.server.host_keys["ed25519"], "-h", *options)

    @property
    def host_key(self) -> str:
        return self.server.host_keys["ed25519"].with_suffix(".pub").read_text().strip()

    @property
    def name(self) -> str:
        """How known_hosts calls the server."""
        return f"[127.0.0.1]:{self.server.port}"

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def key(self, name: str, *, kind: str = "ed25519", passphrase: str = "", accepted: bool = False) -> Path:
        path = make_key(self.folder / name, kind, passphrase)
        if accepted:
            with self.server.authorized_keys.open("a") as file:
                file.write(Path(f"{path}.pub").read_text())
        return path

    def config(self, text: str) -> Path:
        """A configuration; {x} stands for what this world has."""
        filled = text
        for key, value in {
            "{port}": str(self.server.port),
            "{dir}": str(self.folder),
            "{user}": self.server.target().user,
            "{good}": str(self.good),
            "{known}": str(self.server.known_hosts),
        }.items():
            filled = filled.replace(key, value)
        return self.write("config", filled)


def ours(config: Path, alias: str) -> str:
    """What this project makes of `alias`: "" when a command ran there, else the error."""
    try:
        with SshConnection(read_ssh_config(alias, config, None, None)) as ssh:
            return "" if ssh.run("echo in", timeout=20).stdout == "in\n" else "wrong output"
    except PveError as error:
        return f"{type(error).__name__}: {error}"


def both(config: Path, alias: str) -> tuple[str, str]:
    """What this project and OpenSSH make of `alias`: "" for success, else the error."""
    argv = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", alias, "echo in"]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        mine = ours(config, alias)
        theirs = process.communicate(timeout=60)[0].decode(errors="replace")
    return mine, "" if process.returncode == 0 and theirs.endswith("in\n") else theirs or "failed"


@contextlib.contextmanager
def agent(folder: Path, *keys: Path, options: tuple[str, ...] = ()) -> Iterator[Path]:
    """An SSH agent of its own that holds these keys (whose passphrase is none or "word"); its socket."""
    sock = folder / "agent.sock"
    ask = folder / "ask"
    ask.write_text("#!/bin/sh\necho word\n")
    ask.chmod(0o700)
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = {**os.environ, "SSH_AUTH_SOCK": str(sock), "SSH_ASKPASS": str(ask), "DISPLAY": ":0"}
    environment["SSH_ASKPASS_REQUIRE"] = "force"
    try:
        wait_until(sock.exists, deadline=Deadline(10), what="the agent")
        for key in keys:
            subprocess.run(
                ["ssh-add", "-q", *options, str(key)],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
            )
        yield sock
    finally:
        process.terminate()
        process.wait()
        sock.unlink(missing_ok=True)
