"""Commands, files and tunnels over one SSH login, shared by threads and renewed after a loss."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_nestedpve.pve.calls import NO_LOG, Call, CallLog
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import CommandTimeout, HostUnreachable, PveError, SshError
from pytest_nestedpve.pve.ssh import remote_file
from pytest_nestedpve.pve.ssh.command import CommandFailed, CommandResult, Exchange
from pytest_nestedpve.pve.ssh.login import log_in
from pytest_nestedpve.pve.ssh.target import SshTarget

if TYPE_CHECKING:
    import paramiko

    from pytest_nestedpve.pve.ssh.forward import Forward

__all__ = ["CommandFailed", "CommandResult", "SshConnection", "SshTarget"]

# sshd's MaxSessions is 10, but sshd frees a slot late: of 600 sessions, 5 at a time, it refused none; 8 at
# a time, 73.
CHANNELS_PER_TRANSPORT = 5
TRANSPORTS = 4


@dataclass
class _Link:
    transport: paramiko.Transport
    close_proxy: Callable[[], None]
    busy: int = 0
    retired: bool = False  # did not answer: gets no new channels

    @property
    def alive(self) -> bool:
        return not self.retired and bool(self.transport.is_active())

    def close(self) -> None:
        with suppress(Exception):
            self.transport.close()
        self.close_proxy()


@dataclass
class _Attempt:
    """A login that several threads may wait for."""

    error: PveError | None = None
    ended: bool = field(default=False)


class SshConnection:
    """A login at one host. Connects at the first use, and again after the loss of the connection.

    Thread-safe. A transport has at most five channels; further transports are opened on demand. Each command
    that ended is recorded in `log`, a secret one without its text. `via` is the connection to the jump host;
    without it, one to `target.jump` is opened at the first use.
    """

    def __init__(
        self,
        target: SshTarget,
        *,
        via: SshConnection | None = None,
        log: CallLog = NO_LOG,
    ) -> None:
        self.target = target
        self._owns_via = via is None and target.jump is not None
        self._via = SshConnection(target.jump) if via is None and target.jump is not None else via
        self._log = log
        self._changed = threading.Condition()
        self._links: list[_Link] = []
        self._attempt: _Attempt | None = None
        self._closed = False
        self._forwards: list[Forward] = []

    def __enter__(self) -> SshConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SshConnection {self.target.text}>"

    # -- commands ---------------------------------------------------------------------------------

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | BinaryIO | None = None,
        timeout: float = 60.0,
        secret: bool = False,
        logged: bool = True,
    ) -> CommandResult:
        """Run a command and wait for its end, at most `timeout` seconds (nominal) after it began.

        A sequence is an argv and is quoted; a string is shell text. `stdin` is sent up to its end; a
        stream is not closed. Connecting has its own limit.
        `secret` keeps the text and the output out of the log and of exceptions; `logged=False` is for
        a caller that records the call itself.
        Raises SshError and its family when the connection failed, CommandTimeout when the limit passed.
        The channel is closed then; the command may still run on the host.
        An exit status other than 0 is no error: see `CommandResult.check`.
        """
        log = self._log if logged else NO_LOG
        text, label = _texts(command, secret)
        data = b"" if stdin is None else stdin
        began = time.monotonic()
        try:
            with self._channel(timeout) as (channel, link):
                exchange = Exchange(channel, text, label, data, self.target.text, secret)
                try:
                    rc, out, err = exchange.finish(Deadline(timeout))
                except CommandTimeout:
                    # The command may be slow, or the connection lost: a silent transport is replaced.
                    self._retire_if_silent(link)
                    raise
        except PveError:
            log.record(Call("ssh", label, -1, _ms(began)))
            raise
        result = CommandResult(label, rc, out, err, _ms(began), secret)
        log.record(Call("ssh", label, rc, result.ms))
        return result

    # -- files ------------------------------------------------------------------------------------

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        """Write a file on the host, whole or not at all: see `remote_file.write`.

        Raises CommandFailed (no such directory, disk full), SshError, CommandTimeout.
        """
        remote_file.write(self.run, data, remote, mode)

    def get(self, remote: str, limit: int = remote_file.READ_LIMIT) -> bytes:
        """The content of a file on the host; SshError when it has more than `limit` bytes.

        Raises CommandFailed when the file cannot be read.
        """
        return remote_file.read(self.run, remote, limit, self.target.text)

    def pipe(
        self,
        command: str | Sequence[str],
        other: SshConnection,
        other_command: str | Sequence[str],
        timeout: float = 600.0,
    ) -> None:
        """Run `command` on this host, and `other_command` at `other` with its output as input.

        The data is not stored on this machine. Raises CommandFailed for the command that failed (both:
        for `command`), SshError, CommandTimeout after `timeout` seconds (nominal).
        """
        text, label = _texts(command, False)
        other_text, other_label = _texts(other_command, False)
        began = time.monotonic()
        with self._channel(timeout) as (source, _), other._channel(timeout) as (sink, _):
            deadline = Deadline(timeout)
            reader = Exchange(source, text, label, b"", self.target.text)
            writer = Exchange(sink, other_text, other_label, None, other.target.text)
            results = reader.pipe_into(writer, deadline)
        for (rc, out, err), piped in zip(results, (label, other_label), strict=True):
            CommandResult(piped, rc, out, err, _ms(began)).check()

    # -- tunnels ----------------------------------------------------------------------------------

    def open_channel(self, host: str, port: int) -> Any:
        """A connection from the host to `host`:`port`, as a socket-like object; the caller closes it.

        Raises HostUnreachable when the host cannot connect to it.
        """
        return self._open_tunnel(host, port, Deadline(self.target.connect_timeout))

    def forward(self, host: str, port: int) -> Forward:
        """A port on 127.0.0.1 of this machine; its connections continue from the host to `host`:`port`."""
        from pytest_nestedpve.pve.ssh.forward import Forward

        forward = Forward(lambda: self.open_channel(host, port))
        self._forwards.append(forward)
        return forward

    def _open_tunnel(self, host: str, port: int, deadline: Deadline) -> Any:
        import paramiko

        while True:
            # Tunnels do not count against MaxSessions, so they need no slot.
            link = self._link(Deadline(self.target.connect_timeout), slot=False)
            try:
                return link.transport.open_channel(
                    "direct-tcpip",
                    (host, port),
                    ("127.0.0.1", 0),
                    timeout=max(0.1, deadline.remaining()),
                )
            except paramiko.ChannelException as error:
                raise HostUnreachable(
                    f"{self.target.text} cannot connect to {host} port {port}: {error.text}. Is that host "
                    "up, its sshd running, TCP forwarding allowed on the way?"
                ) from error
            except (paramiko.SSHException, EOFError, OSError) as error:
                self._retire(link)
                if deadline.expired:
                    raise HostUnreachable(
                        f"{self.target.text} did not connect to {host} port {port} within "
                        f"{deadline.limit:g} s"
                    ) from error

    # -- transports -------------------------------------------------------------------------------

    @contextmanager
    def _channel(self, timeout: float) -> Iterator[tuple[paramiko.Channel, _Link]]:
        """A session channel; that sshd opens it proves that the transport works."""
        import paramiko

        wait = Deadline(timeout + self.target.connect_timeout)
        pause = 0.02
        while True:
            link = self._link(wait, slot=True)
            try:
                channel = link.transport.open_session(timeout=Deadline(self.target.connect_timeout).limit)
                break
            except (paramiko.SSHException, EOFError, OSError) as error:
                self._release(link)
                refused = isinstance(error, paramiko.ChannelException) or "Unable to open" in str(error)
                if not (refused and link.transport.is_active()):
                    # No answer, or a lost connection. Nothing was sent yet: retried on another transport.
                    self._retire(link)
                elif wait.remaining() > pause:
                    threading.Event().wait(pause)
                    pause = min(pause * 2, 0.5)
                if wait.expired:
                    raise SshError(f"{self.target.text} opens no further session: {error}") from error
        try:
            yield channel, link
        finally:
            with suppress(Exception):
                channel.close()
            self._release(link)

    def _link(self, wait: Deadline, *, slot: bool) -> _Link:
        while True:
            with self._changed:
                awaited = self._attempt
                while True:
                    if self._closed:
                        raise SshError(f"the connection to {self.target.text} was closed by this session")
                    if (
                        awaited is not None
                        and awaited.ended
                        and awaited.error is not None
                        and not self._links
                    ):
                        # Copy: several threads must not share one traceback.
                        raise type(awaited.error)(str(awaited.error)) from awaited.error
                    link = self._pick_link(slot)
                    if link is not None:
                        link.busy += slot
                        return link
                    if self._attempt is None and sum(link.alive for link in self._links) < TRANSPORTS:
                        attempt = self._attempt = _Attempt()
                        break
                    awaited = awaited or self._attempt
                    if not self._changed.wait(wait.remaining()) and wait.expired:
                        raise CommandTimeout(
                            f"no session was free at {self.target.text} for {wait.limit:g} s: "
                            f"{sum(link.busy for link in self._links)} commands run there"
                        )
            self._add_link(attempt)

    def _pick_link(self, slot: bool) -> _Link | None:
        for link in list(self._links):
            if not link.transport.is_active() or (link.retired and not link.busy):
                self._links.remove(link)
                link.close()
        alive = [link for link in self._links if link.alive]
        usable = [link for link in alive if not slot or link.busy < CHANNELS_PER_TRANSPORT]
        return min(usable, key=lambda link: link.busy) if usable else None

    def _add_link(self, attempt: _Attempt) -> None:
        link: _Link | None = None
        try:
            via, target = self._via, self.target
            if via is not None:
                # Before the time limit of this login starts: each hop has its own limit.
                via._link(Deadline(via.target.connect_timeout), slot=False)
            open_socket = (
                None if via is None else lambda rest: via._open_tunnel(target.host, target.port, rest)
            )
            link = _Link(*log_in(target, open_socket))
        except PveError as error:
            attempt.error = error
            # Other transports exist: this one is not necessary.
            if not self._links:
                raise
        finally:
            with self._changed:
                attempt.ended = True
                self._attempt = None
                if link is not None:
                    self._links.append(link)
                self._changed.notify_all()

    def _release(self, link: _Link) -> None:
        with self._changed:
            link.busy -= 1
            self._changed.notify_all()

    def _retire(self, link: _Link) -> None:
        with self._changed:
            link.retired = True
            if link in self._links and not link.busy:
                self._links.remove(link)
                link.close()
            self._changed.notify_all()

    def _retire_if_silent(self, link: _Link) -> None:
        """Retire a transport that does not answer a keep-alive request within a second."""
        answered = threading.Event()

        def request() -> None:
            with suppress(Exception):
                if link.transport.global_request("keepalive@openssh.com", wait=True) is None:
                    # A refusal is an answer, too; the end of the transport is not.
                    if link.transport.is_active():
                        answered.set()
                else:
                    answered.set()

        threading.Thread(target=request, daemon=True, name="nested-pve-alive").start()
        if not answered.wait(1.0):
            self._retire(link)

    def close(self) -> None:
        """Close forwards and transports for good; running commands of other threads fail."""
        with self._changed:
            self._closed = True
            links, self._links = self._links, []
            forwards, self._forwards = self._forwards, []
            self._changed.notify_all()
        for forward in forwards:
            forward.close()
        for link in links:
            link.close()
        if self._owns_via and self._via is not None:
            self._via.close()


def _texts(command: str | Sequence[str], secret: bool) -> tuple[str, str]:
    """The command as it is sent, and as messages and logs show it."""
    if isinstance(command, str):
        return command, "(a command with secrets)" if secret else command
    argv = list(command)
    if not argv or any("\0" in word for word in argv):
        raise ValueError(f"expected a command of at least one word and no NUL byte, found {len(argv)} words")
    return shlex.join(argv), f"{argv[0]} (arguments with secrets)" if secret else shlex.join(argv)


def _ms(began: float) -> float:
    return (time.monotonic() - began) * 1000
