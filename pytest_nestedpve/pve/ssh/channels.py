"""paramiko's transport and channel, with the messages of a channel sent in the order of their creation.

paramiko creates a message under the channel's lock, and sends it after the release of the lock. When a
command ends at once, the transport's thread may send CLOSE before our EOF or data: for sshd the channel no
longer exists, and it ends the connection with all commands on it.
"""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_CLOSE


class Channel(paramiko.Channel):
    """A channel that sends nothing after its CLOSE."""

    _order: threading.RLock

    def _send(self, data: bytes, message: paramiko.Message) -> int:
        # The wait for the other side's window is outside of _order: the transport's thread needs that lock.
        with self.lock:
            if self.closed:
                raise OSError("the channel is closed")
            size: int = self._wait_for_send_window(len(data))  # type: ignore[attr-defined]
            if size == 0:
                return 0
            message.add_string(data[:size])
        with self._order:
            if self.closed:
                raise OSError("the channel is closed")
            self.transport._send_user_message(message)  # type: ignore[union-attr]
        return size

    def shutdown(self, how: int) -> None:
        with self._order:
            super().shutdown(how)

    def close(self) -> None:
        with self._order:
            super().close()

    def _handle_close(self, message: paramiko.Message) -> None:
        with self._order:
            super()._handle_close(message)  # type: ignore[misc]


class Transport(paramiko.Transport):
    """A transport with these channels and a configurable order of host key algorithms."""

    #: Host key algorithms, the first preferred; None: paramiko's own order.
    host_key_algorithms: tuple[str, ...] | None = None

    _channel_handler_table: ClassVar[dict[int, Any]] = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_CLOSE: lambda channel, message: channel._handle_close(message),
    }

    @property
    def preferred_keys(self) -> tuple[str, ...]:
        if self.host_key_algorithms is not None:
            return self.host_key_algorithms
        return tuple(super().preferred_keys)

    def open_channel(self, *args: Any, **kwargs: Any) -> paramiko.Channel:
        channel = super().open_channel(*args, **kwargs)
        # paramiko has no option for the class of its channels; nothing was sent on this one yet.
        channel._order = threading.RLock()  # type: ignore[attr-defined]
        channel.__class__ = Channel
        return channel
