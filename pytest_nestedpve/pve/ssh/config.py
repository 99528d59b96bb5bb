"""What ~/.ssh/config says about a host, by asking OpenSSH itself (`ssh -G`): Include, Match and all."""

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
_NO_JUMP = ". The host where the way begins needs `ProxyJump none`, above the ProxyJump that is for all"
_DEFAULT_CONNECT_TIMEOUT = 10.0


def read_ssh_config(alias: str, config: Path | None, user: str | None, port: int | None) -> SshTarget:
    """The target that `ssh alias` leads to, all its jump hosts included.

    `alias` may also be user@host or ssh://user@host:port. `config` replaces the user's and the
    system's file, as `ssh -F` does; `user` and `port` go before what stands there.
    Raises SshError when the file is wrong, the name is none, or it asks for what is not supported.
    """
    return _target(alias, config, user, port, ())


def _target(
    alias: str, config: Path | None, user: str | None, port: int | None, above: tuple[str, ...]
) -> SshTarget:
    if alias in above or len(above) >= _HOPS:
        raise SshError(
            f"the ProxyJump of {above[0]} goes in a circle or over more than {_HOPS} hops: "
            f"{' → '.join((*above, alias))}{_NO_JUMP}"
        )
    said = _ask(alias, config, user, port)
    config_options.refuse_unusable(alias, said)
    host, login = _one(said, "hostname") or alias, _one(said, "user") or config_options.account().name
    number = int(_one(said, "port") or 22)
    key_alias = _one(said, "hostkeyalias")
    tokens = Tokens(
        host=host,
        typed=_typed(alias),
        port=number,
        user=login,
        key_alias=key_alias or _typed(alias),
        digest=lambda: _digest(alias, config, user, port),
    )

    def paths(option: str) -> tuple[Path, ...]:
        values = said.get(option.lower(), [])
        return tuple(Path(tokens.path(value, option)) for value in values if value.lower() != "none")

    # ssh -G has expanded what stands in UserKnownHostsFile and IdentityAgent.
    known = [
        Path(tokens.home(path))
        for key in ("userknownhostsfile", "globalknownhostsfile")
        for path in _files(_one(said, key) or "", tokens)
    ]
    jump_text = tokens.command(_one(said, "proxyjump") or "none", "ProxyJump")
    command = _one(said, "proxycommand") or "none"
    revoked = paths("RevokedHostKeys")
    seconds = re.fullmatch(r"[1-9]\d*", _one(said, "connecttimeout") or "")
    usual = config_options.usual(_ask)
    return SshTarget(
        host=host,
        port=number,
        user=login,
        identity_files=paths("IdentityFile"),
        certificate_files=paths("CertificateFile"),
        known_hosts=tuple(known),
        host_key_alias=key_alias,
        identity_agent=_agent(_one(said, "identityagent"), tokens),
        identities_only=_one(said, "identitiesonly") == "yes",
        connect_timeout=float(seconds[0]) if seconds else _DEFAULT_CONNECT_TIMEOUT,
        jump=_jump(jump_text, config, (*above, alias)) if jump_text != "none" else None,
        proxy_command=tokens.command(command, "ProxyCommand") if command != "none" else None,
        alias=alias,
        config=config,
        address_family=_one(said, "addressfamily") or "any",
        bind_address=_one(said, "bindaddress"),
        revoked_host_keys=revoked[0] if revoked else None,
        algorithms=config_options.restricted(said, usual),
        lenient=config_options.lenient(said),
        asks=_one(said, "stricthostkeychecking") in (None, "ask"),
        notes=config_options.not_honoured(alias, said, usual, config),
    )


def _agent(value: str | None, tokens: Tokens) -> str | None:
    if value in (None, "none", "SSH_AUTH_SOCK"):
        return value
    if value.startswith("$") and not value.startswith("${"):
        return os.environ.get(value[1:], "none")
    return tokens.home(value)


def _typed(alias: str) -> str:
    """The host of what was typed: without user and port."""
    host = alias.removeprefix("ssh://").rpartition("@")[2]
    return re.sub(r":\d+/?$", "", host).strip("[]") if alias.startswith("ssh://") else host


def _digest(alias: str, config: Path | None, user: str | None, port: int | None) -> str:
    # What goes into %C differs between versions of OpenSSH: it is asked.
    return _one(_ask(alias, config, user, port, "-oControlPath=/%C"), "controlpath")[1:]  # type: ignore[index]


