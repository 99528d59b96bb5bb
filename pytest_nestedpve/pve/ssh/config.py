"""The ssh configuration of a host, as OpenSSH evaluates it (`ssh -G`), with Include and Match."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pytest_nestedpve.pve.deadline import scaled
from pytest_nestedpve.pve.errors import SshError
from pytest_nestedpve.pve.ssh import config_options
from pytest_nestedpve.pve.ssh.target import SshTarget

_HOPS = 8
_NO_JUMP = ". The first jump host needs `ProxyJump none`, above the ProxyJump of all hosts"
_DEFAULT_CONNECT_TIMEOUT = 10.0


def read_ssh_config(alias: str, config: Path | None, user: str | None, port: int | None) -> SshTarget:
    """The target of `ssh alias`, with all its jump hosts.

    `alias` may also be user@host or ssh://user@host:port. `config` replaces the user's and the
    system's file, as `ssh -F` does; `user` and `port` have precedence over those in the file.
    Raises SshError for an invalid file or name, and for options that are not supported.
    """
    return _target(alias, config, user, port, ())


def _target(
    alias: str, config: Path | None, user: str | None, port: int | None, above: tuple[str, ...]
) -> SshTarget:
    if alias in above or len(above) >= _HOPS:
        raise SshError(
            f"the ProxyJump of {above[0]} is a circle, or has more than {_HOPS} hops: "
            f"{' → '.join((*above, alias))}{_NO_JUMP}"
        )
    options = _run_ssh_g(alias, config, user, port)
    config_options.refuse_unusable(alias, options)
    host = _first(options, "hostname") or alias
    login = _first(options, "user") or config_options.account().name
    number = int(_first(options, "port") or 22)
    key_alias = _first(options, "hostkeyalias")
    tokens = Tokens(
        host=host,
        original=_original_host(alias),
        port=number,
        user=login,
        key_alias=key_alias or _original_host(alias),
        digest=lambda: _connection_digest(alias, config, user, port),
    )

    def paths(option: str) -> tuple[Path, ...]:
        values = options.get(option.lower(), [])
        return tuple(Path(tokens.path(value, option)) for value in values if value.lower() != "none")

    # ssh -G has expanded tokens in UserKnownHostsFile and IdentityAgent.
    known_hosts = [
        Path(tokens.home(path))
        for key in ("userknownhostsfile", "globalknownhostsfile")
        for path in _split_paths(_first(options, key) or "", tokens)
    ]
    jump_text = tokens.command(_first(options, "proxyjump") or "none", "ProxyJump")
    command = _first(options, "proxycommand") or "none"
    revoked = paths("RevokedHostKeys")
    seconds = re.fullmatch(r"[1-9]\d*", _first(options, "connecttimeout") or "")
    defaults = config_options.read_defaults(_run_ssh_g)
    return SshTarget(
        host=host,
        port=number,
        user=login,
        identity_files=paths("IdentityFile"),
        certificate_files=paths("CertificateFile"),
        known_hosts=tuple(known_hosts),
        host_key_alias=key_alias,
        identity_agent=_agent_socket(_first(options, "identityagent"), tokens),
        identities_only=_first(options, "identitiesonly") == "yes",
        connect_timeout=float(seconds[0]) if seconds else _DEFAULT_CONNECT_TIMEOUT,
        jump=_jump(jump_text, config, (*above, alias)) if jump_text != "none" else None,
        proxy_command=tokens.command(command, "ProxyCommand") if command != "none" else None,
        alias=alias,
        config=config,
        address_family=_first(options, "addressfamily") or "any",
        bind_address=_first(options, "bindaddress"),
        revoked_host_keys=revoked[0] if revoked else None,
        algorithms=config_options.read_restrictions(options, defaults),
        ignored_leniency=config_options.describe_leniency(options),
        asks_to_add_key=_first(options, "stricthostkeychecking") in (None, "ask"),
        notes=config_options.describe_ignored(alias, options, defaults, config),
    )


def _agent_socket(value: str | None, tokens: Tokens) -> str | None:
    if value in (None, "none", "SSH_AUTH_SOCK"):
        return value
    if value.startswith("$") and not value.startswith("${"):
        return os.environ.get(value[1:], "none")
    return tokens.home(value)


def _original_host(alias: str) -> str:
    """The host in `alias`, without user and port."""
    host = alias.removeprefix("ssh://").rpartition("@")[2]
    return re.sub(r":\d+/?$", "", host).strip("[]") if alias.startswith("ssh://") else host


def _connection_digest(alias: str, config: Path | None, user: str | None, port: int | None) -> str:
    # The input of %C differs between versions of OpenSSH, so OpenSSH computes it.
    return _first(_run_ssh_g(alias, config, user, port, "-oControlPath=/%C"), "controlpath")[1:]  # type: ignore[index]


def _jump(text: str, config: Path | None, above: tuple[str, ...]) -> SshTarget:
    """The last of the hops that ProxyJump names, with the ones before it as its own jumps."""
    before, _, last = text.rpartition(",")
    match = re.fullmatch(
        r"(?:ssh://)?(?:(?P<user>.+)@)?(?P<host>\[[^\]]+\]|[^:/]+)(?::(?P<port>\d{1,5}))?/?", last.strip()
    )
    if match is None:
        raise SshError(f"ProxyJump of {above[-1]}: expected [user@]host[:port], found {last!r}")
    port = int(match["port"]) if match["port"] else None
    hop = _target(match["host"].strip("[]"), config, match["user"], port, above)
    if not before:
        return hop
    # The hops before it in the list replace the ProxyJump of the last hop's own entry.
    from dataclasses import replace

    return replace(hop, jump=_jump(before, config, above), proxy_command=None)


def _run_ssh_g(
    alias: str, config: Path | None, user: str | None, port: int | None, *arguments: str
) -> dict[str, list[str]]:
    if not alias or alias.startswith("-") or re.search(r"[\s\0'\"`$\\;&<>|(){}]", alias):
        raise SshError(f"expected the name of a host, user@host or a Host of ~/.ssh/config, found {alias!r}")
    ssh = shutil.which("ssh")
    if ssh is None:
        raise SshError(
            "expected OpenSSH's `ssh` in the PATH (it reads ~/.ssh/config): install openssh-client"
        )
    argv = [ssh, "-G", *arguments]
    argv += ["-F", str(config)] if config is not None else []
    argv += ["-l", user] if user else []
    argv += ["-p", str(port)] if port else []
    try:
        done = subprocess.run(
            [*argv, "--", alias],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=scaled(30),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SshError(
            f"`ssh -G {alias}` did not end: does a `Match exec` of the configuration hang?"
        ) from error
    if done.returncode != 0:
        where = config or "~/.ssh/config"
        message = done.stderr.decode(errors="replace").strip()[:500]
        advice = _NO_JUMP if "jumphost loop" in message else ""
        raise SshError(f"{where} cannot be used for {alias}: {message}{advice}")
    options: dict[str, list[str]] = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        if value.strip():
            options.setdefault(key.lower(), []).append(value.strip())
    return options


def _first(options: dict[str, list[str]], key: str) -> str | None:
    return options[key][0] if options.get(key) else None


def _split_paths(value: str, tokens: Tokens) -> list[str]:
    """Several paths, which ssh -G prints with blanks between them and without quotes.

    The longest sequence of words that is the name of a file is one path; any other word is a path.
    """
    words = value.split(" ")
    paths = []
    while words:
        length = next(
            (n for n in range(len(words), 1, -1) if os.path.exists(tokens.home(" ".join(words[:n])))), 1
        )
        paths.append(" ".join(words[:length]))
        words = words[length:]
    return [path for path in paths if path and path.lower() not in ("none", "/dev/null")]


@dataclass(frozen=True)
class Tokens:
    """The values of %-tokens, ~ and ${NAME}, which `ssh -G` does not expand in paths and commands."""

    host: str
    original: str
    port: int
    user: str
    key_alias: str
    digest: Callable[[], str]

    def path(self, value: str, option: str) -> str:
        """A path of the configuration, expanded. Raises SshError for an unknown token or variable."""
        return self._expand_tokens(self._expand_variables(self.home(value), option), option, "CdhikLlnpru")

    def command(self, value: str, option: str) -> str:
        """A ProxyCommand or ProxyJump with its tokens expanded; the shell expands the rest."""
        return self._expand_tokens(value, option, "hnpr")

    def home(self, value: str) -> str:
        """`value` with ~ as the account's home directory, as in ssh: regardless of HOME."""
        if value == "~" or value.startswith("~/"):
            return config_options.account().home + value[1:]
        return os.path.expanduser(value)

    def _expand_variables(self, value: str, option: str) -> str:
        def replacement(match: re.Match[str]) -> str:
            if match[1] not in os.environ:
                raise SshError(
                    f"{option} of the ssh configuration is {value!r}, but the environment has no {match[1]}: "
                    "set it, or write the path out"
                )
            return os.environ[match[1]]

        return re.sub(r"\$\{(\w+)\}", replacement, value)

    def _expand_tokens(self, value: str, option: str, allowed: str) -> str:
        def replacement(match: re.Match[str]) -> str:
            token = match[1]
            if token == "%":
                return "%"
            if not token or token not in allowed:
                raise SshError(
                    f"{option} of the ssh configuration is {value!r}: expected only the tokens %% "
                    f"{' '.join('%' + letter for letter in allowed)}, found %{token}. "
                    "Write %% for a percent sign"
                )
            return self._value(token)

        return re.sub(r"%(.?)", replacement, value)

    def _value(self, token: str) -> str:
        hostname = socket.gethostname()
        values: dict[str, Callable[[], str]] = {
            "C": self.digest,
            "d": lambda: config_options.account().home,
            "h": lambda: self.host,
            "i": lambda: str(os.getuid()),
            "k": lambda: self.key_alias,
            "L": lambda: hostname.partition(".")[0],
            "l": lambda: hostname,
            "n": lambda: self.original,
            "p": lambda: str(self.port),
            "r": lambda: self.user,
            "u": lambda: config_options.account().name,
        }
        return values[token]()
