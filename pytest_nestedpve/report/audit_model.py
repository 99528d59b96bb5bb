"""The model of a report, read from the audit log of a run. Independent of pytest and HTML."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

#: Phases of the teardown, listed apart from the steps.
TEARDOWN_PHASES = ("discover", "cleanup_inner", "destroy")


@dataclass(frozen=True)
class HostRecap:
    """One line of Ansible's recap."""

    host: str
    ok: int = 0
    changed: int = 0
    unreachable: int = 0
    failed: int = 0
    skipped: int = 0


@dataclass(frozen=True)
class Playbook:
    """One playbook that was run."""

    name: str
    phase: str
    seconds: float | None
    rc: int | None
    recap: tuple[HostRecap, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One execution of a phase. Times are seconds since the epoch; `seconds` is None while it has not ended.

    `status` is "done" (executed), "proved" (its probe found it done), "attached" (not done, the PVE
    exists), "failed" or "interrupted" (the log ends inside it).
    """

    name: str
    title: str
    status: str
    start: float
    seconds: float | None
    did: str = ""
    cause: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    calls: int = 0
    call_seconds: float = 0.0
    tasks: int = 0
    playbooks: tuple[Playbook, ...] = ()


@dataclass(frozen=True)
class TeardownLine:
    """One event of the teardown: something found, destroyed, kept or proved."""

    at: float
    what: str
    outcome: str
    reason: str = ""


@dataclass(frozen=True)
class KnownSymptom:
    """A known symptom of a failure, with its explanation and fix."""

    phase: str
    title: str
    explanation: str
    fix: str
    source: str
    line: str
    where: str


@dataclass(frozen=True)
class Artifacts:
    """Files collected after a failure in `directory` (below the run's): (name, description, bytes)."""

    phase: str
    directory: str
    files: tuple[tuple[str, str, int], ...] = ()
    missing: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class RunReport:
    """Everything a report shows of one run."""

    run: str
    host: str
    pve_version: str
    started: float | None
    ended: float | None
    steps: tuple[Step, ...]
    teardown_steps: tuple[Step, ...]
    teardown: tuple[TeardownLine, ...]
    leftovers: tuple[TeardownLine, ...]
    proved_empty: bool
    remarks: tuple[str, ...] = ()
    was_kept: bool = False
    symptoms: tuple[KnownSymptom, ...] = ()
    artifacts: tuple[Artifacts, ...] = ()
    tests_failed: bool = False

    @property
    def failed(self) -> Step | None:
        """The first step that failed, if one did."""
        return next((step for step in self.steps if step.status == "failed"), None)

    @property
    def interrupted(self) -> bool:
        """The log ends inside a phase."""
        return any(step.status == "interrupted" for step in (*self.steps, *self.teardown_steps))

    @property
    def seconds(self) -> float:
        """From the first line of the log to the last."""
        return (self.ended or 0.0) - (self.started or 0.0)

    @property
    def verdict(self) -> str:
        """failed, left (leftovers), interrupted, kept, up (no teardown), tests (tests failed) or passed."""
        if self.failed is not None:
            return "failed"
        if self.leftovers:
            return "left"
        if self.interrupted:
            return "interrupted"
        if self.was_kept:
            return "kept"
        if not self.proved_empty:
            return "up"
        return "tests" if self.tests_failed else "passed"


def read_audit(path: Path, *, whole: bool = False) -> RunReport:
    """The report of the last session in the log `path`, or of all if `whole`. Raises OSError."""
    entries = list(_lines(path.read_text(encoding="utf-8", errors="replace")))
    sessions = [number for number, entry in enumerate(entries) if entry["event"] == "session"]
    return build(entries if whole or not sessions else entries[sessions[-1] :])


def _lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # incomplete: the process was killed while it wrote
        if isinstance(entry, dict) and isinstance(entry.get("event"), str):
            yield entry


class _OpenStep:
    """A phase between its start and its end."""

    def __init__(self, name: str, title: str, start: float) -> None:
        self.name, self.title, self.start = name, title, start
        self.calls = self.tasks = 0
        self.call_seconds = 0.0
        self.playbooks: list[Playbook] = []

    def close(self, entry: Mapping[str, Any] | None, end: float | None) -> Step:
        raw = entry.get("facts") if entry else None
        facts = raw if isinstance(raw, dict) else {}
        seconds = None
        if entry is not None:
            seconds = _number(entry.get("seconds"))
            if seconds is None and (ms := _number(entry.get("ms"))) is not None:
                seconds = ms / 1000
            if seconds is None and end is not None:
                seconds = max(0.0, end - self.start)
        did = (entry or {}).get("did") or facts.get("did") or ""
        cause = str((entry or {}).get("cause") or "")
        status = str((entry or {}).get("status") or "done") if entry else "interrupted"
        if status == "failed" and cause.startswith("interrupted:"):
            status = "interrupted"
        return Step(
            name=self.name,
            title=self.title,
            status=status,
            start=self.start,
            seconds=seconds,
            did=str(did),
            cause=cause,
            facts={str(k): _text(v) for k, v in facts.items() if k != "did" and v not in (None, "", [], {})},
            calls=self.calls,
            call_seconds=self.call_seconds,
            tasks=self.tasks,
            playbooks=tuple(self.playbooks),
        )


def build(entries: Iterable[Mapping[str, Any]]) -> RunReport:
    """The report of the log lines `entries`, in their order."""
    run = host = version = ""
    first: float | None = None
    last: float | None = None
    closed: list[Step] = []
    open_steps: dict[str, _OpenStep] = {}
    teardown: list[TeardownLine] = []
    leftovers: list[TeardownLine] = []
    remarks: list[str] = []
    symptoms: list[KnownSymptom] = []
    artifacts: list[Artifacts] = []
    proved_empty = was_kept = tests_failed = False

    for entry in entries:
        at = _time(entry.get("ts"))
        if at is not None:
            first, last = (at if first is None else first), at
        now = at if at is not None else (last or 0.0)
        event, phase = str(entry["event"]), str(entry.get("phase") or "")
        run = run or str(entry.get("run") or "")
        host = host or str(entry.get("host") or "")
        current = open_steps.get(phase)
        if event == "phase_start":
            if current is not None:
                closed.append(current.close(None, None))
            open_steps[phase] = _OpenStep(phase, str(entry.get("title") or ""), now)
        elif event == "phase_end":
            opened = open_steps.pop(phase, None) or _OpenStep(phase, str(entry.get("title") or ""), now)
            step = opened.close(entry, now)
            closed.append(step)
            if phase == "ensure_pve":
                version = step.facts.get("version", version)
        elif event == "call" and current is not None:
            current.calls += 1
            current.call_seconds += (_number(entry.get("ms")) or 0.0) / 1000
        elif event == "task" and current is not None:
            current.tasks += 1
        elif event == "playbook":
            playbook = _playbook(entry)
            if playbook is not None and current is not None:
                current.playbooks.append(playbook)
        elif event == "teardown":
            line = _teardown_line(entry, now)
            teardown.append(line)
            if line.outcome == "clean" and phase in ("", "destroy"):
                proved_empty = True
            was_kept = line.outcome == "kept"
        elif event == "tests":
            tests_failed = entry.get("status") == "failed"
        elif event == "remark":
            remarks.append(str(entry.get("cause") or ""))
        elif event == "symptom":
            names = ("phase", "title", "explanation", "fix", "source", "line", "where")
            symptoms.append(KnownSymptom(**{name: str(entry.get(name) or "") for name in names}))
        elif event == "artifacts":
            artifacts.append(_artifacts(entry))
        elif event == "leak":
            leftovers.append(_teardown_line(entry, now))

    closed.extend(opened.close(None, None) for opened in open_steps.values())
    closed.sort(key=lambda step: step.start)
    return RunReport(
        run=run,
        host=host,
        pve_version=version,
        started=first,
        ended=last,
        steps=tuple(step for step in closed if step.name not in TEARDOWN_PHASES),
        teardown_steps=tuple(step for step in closed if step.name in TEARDOWN_PHASES),
        teardown=tuple(teardown),
        leftovers=tuple(leftovers),
        proved_empty=proved_empty and not leftovers,
        remarks=tuple(remarks),
        was_kept=was_kept and not leftovers,
        symptoms=tuple(symptoms),
        artifacts=tuple(artifacts),
        tests_failed=tests_failed,
    )


def _artifacts(entry: Mapping[str, Any]) -> Artifacts:
    def rows(name: str) -> list[dict[str, Any]]:
        value = entry.get(name)
        return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []

    return Artifacts(
        phase=str(entry.get("phase") or ""),
        directory=str(entry.get("directory") or ""),
        files=tuple(
            (str(row.get("file")), str(row.get("what") or ""), int(_number(row.get("bytes")) or 0))
            for row in rows("files")
        ),
        missing=tuple((str(row.get("what") or ""), str(row.get("why") or "")) for row in rows("missing")),
    )


def _playbook(entry: Mapping[str, Any]) -> Playbook | None:
    if entry.get("rc") is None and entry.get("recap") is None:
        return None  # the line written when the playbook starts
    raw = entry.get("recap")
    recap = raw if isinstance(raw, dict) else {}
    ms = _number(entry.get("ms"))
    failures = entry.get("failures")
    return Playbook(
        name=Path(str(entry.get("playbook") or entry.get("name") or "playbook")).name,
        phase=str(entry.get("phase") or ""),
        seconds=None if ms is None else ms / 1000,
        rc=None if entry.get("rc") is None else int(_number(entry.get("rc")) or 0),
        recap=tuple(_host_recap(str(name), counts) for name, counts in sorted(recap.items())),
        failures=tuple(str(text) for text in failures) if isinstance(failures, list) else (),
    )


def _host_recap(host: str, counts: object) -> HostRecap:
    values = counts if isinstance(counts, dict) else {}

    def count(*names: str) -> int:
        return int(sum(_number(values.get(name)) or 0 for name in names))

    return HostRecap(
        host,
        ok=count("ok"),
        changed=count("changed"),
        unreachable=count("unreachable", "dark"),
        failed=count("failed", "failures"),
        skipped=count("skipped"),
    )


def _teardown_line(entry: Mapping[str, Any], at: float) -> TeardownLine:
    what = entry.get("what") or entry.get("name") or ""
    outcome = str(entry.get("outcome") or entry.get("status") or "")
    vmid = entry.get("vmid")
    phase = str(entry.get("phase") or "")
    if vmid is not None and str(vmid) not in str(what):
        what = f"{what} ({vmid})" if what else f"VM {vmid}"
    return TeardownLine(
        at=at,
        what=str(what or _TEARDOWN_WORDS.get(phase) or phase or "teardown"),
        outcome={"gone": "destroyed", "foreign": "kept, not ours"}.get(outcome, outcome),
        reason=str(entry.get("reason") or entry.get("cause") or entry.get("text") or ""),
    )


_TEARDOWN_WORDS = {
    "discover": "discovery",
    "cleanup_inner": "guests inside the nested PVE",
    "destroy": "second discovery, after the last removal",
}


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value)
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(part)}" for name, part in value.items())
    return str(value)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _time(value: object) -> float | None:
    """Seconds since the epoch, of a number or an ISO 8601 text."""
    number = _number(value)
    if number is not None:
        return number
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except ValueError:
        return None
