"""paramiko's transport and channel, with what one channel sends in the order in which it was decided.

paramiko decides under a channel's lock what is sent, and sends it after letting the lock go. When a
command ends at once, the transport's thread may get its CLOSE out before our EOF or data: sshd then has
no such channel any more, and ends the connection under all commands on it.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_CLOSE


class Channel(paramiko.Channel):
    """A channel after whose CLOSE nothing more is sent."""

    _turn: threading.RLock

    def _send(self, data: bytes, message: paramiko.Message) -> int:
        # Waiting for the other side's window happens outside of the turn: its thread has to come through.
        with self.lock:
            if self.closed:
                raise OSError("the channel is closed")
            size: int = self._wait_for_send_window(len(data))  # type: ignore[attr-defined]
            if size == 0:
                return 0
            message.add_string(data[:size])
        with self._turn:
            if self.closed:
                raise OSError("the channel is closed")
            self.transport._send_user_message(message)  # type: ignore[union-attr]
        return size

    def shutdown(self, how: int) -> None:
        with self._turn:
            super().shutdown(how)

    def close(self) -> None:
        with self._turn:
            super().close()

    def _handle_close(self, message: paramiko.Message) -> None:
        with self._turn:
            super()._handle_close(message)  # type: ignore[misc]


class Transport(paramiko.Transport):
    """A transport that opens such channels, and asks for host keys in the order that is wanted."""

    #: Host key algorithms, the first preferred; None: paramiko's own order.
    wanted_host_keys: tuple[str, ...] | None = None

    _channel_handler_table: ClassVar[dict[int, Any]] = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_CLOSE: lambda channel, message: channel._handle_close(message),
    }

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        if self.wanted_host_keys is not None:
            return self.wanted_host_keys
        return tuple(super().preferred_keys)

    def open_channel(self, *args: Any, **kwargs: Any) -> paramiko.Channel:
        channel = super().open_channel(*args, **kwargs)
        # paramiko has no place to say which class a channel is of; nothing was sent on this one yet.
        channel._turn = threading.RLock()  # type: ignore[attr-defined]
        channel.__class__ = Channel
        return channel
