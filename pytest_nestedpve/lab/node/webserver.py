"""The lab's web server: the repositories, a directory per host name, and files to download.

python3 -m nestedpve_node.webserver ROOT [PORT]. A host name without a directory is answered with 404.
"""

from __future__ import annotations

import functools
import http.server
import os
import sys
from http import HTTPStatus
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files below ROOT/<host name>/; keeps connections open, as apt expects of a mirror."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, *arguments: object, root: Path) -> None:
        self._root = root
        super().__init__(*arguments)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        host = (self.headers.get("Host") or "").partition(":")[0].lower()
        if not host or "/" in host or host.startswith("."):
            return os.devnull + "/none"
        self.directory = str(self._root / host)
        return super().translate_path(path)

    def list_directory(self, path: str | os.PathLike[str]) -> None:  # noqa: ARG002
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:
        sys.stderr.write(f"{self.address_string()} {self.headers.get('Host')} {format % args}\n")


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def main(arguments: list[str]) -> None:
    root = Path(arguments[0])
    port = int(arguments[1]) if len(arguments) > 1 else 80
    Server(("", port), functools.partial(Handler, root=root)).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
