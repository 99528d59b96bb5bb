"""From an SSH target to an authenticated paramiko transport: socket, host key, login."""

from __future__ import annotations

import logging
import os
import queue
import shlex
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve import knownhosts
from pytest_nestedpve.pve.errors import HostUnreachable, LoginRefused, SshError
from pytest_nestedpve.timing import Deadline

if TYPE_CHECKING:
    import paramiko

_LOGGER = "pytest_nestedpve.paramiko"


@dataclass(frozen=True)
class SshTarget:
    """Where and how to log in; what `ssh -G` would say. `alias` is what the user typed.

    `connect_timeout` (seconds) bounds everything up to the login, per attempt to connect.
    """

    host: str
    port: int = 22
    user: str = "root"
    identity_files: tuple[Path, ...] = ()
    certificate_files: tuple[Path, ...] = ()
    known_hosts: tuple[Path, ...] = ()
    host_key_alias: str | None = None
    allow_agent: bool = True
    identity_agent: str | None = None
    identities_only: bool = False
    connect_timeout: float = 10.0
    jump: SshTarget | None = None
    proxy_command: str | None = None
    alias: str = ""

    @property
    def text(self) -> str:
        """For messages: the alias and what it stands for."""
        where = f"{self.user}@{self.host}" + ("" if self.port == 22 else f":{self.port}")
        return f"{self.alias} ({where})" if self.alias and self.alias != self.host else where

    @property
    def by_hand(self) -> str:
        """The ssh command a person would type."""
        if self.alias:
            return f"ssh {self.alias}"
        jump = f"-J {self.jump.user}@{self.jump.host}:{self.jump.port} " if self.jump else ""
        port = "" if self.port == 22 else f"-p {self.port} "
        return f"ssh {jump}{port}{self.user}@{self.host}"


class Slow(Exception):
    """The far end was there but not ready: worth another attempt."""


def log_in(
    target: SshTarget, open_socket: Callable[[Deadline], Any] | None
) -> tuple[paramiko.Transport, Callable[[], None]]:
    """A transport that is logged in, and what to call when it is done with.

    `open_socket` gives a socket-like thing through a jump host; None connects directly (or by the
    proxy command). Attempts are repeated within the connect limit only where sshd is merely slow: a
    reset or a broken banner while it boots, or its limit on unauthenticated connections.
    Raises HostUnreachable, HostKeyMismatch, LoginRefused.
    """
    deadline = Deadline(target.connect_timeout)
    pause = 0.1
    while True:
        try:
            return _attempt(target, open_socket, deadline)
        except Slow as error:
            if deadline.remaining() <= pause:
                raise HostUnreachable(
                    f"{target.text} accepts connections but no SSH session began within "
                    f"{deadline.limit:g} s: {error}. Is sshd still starting, or is this another service?"
                ) from error.__cause__
            threading.Event().wait(pause)
            pause = min(pause * 2, 1.0)


def _attempt(
    target: SshTarget, open_socket: Callable[[Deadline], Any] | None, deadline: Deadline
) -> tuple[paramiko.Transport, Callable[[], None]]:
    from pytest_nestedpve.pve.channels import Transport

    _quiet()
    if open_socket is not None:
        sock, done = open_socket(deadline), _nothing
    elif target.proxy_command:
        sock, done = _proxy(target.proxy_command)
    else:
        sock, done = _connect(target, deadline), _nothing
    transport = None
    try:
        transport = Transport(sock)
        transport.set_log_channel(_LOGGER)
        transport.daemon = True
        left = max(0.1, deadline.remaining())
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = left
        known = knownhosts.known_for(target.known_hosts, target.host, target.port, target.host_key_alias)
        options = transport.get_security_options()
        options.key_types = knownhosts.algorithms(known, options.key_types)
        _negotiate(transport, target, deadline)
        key = transport.get_remote_server_key()
        knownhosts.judge(
            known,
            type=key.get_name(),
            blob=key.asbytes(),
            host=target.host,
            port=target.port,
            alias=target.host_key_alias,
            files=target.known_hosts,
            command=target.by_hand,
        )
        _authenticate(transport, target, deadline)
    except BaseException:
        if transport is not None:
            transport.close()
        with suppress(Exception):
            sock.close()
        done()
        raise
    return transport, done


def _negotiate(transport: paramiko.Transport, target: SshTarget, deadline: Deadline) -> None:
    import paramiko

    try:
        transport.start_client(timeout=deadline.remaining())
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise SshError(f"{target.text} and this client have no algorithm in common: {error}") from error
    except (EOFError, ConnectionError, paramiko.SSHException) as error:
        text = str(error) or "the connection was closed before a banner came"
        raise Slow(text) from error
    except OSError as error:
        raise HostUnreachable(f"the connection to {target.text} broke: {error}") from error
    try:
        transport.get_remote_server_key()
    except paramiko.SSHException as error:
        # paramiko returns without a word when its limit has passed.
        raise HostUnreachable(
            f"{target.text} accepted the connection, but no SSH session began within {deadline.limit:g} s. "
            "Is sshd overloaded, or is this another service?"
        ) from error


def _authenticate(transport: paramiko.Transport, target: SshTarget, deadline: Deadline) -> None:
    problems: list[str] = []
    with _agent_keys(target, problems) as agent:
        _offer(transport, target, _keys(target, agent, problems), problems, deadline)


def _offer(
    transport: paramiko.Transport,
    target: SshTarget,
    keys: Iterator[tuple[str, Any]],
    problems: list[str],
    deadline: Deadline,
) -> None:
    import paramiko

    tried: list[str] = []
    for name, key in keys:
        if deadline.expired:
            raise HostUnreachable(f"the login at {target.text} took longer than {deadline.limit:g} s")
        transport.auth_timeout = max(0.1, deadline.remaining())
        try:
            rest = transport.auth_publickey(target.user, key)
        except paramiko.BadAuthenticationType as error:
            raise LoginRefused(
                f"{target.text} does not accept keys, only {', '.join(error.allowed_types)}: "
                "allow public keys for this user there"
            ) from error
        except paramiko.AuthenticationException as error:
            if "timeout" in str(error).lower():
                raise HostUnreachable(
                    f"{target.text} did not answer the login within {deadline.limit:g} s"
                ) from error
            tried.append(name)
        except (paramiko.SSHException, EOFError, OSError) as error:
            tried.append(name)
            if not transport.is_active():
                raise LoginRefused(
                    f"{target.text} ended the login after {len(tried)} keys ({', '.join(tried)}): {error}. "
                    "Name the right one with IdentityFile and IdentitiesOnly yes in ~/.ssh/config"
                ) from error
            problems.append(f"{name}: {error}")
        else:
            if not rest:
                return
            raise LoginRefused(f"{target.text} wants {', '.join(rest)} after the key {name}: not supported")
    raise LoginRefused(
        f"{target.text} accepted none of the keys offered: {', '.join(tried) or 'there was none to offer'}"
        + "".join(f"; {problem}" for problem in problems)
        + f". Try `{target.by_hand}` by hand; put the public key into the user's authorized_keys there"
    )


