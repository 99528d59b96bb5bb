"""A simulated PVE host with an API over TLS: certificates, tokens, scripted answers."""

from __future__ import annotations

import datetime
import ipaddress
import json
import shlex
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from answering import Answering
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pytest_nestedpve.pve.errors import HostUnreachable
from pytest_nestedpve.pve.ssh.connection import CommandResult

NAMES = ("father", "localhost", "127.0.0.1")


@dataclass(frozen=True)
class Request:
    """A request to the API; `token`: the name of its token."""

    method: str
    path: str
    params: dict[str, list[str]]
    token: str


@dataclass
class HttpsHost(Answering):
    """The state of the server, with its requests; also the SshLike that connects to it."""

    folder: Path
    answers: list[Callable[[Any], bool]] = field(default_factory=list)
    """Functions that may answer a request, with the handler as argument; True if they did."""
    requests: list[Request] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    tokens: dict[str, str] = field(default_factory=dict)
    read_pem: str = ""
    """The certificate that root reads on the host."""
    listens: bool = True
    pveum_error: str = ""
    """The error of pveum; empty: it succeeds."""
    tokens_created: int = 0
    pools: set[str] = field(default_factory=set)
    rights: list[dict[str, str]] = field(default_factory=list)
    """The access control list."""
    connections: int = 0
    address: tuple[str, int] = ("", 0)
    channels: list[socket.socket] = field(default_factory=list)

    # -- the login ----------------------------------------------------------------------------

    def answer(self, command: str | Sequence[str], timeout: float, secret: bool) -> CommandResult:
        del timeout
        text = command if isinstance(command, str) else shlex.join(command)
        self.commands.append(text)
        if "pve-ssl.pem" in text:
            return self._result(self.read_pem, secret)
        if "pveum user token add" in text and self.pveum_error:
            return CommandResult("…", 13, b"", self.pveum_error.encode(), 1.0, secret)
        if "pveum user token add" in text:
            name = text.split("root@pam ")[1].split()[0]
            return self._result(json.dumps({"full-tokenid": name, "value": self.new_token(name)}), secret)
        if text.startswith("date"):
            return self._result(f"{int(time.time())}\n", secret)
        if " pvesh get /access/" in text:
            listed = [{"tokenid": name} for name in self.tokens] if "/token" in text else self.rights
            return self._result(json.dumps(listed), secret)
        if " pvesh delete /access/" in text:
            del self.tokens[text.split("/token/")[1].split()[0]]
            return self._result("", secret)
        if " pvesh " in text:
            return self._result('{"by":"pvesh"}\n', secret)
        raise AssertionError(f"the host has no command {text}")

    def _result(self, text: str, secret: bool) -> CommandResult:
        return CommandResult("…", 0, text.encode(), b"", 1.0, secret)

    def new_token(self, name: str) -> str:
        self.tokens_created += 1
        self.tokens[name] = f"{self.tokens_created:08d}-0000-4000-8000-00000000cafe"
        return self.tokens[name]

    def open_channel(self, host: str, port: int) -> Any:
        assert (host, port) == ("127.0.0.1", 8006)
        if not self.listens:
            raise HostUnreachable("father cannot connect to 127.0.0.1 port 8006: Connect failed")
        channel = socket.create_connection(self.address, timeout=10)
        self.channels.append(channel)
        return channel

    # -- the server ---------------------------------------------------------------------------

    def set_certificate(self, pem: tuple[str, str]) -> None:
        """Serve with this certificate and key from the next connection on."""
        cert, key = self.folder / "cert.pem", self.folder / "key.pem"
        cert.write_text(pem[0])
        key.write_text(pem[1])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self.context = context

    def pvesh(self) -> list[str]:
        """The API calls by pvesh."""
        return [text.split(" pvesh ")[1] for text in self.commands if " pvesh " in text]

    def guest_calls(self) -> list[Request]:
        return [request for request in self.requests if "/qemu" in request.path]


def create_certificate(*, days: int = 30, names: Sequence[str] = NAMES) -> tuple[str, str]:
    """A certificate and its key as PEM, signed by an unknown authority."""
    now = datetime.datetime.now(datetime.UTC)
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    alternative = [
        x509.IPAddress(ipaddress.ip_address(name)) if name[0].isdigit() else x509.DNSName(name)
        for name in names
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "father")]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "unknown authority")]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
    )
    if alternative:
        builder = builder.add_extension(x509.SubjectAlternativeName(alternative), critical=False)
    signed = builder.sign(authority, hashes.SHA256())
    return (
        signed.public_bytes(serialization.Encoding.PEM).decode(),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ).decode(),
    )


@contextmanager
def serve_https_host(folder: Path) -> Iterator[HttpsHost]:
    """Serve a host until the block ends."""
    host = HttpsHost(folder)
    pem = create_certificate()
    host.set_certificate(pem)
    host.read_pem = pem[0]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _serve(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            params = parse_qs(url.query) | parse_qs(self.rfile.read(length).decode(), keep_blank_values=True)
            header = self.headers.get("Authorization", "")
            name = header.partition("!")[2].partition("=")[0]
            assert url.path.startswith("/api2/json/")
            path = url.path.removeprefix("/api2/json")
            host.requests.append(Request(self.command, path, params, name))
            if header.partition("=")[2].partition("=")[2] != host.tokens.get(name, "none"):
                return self.send_answer(401, "Authentication failed!", b"")
            for answer in list(host.answers):
                if answer(self):
                    return None
            if self.command == "POST" and "/token/" in path:
                created = path.rpartition("/")[2]
                return self.data({"value": host.new_token(created), "full-tokenid": created})
            if self.command == "DELETE" and "/token/" in path:
                host.tokens.pop(path.rpartition("/")[2], None)
                return self.data(None)
            if self.command == "GET" and path.endswith("/token"):
                return self.data([{"tokenid": token, "expire": 0} for token in host.tokens])
            if self.command == "GET" and path == "/access/acl":
                return self.data(host.rights)
            if self.command == "GET" and path == "/pools":
                pool = params.get("poolid", [""])[0]
                return self.data([{"poolid": pool, "members": []}] if pool in host.pools else [])
            return self.data({"by": "https"})

        do_GET = do_POST = do_PUT = do_DELETE = _serve

        def data(self, value: Any) -> None:
            self.send_answer(200, "OK", json.dumps({"data": value}).encode())

        def send_answer(self, status: int, reason: str, body: bytes) -> None:
            self.send_response(status, reason)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """No log."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: Any, client_address: Any) -> None:
            host.connections += 1
            with suppress(OSError, ssl.SSLError):
                request.settimeout(20)
                with host.context.wrap_socket(request, server_side=True) as secure:
                    Handler(secure, client_address, self)

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Does nothing: tests close connections early."""

    server = Server(("127.0.0.1", 0), Handler)
    host.address = ("127.0.0.1", server.server_port)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield host
    finally:
        for channel in host.channels:
            channel.close()
        server.shutdown()
        server.server_close()
