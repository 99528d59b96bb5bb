# ruff: noqa: ARG001 (every handler has the same signature)
"""Downloads and uploads of files to a storage."""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import shutil
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..api.access import Caller
from ..api.errors import BadParameters, PveFailure, Unsupported
from ..api.tree import api, task
from ..state import output, paths, volumes

BASE = "/nodes/{node}/storage/{storage}"


def _target(params: dict[str, Any]) -> Path:
    """The path of a new file, by content and cleaned name (facts 70)."""
    name, kind = params["storage"], params["content"]
    volumes.storage(name)
    if kind not in volumes.content(name):
        raise PveFailure(f"storage '{name}' is not configured for content-type '{kind}'")
    file = re.sub(r"[^-a-zA-Z0-9_.]", "_", params["filename"].rpartition("/")[2])
    if not re.search(volumes.ENDINGS[kind] + "$", file):
        message = "wrong file extension" if kind != "import" else "invalid filename or wrong extension"
        raise BadParameters({"filename": message}, rc=255)
    return volumes.folder(name) / volumes.FOLDERS[kind] / file


@api("POST", BASE + "/download-url")
def download(caller: Caller, params: dict[str, Any]) -> Any:
    """Fetch a file, with the messages of PVE's wget (facts 70)."""
    target = _target(params)
    if params.get("compression") not in (None, "gz"):
        raise Unsupported(f"compression {params['compression']}")

    def work() -> None:
        _download(params, target)

    return task(caller, "download", target.name, work)


@api("POST", BASE + "/upload")
def upload(caller: Caller, params: dict[str, Any]) -> Any:
    """Move the file received by the proxy; an existing file is overwritten [ownL-036, ownL-037]."""
    target = _target(params)
    received = paths.at(params["tmpfilename"]) if "tmpfilename" in params else None
    if received is None or not received.is_file():
        raise BadParameters({"tmpfilename": "missing temporary file"})

    def work() -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            shutil.move(received, partial)
            partial.chmod(0o644)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
            received.unlink(missing_ok=True)

    return task(caller, "imgcopy", "", work)


@api("GET", "/nodes/{node}/query-url-metadata")
def metadata(caller: Caller, params: dict[str, Any]) -> Any:
    """Name, size and type of a file by a server's answer to HEAD [ownL-026, ownL-027]."""
    url = params["url"]
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=30) as answer:
            name = answer.headers.get_filename() or urlsplit(answer.url).path.rpartition("/")[2]
            size, kind = answer.headers["Content-Length"], answer.headers["Content-Type"]
    except urllib.error.HTTPError as e:
        raise PveFailure(f"invalid server response: '{e.code} {e.reason}'", rc=2) from e
    except OSError as e:
        where = f"{urlsplit(url).hostname}:{urlsplit(url).port or 80}"
        raise PveFailure(f"invalid server response: '500 Can't connect to {where}'", rc=2) from e
    about: dict[str, Any] = {"filename": name} if name else {}
    if kind:
        about["mimetype"] = kind.partition(";")[0].strip()
    return about | ({"size": int(size)} if size else {})


def _hash(file: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm)
    with open(file, "rb") as opened:
        while piece := opened.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _check(file: Path, params: dict[str, Any], suffix: str = "") -> None:
    expected = params["checksum"]
    checksum = _hash(file, params.get("checksum-algorithm", "sha256"))
    if checksum != expected.lower():
        raise PveFailure(f"checksum mismatch: got '{checksum}' != expect '{expected}'{suffix}")


def _download(params: dict[str, Any], target: Path) -> None:
    url, node_path = params["url"], paths.shown(target)
    output.line(f"downloading {url} to {node_path}")
    if target.exists():
        if "checksum" not in params:
            raise PveFailure(f"refusing to override existing file '{node_path}'")
        output.line("calculating checksum of existing file...")
        _check(target, params, ", aborting")
        output.line("OK, got correct file already, no need to download")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp_dwnl.{os.getpid()}")
    unpacked = target.with_name(f"{target.name}.tmp_dcom.{os.getpid()}")
    try:
        _fetch(url, temporary)
        if "checksum" in params:
            output.line("calculating checksum...")
            _check(temporary, params)
            output.line("OK, checksum verified")
        if "compression" in params:
            output.line(f"decompressing {paths.shown(temporary)} to {paths.shown(unpacked)}")
            with gzip.open(temporary) as packed, open(unpacked, "wb") as out:
                shutil.copyfileobj(packed, out)
            unpacked.replace(temporary)
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
        unpacked.unlink(missing_ok=True)
    output.line(f"download of '{url}' to '{node_path}' finished")


def _fetch(url: str, target: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, open(target, "wb") as out:
            shutil.copyfileobj(answer, out)
    except urllib.error.HTTPError as e:
        output.line(f"ERROR {e.code}: {e.reason}.")
        raise PveFailure("download failed: exit code 8") from e
    except OSError as e:
        host, cause = urlsplit(url).hostname, getattr(e, "reason", e)
        if isinstance(cause, socket.gaierror):
            raise PveFailure(f"download failed: wget: unable to resolve host address '{host}'") from e
        if isinstance(cause, ConnectionRefusedError):
            where = f"{host}:{urlsplit(url).port or (443 if url.startswith('https') else 80)}"
            raise PveFailure(f"download failed: Connecting to {where}... failed: Connection refused.") from e
        output.line(str(e))
        raise PveFailure("download failed: exit code 4") from e
