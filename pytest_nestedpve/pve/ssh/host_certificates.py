"""Host certificates: whether one was signed by an authority that known_hosts names for this host."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import HostKeyMismatch
from pytest_nestedpve.pve.ssh.known_hosts_files import KnownKey, fingerprint

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.serialization.ssh import SSHCertificate

SUFFIX = "-cert-v01@openssh.com"
_FOREVER = 2**64 - 1


@dataclass(frozen=True)
class HostCertificate:
    """The certificate that a host presented instead of a plain key; `blob`: all its bytes."""

    type: str
    blob: bytes


def find_refusal(certificate: HostCertificate, known: Sequence[KnownKey], name: str) -> str | None:
    """Why no @cert-authority of `known` (the entries for this host) certifies the host; None if one does.

    The reason is empty without any authority. `name` is the principal that the certificate must have:
    HostKeyAlias or host name, without the port.
    As in OpenSSH, a refused certificate is not an error yet: its plain key may be known.
    Raises HostKeyMismatch when the authority is revoked.
    """
    authorities = [key for key in known if key.marker == "@cert-authority"]
    if not authorities:
        return ""
    try:
        parsed = _parsed(certificate)
    except ValueError as error:
        return f"the host presented a certificate that cannot be read ({error})"
    signed_by = _blob(parsed.signature_key())
    line = next((key for key in authorities if key.blob == signed_by), None)
    if line is None:
        first = authorities[0]
        return (
            f"its certificate is signed by {fingerprint(signed_by)}, expected the @cert-authority "
            f"{fingerprint(first.blob)} ({first.file}, line {first.line})"
        )
    if any(key.marker == "@revoked" and key.blob == signed_by for key in known):
        raise HostKeyMismatch(
            f"the authority that signed the host certificate of {name} is revoked in known_hosts: "
            f"{fingerprint(signed_by)}. Do not connect."
        )
    fault = _find_fault(parsed, name)
    if fault is None:
        return None
    return (
        f"its certificate, signed by the @cert-authority of {line.file}, line {line.line}, does not hold: "
        f"{fault} (sign it again: `ssh-keygen -s CA -I ID -h -n {name} HOST_KEY.pub`)"
    )


def _parsed(certificate: HostCertificate) -> SSHCertificate:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import ssh

    line = f"{certificate.type} {base64.b64encode(certificate.blob).decode()}".encode()
    try:
        identity = ssh.load_ssh_public_identity(line)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    if not isinstance(identity, ssh.SSHCertificate):
        raise ValueError(f"found a plain {certificate.type} key")
    return identity


def _find_fault(parsed: SSHCertificate, name: str) -> str | None:
    """The reason why the certificate is not valid; None if it is."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization.ssh import SSHCertificateType

    try:
        parsed.verify_cert_signature()
    except InvalidSignature:
        return "its signature is wrong"
    if getattr(parsed, "_inner_sig_type", b"") == b"ssh-rsa":
        return "it is signed with SHA-1"
    if parsed.type is not SSHCertificateType.HOST:
        return "it is a user certificate, expected a host certificate"
    principals = [principal.decode(errors="replace") for principal in parsed.valid_principals]
    if principals and name.lower() not in [principal.lower() for principal in principals]:
        return f"it is for {', '.join(principals)[:200]}, expected {name}"
    now = int(time.time())
    if now < parsed.valid_after:
        return f"it is valid only from {_date(parsed.valid_after)}"
    if parsed.valid_before != _FOREVER and now >= parsed.valid_before:
        return f"it was valid until {_date(parsed.valid_before)}"
    if parsed.critical_options:
        options = b", ".join(parsed.critical_options).decode(errors="replace")[:100]
        return f"it has the critical options {options}, expected none"
    return None


def _date(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _blob(key: object) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    text = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)  # type: ignore[attr-defined]
    return base64.b64decode(text.split()[1])
