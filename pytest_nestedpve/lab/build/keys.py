"""The lab's own archive keys: one in place of Debian's, one in place of Proxmox'. Created once per cache."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import programs
from ..names import cache_dir

NAMES = ("debian", "pve")


def public(name: str) -> Path:
    """The public key `name` as a file for apt (binary)."""
    return cache_dir() / "keys" / f"{name}.gpg"


def _secret(name: str) -> Path:
    return cache_dir() / "keys" / f"{name}.secret"


def create() -> None:
    """Create missing keys. LabError when gpg fails."""
    folder = cache_dir() / "keys"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    for name in NAMES:
        if public(name).exists() and _secret(name).exists():
            continue
        with _temporary_home() as gpg:
            user = f"nested-pve lab, archive {name} <{name}@nested-pve.test>"
            generate = [*gpg, "--passphrase", "", "--quick-generate-key", user, "rsa3072", "sign", "never"]
            programs.run(generate, what="creating an archive key")
            secret = programs.run([*gpg, "--export-secret-keys"], what="exporting an archive key")
            exported = programs.run([*gpg, "--export"], what="exporting an archive key")
        _secret(name).touch(mode=0o600)
        _secret(name).write_bytes(secret)
        public(name).write_bytes(exported)


def sign(name: str, releases: list[Path]) -> None:
    """Sign Release files by the key `name`: write InRelease and Release.gpg beside each of them."""
    with _temporary_home() as gpg:
        programs.run([*gpg, "--import", _secret(name)], what="importing an archive key")
        for release in releases:
            inline = release.with_name("InRelease")
            detached = release.with_name("Release.gpg")
            what = f"signing {release}"
            programs.run([*gpg, "--yes", "--clearsign", "-o", inline, release], what=what)
            programs.run([*gpg, "--yes", "--armor", "--detach-sign", "-o", detached, release], what=what)


@contextlib.contextmanager
def _temporary_home() -> Iterator[list[str]]:
    """A gpg command with a temporary home, whose agent is ended. The path is short enough for its sockets."""
    with tempfile.TemporaryDirectory(prefix="npve-gpg-", dir="/tmp") as home:
        try:
            yield ["gpg", "--homedir", home, "--batch", "--no-tty", "--quiet", "--pinentry-mode", "loopback"]
        finally:
            programs.run(["gpgconf", "--homedir", home, "--kill", "all"], what="ending the key agent")
