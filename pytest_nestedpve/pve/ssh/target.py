"""A host to log in at, with its options of the ssh configuration."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from pytest_nestedpve.pve.ssh import known_hosts_files


@dataclass(frozen=True)
class SshTarget:
    """Address and options of a login, as `ssh -G` prints them; `alias` is the name that the user typed.

    `connect_timeout`: seconds for connecting and logging in, per attempt. `algorithms`: the restricted
    lists, by the name of the option in lower case. `ignored_leniency`: the lenient options for host keys,
    as text for errors. `asks_to_add_key`: whether ssh by hand asks before it adds a host key. `notes`:
    sentences on ignored options that matter for connecting.
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
    ignored_leniency: str = ""
    asks_to_add_key: bool = True
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The target for messages: its alias, and user, host and port."""
        where = f"{self.user}@{self.host}" + ("" if self.port == 22 else f":{self.port}")
        return f"{self.alias} ({where})" if self.alias and self.alias != self.host else where

    @property
    def command(self) -> str:
        """The ssh command for a login by hand."""
        return self._command_with("")

    @property
    def first_login(self) -> str:
        """The ssh command for a login by hand that shows the host's key and asks whether to add it."""
        return self._command_with("" if self.asks_to_add_key else "-o StrictHostKeyChecking=ask ")

    def _command_with(self, options: str) -> str:
        if self.alias:
            config = f"-F {shlex.quote(str(self.config))} " if self.config is not None else ""
            return f"ssh {config}{options}{self.alias}"
        jump = f"-J {self.jump.user}@{self.jump.host}:{self.jump.port} " if self.jump else ""
        port = "" if self.port == 22 else f"-p {self.port} "
        return f"ssh {options}{jump}{port}{self.user}@{self.host}"

    @property
    def known_as(self) -> str:
        """The name of the host in known_hosts files."""
        return known_hosts_files.lookup_name(self.host, self.port, self.host_key_alias)
