"""Entries of known_hosts files, and the check of a host key by them, strict as OpenSSH's."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import hmac
import shlex
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_nestedpve.pve.errors import HostKeyMismatch

# Key type in the file → algorithms that prove possession of such a key (SHA-1 ones left out).
_ALGORITHMS = {
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}
_KRL = b"SSHKRL\n\0"
CERTIFICATE = "-cert-v01@openssh.com"


@dataclass(frozen=True)
class KnownKey:
    """One entry of a known_hosts file, with file and line number."""

    patterns: str
    type: str
    blob: bytes
    marker: str
    file: Path
    line: int

    def matches(self, name: str) -> bool:
        """Whether the entry is for `name`, in plain, wildcard or hashed form."""
        if self.patterns.startswith("|1|"):
            # OpenSSH hashes the name in lower case.
            return _matches_hash(self.patterns, name) or _matches_hash(self.patterns, name.lower())
        matched = False
        for pattern in self.patterns.split(","):
            plain = pattern.removeprefix("!").lower()
            # In OpenSSH only * and ? are wildcards; a bracket is literal, as in [host]:2222.
            if fnmatch.fnmatchcase(name.lower(), plain.replace("[", "[[]")):
                if pattern.startswith("!"):
                    return False
                matched = True
        return matched


def _matches_hash(field: str, name: str) -> bool:
    try:
        _, _, salt, digest = field.split("|")
        mac = hmac.new(base64.b64decode(salt, validate=True), name.encode(), hashlib.sha1).digest()
        return hmac.compare_digest(mac, base64.b64decode(digest, validate=True))
    except (ValueError, binascii.Error):
        return False


def read_known_hosts(files: Iterable[Path]) -> list[KnownKey]:
    """All entries of `files`; missing files and invalid lines are skipped, as in ssh."""
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
    """The name of the host in OpenSSH's known_hosts files."""
    return alias if alias else host if port == 22 else f"[{host}]:{port}"


def order_algorithms(known: Sequence[KnownKey], offered: Sequence[str]) -> tuple[str, ...]:
    """`offered` host key algorithms, first those of which `known` has an authority or a key."""
    plain = {name for key in known if not key.marker for name in _ALGORITHMS.get(key.type, (key.type,))}
    authority = any(key.marker == "@cert-authority" for key in known)

    def rank(name: str) -> int:
        if name.endswith(CERTIFICATE):
            # An authority signs keys of any type.
            return 0 if authority else 3
        return 1 if name in plain else 2

    return tuple(sorted(offered, key=rank))


def find_entries(files: Iterable[Path], host: str, port: int, alias: str | None) -> list[KnownKey]:
    """The entries for this host; for a port other than 22 also those without a port."""
    keys = read_known_hosts(files)
    name = lookup_name(host, port, alias)
    entries = [key for key in keys if key.matches(name)]
    if not alias and port != 22:
        entries += [key for key in keys if key not in entries and key.matches(host)]
    return entries


def fingerprint(blob: bytes) -> str:
    """The fingerprint of a key as ssh-keygen prints it: SHA256:…"""
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def refuse_revoked(known: Sequence[KnownKey], blob: bytes, actual: str, name: str) -> None:
    """Raises HostKeyMismatch when a @revoked entry of `known` has the key; `actual`: it as text."""
    for key in known:
        if key.marker == "@revoked" and key.blob == blob:
            raise HostKeyMismatch(
                f"the host key of {name} is revoked ({key.file}, line {key.line}): {actual}. Do not connect."
            )


