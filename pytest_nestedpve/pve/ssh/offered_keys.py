"""Which keys are offered at a login, in OpenSSH's order: certificates, the agent's keys, files."""

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
# An agent may ask its user before it signs.
_AGENT_LIMIT = 30.0


@dataclass(frozen=True)
class Public:
    """A public key or a certificate as it goes over the wire."""

    type: str
    blob: bytes
    comment: str = ""

    @property
    def name(self) -> str:
        return self.comment or known_hosts_files.fingerprint(self.blob)


@dataclass(frozen=True)
class _Certificate:
    path: Path
    public: Public
    key: bytes  # the plain public key that it certifies


class AgentRefused(Exception):
    """The agent does not do what it was asked for."""


class Agent:
    """An SSH agent behind its socket: lists keys and signs."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def keys(self) -> list[Public]:
        """What it holds. Raises AgentRefused, OSError."""
        answer = self._ask(b"\x0b", 12)
        (count,), rest = struct.unpack_from(">I", answer), answer[4:]
        found = []
        for _ in range(count):
            blob, rest = _string(rest)
            comment, rest = _string(rest)
            found.append(Public(_string(blob)[0].decode("ascii"), blob, comment.decode(errors="replace")))
        return found

    def sign(self, blob: bytes, data: bytes, algorithm: str) -> bytes:
        """A signature by the key of `blob`. Raises AgentRefused, OSError."""
        flags = 4 if algorithm.startswith("rsa-sha2-512") else 2 if algorithm.startswith("rsa-sha2") else 0
        lengths = (struct.pack(">I", len(blob)), struct.pack(">I", len(data)))
        body = b"\x0d" + lengths[0] + blob + lengths[1] + data + struct.pack(">I", flags)
        return _string(self._ask(body, 14))[0]

    def _ask(self, body: bytes, expected: int) -> bytes:
        self._sock.sendall(struct.pack(">I", len(body)) + body)
        (length,) = struct.unpack(">I", self._read(4))
        if not 1 <= length <= 2**20:
            raise AgentRefused(f"expected an answer of an SSH agent, found one of {length} bytes")
        answer = self._read(length)
        if answer[0] != expected:
            raise AgentRefused("the agent refused (is it locked, or did its user decline?)")
        return answer[1:]

    def _read(self, wanted: int) -> bytes:
        got = b""
        while len(got) < wanted:
            part = self._sock.recv(wanted - len(got))
            if not part:
                raise AgentRefused("the agent closed the connection")
            got += part
        return got


class _AgentKey:
    """A key in the agent, as paramiko wants one for a login; `public_blob` as there: its certificate."""

    def __init__(self, agent: Agent, public: Public, refused: Callable[[str], None]) -> None:
        self.public_blob: Any = None
        self._agent = agent
        self._public = public
        self._refused = refused

    def get_name(self) -> str:
        return self._public.type

    def asbytes(self) -> bytes:
        return self._public.blob

    def sign_ssh_data(self, data: bytes, algorithm: str | None = None) -> bytes:
        try:
            return self._agent.sign(self._public.blob, data, algorithm or "")
        except (AgentRefused, OSError, struct.error) as error:
            # Raising would end the connection, on which further keys may follow: the host refuses this one.
            self._refused(f"{self._public.name}: no signature came from the SSH agent: {error}")
            return b""


@contextmanager
def agent_of(target: SshTarget, problems: list[str]) -> Iterator[Agent | None]:
    """The SSH agent that the target names; it signs only within the block. None if there is none."""
    path = agent_socket(target)
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


def agent_socket(target: SshTarget) -> str | None:
    """Where the agent listens that is asked for this target, if any."""
    path = target.identity_agent or "SSH_AUTH_SOCK"
    if path in ("SSH_AUTH_SOCK", "$SSH_AUTH_SOCK"):
        path = os.environ.get("SSH_AUTH_SOCK", "")
    if not target.allow_agent or path in ("", "none"):
        return None
    return os.path.expanduser(path)


def keys_for(target: SshTarget, agent: Agent | None, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Name and key (paramiko's kind) of what OpenSSH would offer, in its order.

    What cannot be used goes into `problems`, with what to do.
    """
    for name, key in _all_keys(target, agent, problems):
        type = key.public_blob.key_type if key.public_blob is not None else key.get_name()
        if algorithms.user_key_allowed(target, type):
            yield name, key
        else:
            problems.append(f"{name}: PubkeyAcceptedAlgorithms of the ssh configuration leaves out {type}")


