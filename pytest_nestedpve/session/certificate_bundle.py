"""Bundles of certificate authorities for other programs: the roots they trust, and one authority more.

SSL_CERT_FILE (OpenSSL, Go), REQUESTS_CA_BUNDLE (Python's requests) and CURL_CA_BUNDLE replace the system's
roots. With the nested PVE's authority alone a program could not download from any other server.
"""

from __future__ import annotations

import importlib.util
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

# Files of the system's roots on Debian, Fedora, SUSE, Alpine and BSD.
_ROOT_FILES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def with_roots(variable: str, authority: bytes, environ: Mapping[str, str] | None = None) -> bytes:
    """PEM of the roots that `variable` selects (the file it names, else the system's), and `authority`."""
    named = (os.environ if environ is None else environ).get(variable, "")
    trusted = _read_pem(Path(named)) if named else None
    if trusted is None:
        trusted = next((pem for path in _root_files() if (pem := _read_pem(path)) is not None), b"")
    return b"\n".join(part.strip() for part in (trusted, authority) if part.strip()) + b"\n"


def _root_files() -> list[Path]:
    default = ssl.get_default_verify_paths().openssl_cafile
    files = [Path(file) for file in (default, *_ROOT_FILES) if file]
    # A minimal machine may have only the roots in requests' dependency certifi.
    spec = importlib.util.find_spec("certifi")
    if spec is not None and spec.origin:
        files.append(Path(spec.origin).with_name("cacert.pem"))
    return files


def _read_pem(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if b"BEGIN " in data else None
