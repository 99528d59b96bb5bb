"""A ProxyCommand: a process whose standard input and output are the connection."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile

_TAIL = 300


class ProxyProcess:
    """The running command of a target; `socket` is our end. Its standard error is stored for messages."""

    def __init__(self, command: str) -> None:
        # Unlike paramiko.ProxyCommand, a socket has time limits, and the child ends with the connection.
        self.socket, far_end = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # As in OpenSSH: the user's shell, replaced by the command.
            [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"],
            stdin=far_end.fileno(),
            stdout=far_end.fileno(),
            stderr=self._errors,
            start_new_session=True,
        )
        far_end.close()

    def describe_end(self) -> str | None:
        """The command's exit status and the end of its standard error; None while it runs."""
        try:
            # Its end of the socket closes a moment before the process ends.
            status = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return None
        self._errors.seek(0)
        errors = " ".join(self._errors.read().decode(errors="replace").split())[-_TAIL:]
        return f"exit status {status}" + (f": {errors}" if errors else "")

    def close(self) -> None:
        self.socket.close()
        self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
