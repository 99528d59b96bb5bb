"""Ciphers, MACs, key exchanges and key types that an ssh configuration restricts, as paramiko wants them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import SshError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.ssh.target import SshTarget

_CERTIFICATE = "-cert-v01@openssh.com"
#: The option as `ssh -G` spells it → as people do.
OPTIONS = {
    "ciphers": "Ciphers",
    "macs": "MACs",
    "kexalgorithms": "KexAlgorithms",
    "hostkeyalgorithms": "HostKeyAlgorithms",
    "pubkeyacceptedalgorithms": "PubkeyAcceptedAlgorithms",
}


def disabled(target: SshTarget) -> dict[str, list[str]]:
    """What this client could do but the configuration does not allow, by paramiko's kinds."""
    from paramiko import Transport

    able: dict[str, tuple[str, Sequence[str]]] = {
        "ciphers": ("ciphers", Transport._preferred_ciphers),  # type: ignore[attr-defined]
        "macs": ("macs", Transport._preferred_macs),  # type: ignore[attr-defined]
        "kexalgorithms": ("kex", Transport._preferred_kex),  # type: ignore[attr-defined]
        "pubkeyacceptedalgorithms": ("pubkeys", Transport._preferred_pubkeys),  # type: ignore[attr-defined]
    }
    found = {}
    for option, allowed in target.algorithms:
        if option in able:
            kind, ours = able[option]
            plain = {name.removesuffix(_CERTIFICATE) for name in allowed}
            if not plain.intersection(ours):
                raise _nothing_in_common(target, option, allowed, ours)
            found[kind] = [name for name in ours if name not in plain]
    return found


def host_keys(target: SshTarget, able: Iterable[str]) -> tuple[str, ...]:
    """The host key algorithms of `able` that HostKeyAlgorithms allows."""
    ours = tuple(able)
    allowed = dict(target.algorithms).get("hostkeyalgorithms")
    if allowed is None:
        return ours
    rest = tuple(name for name in ours if name in allowed)
    if not rest:
        raise _nothing_in_common(target, "hostkeyalgorithms", allowed, ours)
    return rest


def user_key_allowed(target: SshTarget, type: str) -> bool:
    """Whether PubkeyAcceptedAlgorithms lets a key (or certificate) of this type be offered."""
    allowed = dict(target.algorithms).get("pubkeyacceptedalgorithms")
    if allowed is None:
        return True
    tail = _CERTIFICATE if type.endswith(_CERTIFICATE) else ""
    if type.removesuffix(tail) == "ssh-rsa":
        return any(f"{name}{tail}" in allowed for name in ("rsa-sha2-512", "rsa-sha2-256"))
    return type in allowed


def _nothing_in_common(
    target: SshTarget, option: str, allowed: Sequence[str], ours: Sequence[str]
) -> SshError:
    return SshError(
        f"{OPTIONS[option]} of the ssh configuration allows {target.alias or target.host} only "
        f"{', '.join(allowed)[:300] or 'nothing'}; expected at least one that this client has: "
        f"{', '.join(ours)}. Add one of them"
    )
