"""The login at an SSH target: socket, check of the host key, authentication of the user."""

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
from pytest_nestedpve.pve.ssh.proxy_command import ProxyProcess

if TYPE_CHECKING:
    import paramiko

    from pytest_nestedpve.pve.ssh.known_hosts_files import KnownKey
    from pytest_nestedpve.pve.ssh.target import SshTarget

_LOGGER = "pytest_nestedpve.paramiko"
# HTTP; SMTP, FTP and similar; POP3; IMAP. A busy sshd also sends a line before it closes the connection.
_OTHER_SERVICE = re.compile(r"HTTP/\d|[1-5]\d\d[ -]|\+OK|\* OK")


class NotReady(Exception):
    """The service accepted the connection but began no SSH session: the attempt can be retried."""


def log_in(
    target: SshTarget, open_socket: Callable[[Deadline], Any] | None
) -> tuple[paramiko.Transport, Callable[[], None]]:
    """A transport that is logged in, and the function to call after closing it.

    `open_socket` opens a socket-like object through a jump host; None: connect directly, or by the proxy
    command. Within the connect timeout, attempts are repeated only if sshd is not ready: a reset or a
    broken banner while it starts, or its limit on unauthenticated connections.
    Raises HostUnreachable, HostKeyMismatch, LoginRefused.
    """
    deadline = Deadline(target.connect_timeout)
    pause = 0.1
    while True:
        try:
            return _attempt(target, open_socket, deadline)
        except NotReady as error:
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

    _silence_log()
    proxy: ProxyProcess | None = None
    sock: Any
    if open_socket is not None:
        sock = open_socket(deadline)
    elif target.proxy_command:
        proxy = ProxyProcess(target.proxy_command)
        sock = proxy.socket
    else:
        sock = _connect(target, deadline)
    close_proxy = proxy.close if proxy is not None else _do_nothing
    transport = None
    try:
        transport = Transport(sock, disabled_algorithms=algorithms.find_disabled(target))
        transport.set_log_channel(_LOGGER)
        transport.daemon = True
        limit = max(0.1, deadline.remaining())
        transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = limit
        known = known_hosts_files.find_entries(
            target.known_hosts, target.host, target.port, target.host_key_alias
        )
        allowed = algorithms.select_host_keys(target, transport.preferred_keys)
        transport.host_key_algorithms = known_hosts_files.order_algorithms(known, allowed)
        try:
            _negotiate(transport, target, deadline)
        except (NotReady, HostUnreachable) as error:
            if proxy is not None and (end := proxy.describe_end()) is not None:
                raise HostUnreachable(
                    f"the ProxyCommand of {target.text} ended ({end}) before an SSH session began: "
                    f"`{target.proxy_command}`. Test it by hand: `{target.command}`"
                ) from error
            raise
        _check_host_key(transport, target, known)
        _authenticate(transport, target, deadline)
    except BaseException:
        if transport is not None:
            transport.close()
        with suppress(Exception):
            sock.close()
        close_proxy()
        raise
    return transport, close_proxy


def _check_host_key(transport: paramiko.Transport, target: SshTarget, known: list[KnownKey]) -> None:
    key = transport.get_remote_server_key()
    name, type, blob = target.known_as, key.get_name(), key.asbytes()
    remarks = [target.ignored_leniency] if target.ignored_leniency else []
    if target.revoked_host_keys is not None:
        known_hosts_files.refuse_revoked_by(target.revoked_host_keys, type, blob, name)
    presented = getattr(key, "public_blob", None)
    if presented is not None:
        certificate = host_certificates.HostCertificate(presented.key_type, presented.key_blob)
        if target.revoked_host_keys is not None:
            known_hosts_files.refuse_revoked_by(
                target.revoked_host_keys, presented.key_type, presented.key_blob, name
            )
        known_hosts_files.refuse_revoked(known, blob, f"{type} {known_hosts_files.fingerprint(blob)}", name)
        refusal = host_certificates.find_refusal(certificate, known, target.host_key_alias or target.host)
        if refusal is None:
            return
        remarks += [refusal] if refusal else []
    elif any(line.marker == "@cert-authority" for line in known):
        remarks.append("known_hosts has a @cert-authority for it, but the host presented no certificate")
    direct = target.host_key_alias is None and target.jump is None and not target.proxy_command
    port = "" if target.port == 22 else f"-p {target.port} "
    scan = f"ssh-keyscan {port}-t {known_hosts_files.short_type(type)} {target.host}" if direct else None
    advice = known_hosts_files.Advice(target.first_login, scan, "; ".join(remarks))
    files = target.known_hosts
    known_hosts_files.check_key(known, type=type, blob=blob, name=name, files=files, advice=advice)


