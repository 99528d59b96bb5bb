"""pveproxy: the API over HTTPS on port 8006, with API tokens. A process per connection, from which a task can
be forked safely; TLS with the node's certificate (or an administrator's)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import socketserver
import ssl
import sys
import threading
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from ..commands import tables
from ..state import cluster_fs, paths, tasks
from ..state.members import Member
from . import access, forward, tree, uploads
from .errors import NoReply, PveFailure

PORT = 8006
FAILED_DELAY = 3.0  # seconds before a refused log-in is answered (facts 61)
PREFIX = "/api2/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "pve-api-daemon/3.0"
    disable_nagle_algorithm = True
    timeout = 75
    rbufsize = 65536

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, verb: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        if not url.path.startswith(PREFIX):
            return self._page(url.path)
        address = "/" + unquote(url.path[len(PREFIX) :].partition("/")[2])
        header = self.headers.get("Authorization", "")
        if address == "/access/ticket" and verb == "POST":
            threading.Event().wait(FAILED_DELAY)
            return self._answer(
                401, "authentication failure", {"data": None, "message": "authentication failure\n"}
            )
        received: Path | None = None
        caller = access.authenticate(header)
        if caller is None:
            threading.Event().wait(FAILED_DELAY)
            return self._answer(401, "Authentication failed!" if header else "No ticket", None)
        if body and verb in ("GET", "DELETE"):
            return self._answer(501, f"Unexpected content for method '{verb}'", None)
        try:
            cluster_fs.require()
            if (member := forward.other(address)) is not None:
                return self._relay(member, verb, body)
            params = dict(parse_qsl(url.query, keep_blank_values=True))
            if self.headers.get_content_maintype() == "multipart":
                form = uploads.read(self.headers, body) if address.endswith("/upload") else None
                if form is None:
                    return self._answer(400, "Bad Request", None)
                params |= form
                received = paths.at(form["tmpfilename"])
            else:
                params |= self._body(body)
            result = tree.call(verb, address, params, caller)
        except PveFailure as e:
            if received is not None:
                received.unlink(missing_ok=True)
            return self._failure(e)
        except NoReply:
            self.close_connection = True
            return None
        except Exception as e:
            import traceback

            traceback.print_exc()
            return self._failure(PveFailure(f"{e.__class__.__name__}: {e}"))
        if isinstance(result, tasks.Started):
            result = result.upid
        return self._answer(200, "OK", {"data": result} | self._total(address, result))

    def _relay(self, member: Member, verb: str, body: bytes) -> None:
        names = ("Authorization", "Content-Type")
        headers = [(name, self.headers[name]) for name in names if name in self.headers]
        answer = forward.by_https(member, PORT, verb, self.path, headers, body)
        self.close_connection |= answer.status >= 400
        self._send(answer.status, answer.reason, answer.body, answer.kind)

    @staticmethod
    def _total(address: str, result: Any) -> dict[str, Any]:
        listed = isinstance(result, list) and address.split("/")[3:4] == ["tasks"]
        return {"total": len(result)} if listed else {}

    def _body(self, body: bytes) -> dict[str, Any]:
        if not body:
            return {}
        kind = self.headers.get("Content-Type", "")
        if "json" in kind:
            try:
                loaded = json.loads(body)
            except ValueError as e:
                raise PveFailure(f"malformed JSON string: {e}", status=400) from e
            return {key: value for key, value in loaded.items() if value is not None}
        params: dict[str, Any] = {}
        for key, value in parse_qsl(body.decode(), keep_blank_values=True):
            if key in params:
                params[key] = [*(params[key] if isinstance(params[key], list) else [params[key]]), value]
            else:
                params[key] = value
        return params

    def _page(self, path: str) -> None:
        """Answer requests for the web interface, which the lab does not have, with a short page."""
        if path in ("/", "/index.html"):
            message = f"pve-manager {paths.VERSION}: the web interface is not supported by the lab"
            text = f"<html><body>{message}</body></html>\n"
            return self._send(200, "OK", text.encode(), "text/html; charset=utf-8")
        return self._send(404, "Not Found", b"", "text/plain")

    def _failure(self, failure: PveFailure) -> None:
        text = failure.text
        message = text if failure.status == 501 and "not implemented" in text else text + "\n"
        answer: dict[str, Any] = {"data": None, "message": message}
        if failure.errors:
            answer["errors"] = failure.errors
        self._answer(failure.status, text.split("\n")[0], answer)

    def _answer(self, status: int, reason: str, body: dict[str, Any] | None) -> None:
        if status >= 400:
            self.close_connection = True
        data = b"" if body is None else tables.json_text(body).encode()
        self._send(status, reason, data, "application/json;charset=UTF-8")

    def _send(self, status: int, reason: str, data: bytes, kind: str) -> None:
        date = formatdate(usegmt=True)
        head = [
            f"HTTP/1.1 {status} {reason.encode('latin-1', 'replace').decode('latin-1')}",
            "Cache-Control: max-age=0",
            f"Connection: {'close' if self.close_connection else 'Keep-Alive'}",
            f"Date: {date}",
            "Pragma: no-cache",
            f"Server: {self.server_version}",
            f"Content-Length: {len(data)}",
        ]
        if data:
            head.append(f"Content-Type: {kind}")
        head.append(f"Expires: {date}")
        self.wfile.write("\r\n".join(head).encode("latin-1") + b"\r\n\r\n" + data)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Write no access log: the journal is for errors."""


class Server(socketserver.ForkingMixIn, socketserver.TCPServer):
    allow_reuse_address = True
    address_family = socket.AF_INET6
    request_queue_size = 64
    max_children = 200
    block_on_close = False

    def __init__(self, port: int) -> None:
        self.context: ssl.SSLContext | None = None
        super().__init__(("::", port), Handler)

    def server_bind(self) -> None:
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def load(self) -> None:
        """Load the certificate; after a renewal the next connection uses the new one."""
        node_dir = cluster_fs.fs() / "nodes" / paths.node()
        names = ("pveproxy-ssl", "pve-ssl") if (node_dir / "pveproxy-ssl.pem").exists() else ("pve-ssl",)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(node_dir / f"{names[0]}.pem", node_dir / f"{names[0]}.key")
        self.context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's process: the handshake does not block other connections.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert self.context is not None
        with contextlib.suppress(OSError, ssl.SSLError):
            request.settimeout(Handler.timeout)
            with self.context.wrap_socket(request, server_side=True) as secure:
                Handler(secure, client_address, self)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], (OSError, ssl.SSLError)):
            super().handle_error(request, client_address)


def certificate() -> Path:
    return cluster_fs.fs() / "nodes" / paths.node() / "pve-ssl.pem"


def serve(port: int = PORT) -> int:
    if not certificate().exists():
        print("no certificate: run pvecm updatecerts", file=sys.stderr)
        return 1
    server = Server(port)
    server.load()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    signal.signal(signal.SIGHUP, lambda *_: server.load())
    server.serve_forever(poll_interval=0.5)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
