"""A listening port on this machine whose connections continue on the far side of an SSH connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CHUNK = 64 * 1024


class Forward:
    """Listens on 127.0.0.1; `address` is (host, port). `close` ends the listener and its connections."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._lock = threading.Lock()
        self._open: list[Any] = []
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True, name="nested-pve-forward").start()

    def __enter__(self) -> Forward:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(near,), daemon=True, name="nested-pve-forward").start()

    def _serve(self, near: socket.socket) -> None:
        try:
            far = self._connect()
        except Exception:
            # The client sees a closed connection, which is what a refusal looks like through a forward.
            near.close()
            return
        with self._lock:
            self._open += [near, far]
            if self._closed:
                self._end(near, far)
                return
        back = threading.Thread(target=_pump, args=(far, near), daemon=True, name="nested-pve-forward")
        back.start()
        _pump(near, far)
        back.join()
        with self._lock:
            self._end(near, far)

    def _end(self, *ends: Any) -> None:
        for end in ends:
            with suppress(Exception):
                end.close()
            if end in self._open:
                self._open.remove(end)

    def close(self) -> None:
        with suppress(OSError):
            # Wakes the thread in accept; close alone does not.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._closed = True
            self._end(*list(self._open))


def _pump(source: Any, sink: Any) -> None:
    with suppress(Exception):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with suppress(Exception):
        # A channel has no SHUT_WR of its own name, but the number is the same.
        sink.shutdown(socket.SHUT_WR)
