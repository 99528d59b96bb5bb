"""Downloads of the stand-ins, with the recorded messages (group download)."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from standin_support import Answer, Node, _node  # noqa: F401 (a fixture)

FILES = {"/ok.qcow2": b"an image", "/ok.img.gz": gzip.compress(b"a disk")}


class Files(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        if data := self._answer():
            self.wfile.write(data)

    def _answer(self) -> bytes:
        if self.path not in FILES:
            self.send_error(404, "File not found")
            return b""
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream; charset=x")
        self.send_header("Content-Length", str(len(FILES[self.path])))
        self.end_headers()
        return FILES[self.path]

    def log_message(self, format: str, *args: object) -> None:
        """Write no log."""


@pytest.fixture(name="url")
def _url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetch(node: Node, url: str, file: str, *options: str, content: str = "import") -> Answer:
    path = "/nodes/father/storage/local/download-url"
    return node.run("pvesh", "create", path, "--url", url, "--content", content, "--filename", file, *options)


def unresolved(*_: object, **__: object) -> list[object]:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


def test_a_file_is_downloaded_once_and_kept_if_its_checksum_matches(node: Node, url: str) -> None:
    node.ok("pvesm", "set", "local", "--content", "images,iso,import")
    target = node.file("/var/lib/vz/import/new.qcow2")
    digest = hashlib.sha256(FILES["/ok.qcow2"]).hexdigest()
    right, wrong = (("--checksum", value, "--checksum-algorithm", "sha256") for value in (digest, "0" * 64))
    mismatch = f"checksum mismatch: got '{digest}' != expect '{'0' * 64}'"

    assert fetch(node, f"{url}/ok.qcow2", "new.qcow2", *wrong).stderr == f"{mismatch}\n"
    assert not target.exists()
    assert fetch(node, f"{url}/ok.qcow2", "new.qcow2", *right).stderr == ""
    assert target.read_bytes() == FILES["/ok.qcow2"]
    assert (
        fetch(node, f"{url}/ok.qcow2", "new.qcow2").stderr
        == "refusing to override existing file '/var/lib/vz/import/new.qcow2'\n"
    )
    again = fetch(node, f"{url}/ok.qcow2", "new.qcow2", *right)
    assert "OK, got correct file already, no need to download\n" in again.stdout
    assert fetch(node, f"{url}/ok.qcow2", "new.qcow2", *wrong).stderr == f"{mismatch}, aborting\n"
    assert [file.name for file in target.parent.iterdir()] == ["new.qcow2"]


def test_a_compressed_image_is_unpacked(node: Node, url: str) -> None:
    answer = fetch(node, f"{url}/ok.img.gz", "fromgz.img", "--compression", "gz", content="iso")
    assert answer.stderr == ""
    assert "\ndecompressing /var/lib/vz/template/iso/fromgz.img.tmp_dwnl." in answer.stdout
    assert node.file("/var/lib/vz/template/iso/fromgz.img").read_bytes() == b"a disk"
    refused = fetch(node, f"{url}/ok.img.gz", "x.img", "--compression", "zst", content="iso")
    assert "not supported by the lab" in refused.stderr


def test_a_failed_download_is_reported_with_wgets_message(
    node: Node, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:  # bound, but not listening
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        refused = fetch(node, f"http://127.0.0.1:{port}/x.iso", "x.iso", content="iso")
    assert (
        refused.stderr == f"download failed: Connecting to 127.0.0.1:{port}... failed: Connection refused.\n"
    )
    missing = fetch(node, f"{url}/nosuch", "x.iso", content="iso")
    assert missing.stderr == "download failed: exit code 8\n"
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    unknown = fetch(node, "http://nosuch.invalid/x", "x.iso", content="iso")
    assert unknown.stderr == "download failed: wget: unable to resolve host address 'nosuch.invalid'\n"
    node.ok("pvesm", "set", "local", "--content", "images,iso")
    elsewhere = fetch(node, f"{url}/ok.qcow2", "x9.qcow2")
    assert (elsewhere.rc, elsewhere.stderr) == (
        255,
        "storage 'local' is not configured for content-type 'import'\n",
    )


def test_name_size_and_type_of_a_file_on_a_server_are_queried(node: Node, url: str) -> None:
    path, options = "/nodes/father/query-url-metadata", ("--output-format", "json")
    answer = node.ok("pvesh", "get", path, "--url", f"{url}/ok.qcow2", *options)
    assert json.loads(answer) == {"filename": "ok.qcow2", "mimetype": "application/octet-stream", "size": 8}
    missing = node.run("pvesh", "get", path, "--url", f"{url}/nosuch", *options)
    assert missing == Answer(2, "", "invalid server response: '404 File not found'\n")
