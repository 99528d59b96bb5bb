"""A cold round trip on a lab as slow as a real host: its calls, and how late ends were noticed."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import labs
from benchmarks.rows import Row
from benchmarks.trip_plugin import COMMANDS, TASKS

ROOT = Path(__file__).parent.parent
SHARE, CALL_MS, STARTS, LATE = 0.9, 10.0, 6.0, 0.5
Line = dict[str, Any]
REBOOT = "Wait until it is up again"
"""The task of pve-install.yml in which the node comes up again."""
AWAITED = {
    *(f"{phase}.tasks" for phase in ("provision", "start_vm", "leaf_provision", "leaf_start", "destroy")),
    *(f"{phase}.{what}" for phase in ("wait_ip", "leaf_wait_ip") for what in ("agent", "cloud_init")),
    *(f"ensure_pve.{what}" for what in ("reboot", "agent")),
}
"""Rows without which a measurement says nothing: one that is not there is no row that passed."""


@dataclass(frozen=True)
class Trip:
    """The lines of the audit log; moments of guests by phase; ends of tasks by UPID; starts of commands on
    father and the nested PVE. All times are epoch seconds of one clock, the machine's."""

    lines: tuple[Line, ...]
    moments: dict[str, dict[str, float]]
    tasks: dict[str, float]
    commands: tuple[str, ...]
    artifacts: tuple[tuple[str, Line], ...]


@functools.cache
def trip() -> Trip:
    """The measured round trip. Raises RuntimeError when it is not green."""
    with labs.lab("trip") as name, tempfile.TemporaryDirectory(prefix="bench-runs-") as folder:
        labs.pace(name, cli_delay_s=labs.SLOW)
        out = Path(folder)
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.trip_plugin"]
        done = subprocess.run(
            [*pytest, "--pve-host", f"lab:{name}", "-o", f"nested_pve_run_dir={folder}/runs"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
            env={**os.environ, "BENCH_LAB": name, "BENCH_OUT": folder},
        )
        if done.returncode:
            said = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"the round trip ended with status {done.returncode}:\n{said}")
        log = next(out.glob("runs/*/audit.jsonl"))
        lines = tuple(json.loads(line) for line in log.read_text().splitlines() if line.strip())
        first, last = lines[0]["ts"], lines[-1]["ts"]
        ends = labs.ask(name, "sh", "-c", TASKS) + (out / "tasks-nested").read_text()
        commands = [
            f"{node}: {words}"
            for node, text in (
                ("father", labs.ask(name, "sh", "-c", COMMANDS)),
                ("nested", (out / "commands-nested").read_text()),
            )
            for moment, words in _pairs(text)
            if first - 1 <= float(moment) <= last + 1
        ]
        return Trip(
            lines,
            {
                path.name.partition("-")[2]: {what: float(at) for what, at in _pairs(path.read_text())}
                for path in out.glob("moments-*")
            },
            {upid: float(at) for upid, at in _pairs(ends)},
            tuple(commands),
            tuple(_events(log.parent / "artifacts")),
        )


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        one, space, other = line.partition(" ")
        if space:
            yield one, other


def _events(artifacts: Path) -> Iterator[tuple[str, Line]]:
    """Ansible's events, with the playbook's artifacts' name."""
    for path in artifacts.glob("*/job_events/*.json"):
        yield path.parents[1].name, json.loads(path.read_text())


# -- by what the calls went ---------------------------------------------------------------------------------


def measure_calls() -> list[Row]:
    """Share of HTTPS, milliseconds a call, starts of pvesh and qm."""
    return calls_rows(trip())


def calls_rows(found: Trip) -> list[Row]:
    """The rows of a round trip."""
    over_https, by_command = api_calls(found.lines)
    heavy = [words for words in found.commands if re.match(r"\w+: (?:pvesh|qm)\b", words)]
    light = Counter(words for words in found.commands if words not in heavy)
    total = len(over_https) + len(by_command)
    others = 1 - len(over_https) / total
    timed = tuple(float(line["ms"]) for line in over_https if line.get("ms"))
    told = "; ".join(f"{count} x {words}" for words, count in sorted(Counter(heavy).items())) or "none"
    also = "; ".join(f"{count} x {words}" for words, count in sorted(light.items())) or "none"
    ways = Counter(str(line["cmd"]).split()[0] for line in by_command)
    return [
        Row(
            "api_calls.not_over_https", "of all", (round(others, 4),), (), round(1 - SHARE, 4),
            note=f"{len(over_https)} of {total} over HTTPS; the others: {dict(ways) or 'none'}",
        ),
        Row("api_calls.ms", "ms", timed, (), CALL_MS, note="over HTTPS, work on the host included"),
        Row("api_calls.starts", "starts", (float(len(heavy)),), (), STARTS, note=f"pvesh and qm: {told}"),
        Row("api_calls.other_starts", "starts", (float(sum(light.values())),), (), note=f"beside: {also}"),
    ]  # fmt: skip


