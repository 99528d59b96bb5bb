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
        self._sockets: list[Any] = []
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
            # The client gets a closed connection, as with any refusal through a forward.
            near.close()
            return
        with self._lock:
            self._sockets += [near, far]
            if self._closed:
                self._close_sockets(near, far)
                return
        back = threading.Thread(target=_pump, args=(far, near), daemon=True, name="nested-pve-forward")
        back.start()
        _pump(near, far)
        back.join()
        with self._lock:
            self._close_sockets(near, far)

    def _close_sockets(self, *sockets: Any) -> None:
        for sock in sockets:
            with suppress(Exception):
                sock.close()
            if sock in self._sockets:
                self._sockets.remove(sock)

    def close(self) -> None:
        with suppress(OSError):
            # Ends `accept` in the other thread; close alone does not.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            self._closed = True
            self._close_sockets(*list(self._sockets))


def _pump(source: Any, sink: Any) -> None:
    with suppress(Exception):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with suppress(Exception):
        # paramiko's channels have no constant SHUT_WR, but use the same number.
        sink.shutdown(socket.SHUT_WR)
