"""The keys that a login offers, in OpenSSH's order: certificates, the agent's keys, files."""

from __future__ import annotations

import base64
import os
import shlex
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.ssh import algorithms, known_hosts_files

if TYPE_CHECKING:
    from pytest_nestedpve.pve.ssh.target import SshTarget

_CERTIFICATE = "-cert-v01@openssh.com"
# Seconds; an agent may ask its user before it signs.
_AGENT_LIMIT = 30.0


@dataclass(frozen=True)
class PublicKey:
    """A public key or a certificate in SSH's wire format."""

    type: str
    blob: bytes
    comment: str = ""

    @property
    def name(self) -> str:
        return self.comment or known_hosts_files.fingerprint(self.blob)


@dataclass(frozen=True)
class _Certificate:
    path: Path
    public: PublicKey
    key: bytes  # the plain public key that it certifies


class AgentRefused(Exception):
    """The agent refused a request, or its answer is invalid."""


class Agent:
    """An SSH agent behind its socket: lists keys and signs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def list_keys(self) -> list[PublicKey]:
        """The public keys that the agent holds. Raises AgentRefused, OSError."""
        answer = self._request(b"\x0b", 12)
        (count,), rest = struct.unpack_from(">I", answer), answer[4:]
        keys = []
        for _ in range(count):
            blob, rest = _string(rest)
            comment, rest = _string(rest)
            keys.append(PublicKey(_string(blob)[0].decode("ascii"), blob, comment.decode(errors="replace")))
        return keys

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """A signature by the key of `blob`. Raises AgentRefused, OSError."""
        flags = 4 if algorithm.startswith("rsa-sha2-512") else 2 if algorithm.startswith("rsa-sha2") else 0
        lengths = (struct.pack(">I", len(blob)), struct.pack(">I", len(data)))
        body = b"\x0d" + lengths[0] + blob + lengths[1] + data + struct.pack(">I", flags)
        return _string(self._request(body, 14))[0]

    def _request(self, body: bytes, expected: int) -> bytes:
        self._sock.sendall(struct.pack(">I", len(body)) + body)
        (length,) = struct.unpack(">I", self._read(4))
        if not 1 <= length <= 2**20:
            raise AgentRefused(f"expected an answer of an SSH agent, found one of {length} bytes")
        answer = self._read(length)
        if answer[0] != expected:
            raise AgentRefused("the agent refused (is it locked, or did its user decline?)")
        return answer[1:]

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._sock.recv(size - len(data))
            if not part:
                raise AgentRefused("the agent closed the connection")
            data += part
        return data


class _AgentKey:
    """A key in the agent with the interface of paramiko's PKey; `public_blob`: its certificate."""

    def __init__(self, agent: Agent, public: PublicKey, report: Callable[[str], None]) -> None:
        self.public_blob: Any = None
        self._agent = agent
        self._public = public
        self._report = report

    def get_name(self) -> str:
        return self._public.type

    def asbytes(self) -> bytes:
        return self._public.blob

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> bytes:
        try:
            return self._agent.sign(self._public.blob, data, algorithm or "")
        except (AgentRefused, OSError, struct.error) as error:
            # An exception would end the connection, and with it the attempts with further keys.
            self._report(f"{self._public.name}: the SSH agent gave no signature: {error}")
            return b""


@contextmanager
def connect_agent(target: SshTarget, problems: list[str]) -> Iterator[Agent | None]:
    """The SSH agent of the target, connected within the block; None without an agent."""
    path = find_agent_socket(target)
    if path is None:
        yield None
        return
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_AGENT_LIMIT)
        agent: Agent | None = None
        try:
            sock.connect(path)
            agent = Agent(sock)
        except OSError as error:
            problems.append(f"the SSH agent at {path} cannot be used: {error.strerror or error}")
        yield agent


def find_agent_socket(target: SshTarget) -> str | None:
    """The path of the agent's socket for this target, if any."""
    path = target.identity_agent or "SSH_AUTH_SOCK"
    if path in ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK"):
        path = os.environ.get("SSH_AUTH_SOCK", "")
    if not target.allow_agent or path in ("", "none"):
        return None
    return os.path.expanduser(path)


