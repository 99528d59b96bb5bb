"""Programs on a terminal of their own, with somebody who types."""

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
    """Run a program on a terminal; its status, and all that it wrote there.

    `answers`: what is typed, in this order, once the text before it has appeared.
    """
    ours, theirs = os.openpty()

    def begin() -> None:
        os.login_tty(theirs)  # so that Ctrl-C typed there is a signal to it
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background shell has it ignored

    waiting = list((answers or {}).items())
    data = b""
    with subprocess.Popen(command, cwd=cwd, env=env, preexec_fn=begin, pass_fds=[theirs]) as process:
        os.close(theirs)
        try:
            while select.select([ours], [], [], 60)[0]:
                try:
                    chunk = os.read(ours, 4096)
                except OSError:
                    break  # nobody has the terminal open any more
                data += chunk
                if waiting and waiting[0][0].encode() in data:
                    _until_it_reads(process.pid)
                    os.write(ours, waiting.pop(0)[1])
            status = process.wait(30)
        finally:
            process.kill()
            os.close(ours)
    return status, data.decode()


def _until_it_reads(pid: int) -> None:
    """What asks first shows its question and then reads: a Ctrl-C between the two would wait for an Enter, as
    the read is not begun that it would end. Nobody types as fast as that."""
    state = Path(f"/proc/{pid}/stat")
    for _ in range(500):
        if state.read_text().rpartition(")")[2].split()[0] == "S":
            return
        select.select([], [], [], 0.01)