def api_calls(lines: tuple[Line, ...]) -> tuple[list[Line], list[Line]]:
    """The harness's calls of the API: those over HTTPS, and those by a command of PVE's."""
    calls = [line for line in lines if line["event"] == "call"]
    over_https = [line for line in calls if str(line.get("transport", "")).startswith("https")]
    by_command = [
        line
        for line in calls
        if line.get("transport") == "pvesh"
        or (line.get("transport") == "ssh" and re.match(r"pveum |qm |pvesm |pvesh ", line["cmd"]))
    ]
    return over_https, by_command


# -- how late ends were noticed -----------------------------------------------------------------------------


def measure_noticed() -> list[Row]:
    """For each wait of a phase: the time from what was waited for to its being noticed."""
    rows = noticed_rows(trip())
    missing = absent(rows)
    if missing:
        raise RuntimeError(f"not to be found in what the round trip left: {', '.join(missing)}")
    return rows


def absent(rows: list[Row]) -> list[str]:
    """The waits that were not measured."""
    return sorted(AWAITED - {row.name.removeprefix("noticed.") for row in rows})


def noticed_rows(found: Trip) -> list[Row]:
    """The rows of a round trip."""
    rows = [_row(f"{phase}.tasks", late) for phase, late in sorted(_tasks_late(found).items())]
    for phase in ("wait_ip", "leaf_wait_ip"):
        moments = found.moments[phase]
        pings = _calls(found.lines, phase, r"post .*/agent/ping")
        noticed = [line["ts"] for line in pings if line.get("rc") == 0]
        if "qemu-guest-agent" in moments and noticed:
            rows.append(_row(f"{phase}.agent", [noticed[0] - moments["qemu-guest-agent"]]))
        asked = _calls(found.lines, phase, r"get .*/agent/exec-status")
        if "cloud-init" in moments and asked:
            rows.append(_row(f"{phase}.cloud_init", [max(0.0, asked[-1]["ts"] - moments["cloud-init"])]))
    rows += _reboot(found)
    return rows


def _row(name: str, late: list[float], also: str = "") -> Row:
    """The latest decides; the note has them all."""
    ordered = sorted(late, reverse=True)
    note = f"the latest of {len(late)}: " + ", ".join(f"{each:.2f}" for each in ordered[:12])
    note += f"; {also}" if also else ""
    return Row(f"noticed.{name}", "s", tuple(round(each, 3) for each in ordered[:1]), (), LATE, note=note)


def _calls(lines: tuple[Line, ...], phase: str, pattern: str) -> list[Line]:
    return [
        line
        for line in lines
        if line["event"] == "call" and line.get("phase") == phase and re.match(pattern, str(line.get("cmd")))
    ]


def _tasks_late(found: Trip) -> dict[str, list[float]]:
    """By phase, for each task that was awaited: from the last line of its log to the answer that told its
    end."""
    seen: dict[str, tuple[str, float]] = {}
    for line in found.lines:
        match = re.match(r"get /nodes/[^/]+/tasks/(UPID:\S+?)/status", str(line.get("cmd", "")))
        if match:
            seen[match[1]] = (str(line.get("phase")), float(line["ts"]))
    late: dict[str, list[float]] = {}
    for upid, (phase, noticed) in seen.items():
        if upid in found.tasks:
            late.setdefault(phase, []).append(max(0.0, noticed - found.tasks[upid]))
    return late


def _reboot(found: Trip) -> list[Row]:
    """From sshd's start after the reboot to the login that it let in; from the agent's to its answer."""
    from datetime import datetime

    moments = found.moments.get("ensure_pve", {})
    rows = []
    ends = [
        datetime.fromisoformat(data["end"] + ("" if "+" in data["end"] else "+00:00")).timestamp()
        for _, event in found.artifacts
        if event.get("event") == "runner_on_ok"
        and (data := event.get("event_data", {})).get("task") == REBOOT
    ]
    if ends and {"ssh", "login"} <= moments.keys():
        went_on = f"the playbook went on {ends[0] - moments['ssh']:.2f} s after sshd's start"
        rows.append(_row("ensure_pve.reboot", [moments["login"] - moments["ssh"]], went_on))
    asked = _calls(found.lines, "ensure_pve", r"post .*/agent/ping")
    answered = [line["ts"] for line in asked if not line["rc"]]
    if answered and "qemu-guest-agent" in moments:
        # Asked for only after the playbook: what was ready before that was not waited for.
        ready = max(moments["qemu-guest-agent"], asked[0]["ts"])
        rows.append(_row("ensure_pve.agent", [max(0.0, answered[0] - ready)]))
    return rows
