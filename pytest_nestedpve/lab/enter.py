"""Commands on a lab's nodes, run by entering their namespaces: independent of the lab's network."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence

from . import programs
from .names import FATHER, SECOND_NODE, LabError

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
    """The arguments by which this machine runs `command` on `node`. `inits`: PIDs 1 of the lab's outer nodes.
    LabError if the node does not exist, or is off."""
    host, _, path = node.partition("/")
    if host in (FATHER, SECOND_NODE):
        node = path
    else:
        host = FATHER
    if host not in inits:
        raise LabError(
            f"{host} is off, or the lab has one node only: `nestedpve-lab power NAME {host} on` switches "
            "it on, `nestedpve-lab start NAME --nodes 2` starts a lab with two nodes"
        )
    prefix = _nsenter(inits[host])
    if not node:
        steps: list[str] = []
    elif node == "nested":
        steps = [""]
    elif node == "leaf":
        steps = ["", ""]
    else:
        steps = node.split("/")
    for step in steps:
        guests = _booted_guests(prefix)
        matching = [guest for guest in guests if not step or step in (str(guest[0]), guest[1])]
        if len(matching) != 1:
            booted = ", ".join(f"{vmid} ({name})" for vmid, name, _ in guests) or "none"
            expected = f"VM {step!r}" if step else "exactly one VM"
            hint = "; name one, as in --node 9900 or --node 9900/101" if len(matching) > 1 else ""
            raise LabError(f"expected {expected} booted on {host}, found: {booted}{hint}")
        host = matching[0][1]
        prefix = [*prefix, *_nsenter(matching[0][2])]
    # nsenter keeps this process's capabilities; a node's own processes lack those over the whole machine.
    drop = ["setpriv", "--bounding-set=-sys_time,-sys_module"]
    clean = ["env", "-i", "-C", "/", "HOME=/root", "LC_ALL=C.UTF-8", "TERM=dumb", f"PATH={_PATH}"]
    return [*prefix, *drop, *clean, *command]


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _nsenter(init: int) -> list[str]:
    namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
    return ["nsenter", "--target", str(init), *namespaces, "--root", "--wd=/", "--"]


def _booted_guests(prefix: list[str]) -> list[tuple[int, str, int]]:
    """Booted VMs of the node that `prefix` enters: vmid, name, PID 1 in the node's PID namespace."""
    done = subprocess.run(
        [*prefix, "/usr/bin/python3", "-c", _GUESTS],
        capture_output=True,
        text=True,
        env={"PATH": programs.search_path()},
        check=False,
    )
    if done.returncode != 0:
        raise LabError(f"entering a node of the lab failed: {done.stderr.strip()}")
    guests = []
    for line in done.stdout.splitlines():
        vmid, name, init = json.loads(line)
        guests.append((int(vmid), str(name), int(init)))
    return guests
