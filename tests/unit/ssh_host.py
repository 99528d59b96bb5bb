"""A host with keys, certificates and an agent for tests of ssh configurations, and logins with real ssh."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sshd import Sshd, create_key

from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.connection import SshConnection


def sign(authority: Path, key: Path, *options: str) -> Path:
    """Create a certificate for `key`, beside the key."""
    argv = ["ssh-keygen", "-q", "-s", str(authority), "-I", key.name, *options, f"{key}.pub"]
    subprocess.run(argv, check=True, capture_output=True)
    return Path(f"{key}-cert.pub")


@dataclass
class SshHost:
    """A server that accepts `good` and certificates of `ca`; its host key has a certificate of `ca`, too."""

    folder: Path
    server: Sshd = field(init=False)

    def __post_init__(self) -> None:
        self.ca = create_key(self.folder / "ca")
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
        """The name of the server in known_hosts."""
        return f"[127.0.0.1]:{self.server.port}"

    def write(self, name: str, text: str, mode: int = 0o600) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def create_key(
        self, name: str, *, kind: str = "ed25519", passphrase: str = "", accepted: bool = False
    ) -> Path:
        path = create_key(self.folder / name, kind, passphrase)
        if accepted:
            with self.server.authorized_keys.open("a") as file:
                file.write(Path(f"{path}.pub").read_text())
        return path

    def write_config(self, text: str) -> Path:
        """Write a configuration, with {port}, {dir}, {user}, {good} and {known} filled in."""
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


def log_in(config: Path, alias: str) -> str:
    """Log in at `alias` with this project and run a command: "" for success, else the error."""
    try:
        with SshConnection(read_ssh_config(alias, config, None, None)) as ssh:
            return "" if ssh.run("echo in", timeout=20).stdout == "in\n" else "wrong output"
    except PveError as error:
        return f"{type(error).__name__}: {error}"


def log_in_twice(config: Path, alias: str) -> tuple[str, str]:
    """Log in at `alias` with this project and with OpenSSH: "" for success, else the error, for both."""
    argv = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", alias, "echo in"]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        error = log_in(config, alias)
        output = process.communicate(timeout=60)[0].decode(errors="replace")
    return error, "" if process.returncode == 0 and output.endswith("in\n") else output or "failed"


@contextlib.contextmanager
def run_agent(folder: Path, *keys: Path, options: tuple[str, ...] = ()) -> Iterator[Path]:
    """Run an SSH agent with these keys (without passphrase, or with "word"); yields its socket."""
    sock = folder / "agent.sock"
    askpass = folder / "ask"
    askpass.write_text("#!/bin/sh\necho word\n")
    askpass.chmod(0o700)
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(sock)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = {**os.environ, "SSH_AUTH_SOCK": str(sock), "SSH_ASKPASS": str(askpass), "DISPLAY": ":0"}
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