def _jump(text: str, config: Path | None, above: tuple[str, ...]) -> SshTarget:
    """The last of the hops that ProxyJump names, reached over the ones before it."""
    before, _, last = text.rpartition(",")
    found = re.fullmatch(
        r"(?:ssh://)?(?:(?P<user>.+)@)?(?P<host>\[[^\]]+\]|[^:/]+)(?::(?P<port>\d{1,5}))?/?", last.strip()
    )
    if found is None:
        raise SshError(f"ProxyJump of {above[-1]}: expected [user@]host[:port], found {last!r}")
    port = int(found["port"]) if found["port"] else None
    hop = _target(found["host"].strip("[]"), config, found["user"], port, above)
    if not before:
        return hop
    # Hops that were written out replace those that the last one's own entry names.
    from dataclasses import replace

    return replace(hop, jump=_jump(before, config, above), proxy_command=None)


def _ask(
    alias: str, config: Path | None, user: str | None, port: int | None, *options: str
) -> dict[str, list[str]]:
    if not alias or alias.startswith("-") or re.search(r"[\s\0'\"`$\\;&<>|(){}]", alias):
        raise SshError(f"expected the name of a host, user@host or a Host of ~/.ssh/config, found {alias!r}")
    ssh = shutil.which("ssh")
    if ssh is None:
        raise SshError(
            "expected OpenSSH's `ssh` in the PATH (it reads ~/.ssh/config): install openssh-client"
        )
    argv = [ssh, "-G", *options]
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
        said_so = done.stderr.decode(errors="replace").strip()[:500]
        cure = _NO_JUMP if "jumphost loop" in said_so else ""
        raise SshError(f"{where} cannot be used for {alias}: {said_so}{cure}")
    said: dict[str, list[str]] = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        if value.strip():
            said.setdefault(key.lower(), []).append(value.strip())
    return said


def _one(said: dict[str, list[str]], key: str) -> str | None:
    return said[key][0] if said.get(key) else None


def _files(value: str, tokens: Tokens) -> list[str]:
    """Several paths, which ssh -G prints with blanks between them and without quotes.

    The longest run of words that is a file's name is one path; what is no file is a path per word.
    """
    words = value.split(" ")
    found = []
    while words:
        length = next(
            (n for n in range(len(words), 1, -1) if os.path.exists(tokens.home(" ".join(words[:n])))), 1
        )
        found.append(" ".join(words[:length]))
        words = words[length:]
    return [path for path in found if path and path.lower() not in ("none", "/dev/null")]


@dataclass(frozen=True)
class Tokens:
    """What the %-tokens, ~ and ${NAME} that `ssh -G` leaves in paths and commands stand for."""

    host: str
    typed: str
    port: int
    user: str
    key_alias: str
    digest: Callable[[], str]

    def path(self, value: str, option: str) -> str:
        """A path of the configuration as it is meant. Raises SshError for what ssh would not know."""
        return self._percent(self._named(self.home(value), option), option, "CdhikLlnpru")

    def command(self, value: str, option: str) -> str:
        """A ProxyCommand or ProxyJump; the shell sees to the rest."""
        return self._percent(value, option, "hnpr")

    def home(self, value: str) -> str:
        """~ is the account's home directory, as ssh has it, whatever HOME says."""
        if value == "~" or value.startswith("~/"):
            return config_options.account().home + value[1:]
        return os.path.expanduser(value)

    def _named(self, value: str, option: str) -> str:
        def replaced(found: re.Match[str]) -> str:
            if found[1] not in os.environ:
                raise SshError(
                    f"{option} of the ssh configuration is {value!r}, but the environment has no {found[1]}: "
                    "set it, or write the path out"
                )
            return os.environ[found[1]]

        return re.sub(r"\$\{(\w+)\}", replaced, value)

    def _percent(self, value: str, option: str, allowed: str) -> str:
        def replaced(found: re.Match[str]) -> str:
            token = found[1]
            if token == "%":
                return "%"
            if not token or token not in allowed:
                raise SshError(
                    f"{option} of the ssh configuration is {value!r}: expected of the tokens only %% "
                    f"{' '.join('%' + each for each in allowed)}, found %{token}. Write %% for a percent sign"
                )
            return self._value(token)

        return re.sub(r"%(.?)", replaced, value)

    def _value(self, token: str) -> str:
        this = socket.gethostname()
        values: dict[str, Callable[[], str]] = {
            "C": self.digest,
            "d": lambda: config_options.account().home,
            "h": lambda: self.host,
            "i": lambda: str(os.getuid()),
            "k": lambda: self.key_alias,
            "L": lambda: this.partition(".")[0],
            "l": lambda: this,
            "n": lambda: self.typed,
            "p": lambda: str(self.port),
            "r": lambda: self.user,
            "u": lambda: config_options.account().name,
        }
        return values[token]()
