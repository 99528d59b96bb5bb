"""From what the user calls the host to a PveHost: an SSH name, or the embedded lab."""

from __future__ import annotations

import configparser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import ProfileError, PveError, SshError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.calls import CallLog
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshTarget

PROFILE = "/etc/nested-pve.ini"
PROFILE_SECTION = "nested-pve"
_PROFILE_LIMIT = 64 * 1024
# A host must not choose what the client runs or sends: nothing else is taken from it.
PROFILE_KEYS = frozenset(
    {
        "image",
        "template",
        "storage",
        "bridge",
        "ipconfig",
        "pool_parent",
        "mirror",
        "http_proxy",
        "pve_repository_url",
        "pve_repository_key_url",
        "pve_repository_key_sha256",
    }
)


@dataclass(frozen=True)
class ResolvedHost:
    """Where the outer host is. `close` gives back what resolving took (the lab's lease)."""

    name: str
    target: SshTarget
    ssh_config: Path | None
    close: Callable[[], None]

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the ssh configuration matters for the way there and is not honoured; once each."""
        found: list[str] = []
        hop: SshTarget | None = self.target
        while hop is not None:
            found += hop.notes
            hop = hop.jump
        return tuple(dict.fromkeys(found))


def resolve(host: str, *, ssh_config: Path | None = None) -> ResolvedHost:
    """Find the host that the setting names: `lab`, `lab:NAME`, or what `ssh NAME` would reach.

    `ssh_config` replaces ~/.ssh/config. Nothing is connected yet, but a lab is started.
    Raises SshError for a name or configuration that cannot be used, and the lab's own PveError.
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
    return ResolvedHost(host, read_ssh_config(host, ssh_config, None, None), ssh_config, _nothing)


def lab_runs(host: str) -> bool:
    """Whether the lab that `lab` or `lab:NAME` means is up; starts none."""
    from pytest_nestedpve.lab.session import runs

    return bool(runs(host.partition(":")[2] or ""))


def lab_hindrance() -> str | None:
    """Why no lab can run on this machine; None if one can. Starts none."""
    from pytest_nestedpve.lab import requirements

    try:
        requirements.check()
    except PveError as e:
        return str(e)
    return None


def connect(resolved: ResolvedHost, log: CallLog | None = None) -> PveHost:
    """Log in. Commands are recorded in `log`; API calls are not, see `PveHost.logged`.

    Raises HostUnreachable, HostKeyMismatch, LoginRefused, each with what to do.
    """
    from pytest_nestedpve.pve.calls import NO_LOG
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection
    from pytest_nestedpve.pve.transports import HostApi

    ssh = SshConnection(resolved.target, log=log or NO_LOG)
    try:
        result = ssh.run(["true"], timeout=30)
    except PveError:
        ssh.close()
        raise
    if not result.ok:
        ssh.close()
        raise SshError(
            f"{resolved.target.text} accepts the login, but runs no commands: `true` ended with "
            f"{result.rc} ({(result.stderr or result.stdout).strip()[:200]}). "
            "Does the account force a command?"
        )
    if result.stdout_bytes:
        # Every file that is read and every answer that is parsed would begin with it.
        ssh.close()
        raise SshError(
            f"{resolved.target.text}: expected no output of the command `true`, found "
            f"{result.stdout.strip()[:80]!r}: the account's start-up files print it before each command. "
            "Have them print only for people, below `[[ $- == *i* ]] || return` in ~/.bashrc, or to stderr"
        )
    host = PveHost(resolved.name, ssh, HostApi(ssh))
    host.ssh_config = resolved.ssh_config
    return host


def host_profile(host: PveHost) -> dict[str, str]:
    """The settings in /etc/nested-pve.ini on the host; empty without that file.

    One section [nested-pve], only the keys that a host may set, no interpolation. Raises ProfileError
    when it is anything else, or cannot be read.
    """
    # test -e also follows a dangling link: that is a mistake to be told, so -L as well.
    script = (
        f"if [ -e {PROFILE} ] || [ -L {PROFILE} ]; then exec head -c {_PROFILE_LIMIT + 1} -- {PROFILE}; fi"
    )
    result = host.run(script, timeout=30)
    if not result.ok:
        raise ProfileError(
            f"{PROFILE} on {host.name} cannot be read: {result.stderr.strip()[:300] or result.rc}. "
            "Make it a readable file, or remove it"
        )
    return parse_profile(result.stdout_bytes, host.name)


def parse_profile(content: bytes, host: str) -> dict[str, str]:
    """The keys and values of a host profile; raises ProfileError, and nothing else."""
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
            f"{where} sets {', '.join(foreign)[:300]}, which a host may not: expected only "
            f"{', '.join(sorted(PROFILE_KEYS))}"
        )
    for key, value in values.items():
        if any(ord(character) < 32 or ord(character) == 127 for character in value):
            raise ProfileError(f"{where}: the value of {key} has more than one line or a control character")
    return {key: value for key, value in values.items() if value}


def _nothing() -> None:
    return None
