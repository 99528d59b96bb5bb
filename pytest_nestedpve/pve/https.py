"""The API over HTTPS: port 8006 of a host, through its SSH connection, with one API token."""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlencode

from pytest_nestedpve.pve.answers import checked
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import (
    BadParameter,
    CommandTimeout,
    NodeUnreachable,
    PermissionDenied,
    PveError,
    SshError,
    UnreadableAnswer,
    classify,
)

if TYPE_CHECKING:
    import urllib3

PORT = 8006
ANSWER_LIMIT = 64 * 1024 * 1024
# pveproxy closes idle connections after some seconds. One that was idle for longer than this is not reused: a
# request that is sent while the proxy closes the connection may or may not take effect.
IDLE_LIMIT = 2.0
_CONNECTIONS = 8

_deadline: ContextVar[Deadline | None] = ContextVar("nested_pve_https_deadline", default=None)


class NoHttps(PveError):
    """HTTPS cannot be used with this host now; nothing was sent. The message has the reason."""


class Untrusted(NoHttps):
    """The certificate is not the one that root read over SSH."""


class NotDelivered(NoHttps):
    """This request did not reach the API: no connection, or the proxy could not pass it on."""


class Unauthorized(PermissionDenied):
    """The token was not accepted: deleted, expired, or never valid. The call had no effect."""


class ReplyLost(SshError):
    """The request was sent and its answer did not arrive: its outcome is unknown."""


@dataclass(frozen=True)
class Trust:
    """The certificates that the host's certificate is checked against: PEM text that root read over SSH.

    `name` is one of the names in the certificate that the host serves.
    """

    pem: str
    name: str

    def context(self) -> ssl.SSLContext:
        """A context that accepts only certificates of this trust, under this name."""
        context = ssl.create_default_context(cadata=self.pem)
        # Root read the certificate that the proxy serves: it is trusted itself, without its issuer. Issuers
        # of a pve-cluster before 9.1.2 lack the key usage that strict checks require (facts 66).
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.verify_flags &= ~ssl.VERIFY_X509_STRICT
        return context


def read_trust(pem: str) -> Trust:
    """The trust for PEM text whose first certificate is the one that the proxy serves.

    Raises NoHttps when there is no certificate, or no name in it.
    """
    from cryptography import x509

    try:
        served = x509.load_pem_x509_certificates(pem.encode())[0]
        names = served.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise NoHttps("its certificate has no subject alternative name, so no name to check") from error
    except (ValueError, IndexError) as error:
        raise NoHttps(f"its certificate cannot be read: {error}") from error
    hosts = names.get_values_for_type(x509.DNSName)
    plain = sorted((name for name in hosts if "*" not in name), key=lambda name: name != "localhost")
    wild = [name.replace("*", "pve", 1) for name in hosts if name.startswith("*.")]
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    for name in (*plain, *wild, *addresses):
        return Trust(pem, name)
    raise NoHttps("its certificate has no name that can be checked")


