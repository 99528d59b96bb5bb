"""Certificate authorities for programs of other people: what they trust here already, and one more.

SSL_CERT_FILE (OpenSSL, Go), REQUESTS_CA_BUNDLE (Python's requests) and CURL_CA_BUNDLE take the place of the
system's roots. A program that is told the nested PVE's authority alone could not download from anywhere else.
"""

from __future__ import annotations

import importlib.util
import os
import ssl
from collections.abc import Mapping
from pathlib import Path

# Where systems keep their roots in one file: Debian, Fedora, SUSE, Alpine and BSD.
_PLACES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def with_roots(variable: str, authority: bytes, environ: Mapping[str, str] | None = None) -> bytes:
    """PEM of `authority` and of what `variable` stands for now: the file it names, or the system's roots."""
    named = (os.environ if environ is None else environ).get(variable, "")
    trusted = _content(Path(named)) if named else None
    if trusted is None:
        trusted = next((found for path in _system() if (found := _content(path)) is not None), b"")
    return b"\n".join(part.strip() for part in (trusted, authority) if part.strip()) + b"\n"


def _system() -> list[Path]:
    default = ssl.get_default_verify_paths().openssl_cafile
    places = [Path(place) for place in (default, *_PLACES) if place]
    # A bare machine may have none but those that requests brings.
    spec = importlib.util.find_spec("certifi")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).with_name("cacert.pem"))
    return places


def _content(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return data if b"BEGIN " in data else None
