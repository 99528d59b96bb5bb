"""Options of an ssh configuration that are refused, ignored with a report, or honoured in part."""

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

Options = Mapping[str, list[str]]

#: Options that matter for connecting and are ignored, with the consequence.
NOT_HONOURED = {
    "PKCS11Provider": "keys on a smart card are used only through an agent: `ssh-add -s PROVIDER`",
    "SecurityKeyProvider": "FIDO keys are used only through an agent: `ssh-add KEY`",
    "KnownHostsCommand": "it is not run: the host key must be in a known_hosts file",
    "VerifyHostKeyDNS": "host keys are not looked up in DNS: the key must be in a known_hosts file",
    "HostbasedAuthentication": "only keys are offered to log in",
    "BindInterface": "connections follow the routing table; BindAddress is honoured",
    "CASignatureAlgorithms": "a host certificate may be signed with any algorithm but SHA-1",
    "RequiredRSASize": "RSA keys of any size that the host accepts are offered",
}
_DEPTH = 16  # OpenSSH's limit on nested Includes


@dataclass(frozen=True)
class Account:
    """The user of this process, by the system's list of users, as in ssh."""

    name: str
    home: str


@cache
def account() -> Account:
    import pwd

    with suppress(KeyError):
        entry = pwd.getpwuid(os.getuid())
        return Account(entry.pw_name, entry.pw_dir)
    return Account(getpass.getuser(), os.path.expanduser("~"))


def read_defaults(read: Callable[[str, Path, None, None], Options]) -> Options:
    """The output of `ssh -G` without any configuration, by `read`; other values are configured."""
    return _read_defaults(read)


@cache
def _read_defaults(read: Callable[[str, Path, None, None], Options]) -> Options:
    return read("none", Path("none"), None, None)


def refuse_unusable(alias: str, options: Options) -> None:
    """Raises SshError for options that make a login impossible."""

    def refuse(option: str, why: str) -> None:
        raise SshError(f"the ssh configuration of {alias} has {option}: not supported, {why}")

    if _first(options, "proxyusefdpass") == "yes":
        refuse("ProxyUseFdpass yes", "expected a ProxyCommand that carries the connection itself")
    if _first(options, "pubkeyauthentication") in ("no", "false"):
        refuse("PubkeyAuthentication no", "only keys are offered to log in")
    preferred = _first(options, "preferredauthentications")
    if preferred is not None and "publickey" not in preferred.split(","):
        refuse(f"PreferredAuthentications {preferred}", "only keys are offered to log in: add publickey")


def read_restrictions(options: Options, defaults: Options) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The configured lists of algorithms, by the name of the option in lower case."""
    return tuple(
        (option, tuple(options[option][0].split(",")))
        for option in algorithms.OPTIONS
        if options.get(option) and options[option] != defaults.get(option)
    )


def describe_leniency(options: Options) -> str:
    """The lenient options for host keys, which are ignored, as text for an error; empty without any."""
    strict = _first(options, "stricthostkeychecking")
    lenient = []
    if strict in ("no", "off", "false", "accept-new"):
        spelled = "no" if strict == "false" else strict
        lenient.append(f"StrictHostKeyChecking {spelled}")
    if _first(options, "nohostauthenticationforlocalhost") in ("yes", "true"):
        lenient.append("NoHostAuthenticationForLocalhost yes")
    return f"{' and '.join(lenient)} of the ssh configuration is ignored" if lenient else ""


def describe_ignored(alias: str, options: Options, defaults: Options, config: Path | None) -> tuple[str, ...]:
    """A sentence for each option that matters for connecting to `alias` and is ignored."""
    notes = []
    for option, meaning in NOT_HONOURED.items():
        value = _first(options, option.lower())
        if value in (None, "none", "no", "false") or value == _first(defaults, option.lower()):
            continue
        lines = find_lines(option, config)
        where = f" ({', '.join(lines)})" if lines else ""
        spelled = "yes" if value == "true" else value[:80]
        notes.append(f"{option} {spelled}{where} is not honoured for {alias}: {meaning}")
    return tuple(notes)


def find_lines(option: str, config: Path | None) -> list[str]:
    """File and line of the option, in any block of the configuration; at most three."""
    home = Path(account().home)
    files = [config] if config is not None else [home / ".ssh" / "config", Path("/etc/ssh/ssh_config")]
    keyword = option.lower()
    lines = [
        f"{path}, line {number}"
        for file in files
        for path, number, key, _ in _lines(file, home, _DEPTH)
        if key == keyword
    ]
    return list(dict.fromkeys(lines))[:3]


def _lines(file: Path, home: Path, depth: int) -> Iterator[tuple[Path, int, str, str]]:
    """File, line number, keyword in lower case and value, with included files at their Include."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r"\s*(\w+)(?:\s*=\s*|\s+)(.*)", line)
        if match is None:
            continue
        key, value = match[1].lower(), match[2].strip()
        if key != "include":
            yield file, number, key, value
            continue
        base = Path("/etc/ssh") if file.is_relative_to("/etc/ssh") else home / ".ssh"
        for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', value):
            pattern = quoted or plain
            pattern = str(home) + pattern[1:] if pattern.startswith("~/") else pattern
            for path in sorted(glob.glob(os.path.join(base, pattern))) if depth else ():
                yield from _lines(Path(path), home, depth - 1)


def _first(options: Options, key: str) -> str | None:
    return options[key][0] if options.get(key) else None
