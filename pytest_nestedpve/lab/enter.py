"""Entering a lab's nodes from the machine, by their namespaces: works whatever the network in there does."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence

from . import programs
from .names import FATHER, UNCLE, LabError

_GUESTS = (
    "import json, pathlib\n"
    "for place in sorted(pathlib.Path('/run/nestedpve-lab/guests').glob('*/state.json')):\n"
    "    state = json.loads(place.read_text())\n"
    "    spec = place.with_name('spec.json')\n"
    "    if 'init' in state and spec.exists():\n"
    "        name = json.loads(spec.read_text())['name']\n"
    "        print(json.dumps([int(place.parent.name), name, state['init']]))\n"
)


def namespace_command(inits: Mapping[str, int], node: str, command: Sequence[str]) -> list[str]:
    """The command as seen from the machine, to run it on `node` of the lab whose outer nodes have these
    PIDs 1. LabError if there is no such node."""
    shown, _, below = node.partition("/")
    if shown in (FATHER, UNCLE):
        node = below
    else:
        shown = FATHER
    if shown not in inits:
        raise LabError(
            f"{shown} is off, or not in this lab: `nestedpve-lab start NAME --nodes 2` has two nodes"
        )
    inside = _into(inits[shown])
    if not node:
        steps: list[str] = []
    elif node == "nested":
        steps = [""]
    elif node == "leaf":
        steps = ["", ""]
    else:
        steps = node.split("/")
    for step in steps:
        guests = _guests(inside)
        chosen = [guest for guest in guests if not step or step in (str(guest[0]), guest[1])]
        if len(chosen) != 1:
            there = ", ".join(f"{vmid} ({name})" for vmid, name, _ in guests) or "none"
            wanted = f"VM {step!r}" if step else "exactly one VM"
            more = "; name one, as in --node 9900 or --node 9900/101" if len(chosen) > 1 else ""
            raise LabError(f"expected {wanted} booted on {shown}, found: {there}{more}")
        shown = chosen[0][1]
        inside = [*inside, *_into(chosen[0][2])]
    # Entering brings this process's rights along; a node's own processes lack those over the whole machine.
    fewer = ["setpriv", "--bounding-set=-sys_time,-sys_module"]
    clean = ["env", "-i", "-C", "/", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb", f"PATH={_PATH}"]
    return [*inside, *fewer, *clean, *command]


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _into(init: int) -> list[str]:
    spaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
    return ["nsenter", "--target", str(init), *spaces, "--root", "--wd=/", "--"]


def _guests(inside: list[str]) -> list[tuple[int, str, int]]:
    """Booted VMs of a node: vmid, name, PID 1 as that node sees it."""
    done = subprocess.run(
        [*inside, "/usr/bin/python3", "-c", _GUESTS],
        capture_output=True,
        text=True,
        env={"PATH": programs.search_path()},
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"the node cannot be entered: {done.stderr.strip()}")
    found = []
    for line in done.stdout.splitlines():
        vmid, name, init = json.loads(line)
        found.append((int(vmid), str(name), int(init)))
    return found
