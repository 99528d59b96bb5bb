"""The directory of a run: state, keys, known hosts, ssh_config."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.ssh.target import SshTarget


FINISHED = "finished"
"""The file in a run's directory that lists the leftovers of its teardown, after that has ended."""

_KEY_LINE = re.compile(r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)) [A-Za-z0-9+/]+={0,3}\Z")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\Z")


class RunDirectoryError(PveError):
    """The run's directory or its lock cannot be created or used."""


class BadHostKey(PveError):
    """A host key is not exactly one line of `type base64`."""


@dataclass(frozen=True)
class RunDirectory:
    """The directory of one run: mode 0700, its files 0600."""

    path: Path

    @property
    def key(self) -> Path:
        return self.path / "key"

    @property
    def public_key(self) -> Path:
        return self.path / "key.pub"

    @property
    def known_hosts(self) -> Path:
        return self.path / "known_hosts"

    @property
    def ssh_config(self) -> Path:
        return self.path / "ssh_config"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    def create(self) -> None:
        """Create the directory; git ignores that of all runs. Raises RunDirectoryError."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            ignore = self.path.parent / ".gitignore"
            if not ignore.exists():
                ignore.write_text("*\n", encoding="ascii")
            self.path.mkdir(mode=0o700, exist_ok=True)
            self.artifacts.mkdir(mode=0o700, exist_ok=True)
            self.path.chmod(0o700)
        except OSError as e:
            raise RunDirectoryError(
                f"cannot create the run's directory {self.path}: {e}; set nested_pve_run_dir to another"
            ) from e

    def write(self, name: str, data: str | bytes) -> Path:
        """Write a file of the directory (mode 0600), whole or not at all; return its path. Raises OSError."""
        local_file.write(self.path / name, data)
        return self.path / name

    def save_state(self, facts: Mapping[str, Any]) -> None:
        """Write the facts, by phase, to state.json."""
        self.write("state.json", json.dumps(facts, indent=1, default=str) + "\n")

    def load_state(self) -> dict[str, dict[str, Any]]:
        """The facts by phase; empty without state.json. Raises RunDirectoryError when that is damaged."""
        path = self.path / "state.json"
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as e:
            raise RunDirectoryError(f"cannot read {path}: {e}") from e
        if not isinstance(facts, dict) or not all(isinstance(value, dict) for value in facts.values()):
            raise RunDirectoryError(f"{path}: expected an object of objects by phase, found other JSON")
        return facts

    def ensure_key(self, comment: str) -> str:
        """The line of the run's public key; the first call creates the ed25519 pair."""
        if not (self.key.exists() and self.public_key.exists()):
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

            private = Ed25519PrivateKey.generate()
            public = private.public_key().public_bytes(
                serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
            )
            self.write(
                "key",
                private.private_bytes(
                    serialization.Encoding.PEM,
                    serialization.PrivateFormat.OpenSSH,
                    serialization.NoEncryption(),
                ),
            )
            self.write("key.pub", f"{public.decode()} {comment}\n")
        return self.public_key.read_text(encoding="ascii").strip()

    def pin_host_keys(self, alias: str, keys: Sequence[str]) -> None:
        """Replace the keys of `alias` in the run's known_hosts by `keys`. Raises BadHostKey."""
        if not _ALIAS.match(alias):
            raise BadHostKey(f"expected a host name for known_hosts, found {alias[:60]!r}")
        self._pin(alias, [_one_key(key) for key in keys])

    def pin_forward(self, address: tuple[str, int], alias: str) -> None:
        """Pin the keys of `alias` for a forward to it, too. Raises BadHostKey when `alias` has none."""
        host, port = address
        pinned = [line.partition(" ") for line in self._known_lines()]
        self._pin(f"[{host}]:{port}", [key for name, _, key in pinned if name == alias])

    def _pin(self, name: str, keys: Sequence[str]) -> None:
        if not keys:
            raise BadHostKey(f"no host key to pin for {name}")
        lines = [line for line in self._known_lines() if line.split(" ", 1)[0] != name]
        lines += [f"{name} {key}" for key in dict.fromkeys(keys)]
        self.write("known_hosts", "\n".join(lines) + "\n")

    def _known_lines(self) -> list[str]:
        try:
            return self.known_hosts.read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            return []

    def write_ssh_config(
        self,
        outer_alias: str,
        outer_config: Path | None,
        nested_ip: str,
        nested_name: str,
        leaf_ip: str | None = None,
        leaf_name: str | None = None,
        *,
        nested_block: Sequence[str] | None = None,
    ) -> Path:
        """Write an ssh_config for the nested PVE (through the outer host) and the leaf (through the nested).

        `outer_alias` is the name of the outer host in `outer_config` (None: the user's own). No option there
        applies to the two guests: they get the run's key only, and must have the run's pinned host keys.
        `nested_block` replaces the part of the nested PVE if that is the host of `outer_alias` itself.
        """
        attached = nested_block is not None
        blocks = list(nested_block or self._guest_block(nested_name, "nested", nested_ip, outer_alias))
        names = ["nested"] if attached and nested_name == outer_alias else [nested_name, "nested"]
        if leaf_ip and leaf_name:
            blocks += self._guest_block(leaf_name, "leaf", leaf_ip, outer_alias if attached else nested_name)
            names += [leaf_name, "leaf"]
        # Not `Host`: with a `Match final` in that file, ssh reads the whole file again, by the addresses.
        blocks.append("Match originalhost *," + ",".join(f"!{name}" for name in dict.fromkeys(names)))
        if outer_config is not None:
            # ssh would search a relative path in ~/.ssh.
            blocks.append(f"    Include {quoted(outer_config.absolute())}")
        else:
            blocks += ["    Include ~/.ssh/config", "    Include /etc/ssh/ssh_config"]
        return self.write("ssh_config", "\n".join(blocks) + "\n")

    def _guest_block(self, name: str, short: str, ip: str, jump: str) -> Iterator[str]:
        import ipaddress

        if not _ALIAS.match(name):
            raise RunDirectoryError(f"expected a host name for an ssh_config, found {name[:60]!r}")
        if not re.fullmatch(r"(ssh://)?[A-Za-z0-9._@:\[\]+-]+/?", jump) or jump.startswith("-"):
            raise RunDirectoryError(f"expected the name of a jump host, found {jump[:60]!r}")
        user, at, host = jump.rpartition("@")
        if host.count(":") > 1 and "[" not in host and "/" not in host:
            jump = f"{user}{at}[{host}]"  # ssh accepts a bare IPv6 address, ProxyJump does not
        yield f"Host {name} {short}"
        for key, value in {
            "HostName": str(ipaddress.ip_address(ip)),
            "User": "root",
            "IdentityFile": quoted(self.key, percent=True),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "ForwardAgent": "no",
            "PreferredAuthentications": "publickey",
            "UserKnownHostsFile": quoted(self.known_hosts, percent=True),
            "GlobalKnownHostsFile": "none",
            "HostKeyAlias": name,
            "StrictHostKeyChecking": "yes",
            "ProxyJump": jump,
        }.items():
            yield f"    {key} {value}"
        yield ""