def refuse_revoked_by(file: Path, type: str, blob: bytes, name: str) -> None:
    """Raises HostKeyMismatch when the file of RevokedHostKeys has this key, or cannot be read.

    The file is a list of public keys, or a binary key revocation list, which `ssh-keygen` reads.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error.strerror or str(error)) from error
    if content.startswith(_KRL):
        revoked, problem = _is_in_krl(file, type, blob)
        if problem:
            raise _unreadable(file, problem)
    else:
        text = base64.b64encode(blob).decode()
        revoked = any(text in line.split() for line in content.decode(errors="replace").splitlines())
    if revoked:
        raise HostKeyMismatch(
            f"the host key of {name} is revoked by RevokedHostKeys {file}: {type} {fingerprint(blob)}. "
            "Do not connect."
        )


def _is_in_krl(file: Path, type: str, blob: bytes) -> tuple[bool, str]:
    """Whether the key is revoked; and the reason, if ssh-keygen cannot read the list."""
    with tempfile.NamedTemporaryFile("w", suffix=".pub") as key:
        key.write(f"{type} {base64.b64encode(blob).decode()}\n")
        key.flush()
        argv = ["ssh-keygen", "-Q", "-f", str(file), key.name]
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode == 0 or b"REVOKED" in done.stdout:
        return done.returncode != 0, ""
    return False, (done.stderr or done.stdout).decode(errors="replace").strip()[:300] or "no reason given"


def _unreadable(file: Path, why: str) -> HostKeyMismatch:
    return HostKeyMismatch(
        f"RevokedHostKeys {file} cannot be read, so no host key is accepted: {why}. Fix or remove the file"
    )


@dataclass(frozen=True)
class Advice:
    """Advice for an error about a host key that is not known.

    `login` is the command to log in once by hand, `scan` the one that prints the host's keys on this machine
    (None: the host cannot be reached directly), `remark` an addition to the error.
    """

    login: str
    scan: str | None = None
    remark: str = ""


def check_key(
    known: Sequence[KnownKey],
    *,
    type: str,
    blob: bytes,
    name: str,
    files: Sequence[Path],
    advice: Advice,
) -> None:
    """Accept the key `blob` of `type` that the host presented, or raise HostKeyMismatch.

    `name` is the name of the host in known_hosts, `known` the entries for it, `files` the files that were
    read. No file is changed.
    """
    actual = f"{type} {fingerprint(blob)}"
    refuse_revoked(known, blob, actual, name)
    plain = [key for key in known if not key.marker]
    if any(key.blob == blob and key.type == type for key in plain):
        return
    remark = f"; {advice.remark}" if advice.remark else ""
    # An entry without the port can only confirm a key: another port may be another machine.
    exact = [key for key in plain if key.matches(name)]
    same_type = [key for key in exact if key.type == type]
    if same_type:
        key = same_type[0]
        raise HostKeyMismatch(
            f"the host key of {name} CHANGED: expected {key.type} {fingerprint(key.blob)} "
            f"({key.file}, line {key.line}), found {actual}{remark}. This may be an attack, or the "
            "host was reinstalled: ask its administrator. If the new key is right, remove the old one "
            f"with `ssh-keygen -R {shlex.quote(name)} -f {shlex.quote(str(key.file))}` and log in once by "
            f"hand with `{advice.login}`"
        )
    others = "".join(f"; its known key is {key.type} ({key.file}, line {key.line})" for key in exact[:3])
    where = ", ".join(str(file) for file in files) or "a known_hosts file, but the configuration names none"
    add = f"Then log in once by hand with `{advice.login}`, which adds it"
    if not files:
        add = f"Then name a file (UserKnownHostsFile ~/.ssh/known_hosts) and log in with `{advice.login}`"
    elif advice.scan is not None:
        add += f"; or: `{advice.scan} >>{shlex.quote(str(files[0]))}`"
    raise HostKeyMismatch(
        f"the host key of {name} is unknown: expected it in {where}, found {actual}{others}{remark}. Compare "
        f"it with `ssh-keygen -lf /etc/ssh/ssh_host_{short_type(type)}_key.pub` on the host's console. {add}"
    )


def short_type(type: str) -> str:
    """The name of a key type for ssh-keygen and ssh-keyscan: ed25519, rsa, ecdsa."""
    return "ecdsa" if type.startswith("ecdsa") else type.removeprefix("ssh-")
