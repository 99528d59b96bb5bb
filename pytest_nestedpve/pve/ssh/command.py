"""A command on a channel: both output streams are read until its end or the time limit."""

from __future__ import annotations

import select
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import CommandTimeout, PveError, SshError

if TYPE_CHECKING:
    import paramiko

OUTPUT_LIMIT = 256 * 1024 * 1024
_CHUNK = 256 * 1024
# Bytes that sshd buffers before the command reads any.
_BUFFERED = 32 * 1024
# Seconds of silence after the exit status: a daemon that the command started keeps its output open.
_AFTER_EXIT = 1.0

Ended = tuple[int, bytes, bytes]


@dataclass(frozen=True)
class CommandResult:
    """The result of a command that ended.

    >>> result = CommandResult("id -un", 0, b"root\\n", b"", 5.8)
    >>> result.ok, result.stdout
    (True, 'root\\n')

    `rc` is the exit status (-1: unknown, killed by a signal); `ms` wall-clock milliseconds.
    """

    command: str
    rc: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    ms: float
    secret: bool = False

    @property
    def stdout(self) -> str:
        """Standard output as text; bytes that are not UTF-8 are replaced."""
        return self.stdout_bytes.decode("utf-8", "replace")

    @property
    def stderr(self) -> str:
        """Standard error as text; bytes that are not UTF-8 are replaced."""
        return self.stderr_bytes.decode("utf-8", "replace")

    @property
    def ok(self) -> bool:
        return self.rc == 0

    def check(self) -> CommandResult:
        """This result, if the exit status is 0; raises CommandFailed otherwise."""
        if not self.ok:
            raise CommandFailed(self)
        return self


class CommandFailed(PveError):
    """A command ended with an exit status other than 0; `result` has its status and output."""

    def __init__(self, result: CommandResult) -> None:
        output = "" if result.secret else (result.stderr.strip() or result.stdout.strip())
        tail = "".join(f"\n    {line}" for line in output.splitlines()[-12:])
        super().__init__(f"`{result.command}` ended with exit status {result.rc}, expected 0{tail}")
        self.result = result


class Exchange:
    """A command and its channel: `finish` sends the command and waits for its end.

    `stdin` is sent and closed; None leaves standard input open (`pipe_into`).
    `label` (the command) and `where` (the host) are for messages; with `secret` no message has the output.
    """

    def __init__(
        self,
        channel: paramiko.Channel,
        command: str,
        label: str,
        stdin: bytes | BinaryIO | None,
        where: str,
        secret: bool = False,
    ) -> None:
        self._channel = channel
        self._command = command
        self._label = label
        self._where = where
        self._stdin = stdin
        self._secret = secret

    def _start(self, deadline: Deadline) -> None:
        import paramiko

        self._channel.settimeout(max(0.05, deadline.remaining()))
        try:
            self._channel.exec_command(self._command)
        except (paramiko.SSHException, EOFError, OSError) as error:
            raise SshError(
                f"the connection to {self._where} was lost as `{self._label}` was sent: {error}. "
                "It is not known whether the command ran"
            ) from error
        if self._stdin is None:
            return
        if isinstance(self._stdin, bytes) and len(self._stdin) <= _BUFFERED:
            self._feed(self._stdin)
        else:
            threading.Thread(
                target=self._feed, args=(self._stdin,), daemon=True, name="nested-pve-stdin"
            ).start()

    def _feed(self, data: bytes | BinaryIO) -> None:
        # A command may end without reading all of its input.
        with suppress(Exception):
            if not isinstance(data, bytes):
                while chunk := data.read(_CHUNK):
                    self._channel.sendall(chunk)
            elif data:
                self._channel.sendall(data)
            self._channel.shutdown_write()

    def finish(self, deadline: Deadline) -> Ended:
        """Exit status, standard output, standard error; raises CommandTimeout, SshError."""
        self._start(deadline)
        return self._collect(deadline, None)

    def _collect(self, deadline: Deadline, sink: Callable[[bytes], None] | None) -> Ended:
        channel = self._channel
        out: list[bytes] = []
        err: list[bytes] = []
        size = 0
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        after_exit: Deadline | None = None
        while True:
            received = False
            if channel.recv_ready():
                data = channel.recv(_CHUNK)
                received = True
                if sink is None:
                    out.append(data)
                    size += len(data)
                else:
                    sink(data)
            if channel.recv_stderr_ready():
                data = channel.recv_stderr(_CHUNK)
                received = True
                err.append(data)
                size += len(data)
            if size > OUTPUT_LIMIT:
                raise SshError(f"`{self._label}` at {self._where} wrote more than {OUTPUT_LIMIT >> 20} MiB")
            if received:
                after_exit = None
                if deadline.expired:
                    raise self._timeout(deadline, out, err)
                continue
            # Both streams are read up to here; `eof_received` and `closed` are set after their last bytes.
            if channel.eof_received or channel.closed:
                if channel.recv_ready() or channel.recv_stderr_ready():
                    continue
                break
            if channel.exit_status_ready():
                after_exit = after_exit or Deadline(_AFTER_EXIT)
                if after_exit.expired:
                    break
            if deadline.expired:
                raise self._timeout(deadline, out, err)
            # The pipe signals data and the end, but not an exit status alone: hence the short wait.
            poll.poll(max(1, min(250, deadline.remaining() * 1000)))
        while not channel.status_event.wait(min(0.25, deadline.remaining())):
            if deadline.expired:
                raise self._timeout(deadline, out, err)
        if not channel.exit_status_ready() or (channel.exit_status == -1 and self._is_lost()):
            raise SshError(
                f"the connection to {self._where} was lost while `{self._label}` ran: "
                "the command may still run there"
            )
        return channel.exit_status, b"".join(out), b"".join(err)

    def _is_lost(self) -> bool:
        transport = self._channel.get_transport()
        return not transport.is_active()

    def _timeout(self, deadline: Deadline, out: list[bytes], err: list[bytes]) -> CommandTimeout:
        tail = b"" if self._secret else b"".join(err)[-400:] or b"".join(out)[-400:]
        output = f". Last output: {tail.decode('utf-8', 'replace').strip()!r}" if tail else ""
        return CommandTimeout(
            f"`{self._label}` at {self._where} did not end within {deadline.limit:g} s; the channel was "
            f"closed, the command may still run there{output}"
        )

    def pipe_into(self, other: Exchange, deadline: Deadline) -> tuple[Ended, Ended]:
        """Run this command and `other` at once, with the output of this one as input of the other."""
        other._start(deadline)
        other_result: list[Ended | BaseException] = []

        def collect() -> None:
            try:
                other_result.append(other._collect(deadline, None))
            except BaseException as error:
                other_result.append(error)

        collector = threading.Thread(target=collect, daemon=True, name="nested-pve-pipe")
        collector.start()
        self._start(deadline)

        def forward(data: bytes) -> None:
            other._channel.settimeout(max(0.05, deadline.remaining()))
            # When the other command stopped reading, its exit status has the reason.
            with suppress(OSError):
                other._channel.sendall(data)

        result = self._collect(deadline, forward)
        other._feed(b"")
        collector.join(deadline.remaining() + 1)
        if not other_result:
            raise other._timeout(deadline, [], [])
        if isinstance(other_result[0], BaseException):
            raise other_result[0]
        return result, other_result[0]
