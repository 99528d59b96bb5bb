"""Leftovers of runs on a lab's father: their VMs and pools."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from .names import FATHER, LabError
from .programs import search_path

_NO_COMMAND = 127


def ssh(folder: Path, command: str, *, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run a command on father of the lab in `folder`. LabError if SSH itself fails or the limit (seconds,
    wall clock) passes."""
    argv = ["ssh", "-F", str(folder / "ssh_config"), "-o", "BatchMode=yes", FATHER, command]
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit,
            env={"PATH": search_path(), "HOME": "/nonexistent", "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise LabError(f"{FATHER} did not finish `{command}` within {limit:g} s") from e
    if done.returncode == 255:
        raise LabError(f"SSH to {FATHER} failed: {done.stderr.strip()}")
    return done


def marked_guests(folder: Path) -> list[str]:
    """The runs' pools on father, by name, and their VMs, as `vmid (name)`. LabError if father does not
    answer."""
    answers = []
    for path in ("/pools", "/cluster/resources --type vm"):
        done = ssh(folder, f"pvesh get {path} --output-format json")
        if done.returncode == _NO_COMMAND:
            return []
        if done.returncode != 0:
            raise LabError(f"pvesh on father ended with status {done.returncode}: {done.stderr.strip()}")
        answers.append(json.loads(done.stdout))
    pools, guests = answers
    marked = [str(pool["poolid"]) for pool in pools if "npve-" in str(pool.get("poolid", ""))]
    for guest in guests:
        tags = str(guest.get("tags", "")).replace(",", ";").split(";")
        if "nestedpve" in tags or "npve-" in str(guest.get("pool", "")):
            marked.append(f"{guest.get('vmid')} ({guest.get('name', 'without a name')})")
    return marked
