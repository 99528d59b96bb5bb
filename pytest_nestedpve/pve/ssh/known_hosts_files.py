"""Reading known_hosts files and judging a host key by them, as OpenSSH does with strict checking."""

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
            # OpenSSH hashes the name in lower case.
            return _hashed(self.patterns, name) or _hashed(self.patterns, name.lower())
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
    """`offered` host key algorithms, those first whose outcome is known: plain keys, certificates."""
    plain = {name for key in known if not key.marker for name in _ALGORITHMS.get(key.type, (key.type,))}
    authority = any(key.marker == "@cert-authority" for key in known)

    def rank(name: str) -> int:
        if name.endswith(CERTIFICATE):
            # Whatever kind of key it is for: an authority signs any.
            return 0 if authority else 3
        return 1 if name in plain else 2

    return tuple(sorted(offered, key=rank))


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


def refuse_revoked(known: Sequence[KnownKey], blob: bytes, shown: str, name: str) -> None:
    """Raises HostKeyMismatch when a @revoked line of `known` has this key."""
    for key in known:
        if key.marker == "@revoked" and key.blob == blob:
            raise HostKeyMismatch(
                f"the host key of {name} is revoked ({key.file}, line {key.line}): {shown}. Do not connect."
            )


def refuse_revoked_by(file: Path, type: str, blob: bytes, name: str) -> None:
    """Raises HostKeyMismatch when RevokedHostKeys has this key, or cannot be read.

    It is a list of public keys, or a binary key revocation list, about which OpenSSH is asked.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error.strerror or str(error)) from error
    if content.startswith(_KRL):
        revoked, said = _revoked_by_krl(file, type, blob)
        if said:
            raise _unreadable(file, said)
    else:
        text = base64.b64encode(blob).decode()
        revoked = any(text in line.split() for line in content.decode(errors="replace").splitlines())
    if revoked:
        raise HostKeyMismatch(
            f"the host key of {name} is revoked by RevokedHostKeys {file}: {type} {fingerprint(blob)}. "
            "Do not connect."
        )


def _revoked_by_krl(file: Path, type: str, blob: bytes) -> tuple[bool, str]:
    """Whether it is revoked, and what OpenSSH says against the list."""
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
        f"RevokedHostKeys {file} cannot be read, so no host key is accepted: {why}. Mend or remove it"
    )


@dataclass(frozen=True)
class Advice:
    """What a person needs to mend a host key that is not known.

    `by_hand` logs in once; `scan` prints the host's keys from here (None: it cannot be reached directly);
    `remark` is anything to add to the error.
    """

    by_hand: str
    scan: str | None = None
    remark: str = ""


def judge(
    known: Sequence[KnownKey],
    *,
    type: str,
    blob: bytes,
    name: str,
    files: Sequence[Path],
    advice: Advice,
) -> None:
    """Accept the key `blob` of `type` that the host showed, or raise HostKeyMismatch.

    `name` is the one under which the host's key is filed, `known` the lines about it, `files` where they
    were looked for. Nothing is ever added to a file.
    """
    shown = f"{type} {fingerprint(blob)}"
    refuse_revoked(known, blob, shown, name)
    plain = [key for key in known if not key.marker]
    if any(key.blob == blob and key.type == type for key in plain):
        return
    remark = f"; {advice.remark}" if advice.remark else ""
    # A line without the port only ever helps: that host on another port may be another machine.
    exact = [key for key in plain if key.names(name)]
    same_type = [key for key in exact if key.type == type]
    if same_type:
        key = same_type[0]
        raise HostKeyMismatch(
            f"the host key of {name} CHANGED: expected {key.type} {fingerprint(key.blob)} "
            f"({key.file}, line {key.line}), found {shown}{remark}. Somebody may be listening in, or the "
            "host was installed anew: ask its administrator. If the new key is right, remove the old one "
            f"with `ssh-keygen -R {shlex.quote(name)} -f {shlex.quote(str(key.file))}` and log in once by "
            f"hand with `{advice.by_hand}`"
        )
    others = "".join(f"; known for it is {key.type} ({key.file}, line {key.line})" for key in exact[:3])
    where = ", ".join(str(file) for file in files) or "a known_hosts file, but the configuration names none"
    add = f"Then log in once by hand with `{advice.by_hand}`, which adds it"
    if not files:
        add = f"Then name a file (UserKnownHostsFile ~/.ssh/known_hosts) and log in by `{advice.by_hand}`"
    elif advice.scan is not None:
        add += f"; or: `{advice.scan} >>{shlex.quote(str(files[0]))}`"
    raise HostKeyMismatch(
        f"the host key of {name} is unknown: expected it in {where}, found {shown}{others}{remark}. Compare "
        f"it with `ssh-keygen -lf /etc/ssh/ssh_host_{kind(type)}_key.pub` on the host's console. {add}"
    )


def kind(type: str) -> str:
    """What ssh-keygen and ssh-keyscan call keys of this type: ed25519, rsa, ecdsa."""
    return "ecdsa" if type.startswith("ecdsa") else type.removeprefix("ssh-")