class HttpsClient:
    """Calls with one token. Thread-safe; up to eight connections are kept open.

    `open_channel(host, port)` connects from the host; `token` is `USER!NAME=VALUE`.
    """

    def __init__(self, open_channel: Callable[[str, int], Any], trust: Trust, token: str) -> None:
        self._open_channel = open_channel
        self._trust = trust
        self._header = f"PVEAPIToken={token}"
        self._context = trust.context()
        self._lock = threading.Lock()
        self._pool: urllib3.HTTPConnectionPool | None = None

    def __repr__(self) -> str:
        return f"<HttpsClient {self._trust.name}>"

    def call(self, method: str, path: str, params: dict[str, Any], limit: float) -> Any:
        """One request, at most `limit` seconds (nominal) in all; the decoded `data`.

        Raises NoHttps and Unauthorized (the call had no effect), ReplyLost, CommandTimeout, and the errors
        that `PveshApi` raises for the same call.
        """
        import urllib3

        call = f"{method.lower()} {path}"
        url, body = _request(method, path, params, call)
        headers = {"Authorization": self._header, "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded"
        token = _deadline.set(Deadline(limit))
        try:
            response = self._connections().urlopen(
                method, url, body=body, headers=headers, retries=False, redirect=False, preload_content=False
            )
            try:
                content = response.read(ANSWER_LIMIT + 1)
                if len(content) > ANSWER_LIMIT:
                    response.close()
            finally:
                response.release_conn()
            return _answer(response.status, response.reason or "", content, call)
        except _LimitPassed as error:
            raise CommandTimeout(f"{call}: no answer over HTTPS within {limit:g} s") from error
        except NoHttps:
            raise
        except urllib3.exceptions.HTTPError as error:
            cause = _cause(error)
            if isinstance(cause, _LimitPassed):
                raise CommandTimeout(f"{call}: no answer over HTTPS within {limit:g} s") from error
            if isinstance(cause, NoHttps):
                raise cause from error
            raise ReplyLost(f"{call}: the connection ended before the answer arrived ({error})") from error
        except (OSError, EOFError) as error:
            raise ReplyLost(f"{call}: the connection ended before the answer arrived ({error})") from error
        finally:
            _deadline.reset(token)

    def greet(self, limit: float) -> None:
        """Connect, check the certificate, close the connection; no token is sent. Raises NoHttps."""
        token = _deadline.set(Deadline(limit))
        try:
            self._connect().close()
        finally:
            _deadline.reset(token)

    def replace_trust(self, trust: Trust) -> None:
        """Check the certificate against `trust` from the next connection on."""
        self._trust, self._context = trust, trust.context()
        self.close()

    def close(self) -> None:
        """Close the open connections; the next call opens another one."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            with suppress(Exception):
                pool.close()

    def _connections(self) -> urllib3.HTTPConnectionPool:
        with self._lock:
            if self._pool is None:
                self._pool = self._new_pool()
            return self._pool

    def _new_pool(self) -> urllib3.HTTPConnectionPool:
        from urllib3 import HTTPConnectionPool
        from urllib3.connection import HTTPConnection

        client = self

        class Connection(HTTPConnection):
            """A connection whose socket is TLS over a channel."""

            used = 0.0

            def connect(self) -> None:
                self.sock = client._connect()
                self._tunnel_host: str | None = None

            @property
            def is_connected(self) -> bool:
                return (
                    self.sock is not None
                    and time.monotonic() - self.used < IDLE_LIMIT
                    and super().is_connected
                )

            def getresponse(self) -> Any:
                try:
                    return super().getresponse()
                finally:
                    self.used = time.monotonic()

        class Pool(HTTPConnectionPool):
            ConnectionCls = cast(Any, Connection)

        return Pool("127.0.0.1", PORT, maxsize=_CONNECTIONS, block=False)

    def _connect(self) -> Any:
        from urllib3.util.ssltransport import SSLTransport

        try:
            channel = self._open_channel("127.0.0.1", PORT)
        except PveError as error:
            raise NotDelivered(f"no connection to port {PORT} on the host: {error}") from error
        socket = _ChannelSocket(channel)
        try:
            return SSLTransport(cast(Any, socket), self._context, server_hostname=self._trust.name)
        except ssl.SSLCertVerificationError as error:
            socket.shut()
            reason = error.verify_message
            raise Untrusted(f"its certificate is not the one that root reads: {reason}") from error
        except _LimitPassed:
            socket.shut()
            raise NotDelivered(f"port {PORT} on the host accepts connections, but does not answer") from None
        except (ssl.SSLError, OSError, EOFError) as error:
            socket.shut()
            raise NotDelivered(f"port {PORT} on the host does not speak TLS: {error}") from error


class _LimitPassed(Exception):
    """The limit of the current call passed. Not an OSError, which libraries below would handle."""


class _ChannelSocket:
    """An SSH channel as the socket that urllib3's SSLTransport needs; waits up to the limit of the call."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._io_refs = 0
        self._ended = False

    def fileno(self) -> int:
        return int(self._channel.fileno())

    def recv(self, size: int) -> bytes:
        return self._timed(self._channel.recv, size)  # type: ignore[no-any-return]

    def recv_into(self, buffer: Any, size: int | None = None) -> int:
        data = self.recv(size or len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def sendall(self, data: bytes) -> None:
        self._timed(self._channel.sendall, bytes(data))

    send = sendall

    def _timed(self, do: Callable[[Any], Any], argument: Any) -> Any:
        deadline = _deadline.get()
        remaining = 30.0 if deadline is None else deadline.remaining()
        if remaining <= 0:
            raise _LimitPassed
        self._channel.settimeout(remaining)
        try:
            return do(argument)
        except TimeoutError as error:
            raise _LimitPassed from error

    def settimeout(self, seconds: float | None) -> None:
        """Ignored: the limit of the call is in force, not the library's."""

    def gettimeout(self) -> float | None:
        return None

    def shutdown(self, how: int) -> None:
        with suppress(Exception):
            self._channel.shutdown(how)

    def _decref_socketios(self) -> None:
        self._io_refs -= 1
        if self._ended:
            self.close()

    def close(self) -> None:
        self._ended = True
        if self._io_refs <= 0:
            self.shut()

    def shut(self) -> None:
        with suppress(Exception):
            self._channel.close()


def _cause(error: BaseException) -> BaseException | None:
    """The error of this module that the library wrapped, if any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, (_LimitPassed, NoHttps)):
        cause = cause.__cause__ or cause.__context__
    return cause


def _request(method: str, path: str, params: dict[str, Any], call: str) -> tuple[str, bytes | None]:
    if not path.startswith("/") or "\0" in path or any(part in (".", "..") for part in path.split("/")):
        raise BadParameter(f"expected an API path that begins with a slash, found {path!r}", call=call)
    pairs: list[tuple[str, str]] = []
    for name, value in params.items():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if item is not None:
                pairs.append((name, str(int(item)) if isinstance(item, bool) else str(item)))
    url = "/api2/json" + quote(path, safe="/:!@,=")
    text = urlencode(pairs)
    if method in ("GET", "DELETE"):
        # PVE refuses a body with these: 501 (facts 65).
        return (f"{url}?{text}" if text else url), None
    return url, text.encode()


def _answer(status: int, reason: str, content: bytes, call: str) -> Any:
    if len(content) > ANSWER_LIMIT:
        raise UnreadableAnswer(f"expected an answer below {ANSWER_LIMIT} bytes", call=call)
    try:
        answer = json.loads(content.decode("utf-8", "replace")) if content.strip() else {}
    except (ValueError, RecursionError):
        answer = None
    if 200 <= status < 300:
        if not isinstance(answer, dict) or "data" not in answer:
            shown = content[:200].decode("utf-8", "replace")
            raise UnreadableAnswer(f"expected an object with `data`, found {shown!r}", call=call)
        return checked(answer["data"])
    message = _message(status, reason, answer if isinstance(answer, dict) else {})
    if status == 401:
        raise Unauthorized(message, call=call, rc=status)
    if status == 595:
        # The proxy could not pass the request on: its daemon, or the other node, is down.
        raise NotDelivered(f"{call}: {message}")
    if status in (596, 597, 598, 599):
        # The proxy had passed it on, and lost the answer of its daemon or of the other node.
        if not call.startswith("get "):
            raise ReplyLost(f"{call}: {message}")
        raise NodeUnreachable(message, call=call, rc=status)
    raise classify(message, status, call)


def _message(status: int, reason: str, answer: dict[str, Any]) -> str:
    """PVE's message as `pvesh` prints it: with the status in front, unless that is 500."""
    message = answer.get("message")
    text = message.strip() if isinstance(message, str) else ""
    # http.client decodes the status line as Latin-1.
    text = text or reason.encode("latin-1", "replace").decode("utf-8", "replace").strip()
    errors = answer.get("errors")
    lines = [f"{name}: {reason}" for name, reason in errors.items()] if isinstance(errors, dict) else []
    full = "\n".join([text, *lines])
    return full if status == 500 or full.startswith(str(status)) else f"{status} {full}"
