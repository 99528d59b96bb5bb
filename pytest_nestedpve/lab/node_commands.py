"""Commands of the lab's own on a node of a running lab, for their output."""

from __future__ import annotations

import os
import subprocess

from . import lifecycle, programs
from .enter import namespace_command
from .names import LabError


def output_on(node: str, lab: str, script: str, text: str = "") -> str:
    """The output of `script` on the node, with `text` as its input.

    Raises LabError if the lab does not run or the script failed.
    """
    argv = namespace_command(lifecycle.get(lab).pids, node, ["/bin/sh", "-c", script])
    environment = {**os.environ, "PATH": programs.search_path()}
    done = subprocess.run(argv, input=text, text=True, capture_output=True, env=environment, check=False)
    if done.returncode:
        raise LabError(f"{node} of lab {lab}: `{script}` ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout
