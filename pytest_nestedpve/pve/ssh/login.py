"""From an SSH target to an authenticated paramiko transport: socket, host key, login."""

from __future__ import annotations

import logging
import queue
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import HostUnreachable, LoginRefused, SshError
from pytest_nestedpve.pve.ssh import algorithms, host_certificates, known_hosts_files, offered_keys
from pytest_nestedpve.pve.ssh.proxy_command import Proxy

if TYPE_CHECKING:
    import paramiko

    from pytest_nestedpve.pve.ssh.known_hosts_files import KnownKey
    from pytest_nestedpve.pve.ssh.target import SshTarget

_LOGGER = "pytest_nestedpve.paramiko"
# HTTP; SMTP, FTP and the like; POP3; IMAP. An sshd that refuses for now says a line of its own, too.
_OTHER_SERVICE = re.compile(r"HTTP/\d|[1-5]\d\d[ -]|\+OK|\* OK")


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
    from pytest_nestedpve.pve.ssh.channels import Transport

    _quiet()
    proxy: Proxy | None = None
    sock: Any
    if open_socket is not None:
        sock = open_socket(deadline)
    elif target.proxy_command:
        proxy = Proxy(target.proxy_command)
        sock = proxy.socket
    else:
        sock = _connect(target, deadline)
    done = proxy.close if proxy is not None else _nothing
    transport = None
    try:
        transport = Transport(sock, disabled_algorithms=algorithms.disabled(target))
        transport.set_log_channel(_LOGGER)
        transport.daemon = True
        left = max(0.1, deadline.remaining())
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = left
        known = known_hosts_files.known_for(
            target.known_hosts, target.host, target.port, target.host_key_alias
        )
        wanted = algorithms.host_keys(target, transport.preferred_keys)
        transport.wanted_host_keys = known_hosts_files.algorithms(known, wanted)
        try:
            _negotiate(transport, target, deadline)
        except (Slow, HostUnreachable) as error:
            if proxy is not None and (ended := proxy.ended()) is not None:
                raise HostUnreachable(
                    f"the ProxyCommand of {target.text} ended ({ended}) before an SSH session began: "
                    f"`{target.proxy_command}`. Does it work by hand: `{target.by_hand}`?"
                ) from error
            raise
        _check_host_key(transport, target, known)
        _authenticate(transport, target, deadline)
    except BaseException:
        if transport is not None:
            transport.close()
        with suppress(Exception):
            sock.close()
        done()
        raise
    return transport, done


def _check_host_key(transport: paramiko.Transport, target: SshTarget, known: list[KnownKey]) -> None:
    key = transport.get_remote_server_key()
    name, type, blob = target.known_as, key.get_name(), key.asbytes()
    remarks = [target.lenient] if target.lenient else []
    if target.revoked_host_keys is not None:
        known_hosts_files.refuse_revoked_by(target.revoked_host_keys, type, blob, name)
    shown = getattr(key, "public_blob", None)
    if shown is not None:
        certificate = host_certificates.HostCertificate(shown.key_type, shown.key_blob)
        if target.revoked_host_keys is not None:
            known_hosts_files.refuse_revoked_by(
                target.revoked_host_keys, shown.key_type, shown.key_blob, name
            )
        known_hosts_files.refuse_revoked(known, blob, f"{type} {known_hosts_files.fingerprint(blob)}", name)
        refusal = host_certificates.refusal(certificate, known, target.host_key_alias or target.host)
        if refusal is None:
            return
        remarks += [refusal] if refusal else []
    elif any(line.marker == "@cert-authority" for line in known):
        remarks.append("known for it is a @cert-authority, but the host showed no certificate")
    direct = target.host_key_alias is None and target.jump is None and not target.proxy_command
    port = "" if target.port == 22 else f"-p {target.port} "
    scan = f"ssh-keyscan {port}-t {known_hosts_files.kind(type)} {target.host}" if direct else None
    advice = known_hosts_files.Advice(target.first_login, scan, "; ".join(remarks))
    known_hosts_files.judge(known, type=type, blob=blob, name=name, files=target.known_hosts, advice=advice)


def _negotiate(transport: paramiko.Transport, target: SshTarget, deadline: Deadline) -> None:
    import paramiko

    heard = _overheard(transport)
    try:
        transport.start_client(timeout=deadline.remaining())
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise SshError(f"{target.text} and this client have no algorithm in common: {error}") from error
    except (EOFError, ConnectionError, paramiko.SSHException) as error:
        if heard and _OTHER_SERVICE.match(heard[0]):
            raise HostUnreachable(
                f"{target.text}: expected an sshd at port {target.port}, found another service, which says "
                f"{heard[0][:80]!r}. Check Port and HostName"
            ) from error
        if heard and not any(line.startswith("SSH-") for line in heard):
            # Also sshd's own way to say that it takes no more connections: "Exceeded MaxStartups".
            raise Slow(f"it says {heard[0][:80]!r} and closes the connection") from error
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


def _overheard(transport: paramiko.Transport) -> list[str]:
    """The lines in which the far end introduces itself, as they come; paramiko keeps only the last."""
    heard: list[str] = []
    readline = transport.packetizer.readline

    def listen(timeout: float) -> str:
        line: str = readline(timeout)
        heard.append(line)
        return line

    transport.packetizer.readline = listen  # type: ignore[method-assign]
    return heard


def _authenticate(transport: paramiko.Transport, target: SshTarget, deadline: Deadline) -> None:
    problems: list[str] = []
    with offered_keys.agent_of(target, problems) as agent:
        _offer(transport, target, offered_keys.keys_for(target, agent, problems), problems, deadline)


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


def _connect(target: SshTarget, deadline: Deadline) -> socket.socket:
    last: OSError | None = None
    for family, kind, proto, _, address in _resolve(target, deadline):
        sock = socket.socket(family, kind, proto)
        try:
            sock.settimeout(max(0.05, deadline.remaining()))
            if target.bind_address:
                sock.bind((target.bind_address, 0))
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
    family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(target.address_family, 0)

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, family, socket.SOCK_STREAM))
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


def _nothing() -> None:
    return None


def _quiet() -> None:
    # paramiko logs tracebacks of its threads as errors; what matters of them is raised to the caller.
    logger = logging.getLogger(_LOGGER)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