def _keys(target: SshTarget, agent: tuple[Any, ...], problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Keys in the order of OpenSSH: the agent's that are configured, the agent's others, files."""
    in_agent = {key.asbytes(): key for key in agent}
    files = [(path, _public_blob(path)) for path in target.identity_files]
    named = {blob for _, blob in files if blob}
    for blob, key in in_agent.items():
        if blob in named:
            yield f"{_comment(key)} (agent)", key
    if not target.identities_only:
        for blob, key in in_agent.items():
            if blob not in named:
                yield f"{_comment(key)} (agent)", key
    for path, blob in files:
        if blob in in_agent:
            continue
        key = _load(path, problems)
        if key is None:
            continue
        for certificate in target.certificate_files:
            with suppress(Exception):
                # Raises when it is another key's certificate.
                key.load_certificate(str(certificate))
                break
        if key.public_blob is not None:
            yield f"{path} with its certificate", key
            key.public_blob = None
        yield str(path), key


def _load(path: Path, problems: list[str]) -> Any:
    import paramiko
    from cryptography.exceptions import UnsupportedAlgorithm

    if not path.exists():
        return None
    try:
        return paramiko.PKey.from_path(str(path))
    except (paramiko.PasswordRequiredException, TypeError):
        problems.append(
            f"{path} is protected by a passphrase and not in the agent: `ssh-add {shlex.quote(str(path))}`"
        )
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
    except (paramiko.SSHException, ValueError, UnsupportedAlgorithm, paramiko.pkey.UnknownKeyType) as error:
        why = str(error)[:100] or type(error).__name__
        problems.append(f"{path} is not a private key that can be used: {why}")
    return None


def _public_blob(path: Path) -> bytes | None:
    import base64

    try:
        fields = Path(f"{path}.pub").read_text().split()
        return base64.b64decode(fields[1])
    except (OSError, IndexError, ValueError):
        return None


def _comment(key: Any) -> str:
    return str(getattr(key, "comment", "") or knownhosts.fingerprint(key.asbytes()))


@contextmanager
def _agent_keys(target: SshTarget, problems: list[str]) -> Iterator[tuple[Any, ...]]:
    """The keys of the SSH agent, none if there is none; they sign only within the block."""
    path = target.identity_agent or "SSH_AUTH_SOCK"
    if path in ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK"):
        path = os.environ.get("SSH_AUTH_SOCK", "")
    if not target.allow_agent or path in ("", "none"):
        yield ()
        return
    from paramiko.agent import AgentSSH

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)  # an agent may ask its user before it signs
        agent = AgentSSH()
        keys: tuple[Any, ...] = ()
        try:
            sock.connect(os.path.expanduser(path))
            agent._connect(sock)  # type: ignore[attr-defined]
            keys = tuple(agent.get_keys())
        except Exception as error:
            problems.append(f"the SSH agent at {path} cannot be used: {error}")
        yield keys


def _connect(target: SshTarget, deadline: Deadline) -> socket.socket:
    last: OSError | None = None
    for family, kind, proto, _, address in _resolve(target, deadline):
        sock = socket.socket(family, kind, proto)
        try:
            sock.settimeout(max(0.05, deadline.remaining()))
            sock.connect(address)
            # Without it each request waits for the other side's delayed acknowledgement: 54 ms, not 6.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except OSError as error:
            sock.close()
            last = error
            if deadline.expired:
                break
        else:
            return sock
    if last is None or isinstance(last, TimeoutError):
        raise HostUnreachable(
            f"{target.text} does not answer: expected a connection to port {target.port} within "
            f"{deadline.limit:g} s, found silence. Is it switched on, the address right, a firewall between?"
        ) from last
    raise HostUnreachable(
        f"no connection to {target.text}, port {target.port}: {last.strerror or last}. "
        "Is it switched on, is sshd running there?"
    ) from last


def _resolve(target: SshTarget, deadline: Deadline) -> list[Any]:
    # In a thread: a name server that is silent would hold us far beyond the limit.
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True, name="nested-pve-resolve").start()
    try:
        answer = answers.get(timeout=max(0.05, deadline.remaining()))
    except queue.Empty as error:
        raise HostUnreachable(
            f"the name {target.host} was not resolved within {deadline.limit:g} s: check DNS"
        ) from error
    if isinstance(answer, BaseException):
        raise HostUnreachable(
            f"unknown host {target.alias or target.host}: the name {target.host} does not resolve "
            f"({getattr(answer, 'strerror', None) or answer}). Expected a Host entry in ~/.ssh/config or "
            "a name in DNS"
        ) from answer
    return list(answer)


def _proxy(command: str) -> tuple[socket.socket, Callable[[], None]]:
    # A socket pair instead of paramiko.ProxyCommand: real limits, and the child goes with the connection.
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        ["/bin/sh", "-c", f"exec {command}"],
        stdin=theirs.fileno(),
        stdout=theirs.fileno(),
        start_new_session=True,
    )
    theirs.close()

    def done() -> None:
        ours.close()
        process.terminate()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    return ours, done


def _nothing() -> None:
    return None


def _quiet() -> None:
    # paramiko logs tracebacks of its threads as errors; what matters of them is raised to the caller.
    logger = logging.getLogger(_LOGGER)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
