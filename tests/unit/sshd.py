"""A real OpenSSH server for tests: an unprivileged port on loopback, with its own keys and files."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.ssh.connection import SshTarget

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))


def create_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """Create a key pair; return the path of the private key."""
    bits = ["-b", "2048"] if kind == "rsa" else []  # larger keys take seconds to create
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, *bits, "-N", passphrase, "-C", path.name, "-f", str(path)],
        check=True,
    )
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class Sshd:
    """A server. `start` returns when it listens; `stop` kills the server and all its sessions."""

    directory: Path
    host_key_types: Sequence[str] = ("ed25519",)
    options: Sequence[str] = ()
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.user_key = create_key(self.directory / "user_key")
        self.known_hosts = self.directory / "known_hosts"
        self.authorized_keys = self.directory / "authorized_keys"
        self.authorized_keys.write_text(self.user_key.with_suffix(".pub").read_text())
        self.host_keys = {t: create_key(self.directory / f"host_{t}", t) for t in self.host_key_types}
        self.write_known_hosts()

    def write_known_hosts(self, types: Sequence[str] | None = None) -> None:
        """Write known_hosts with the host keys of these types (default: all)."""
        self.known_hosts.write_text(
            "".join(
                f"[127.0.0.1]:{self.port} {self.host_keys[t].with_suffix('.pub').read_text()}"
                for t in types or self.host_key_types
            )
        )

    def replace_host_key(self, kind: str = "ed25519") -> None:
        """Replace the host key, from the next start on; known_hosts keeps the old one."""
        path = self.host_keys[kind]
        path.unlink()
        path.with_suffix(".pub").unlink()
        create_key(path, kind)

    def target(self, **changes: object) -> SshTarget:
        values: dict[str, object] = {
            "host": "127.0.0.1",
            "port": self.port,
            "user": getpass.getuser(),
            "identity_files": (self.user_key,),
            "known_hosts": (self.known_hosts,),
            "allow_agent": False,
            **changes,
        }
        return SshTarget(**values)  # type: ignore[arg-type]

    def config_block(self, alias: str, *lines: str) -> str:
        """A Host block of an ssh_config for this server."""
        return (
            "\n    ".join(
                (
                    f"Host {alias}",
                    "HostName 127.0.0.1",
                    f"Port {self.port}",
                    f"User {getpass.getuser()}",
                    f"IdentityFile {self.user_key}",
                    "IdentitiesOnly yes",
                    "IdentityAgent none",
                    f"UserKnownHostsFile {self.known_hosts}",
                    "StrictHostKeyChecking yes",
                    *lines,
                )
            )
            + "\n"
        )

    def start(self) -> Sshd:
        assert SSHD, "these tests need OpenSSH's sshd: apt-get install openssh-server"
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # its privilege separation directory
        config = self.directory / "sshd_config"
        config.write_text(
            "\n".join(
                [
                    *self.options,  # in front: in sshd, the first value of an option is used
                    f"Port {self.port}",
                    "ListenAddress 127.0.0.1",
                    *(f"HostKey {path}" for path in self.host_keys.values()),
                    f"PidFile {self.directory / 'sshd.pid'}",
                    f"AuthorizedKeysFile {self.authorized_keys}",
                    "StrictModes no",
                    "UsePAM no",
                    "PasswordAuthentication no",
                    "KbdInteractiveAuthentication no",
                    "PermitRootLogin prohibit-password",
                    "LogLevel ERROR",
                    "MaxStartups 50:30:100",
                    # bash reads ~/.bashrc below sshd, but only as the outermost shell: with SHLVL
                    # the start-up file of the user (which may take 100 ms) is not read.
                    "SetEnv SHLVL=1",
                ]
            )
            + "\n"
        )
        log = (self.directory / "sshd.log").open("ab")
        # In a new session, apart from the process group of pytest.
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(config)],
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        log.close()
        wait_until(self._is_listening, deadline=Deadline(10), what=f"sshd on port {self.port}")
        return self

    def _is_listening(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.directory / "sshd.log").read_text()
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def children(self) -> list[int]:
        """Process ids of the sessions, deepest first."""
        assert self.process is not None
        return _descendants(self.process.pid)

    def stop(self, *, spare_commands: bool = False) -> None:
        """Kill the server and its sessions, and (unless spared) the commands that run in them."""
        if self.process is None:
            return
        pids = [pid for pid in self.children() if not spare_commands or _name(pid).startswith("sshd")]
        self.process.kill()
        self.process.wait()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process = None


MakeServer = Callable[..., Sshd]
"""The fixture `make_server`: creates a server with a name and options."""


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    try:
        direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    pids = []
    for child in map(int, direct):
        pids += [*_descendants(child), child]
    return pids
