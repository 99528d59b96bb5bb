"""Ciphers, MACs, key exchanges and key types that an ssh configuration restricts, in paramiko's form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import SshError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.ssh.target import SshTarget

_CERTIFICATE = "-cert-v01@openssh.com"
#: The option as `ssh -G` prints it → as ssh_config(5) spells it.
OPTIONS = {
    "ciphers": "Ciphers",
    "macs": "MACs",
    "kexalgorithms": "KexAlgorithms",
    "hostkeyalgorithms": "HostKeyAlgorithms",
    "pubkeyacceptedalgorithms": "PubkeyAcceptedAlgorithms",
}


def find_disabled(target: SshTarget) -> dict[str, list[str]]:
    """The algorithms of this client that the configuration does not allow, by paramiko's kinds.

    Raises SshError when an option allows none of them.
    """
    from paramiko import Transport

    supported: dict[str, tuple[str, Sequence[str]]] = {
        "ciphers": ("ciphers", Transport._preferred_ciphers),  # type: ignore[attr-defined]
        "macs": ("macs", Transport._preferred_macs),  # type: ignore[attr-defined]
        "kexalgorithms": ("kex", Transport._preferred_kex),  # type: ignore[attr-defined]
        "pubkeyacceptedalgorithms": ("pubkeys", Transport._preferred_pubkeys),  # type: ignore[attr-defined]
    }
    disabled = {}
    for option, allowed in target.algorithms:
        if option in supported:
            kind, names = supported[option]
            plain = {name.removesuffix(_CERTIFICATE) for name in allowed}
            if not plain.intersection(names):
                raise _no_common_algorithm(target, option, allowed, names)
            disabled[kind] = [name for name in names if name not in plain]
    return disabled


def select_host_keys(target: SshTarget, supported: Iterable[str]) -> tuple[str, ...]:
    """The algorithms of `supported` that HostKeyAlgorithms allows. Raises SshError when there is none."""
    supported = tuple(supported)
    allowed = dict(target.algorithms).get("hostkeyalgorithms")
    if allowed is None:
        return supported
    common = tuple(name for name in supported if name in allowed)
    if not common:
        raise _no_common_algorithm(target, "hostkeyalgorithms", allowed, supported)
    return common


def is_user_key_allowed(target: SshTarget, type: str) -> bool:
    """Whether PubkeyAcceptedAlgorithms allows to offer a key or certificate of this type."""
    allowed = dict(target.algorithms).get("pubkeyacceptedalgorithms")
    if allowed is None:
        return True
    suffix = _CERTIFICATE if type.endswith(_CERTIFICATE) else ""
    if type.removesuffix(suffix) == "ssh-rsa":
        return any(f"{name}{suffix}" in allowed for name in ("rsa-sha2-512", "rsa-sha2-256"))
    return type in allowed


def _no_common_algorithm(
    target: SshTarget, option: str, allowed: Sequence[str], supported: Sequence[str]
) -> SshError:
    return SshError(
        f"{OPTIONS[option]} of the ssh configuration allows {target.alias or target.host} only "
        f"{', '.join(allowed)[:300] or 'nothing'}; expected at least one that this client supports: "
        f"{', '.join(supported)}. Add one of them"
    )
