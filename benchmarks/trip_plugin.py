"""What a measured round trip has to say beyond its audit log, asked of the lab and not of the harness.

Loaded by `-p benchmarks.trip_plugin`; BENCH_LAB names the lab, BENCH_OUT a directory for the answers.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import labs

# Moments on the guest in epoch seconds: `name moment`, one a line.
MOMENTS = r"""
[ -e /run/cloud-init/result.json ] && echo "cloud-init $(stat -c %.6Y /run/cloud-init/result.json)"
journalctl -q -b -u ssh -o short-unix --no-pager 2>/dev/null |
    sed -n "s/^\([0-9.]*\) .*Accepted publickey.*/login \1/p" | head -1
for unit in qemu-guest-agent ssh networking systemd-networkd pveproxy; do
    journalctl -q -b -u $unit -o short-unix --no-pager 2>/dev/null |
        sed -n "s/^\([0-9.]*\) .*systemd\[1\]: Started .*/$unit \1/p" | head -1
done
true
"""
TASKS = r"find /var/log/pve/tasks -type f -name 'UPID:*' -printf '%f %T@\n' 2>/dev/null; true"
COMMANDS = "cat /var/log/nestedpve-lab-commands.log 2>/dev/null; true"
AFTER = {"wait_ip": "nested", "ensure_pve": "nested", "leaf_wait_ip": "leaf"}


def _save(name: str, node: str, script: str) -> None:
    text = labs.ask(os.environ["BENCH_LAB"], "sh", "-c", script, node=node)
    (Path(os.environ["BENCH_OUT"]) / name).write_text(text)


@pytest.hookimpl(optionalhook=True)
def pytest_nestedpve_phase_finished(phase: Any) -> None:
    """Between the phases, so that it is no phase's time."""
    if phase.name in AFTER:
        _save(f"moments-{phase.name}", AFTER[phase.name], MOMENTS)


def pytest_configure() -> None:
    """Before the nested PVE goes, when all is done in it: its tasks and the starts of its commands."""
    from pytest_nestedpve.teardown import teardown

    destroy_run = teardown.destroy_run

    @functools.wraps(destroy_run)
    def asked(*args: Any, **kwargs: Any) -> Any:
        _save("tasks-nested", "nested", TASKS)
        _save("commands-nested", "nested", COMMANDS)
        return destroy_run(*args, **kwargs)

    teardown.destroy_run = asked
