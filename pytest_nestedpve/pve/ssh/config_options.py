"""What an ssh configuration says that is not honoured, or not to the letter: refused, or told once."""

from __future__ import annotations

import getpass
import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pytest_nestedpve.pve.errors import SshError
from pytest_nestedpve.pve.ssh import algorithms

Said = Mapping[str, list[str]]

#: Options that matter for connecting and are not honoured: as people spell them, and what that means.
NOT_HONOURED = {
    "PKCS11Provider": "keys on a smart card are not read from here; `ssh-add -s PROVIDER` gives them to an "
    "agent, which is asked",
    "SecurityKeyProvider": "FIDO keys are used only through an agent: `ssh-add KEY`",
    "KnownHostsCommand": "it is not run: the host key has to stand in a known_hosts file",
    "VerifyHostKeyDNS": "host keys are not looked up in DNS: the key has to stand in a known_hosts file",
    "HostbasedAuthentication": "only keys are offered to log in",
    "BindInterface": "connections go out as the routes say; BindAddress is honoured",
    "CASignatureAlgorithms": "a host certificate may be signed with any algorithm but SHA-1",
    "RequiredRSASize": "RSA keys of any size that the host accepts are offered",
}
_DEPTH = 16  # OpenSSH's limit on nested Includes


@dataclass(frozen=True)
class Account:
    """The user this process runs as, by the system's list of users: what ssh goes by."""

    name: str
    home: str


@cache
def account() -> Account:
    import pwd

    with suppress(KeyError):
        entry = pwd.getpwuid(os.getuid())
        return Account(entry.pw_name, entry.pw_dir)
    return Account(getpass.getuser(), os.path.expanduser("~"))


def usual(ask: Callable[[str, Path, None, None], Said]) -> Said:
    """What `ssh -G` says without any configuration: a difference is somebody's wish."""
    return _usual(ask)


@cache
def _usual(ask: Callable[[str, Path, None, None], Said]) -> Said:
    return ask("none", Path("none"), None, None)


def refuse_unusable(alias: str, said: Said) -> None:
    """Raises SshError for what makes a login impossible."""

    def refuse(option: str, why: str) -> None:
        raise SshError(f"the ssh configuration of {alias} has {option}: not supported, {why}")

    if _one(said, "proxyusefdpass") == "yes":
        refuse("ProxyUseFdpass yes", "expected a ProxyCommand that carries the connection itself")
    if _one(said, "pubkeyauthentication") in ("no", "false"):
        refuse("PubkeyAuthentication no", "only keys are offered to log in")
    preferred = _one(said, "preferredauthentications")
    if preferred is not None and "publickey" not in preferred.split(","):
        refuse(f"PreferredAuthentications {preferred}", "only keys are offered to log in: add publickey")


def restricted(said: Said, usual: Said) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The lists of algorithms that somebody has chosen, by the name of the option."""
    return tuple(
        (option, tuple(said[option][0].split(",")))
        for option in algorithms.OPTIONS
        if said.get(option) and said[option] != usual.get(option)
    )


def lenient(said: Said) -> str:
    """What the configuration says of host keys that is not followed, as an error tells it; or nothing."""
    strict = _one(said, "stricthostkeychecking")
    found = []
    if strict in ("no", "off", "false", "accept-new"):
        spelled = "no" if strict == "false" else strict
        found.append(f"StrictHostKeyChecking {spelled}")
    if _one(said, "nohostauthenticationforlocalhost") in ("yes", "true"):
        found.append("NoHostAuthenticationForLocalhost yes")
    return f"{' and '.join(found)} of the ssh configuration is not followed here" if found else ""


def not_honoured(alias: str, said: Said, usual: Said, config: Path | None) -> tuple[str, ...]:
    """A sentence for each option that matters for connecting to `alias` and is passed over."""
    notes = []
    for option, meaning in NOT_HONOURED.items():
        value = _one(said, option.lower())
        if value in (None, "none", "no", "false") or value == _one(usual, option.lower()):
            continue
        where = places(option, config)
        there = f" ({', '.join(where)})" if where else ""
        spelled = "yes" if value == "true" else value[:80]
        notes.append(f"{option} {spelled}{there} is not honoured for {alias}: {meaning}")
    return tuple(notes)


def places(option: str, config: Path | None) -> list[str]:
    """Where the option stands: file and line, at most three, whatever block it is in."""
    home = Path(account().home)
    files = [config] if config is not None else [home / ".ssh" / "config", Path("/etc/ssh/ssh_config")]
    wanted = option.lower()
    found = [
        f"{path}, line {number}"
        for file in files
        for path, number, key, _ in _lines(file, home, _DEPTH)
        if key == wanted
    ]
    return list(dict.fromkeys(found))[:3]


def _lines(file: Path, home: Path, depth: int) -> Iterator[tuple[Path, int, str, str]]:
    """File, line number, keyword in small letters and value; those of included files in their place."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        found = re.match(r"\s*(\w+)(?:\s*=\s*|\s+)(.*)", line)
        if found is None:
            continue
        key, value = found[1].lower(), found[2].strip()
        if key != "include":
            yield file, number, key, value
            continue
        base = Path("/etc/ssh") if file.is_relative_to("/etc/ssh") else home / ".ssh"
        for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', value):
            pattern = quoted or plain
            pattern = str(home) + pattern[1:] if pattern.startswith("~/") else pattern
            for path in sorted(glob.glob(os.path.join(base, pattern))) if depth else ():
                yield from _lines(Path(path), home, depth - 1)


def _one(said: Said, key: str) -> str | None:
    return said[key][0] if said.get(key) else None
