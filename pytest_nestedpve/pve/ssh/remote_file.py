"""A file on a host: written whole or not at all, read within a limit, by commands of its shell.

No SFTP subsystem is needed; appliances often have none.
"""

from __future__ import annotations

import io
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from pytest_nestedpve.pve.errors import SshError
from pytest_nestedpve.pve.ssh.command import CommandResult

READ_LIMIT = 64 * 1024 * 1024
"""Bytes that a file may have unless the caller sets another limit."""


class Runner(Protocol):
    """Runs a command on the host, as `SshConnection.run` does."""

    def __call__(
        self, command: Sequence[str], /, *, stdin: bytes | BinaryIO | None = None, timeout: float = 60.0
    ) -> CommandResult: ...


def write(run: Runner, data: bytes | BinaryIO | Path, remote: str, mode: int) -> None:
    """Write `data` to the path `remote`, which holds the old file until the new one is complete.

    The bytes go to a temporary file in the same directory, in one command; it is renamed when its size is
    right, and deleted after any failure, also that of the connection. A symbolic link at `remote` is
    replaced, not followed. Below /etc/pve, where PVE decides on modes, `mode` is not set. A stream with an
    attribute `size` is closed, any other is copied first. Raises CommandFailed and what `run` raises.
    """
    stream, size = _sized(data)
    try:
        # Half a minute, and the time of the bytes at 1 MiB/s.
        run(["sh", "-c", _script(remote, size, mode)], stdin=stream, timeout=30 + size / 2**20).check()
    finally:
        stream.close()


def _script(remote: str, size: int, mode: int) -> str:
    folder, slash, name = remote.rpartition("/")
    part = shlex.quote(f"{folder}{slash}.{name[:120]}.{secrets.token_hex(6)}.part")
    target = shlex.quote(remote)
    message = shlex.quote(f"{remote} is unchanged: the transfer was cut off, expected {size} bytes, received")
    chmod = "" if remote.startswith("/etc/pve/") else f"chmod {mode:o} -- {part} && "
    # After a lost connection `cat` reads an end of input, or the shell gets a signal. Without the second
    # trap, dash would not run the first one then.
    return (
        f"umask 077; trap {shlex.quote('rm -f -- ' + part)} EXIT; trap 'exit 1' HUP INT PIPE TERM; "
        f"cat >{part} && received=$(wc -c <{part}) && "
        f'{{ test "$received" -eq {size} || {{ echo {message} "$received" >&2; exit 1; }}; }} && '
        f"{chmod}mv -fT -- {part} {target}"
    )


def read(run: Runner, remote: str, limit: int, host: str) -> bytes:
    """The content of the file `remote`, at most `limit` bytes; `host` is for messages.

    Raises SshError when the file is larger, CommandFailed when it cannot be read, and what `run` raises.
    """
    command = ["head", "-c", str(limit + 1), "--", remote]
    content = run(command, timeout=30 + limit / 2**20).check().stdout_bytes
    if len(content) > limit:
        raise SshError(f"{remote} on {host}: expected at most {limit} bytes, found more")
    return content


def _sized(data: bytes | BinaryIO | Path) -> tuple[BinaryIO, int]:
    """A stream for the caller to close, and the number of its bytes."""
    if isinstance(data, bytes):
        return io.BytesIO(data), len(data)
    if isinstance(data, Path):
        return data.open("rb"), data.stat().st_size
    if isinstance(size := getattr(data, "size", None), int):
        return data, size
    # The size is needed first, and the caller's stream is not closed: a copy on disk.
    copy = tempfile.SpooledTemporaryFile(max_size=2**20)  # noqa: SIM115
    shutil.copyfileobj(data, copy)
    size = copy.tell()
    copy.seek(0)
    return cast(BinaryIO, copy), size
