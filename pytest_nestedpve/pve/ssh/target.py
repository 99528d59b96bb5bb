"""A host to log in at: what ssh's configuration says of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pytest_nestedpve.pve.ssh import known_hosts_files


@dataclass(frozen=True)
class SshTarget:
    """Where and how to log in; what `ssh -G` would say. `alias` is what the user typed.

    `connect_timeout` (seconds) bounds everything up to the login, per attempt to connect. `algorithms`
    are those that the configuration restricts, by the name of its option in small letters, all others
    are free. `lenient` is what it says about host keys that is not followed, for the errors; `asks`:
    whether ssh by hand asks before it adds a host key. `notes` are sentences on options that matter for
    connecting and are not honoured.
    """

    host: str
    port: int = 22
    user: str = "root"
    identity_files: tuple[Path, ...] = ()
    certificate_files: tuple[Path, ...] = ()
    known_hosts: tuple[Path, ...] = ()
    host_key_alias: str | None = None
    allow_agent: bool = True
    identity_agent: str | None = None
    identities_only: bool = False
    connect_timeout: float = 10.0
    jump: SshTarget | None = None
    proxy_command: str | None = None
    alias: str = ""
    config: Path | None = None
    address_family: str = "any"
    bind_address: str | None = None
    revoked_host_keys: Path | None = None
    algorithms: tuple[tuple[str, tuple[str, ...]], ...] = ()
    lenient: str = ""
    asks: bool = True
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """For messages: the alias and what it stands for."""
        where = f"{self.user}@{self.host}" + ("" if self.port == 22 else f":{self.port}")
        return f"{self.alias} ({where})" if self.alias and self.alias != self.host else where

    @property
    def by_hand(self) -> str:
        """The ssh command a person would type."""
        return self._typed("")

    @property
    def first_login(self) -> str:
        """The ssh command with which a person adds the host's key after looking at it."""
        return self._typed("" if self.asks else "-o StrictHostKeyChecking=ask ")

    def _typed(self, options: str) -> str:
        if self.alias:
            config = f"-F {shlex.quote(str(self.config))} " if self.config is not None else ""
            return f"ssh {config}{options}{self.alias}"
        jump = f"-J {self.jump.user}@{self.jump.host}:{self.jump.port} " if self.jump else ""
        port = "" if self.port == 22 else f"-p {self.port} "
        return f"ssh {options}{jump}{port}{self.user}@{self.host}"

    @property
    def known_as(self) -> str:
        """The name under which OpenSSH files the host's key."""
        return known_hosts_files.lookup_name(self.host, self.port, self.host_key_alias)