def _negotiate(transport: paramiko.Transport, target: SshTarget, deadline: Deadline) -> None:
    import paramiko

    lines = _record_lines(transport)
    try:
        transport.start_client(timeout=deadline.remaining())
    except paramiko.ssh_exception.IncompatiblePeer as error:
        raise SshError(f"{target.text} and this client have no algorithm in common: {error}") from error
    except (EOFError, ConnectionError, paramiko.SSHException) as error:
        if lines and _OTHER_SERVICE.match(lines[0]):
            raise HostUnreachable(
                f"{target.text}: expected an sshd at port {target.port}, found another service, which sends "
                f"{lines[0][:80]!r}. Check Port and HostName"
            ) from error
        if lines and not any(line.startswith("SSH-") for line in lines):
            # sshd itself does this when it has too many connections: "Exceeded MaxStartups".
            raise NotReady(f"it sends {lines[0][:80]!r} and closes the connection") from error
        text = str(error) or "the connection was closed before a banner arrived"
        raise NotReady(text) from error
    except OSError as error:
        raise HostUnreachable(f"the connection to {target.text} was lost: {error}") from error
    try:
        transport.get_remote_server_key()
    except paramiko.SSHException as error:
        # paramiko returns without an error when its time limit has passed.
        raise HostUnreachable(
            f"{target.text} accepted the connection, but no SSH session began within {deadline.limit:g} s. "
            "Is sshd overloaded, or is this another service?"
        ) from error


def _record_lines(transport: paramiko.Transport) -> list[str]:
    """A list of the server's lines before the key exchange, as they arrive; paramiko keeps the last only."""
    lines: list[str] = []
    readline = transport.packetizer.readline

    def read_line(timeout: float) -> str:
        line: str = readline(timeout)
        lines.append(line)
        return line

    transport.packetizer.readline = read_line  # type: ignore[method-assign]
    return lines


def _authenticate(transport: paramiko.Transport, target: SshTarget, deadline: Deadline) -> None:
    problems: list[str] = []
    with offered_keys.connect_agent(target, problems) as agent:
        _offer(transport, target, offered_keys.list_keys(target, agent, problems), problems, deadline)


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
            further = transport.auth_publickey(target.user, key)
        except paramiko.BadAuthenticationType as error:
            raise LoginRefused(
                f"{target.text} does not accept keys, only {', '.join(error.allowed_types)}: "
                "allow public keys for this user on that host"
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
                    "Name the right key with IdentityFile and IdentitiesOnly yes in ~/.ssh/config"
                ) from error
            problems.append(f"{name}: {error}")
        else:
            if not further:
                return
            raise LoginRefused(
                f"{target.text} requires {', '.join(further)} after the key {name}: not supported"
            )
    raise LoginRefused(
        f"{target.text} accepted none of the keys offered: {', '.join(tried) or 'there was none to offer'}"
        + "".join(f"; {problem}" for problem in problems)
        + f". Try `{target.command}` by hand; add the public key to the user's authorized_keys on that host"
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
            # Without TCP_NODELAY each request waits for a delayed acknowledgement: 54 ms instead of 6.
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
            f"{deadline.limit:g} s, found no answer. Is it switched on, is the address right, does a "
            "firewall drop packets?"
        ) from last
    raise HostUnreachable(
        f"no connection to {target.text}, port {target.port}: {last.strerror or last}. "
        "Is it switched on, is sshd running there?"
    ) from last


def _resolve(target: SshTarget, deadline: Deadline) -> list[Any]:
    # In a thread: without an answer of the name server, getaddrinfo takes longer than the limit.
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(target.address_family, 0)

    def resolve() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, family, socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=resolve, daemon=True, name="nested-pve-resolve").start()
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


def _do_nothing() -> None:
    return None


def _silence_log() -> None:
    # paramiko logs tracebacks of its threads as errors; the relevant ones are raised to the caller.
    logger = logging.getLogger(_LOGGER)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