def list_keys(target: SshTarget, agent: Agent | None, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Name and key (paramiko's type) of all keys that OpenSSH would offer, in its order.

    A message for each unusable key, with advice, is added to `problems`.
    """
    for name, key in _all_keys(target, agent, problems):
        type = key.public_blob.key_type if key.public_blob is not None else key.get_name()
        if algorithms.is_user_key_allowed(target, type):
            yield name, key
        else:
            problems.append(
                f"{name}: PubkeyAcceptedAlgorithms of the ssh configuration does not allow {type}"
            )


def _all_keys(target: SshTarget, agent: Agent | None, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Certificates of files, the agent's keys that are configured, its other keys, keys in files only."""
    held = _list_held(target, agent, problems)
    files = [(path, _public(path)) for path in target.identity_files]
    certificates = _certificates(target, problems)
    loaded: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        if path not in loaded:
            loaded[path] = _load(path, problems, ssh_add_fault=_ssh_add_fault(target))
        return loaded[path]

    for certificate in certificates:
        key = _private_of(certificate, held, files, agent, problems, load)
        if key is not None:
            key.public_blob = _PublicBlob(certificate.public.type, certificate.public.blob)
            yield f"{certificate.path} (certificate)", key
            key.public_blob = None
    certified = {certificate.public.blob for certificate in certificates}
    configured = {public.blob for _, public in files if public} | certified
    first = [public for public in held if public.blob in configured]
    others = [] if target.identities_only else [public for public in held if public.blob not in configured]
    for public in (*first, *others):
        if agent is not None and public.blob not in certified:
            yield f"{public.name} (agent)", _AgentKey(agent, public, problems.append)
    in_agent = {public.blob for public in held}
    for path, public_key in files:
        if public_key is not None and public_key.blob in in_agent:
            continue
        key = load(path)
        if key is not None:
            yield str(path), key


@dataclass(frozen=True)
class _PublicBlob:
    """The certificate that paramiko sends instead of the plain public key."""

    key_type: str
    key_blob: bytes


def _list_held(target: SshTarget, agent: Agent | None, problems: list[str]) -> list[PublicKey]:
    if agent is None:
        return []
    try:
        return agent.list_keys()
    except (AgentRefused, OSError, struct.error, ValueError) as error:
        problems.append(f"the SSH agent at {find_agent_socket(target)} cannot be used: {error}")
        return []


def _private_of(
    certificate: _Certificate,
    held: Sequence[PublicKey],
    files: Sequence[tuple[Path, PublicKey | None]],
    agent: Agent | None,
    problems: list[str],
    load: Callable[[Path], Any],
) -> Any:
    """What signs for a certificate: its key in the agent, or in one of the files."""
    for public in held:
        if public.blob == certificate.key and agent is not None:
            return _AgentKey(agent, public, problems.append)
    for path, public_key in files:
        # Of an old PEM file without its .pub, the public key is known only after loading.
        if public_key is None or public_key.blob == certificate.key:
            key = load(path)
            if key is not None and key.asbytes() == certificate.key:
                return key
    return None


def _certificates(target: SshTarget, problems: list[str]) -> list[_Certificate]:
    """The certificates of CertificateFile; without that option those beside the keys."""
    beside = [Path(f"{path}-cert.pub") for path in target.identity_files]
    certificates = []
    for path in target.certificate_files or beside:
        public = _public_line(path)
        if public is None:
            if target.certificate_files:
                why = "does not exist" if not path.exists() else "is not a certificate"
                problems.append(f"CertificateFile {path} {why}")
            continue
        key = _certified(public)
        if key is not None:
            certificates.append(_Certificate(path, public, key))
    return certificates


def _certified(public: PublicKey) -> bytes | None:
    """The plain public key inside of a certificate."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, ssh

    if not public.type.endswith(_CERTIFICATE):
        return None
    line = f"{public.type} {base64.b64encode(public.blob).decode()}".encode()
    try:
        identity = ssh.load_ssh_public_identity(line)
    except (ValueError, UnsupportedAlgorithm):
        return None
    if not isinstance(identity, ssh.SSHCertificate):
        return None
    plain = identity.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return base64.b64decode(plain.split()[1])


def _load(path: Path, problems: list[str], *, ssh_add_fault: str) -> Any:
    import paramiko
    from cryptography.exceptions import UnsupportedAlgorithm

    name = shlex.quote(str(path))
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
        return None
    if _public_line(path) is not None:
        problems.append(f"{path} is a public key, and the agent does not hold the private one{ssh_add_fault}")
        return None
    if about.st_uid == os.getuid() and stat.S_IMODE(about.st_mode) & 0o077:
        mode = stat.S_IMODE(about.st_mode)
        problems.append(f"{path} can be read by others (mode {mode:04o}) and is not used: `chmod 600 {name}`")
        return None
    public = _public(path)
    if public is not None and public.type.startswith("sk-"):
        problems.append(
            f"{path} is a FIDO key ({public.type}), which only an agent can use here: "
            f"`ssh-add {name}`{ssh_add_fault}"
        )
        return None
    try:
        key = paramiko.PKey.from_path(str(path))
        key.public_blob = None
        return key
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
    except (
        paramiko.SSHException,
        TypeError,
        ValueError,
        UnsupportedAlgorithm,
        paramiko.pkey.UnknownKeyType,
    ) as error:
        # Versions of cryptography differ in the error for a missing passphrase.
        passphrase_missing = isinstance(error, (paramiko.PasswordRequiredException, TypeError))
        if passphrase_missing or _cipher_of(path) not in ("none", ""):
            problems.append(
                f"{path} is protected by a passphrase and not in the agent: `ssh-add {name}`{ssh_add_fault}"
            )
        else:
            why = str(error)[:100] or type(error).__name__
            problems.append(f"{path} is not a usable private key: {why}")
    return None


def _ssh_add_fault(target: SshTarget) -> str:
    """The reason why `ssh-add` alone would not help, for a message; empty if it would."""
    if find_agent_socket(target) is not None:
        return ""
    if target.identity_agent == "none" or not target.allow_agent:
        return " (and remove IdentityAgent none)"
    return " (no agent runs: SSH_AUTH_SOCK is not set; `eval $(ssh-agent)` starts one)"


def _public(path: Path) -> PublicKey | None:
    """The public key of an identity file: in that file (public, or in OpenSSH's format), or its .pub."""
    return _public_line(path) or _public_in_private(path) or _public_line(Path(f"{path}.pub"))


def _public_line(path: Path) -> PublicKey | None:
    with suppress(OSError, ValueError, IndexError):
        fields = path.read_text(encoding="utf-8", errors="replace")[:65536].split("\n", 1)[0].split(None, 2)
        blob = base64.b64decode(fields[1], validate=True)
        if _string(blob)[0].decode() == fields[0]:
            return PublicKey(fields[0], blob, fields[2].strip() if len(fields) > 2 else "")
    return None


def _public_in_private(path: Path) -> PublicKey | None:
    """The public key of a private key file in OpenSSH's format, which no passphrase protects."""
    with suppress(OSError, ValueError, struct.error):
        body = _openssh_body(path)
        for _ in range(3):  # cipher, key derivation, options of the derivation
            _, body = _string(body)
        blob, _ = _string(body[4:])
        return PublicKey(_string(blob)[0].decode("ascii"), blob, str(path))
    return None


def _cipher_of(path: Path) -> str:
    """The cipher of a private key in OpenSSH's format ("none" without passphrase); "" for other formats."""
    with suppress(OSError, ValueError, struct.error):
        return _string(_openssh_body(path))[0].decode("ascii")
    return ""


def _openssh_body(path: Path) -> bytes:
    """The bytes after the magic of OpenSSH's format. Raises ValueError for another format; OSError."""
    _, begin, rest = path.read_text(encoding="ascii").partition("-----BEGIN OPENSSH PRIVATE KEY-----")
    body = base64.b64decode("".join(rest.partition("-----END")[0].split())) if begin else b""
    magic = b"openssh-key-v1\0"
    if not body.startswith(magic):
        raise ValueError(f"{path} is not in OpenSSH's format")
    return body[len(magic) :]


def _string(data: bytes) -> tuple[bytes, bytes]:
    """The first length-prefixed string of `data`, and the rest. Raises ValueError, struct.error."""
    (length,) = struct.unpack_from(">I", data)
    if len(data) < 4 + length:
        raise ValueError(f"expected {length} bytes, found {len(data) - 4}")
    return data[4 : 4 + length], data[4 + length :]
