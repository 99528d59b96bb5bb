"""From the option --pve-host to an open PveHost: an SSH name, or the embedded lab."""

from __future__ import annotations

import configparser
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nestedpve.config.settings import PROFILE_KEYS
from pytest_nestedpve.pve.errors import ProfileError, PveError, SshError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.calls import CallLog
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection, SshTarget

PROFILE = "/etc/nested-pve.ini"
PROFILE_SECTION = "nested-pve"
_PROFILE_LIMIT = 64 * 1024


@dataclass(frozen=True)
class ResolvedHost:
    """The address of an outer host, before any connection.

    `connect` hands `release` over to the PveHost that it opens. Without a connection, call `release`: it
    gives back the lab's lease, and does nothing for a host that is no lab.
    """

    name: str
    target: SshTarget
    ssh_config: Path | None
    release: Callable[[], None]

    @property
    def notes(self) -> tuple[str, ...]:
        """Options of the ssh configuration that matter for this host or a jump host and are not honoured."""
        notes: list[str] = []
        hop: SshTarget | None = self.target
        while hop is not None:
            notes += hop.notes
            hop = hop.jump
        return tuple(dict.fromkeys(notes))


def resolve(host: str, *, ssh_config: Path | None = None) -> ResolvedHost:
    """Resolve the option --pve-host: `lab`, `lab:NAME`, or a name that `ssh NAME` reaches.

    `ssh_config` replaces ~/.ssh/config. A lab is started; no connection is opened.
    Raises SshError for an unusable name or configuration, and the lab's own PveError.
    """
    from pytest_nestedpve.pve.ssh.config import read_ssh_config

    if host == "lab" or host.startswith("lab:"):
        from pytest_nestedpve.lab.session import acquire

        lab = acquire(host.partition(":")[2] or "")
        try:
            target = read_ssh_config(lab.host, lab.ssh_config, None, None)
        except BaseException:
            lab.release()
            raise
        return ResolvedHost(host, target, lab.ssh_config, lab.release)
    return ResolvedHost(host, read_ssh_config(host, ssh_config, None, None), ssh_config, _no_release)


def connect(resolved: ResolvedHost, log: CallLog | None = None) -> PveHost:
    """Log in, and open the host; its `close` ends everything that `resolved` and the connection hold.

    Commands are recorded in `log`; API calls are not, see `PveHost.logged`.
    Raises HostUnreachable, HostKeyMismatch, LoginRefused or SshError with the remedy; the connection is
    closed and `resolved` released then.
    """
    from pytest_nestedpve.pve.calls import NO_LOG
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection
    from pytest_nestedpve.pve.transports import HostApi

    with contextlib.ExitStack() as ending:
        ending.callback(resolved.release)
        ssh = SshConnection(resolved.target, log=log or NO_LOG)
        ending.callback(ssh.close)
        _check_shell(ssh, resolved.target)
        host = PveHost(
            resolved.name, ssh, HostApi(ssh), ssh_config=resolved.ssh_config, release=resolved.release
        )
        ending.pop_all()
    return host


def _check_shell(ssh: SshConnection, target: SshTarget) -> None:
    """Raises SshError unless the account runs commands and prints nothing of its own before their output."""
    result = ssh.run(["true"], timeout=30)
    if not result.ok:
        raise SshError(
            f"{target.text} accepts the login, but runs no commands: `true` ended with "
            f"{result.rc} ({(result.stderr or result.stdout).strip()[:200]}). "
            "Does the account force a command?"
        )
    if result.stdout_bytes:
        # Every file and every answer read from the host would begin with it.
        raise SshError(
            f"{target.text}: expected no output of the command `true`, found "
            f"{result.stdout.strip()[:80]!r}: the account's start-up files print it before each command. "
            "Have them print only in interactive shells, below `[[ $- == *i* ]] || return` in ~/.bashrc, "
            "or to stderr"
        )


def lab_runs(host: str) -> bool:
    """Whether the lab of `lab` or `lab:NAME` is running; starts none."""
    from pytest_nestedpve.lab.session import is_running

    return bool(is_running(host.partition(":")[2] or ""))


def lab_hindrance() -> str | None:
    """The reason why this machine cannot run a lab; None if it can. Starts none."""
    from pytest_nestedpve.lab import requirements

    try:
        requirements.check()
    except PveError as e:
        return str(e)
    return None


def host_profile(host: PveHost) -> dict[str, str]:
    """The settings in /etc/nested-pve.ini on the host; empty without that file.

    Expected: one section [nested-pve], only PROFILE_KEYS, no interpolation. Raises ProfileError for
    anything else, and for a file that cannot be read.
    """
    # -L as well: for a dangling link `test -e` is false, but it is a mistake to report.
    script = (
        f"if [ -e {PROFILE} ] || [ -L {PROFILE} ]; then exec head -c {_PROFILE_LIMIT + 1} -- {PROFILE}; fi"
    )
    result = host.run(script, timeout=30)
    if not result.ok:
        raise ProfileError(
            f"{PROFILE} on {host.name} cannot be read: {result.stderr.strip()[:300] or result.rc}. "
            "Expected a readable file, or none"
        )
    return parse_profile(result.stdout_bytes, host.name)


def parse_profile(content: bytes, host: str) -> dict[str, str]:
    """The keys and values of a host profile. Raises ProfileError, no other error."""
    where = f"{PROFILE} on {host}"
    if len(content) > _PROFILE_LIMIT:
        raise ProfileError(f"{where} has more than {_PROFILE_LIMIT} bytes: expected a few lines")
    parser = configparser.ConfigParser(
        interpolation=None,
        default_section="\0none",
        strict=True,
        delimiters=("=",),
        empty_lines_in_values=False,
    )
    try:
        parser.read_string(content.decode("utf-8"), source=where)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ProfileError(
            f"{where} is malformed: expected `[{PROFILE_SECTION}]` and lines `key = value`, found: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    others = sorted(set(parser.sections()) - {PROFILE_SECTION})
    if others:
        raise ProfileError(f"{where}: expected only the section [{PROFILE_SECTION}], found [{others[0]}]")
    if PROFILE_SECTION not in parser:
        return {}
    values = {key: value.strip() for key, value in parser[PROFILE_SECTION].items()}
    foreign = sorted(set(values) - PROFILE_KEYS)
    if foreign:
        raise ProfileError(
            f"{where} sets {', '.join(foreign)[:300]}, which a host may not set: expected only "
            f"{', '.join(sorted(PROFILE_KEYS))}"
        )
    for key, value in values.items():
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ProfileError(f"{where}: the value of {key} has more than one line or a control character")
    return {key: value for key, value in values.items() if value}


def _no_release() -> None:
    """A host that is no lab holds nothing."""