def _all_keys(target: SshTarget, agent: Agent | None, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """Certificates of files, the agent's keys that are configured, the agent's others, keys in files only."""
    held = _held(target, agent, problems)
    files = [(path, _public(path)) for path in target.identity_files]
    certificates = _certificates(target, problems)
    loaded: dict[Path, Any] = {}

    def load(path: Path) -> Any:
        if path not in loaded:
            loaded[path] = _load(path, problems, in_vain=_hint(target))
        return loaded[path]

    for each in certificates:
        key = _private_of(each, held, files, agent, problems, load)
        if key is not None:
            key.public_blob = _PublicBlob(each.public.type, each.public.blob)
            yield f"{each.path} (certificate)", key
            key.public_blob = None
    named = {public.blob for _, public in files if public} | {each.public.blob for each in certificates}
    shown = {each.public.blob for each in certificates}
    mine = [public for public in held if public.blob in named]
    others = [] if target.identities_only else [public for public in held if public.blob not in named]
    for public in (*mine, *others):
        if agent is not None and public.blob not in shown:
            yield f"{public.name} (agent)", _AgentKey(agent, public, problems.append)
    in_agent = {public.blob for public in held}
    for path, found in files:
        if found is not None and found.blob in in_agent:
            continue
        key = load(path)
        if key is not None:
            yield str(path), key


@dataclass(frozen=True)
class _PublicBlob:
    """What paramiko sends instead of the plain public key."""

    key_type: str
    key_blob: bytes


def _held(target: SshTarget, agent: Agent | None, problems: list[str]) -> list[Public]:
    if agent is None:
        return []
    try:
        return agent.keys()
    except (AgentRefused, OSError, struct.error, ValueError) as error:
        problems.append(f"the SSH agent at {agent_socket(target)} cannot be used: {error}")
        return []


def _private_of(
    certificate: _Certificate,
    held: Sequence[Public],
    files: Sequence[tuple[Path, Public | None]],
    agent: Agent | None,
    problems: list[str],
    load: Callable[[Path], Any],
) -> Any:
    """What signs for a certificate: its key in the agent, or in one of the files."""
    for public in held:
        if public.blob == certificate.key and agent is not None:
            return _AgentKey(agent, public, problems.append)
    for path, found in files:
        # An old PEM file without its .pub shows its public key only when it is loaded.
        if found is None or found.blob == certificate.key:
            key = load(path)
            if key is not None and key.asbytes() == certificate.key:
                return key
    return None


def _certificates(target: SshTarget, problems: list[str]) -> list[_Certificate]:
    """Those of CertificateFile; without it those that lie beside the keys."""
    beside = [Path(f"{path}-cert.pub") for path in target.identity_files]
    found = []
    for path in target.certificate_files or beside:
        public = _public_line(path)
        if public is None:
            if target.certificate_files:
                why = "is not there" if not path.exists() else "is no certificate"
                problems.append(f"CertificateFile {path} {why}")
            continue
        key = _certified(public)
        if key is not None:
            found.append(_Certificate(path, public, key))
    return found


def _certified(public: Public) -> bytes | None:
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


def _load(path: Path, problems: list[str], *, in_vain: str) -> Any:
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
        problems.append(f"{path} is a public key, and the agent does not hold the private one{in_vain}")
        return None
    if about.st_uid == os.getuid() and stat.S_IMODE(about.st_mode) & 0o077:
        mode = stat.S_IMODE(about.st_mode)
        problems.append(f"{path} can be read by others (mode {mode:04o}) and is not used: `chmod 600 {name}`")
        return None
    public = _public(path)
    if public is not None and public.type.startswith("sk-"):
        problems.append(
            f"{path} is a FIDO key ({public.type}), which only an agent can use here: "
            f"`ssh-add {name}`{in_vain}"
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
        # That a passphrase is missing, each version of cryptography says in another way.
        missing = isinstance(error, (paramiko.PasswordRequiredException, TypeError))
        if missing or _opened_by(path) not in ("none", ""):
            problems.append(
                f"{path} is protected by a passphrase and not in the agent: `ssh-add {name}`{in_vain}"
            )
        else:
            why = str(error)[:100] or type(error).__name__
            problems.append(f"{path} is not a private key that can be used: {why}")
    return None


def _hint(target: SshTarget) -> str:
    """Why `ssh-add` would not help, if so."""
    if agent_socket(target) is not None:
        return ""
    if target.identity_agent == "none" or not target.allow_agent:
        return " (and remove IdentityAgent none)"
    return " (no agent runs here: SSH_AUTH_SOCK is not set; `eval $(ssh-agent)` starts one)"


def _public(path: Path) -> Public | None:
    """The public key of an identity file: in itself, if it is one or of OpenSSH's form, or in its .pub."""
    return _public_line(path) or _public_in_private(path) or _public_line(Path(f"{path}.pub"))


def _public_line(path: Path) -> Public | None:
    with suppress(OSError, ValueError, IndexError):
        fields = path.read_text(encoding="utf-8", errors="replace")[:65536].split("\n", 1)[0].split(None, 2)
        blob = base64.b64decode(fields[1], validate=True)
        if _string(blob)[0].decode() == fields[0]:
            return Public(fields[0], blob, fields[2].strip() if len(fields) > 2 else "")
    return None


def _public_in_private(path: Path) -> Public | None:
    """OpenSSH's own form has the public key in clear, in front of what a passphrase protects."""
    with suppress(OSError, ValueError, struct.error):
        body = _openssh(path)
        for _ in range(3):  # cipher, derivation, its options
            _, body = _string(body)
        blob, _ = _string(body[4:])
        return Public(_string(blob)[0].decode("ascii"), blob, str(path))
    return None


def _opened_by(path: Path) -> str:
    """The cipher that protects a key of OpenSSH's own form ("none" if it is in clear); "" of any other."""
    with suppress(OSError, ValueError, struct.error):
        return _string(_openssh(path))[0].decode("ascii")
    return ""


def _openssh(path: Path) -> bytes:
    """What follows the magic of OpenSSH's own form. Raises ValueError for any other, OSError."""
    _, begin, rest = path.read_text(encoding="ascii").partition("-----BEGIN OPENSSH PRIVATE KEY-----")
    body = base64.b64decode("".join(rest.partition("-----END")[0].split())) if begin else b""
    magic = b"openssh-key-v1\0"
    if not body.startswith(magic):
        raise ValueError(f"{path} is not of OpenSSH's own form")
    return body[len(magic) :]


def _string(data: bytes) -> tuple[bytes, bytes]:
    """The first length-prefixed string of `data`, and what follows. Raises ValueError, struct.error."""
    (length,) = struct.unpack_from(">I", data)
    if len(data) < 4 + length:
        raise ValueError(f"expected {length} bytes, found {len(data) - 4}")
    return data[4 : 4 + length], data[4 + length :]