def _one_key(key: str) -> str:
    # A second line, or text before the key, would be another entry of known_hosts, set by the guest.
    clean = " ".join(key.strip(" \n").split(" ")[:2])
    if "\n" in key.strip("\n") or not _KEY_LINE.match(clean):
        raise BadHostKey(f"expected one host key, 'type base64'; found {key[:80]!r}")
    return clean


def quoted(path: Path, *, percent: bool = False) -> str:
    """`path` in quotes for an ssh_config; `percent`: for an option that expands % tokens."""
    text = str(path)
    if '"' in text or "\n" in text or "\\" in text:
        raise RunDirectoryError(
            f"expected a path without quotes, backslashes and line ends for an ssh_config, found {text!r}"
        )
    return f'"{text.replace("%", "%%") if percent else text}"'


def ssh_block(target: SshTarget | None, name: str, address: str, known_hosts: Path) -> list[str]:
    """The part of an ssh_config for the attached PVE, as `nested` and by its node name, like `ssh HOST`; only
    as `nested` if the node's name is the user's own alias."""
    names = "nested" if target is not None and target.alias == name else f"{name} nested"
    lines = [f"Host {names}"]

    def put(key: str, value: object) -> None:
        lines.append(f"    {key} {value}")

    if target is None:
        put("HostName", address)
        put("User", "root")
        put("UserKnownHostsFile", quoted(known_hosts, percent=True))
        put("HostKeyAlias", name)
    else:
        put("HostName", target.host)
        put("Port", target.port)
        put("User", target.user)
        for path in target.identity_files:
            put("IdentityFile", quoted(path, percent=True))
        for path in target.certificate_files:
            put("CertificateFile", quoted(path, percent=True))
        if target.identities_only:
            put("IdentitiesOnly", "yes")
        if not target.allow_agent:
            put("IdentityAgent", "none")
        elif target.identity_agent:
            put("IdentityAgent", f'"{target.identity_agent}"')
        if target.known_hosts:
            put("UserKnownHostsFile", " ".join(quoted(path, percent=True) for path in target.known_hosts))
        if target.host_key_alias:
            put("HostKeyAlias", target.host_key_alias)
        if target.jump is not None:
            jump = target.jump
            put("ProxyJump", jump.alias or f"{jump.user}@{jump.host}:{jump.port}")
        elif target.proxy_command:
            put("ProxyCommand", target.proxy_command.replace("%", "%%"))
    put("StrictHostKeyChecking", "yes")
    return [*lines, ""]
