"""What ~/.ssh/config says about a host, by asking OpenSSH itself (`ssh -G`): Include, Match and all."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

from pytest_nestedpve.pve.errors import SshError
from pytest_nestedpve.pve.login import SshTarget
from pytest_nestedpve.timing import scaled

_HOPS = 8
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
            f"{' → '.join((*above, alias))}. Check ~/.ssh/config"
        )
    said = _ask(alias, config, user, port)
    _refuse_unsupported(alias, said)
    host, login = _one(said, "hostname") or alias, _one(said, "user") or getpass.getuser()
    number = int(_one(said, "port") or 22)

    def paths(key: str) -> tuple[Path, ...]:
        return tuple(
            Path(_expanded(value, alias, host, number, login))
            for value in said.get(key, [])
            if value.lower() != "none"
        )

    known = [
        path
        for key in ("userknownhostsfile", "globalknownhostsfile")
        for path in _files(_one(said, key) or "")
    ]
    jump_text = _one(said, "proxyjump")
    command = _one(said, "proxycommand")
    agent = _one(said, "identityagent")
    if agent not in (None, "none", "SSH_AUTH_SOCK"):
        agent = os.environ.get(agent[1:], "none") if agent.startswith("$") else agent
        agent = _expanded(agent, alias, host, number, login)
    seconds = re.fullmatch(r"[1-9]\d*", _one(said, "connecttimeout") or "")
    return SshTarget(
        host=host,
        port=number,
        user=login,
        identity_files=paths("identityfile"),
        certificate_files=paths("certificatefile"),
        known_hosts=tuple(Path(_expanded(str(path), alias, host, number, login)) for path in known),
        host_key_alias=_one(said, "hostkeyalias"),
        identity_agent=agent,
        identities_only=_one(said, "identitiesonly") == "yes",
        connect_timeout=float(seconds[0]) if seconds else _DEFAULT_CONNECT_TIMEOUT,
        jump=_jump(jump_text, config, (*above, alias)) if jump_text and jump_text != "none" else None,
        proxy_command=_expanded(command, alias, host, number, login)
        if command and command != "none"
        else None,
        alias=alias,
    )


def _jump(text: str, config: Path | None, above: tuple[str, ...]) -> SshTarget:
    """The last of the hops that ProxyJump names, reached over the ones before it."""
    before, _, last = text.rpartition(",")
    found = re.fullmatch(
        r"(?:ssh://)?(?:(?P<user>[^@]+)@)?(?P<host>\[[^\]]+\]|[^:/]+)(?::(?P<port>\d{1,5}))?/?", last.strip()
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


def _ask(alias: str, config: Path | None, user: str | None, port: int | None) -> dict[str, list[str]]:
    if not alias or alias.startswith("-") or re.search(r"[\s\0'\"`$\\;&<>|(){}]", alias):
        raise SshError(f"expected the name of a host, user@host or a Host of ~/.ssh/config, found {alias!r}")
    ssh = shutil.which("ssh")
    if ssh is None:
        raise SshError(
            "expected OpenSSH's `ssh` in the PATH (it reads ~/.ssh/config): install openssh-client"
        )
    argv = [ssh, "-G"]
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
        raise SshError(
            f"{where} cannot be used for {alias}: {done.stderr.decode(errors='replace').strip()[:500]}"
        )
    said: dict[str, list[str]] = {}
    for line in done.stdout.decode(errors="replace").splitlines():
        key, _, value = line.partition(" ")
        if value.strip():
            said.setdefault(key.lower(), []).append(value.strip())
    return said


def _refuse_unsupported(alias: str, said: dict[str, list[str]]) -> None:
    if _one(said, "proxyusefdpass") == "yes":
        raise SshError(f"ProxyUseFdpass, as {alias} has it in the ssh configuration, is not supported")


def _one(said: dict[str, list[str]], key: str) -> str | None:
    return said[key][0] if said.get(key) else None


def _files(value: str) -> list[Path]:
    if value.lower() in ("", "none", "/dev/null"):
        return []
    # ssh -G prints several paths with blanks between them and no quotes.
    return (
        [Path(value)] if os.path.exists(os.path.expanduser(value)) else [Path(part) for part in value.split()]
    )


def _expanded(value: str, alias: str, host: str, port: int, user: str) -> str:
    """~, ${NAME} and the %-tokens that `ssh -G` leaves in paths and commands."""
    home = os.path.expanduser("~")
    this = socket.gethostname()
    tokens = {
        "%": "%",
        "d": home,
        "h": host,
        "i": str(os.getuid()),
        "k": host,
        "l": this,
        "L": this.partition(".")[0],
        "n": alias,
        "p": str(port),
        "r": user,
        "u": getpass.getuser(),
    }
    value = re.sub(r"%(.)", lambda found: tokens.get(found[1], found[0]), value)
    value = re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], ""), value)
    return os.path.expanduser(value) if value.startswith("~") else value
