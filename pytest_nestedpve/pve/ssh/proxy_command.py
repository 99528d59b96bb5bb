"""A ProxyCommand: a process whose standard input and output are the connection."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile

_TAIL = 300


class Proxy:
    """The running command of a target; `socket` is our end. What it says as errors is kept for ours."""

    def __init__(self, command: str) -> None:
        # A socket pair instead of paramiko.ProxyCommand: real limits, and the child goes with the connection.
        self.socket, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            # As OpenSSH does it: the user's shell, replaced by the command.
            [os.environ.get("SHELL") or "/bin/sh", "-c", f"exec {command}"],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()

    def ended(self) -> str | None:
        """The command's exit status and last words; None while it runs."""
        try:
            # Its end of the socket closes a moment before it is gone.
            status = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return None
        self._errors.seek(0)
        said = " ".join(self._errors.read().decode(errors="replace").split())[-_TAIL:]
        return f"exit status {status}" + (f": {said}" if said else "")

    def close(self) -> None:
        self.socket.close()
        self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()
