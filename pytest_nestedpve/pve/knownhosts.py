"""Reading known_hosts files and judging a host key by them, as OpenSSH does with strict checking."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nestedpve.pve.errors import HostKeyMismatch

# Key type in the file → algorithms that prove possession of such a key (SHA-1 ones left out).
_ALGORITHMS = {
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}


@dataclass(frozen=True)
class KnownKey:
    """One line of a known_hosts file: where it stands and what it says."""

    patterns: str
    type: str
    blob: bytes
    marker: str
    file: Path
    line: int

    def names(self, name: str) -> bool:
        """Whether the line is about `name`, in plain, wildcard or hashed form."""
        if self.patterns.startswith("|1|"):
            return _hashed(self.patterns, name)
        found = False
        for pattern in self.patterns.split(","):
            wanted = pattern.removeprefix("!").lower()
            # OpenSSH knows only * and ?; a bracket is a literal, as in [host]:2222.
            if fnmatch.fnmatchcase(name.lower(), wanted.replace("[", "[[]")):
                if pattern.startswith("!"):
                    return False
                found = True
        return found


def _hashed(field: str, name: str) -> bool:
    try:
        _, _, salt, digest = field.split("|")
        mac = hmac.new(base64.b64decode(salt, validate=True), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(mac, base64.b64decode(digest, validate=True))
    except (ValueError, binascii.Error):
        return False


def read_known_hosts(files: Iterable[Path]) -> list[KnownKey]:
    """All readable lines of `files`; missing files and lines that are none are passed over, as ssh does."""
    keys = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            fields = line.split()
            marker = fields.pop(0) if fields and fields[0].startswith("@") else ""
            if len(fields) < 3 or fields[0].startswith("#"):
                continue
            try:
                blob = base64.b64decode(fields[2], validate=True)
            except (ValueError, binascii.Error):
                continue
            keys.append(KnownKey(fields[0], fields[1], blob, marker, file, number))
    return keys


def lookup_name(host: str, port: int, alias: str | None) -> str:
    """The name under which OpenSSH files the host's key."""
    return alias if alias else host if port == 22 else f"[{host}]:{port}"


def algorithms(known: Sequence[KnownKey], offered: Sequence[str]) -> tuple[str, ...]:
    """`offered` host key algorithms, those for which a key is known first."""
    first = [name for key in known if not key.marker for name in _ALGORITHMS.get(key.type, (key.type,))]
    return tuple(sorted(offered, key=lambda name: name not in first))


def known_for(files: Iterable[Path], host: str, port: int, alias: str | None) -> list[KnownKey]:
    """The lines about this host; for an unusual port also those without a port."""
    keys = read_known_hosts(files)
    name = lookup_name(host, port, alias)
    found = [key for key in keys if key.names(name)]
    if not alias and port != 22:
        found += [key for key in keys if key not in found and key.names(host)]
    return found


def fingerprint(blob: bytes) -> str:
    """As ssh-keygen prints it: SHA256:…"""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def judge(
    known: Sequence[KnownKey],
    *,
    type: str,
    blob: bytes,
    host: str,
    port: int,
    alias: str | None,
    files: Sequence[Path],
    command: str,
) -> None:
    """Accept the key `blob` of `type` that the host showed, or raise HostKeyMismatch.

    `command` is what a person types to log in by hand once (it ends up in the error's advice).
    """
    name = lookup_name(host, port, alias)
    shown = f"{type} {fingerprint(blob)}"
    if any(key.marker == "@revoked" and key.blob == blob for key in known):
        raise HostKeyMismatch(f"the host key of {name} is revoked in known_hosts: {shown}. Do not connect.")
    plain = [key for key in known if not key.marker]
    if any(key.blob == blob and key.type == type for key in plain):
        return
    # A line without the port only ever helps: that host on another port may be another machine.
    exact = [key for key in plain if key.names(name)]
    same_type = [key for key in exact if key.type == type]
    if same_type:
        key = same_type[0]
        raise HostKeyMismatch(
            f"the host key of {name} CHANGED: expected {key.type} {fingerprint(key.blob)} "
            f"({key.file}, line {key.line}), found {shown}. Somebody may be listening in, or the host was "
            f"installed anew: ask its administrator. If the new key is right, remove the old one with "
            f"`ssh-keygen -R {_quoted(name)} -f {key.file}` and log in once by hand with `{command}`"
        )
    others = "".join(f"; known for it is {key.type} ({key.file}, line {key.line})" for key in exact[:3])
    if any(key.marker == "@cert-authority" for key in known):
        others += "; host certificates (@cert-authority) are not supported, the key itself must be known"
    where = ", ".join(str(file) for file in files) or "no known_hosts file"
    scan = f"ssh-keyscan {'' if port == 22 else f'-p {port} '}{host}"
    raise HostKeyMismatch(
        f"the host key of {name} is unknown: expected it in {where}, found {shown}{others}. Log in once by "
        f"hand with `{command}` and compare the fingerprint, or take it from `{scan}` after comparing it"
    )


def _quoted(name: str) -> str:
    return f"'{name}'" if re.search(r"[\[\]*?]", name) else name
