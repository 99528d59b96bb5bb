"""Programs on a pseudo-terminal, with typed input."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def on_terminal(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], answers: Mapping[str, bytes] | None = None
) -> tuple[int, str]:
    """Run a program on a terminal; return its exit status and its output.

    `answers`: prompts, and the input that is typed once the prompt has appeared, in this order.
    """
    controller, terminal = os.openpty()

    def attach_terminal() -> None:
        os.login_tty(terminal)  # so that a typed Ctrl-C sends a signal to the program
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background shell ignores SIGINT

    pending = list((answers or {}).items())
    data = b""
    with subprocess.Popen(
        command, cwd=cwd, env=env, preexec_fn=attach_terminal, pass_fds=[terminal]
    ) as process:
        os.close(terminal)
        try:
            while select.select([controller], [], [], 60)[0]:
                try:
                    chunk = os.read(controller, 4096)
                except OSError:
                    break  # no process has the terminal open
                data += chunk
                if pending and pending[0][0].encode() in data:
                    _await_read(process.pid)
                    os.write(controller, pending.pop(0)[1])
            status = process.wait(30)
        finally:
            process.kill()
            os.close(controller)
    return status, data.decode()


def _await_read(pid: int) -> None:
    """Wait until the process sleeps in its read: a Ctrl-C between prompt and read, faster than a person
    types, would not end the read."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(500):
        if state.read_text().rpartition(")")[2].split()[0] == "S":
            return
        select.select([], [], [], 0.01)
