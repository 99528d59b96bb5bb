"""A cold round trip on a lab with a real host's delays: its API calls, and how late ends were noticed."""

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
REBOOT = "Wait for the node to answer"
"""The task of pve-install.yml that waits for the rebooted node."""
AWAITED = {
    *(f"{phase}.tasks" for phase in ("provision", "start_vm", "leaf_provision", "leaf_start", "destroy")),
    *(f"{phase}.{what}" for phase in ("wait_ip", "leaf_wait_ip") for what in ("agent", "cloud_init")),
    *(f"ensure_pve.{what}" for what in ("reboot", "agent")),
}
"""The rows of all waits; a missing row is an error, not a row that passed."""


@dataclass(frozen=True)
class Trip:
    """The lines of the audit log; moments on guests by phase; ends of tasks by UPID; commands started on
    father and the nested PVE; events of Ansible. All times are epoch seconds of one clock, the machine's."""

    lines: tuple[Line, ...]
    moments: dict[str, dict[str, float]]
    tasks: dict[str, float]
    commands: tuple[str, ...]
    artifacts: tuple[tuple[str, Line], ...]


@functools.cache
def run_trip() -> Trip:
    """Run the round trip once and collect its data. Raises RuntimeError when it fails."""
    with labs.lab("trip") as name, tempfile.TemporaryDirectory(prefix="bench-runs-") as folder:
        labs.set_delays(name, cli_delay_s=labs.REAL_DELAY)
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
            output = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"the round trip ended with status {done.returncode}:\n{output}")
        log = next(out.glob("runs/*/audit.jsonl"))
        lines = tuple(json.loads(line) for line in log.read_text().splitlines() if line.strip())
        first, last = lines[0]["ts"], lines[-1]["ts"]
        ends = labs.run_on(name, "sh", "-c", TASKS) + (out / "tasks-nested").read_text()
        commands = [
            f"{node}: {words}"
            for node, text in (
                ("father", labs.run_on(name, "sh", "-c", COMMANDS)),
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
        first, space, rest = line.partition(" ")
        if space:
            yield first, rest


def _events(artifacts: Path) -> Iterator[tuple[str, Line]]:
    """Ansible's events, each with the name of its playbook's artifact directory."""
    for path in artifacts.glob("*/job_events/*.json"):
        yield path.parents[1].name, json.loads(path.read_text())


# -- transports of the calls --------------------------------------------------------------------------------


def measure_calls() -> list[Row]:
    """Share of HTTPS, milliseconds per call, starts of pvesh and qm."""
    return calls_rows(run_trip())


def calls_rows(trip: Trip) -> list[Row]:
    """The rows of a round trip."""
    over_https, by_command = api_calls(trip.lines)
    heavy = [words for words in trip.commands if re.match(r"\w+: (?:pvesh|qm)\b", words)]
    light = Counter(words for words in trip.commands if words not in heavy)
    total = len(over_https) + len(by_command)
    share = 1 - len(over_https) / total
    timed = tuple(float(line["ms"]) for line in over_https if line.get("ms"))
    starts = "; ".join(f"{count} x {words}" for words, count in sorted(Counter(heavy).items())) or "none"
    others = "; ".join(f"{count} x {words}" for words, count in sorted(light.items())) or "none"
    programs = Counter(str(line["cmd"]).split()[0] for line in by_command)
    return [
        Row(
            "api_calls.not_over_https", "of all", (round(share, 4),), (), round(1 - SHARE, 4),
            note=f"{len(over_https)} of {total} over HTTPS; the others: {dict(programs) or 'none'}",
        ),
        Row("api_calls.ms", "ms", timed, (), CALL_MS, note="over HTTPS, work on the host included"),
        Row("api_calls.starts", "starts", (float(len(heavy)),), (), STARTS, note=f"pvesh and qm: {starts}"),
        Row("api_calls.other_starts", "starts", (float(sum(light.values())),), (), note=f"others: {others}"),
    ]  # fmt: skip


def api_calls(lines: tuple[Line, ...]) -> tuple[list[Line], list[Line]]:
    """The harness's API calls: those over HTTPS, and those by a command of PVE."""
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
    """For each wait of a phase: the time from the awaited event until the harness noticed it."""
    rows = noticed_rows(run_trip())
    missing = missing_waits(rows)
    if missing:
        raise RuntimeError(f"the logs of the round trip lack the data of these waits: {', '.join(missing)}")
    return rows


def missing_waits(rows: list[Row]) -> list[str]:
    """Waits that were not measured."""
    return sorted(AWAITED - {row.name.removeprefix("noticed.") for row in rows})


def noticed_rows(trip: Trip) -> list[Row]:
    """The rows of a round trip."""
    rows = [_row(f"{phase}.tasks", late) for phase, late in sorted(_tasks_late(trip).items())]
    for phase in ("wait_ip", "leaf_wait_ip"):
        moments = trip.moments[phase]
        pings = _calls(trip.lines, phase, r"post .*/agent/ping")
        noticed = [line["ts"] for line in pings if line.get("rc") == 0]
        if "qemu-guest-agent" in moments and noticed:
            rows.append(_row(f"{phase}.agent", [noticed[0] - moments["qemu-guest-agent"]]))
        polls = _calls(trip.lines, phase, r"get .*/agent/exec-status")
        if "cloud-init" in moments and polls:
            rows.append(_row(f"{phase}.cloud_init", [max(0.0, polls[-1]["ts"] - moments["cloud-init"])]))
    rows += _reboot_rows(trip)
    return rows


def _row(name: str, late: list[float], remark: str = "") -> Row:
    """The row's value is the largest of `late`; its note lists them."""
    ordered = sorted(late, reverse=True)
    note = f"the latest of {len(late)}: " + ", ".join(f"{seconds:.2f}" for seconds in ordered[:12])
    note += f"; {remark}" if remark else ""
    return Row(
        f"noticed.{name}", "s", tuple(round(seconds, 3) for seconds in ordered[:1]), (), LATE, note=note
    )


def _calls(lines: tuple[Line, ...], phase: str, pattern: str) -> list[Line]:
    return [
        line
        for line in lines
        if line["event"] == "call" and line.get("phase") == phase and re.match(pattern, str(line.get("cmd")))
    ]


def _tasks_late(trip: Trip) -> dict[str, list[float]]:
    """By phase, for each awaited task: seconds from the last line of its log to the answer that reported its
    end."""
    seen: dict[str, tuple[str, float]] = {}
    for line in trip.lines:
        match = re.match(r"get /nodes/[^/]+/tasks/(UPID:\S+?)/status", str(line.get("cmd", "")))
        if match:
            seen[match[1]] = (str(line.get("phase")), float(line["ts"]))
    late: dict[str, list[float]] = {}
    for upid, (phase, noticed) in seen.items():
        if upid in trip.tasks:
            late.setdefault(phase, []).append(max(0.0, noticed - trip.tasks[upid]))
    return late


def _reboot_rows(trip: Trip) -> list[Row]:
    """Seconds from sshd's start after the reboot to the first login; from the agent's start to its answer."""
    from datetime import datetime

    moments = trip.moments.get("ensure_pve", {})
    rows = []
    ends = [
        datetime.fromisoformat(data["end"] + ("" if "+" in data["end"] else "+00:00")).timestamp()
        for _, event in trip.artifacts
        if event.get("event") == "runner_on_ok"
        and (data := event.get("event_data", {})).get("task") == REBOOT
    ]
    if ends and {"ssh", "login"} <= moments.keys():
        remark = f"the playbook went on {ends[0] - moments['ssh']:.2f} s after sshd's start"
        rows.append(_row("ensure_pve.reboot", [moments["login"] - moments["ssh"]], remark))
    pings = _calls(trip.lines, "ensure_pve", r"post .*/agent/ping")
    answered = [line["ts"] for line in pings if not line["rc"]]
    if answered and "qemu-guest-agent" in moments:
        # The agent is polled after the playbook only: an agent that was ready before was not awaited.
        ready = max(moments["qemu-guest-agent"], pings[0]["ts"])
        rows.append(_row("ensure_pve.agent", [max(0.0, answered[0] - ready)]))
    return rows
