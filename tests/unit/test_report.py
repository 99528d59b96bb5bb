"""The report is built from the audit log alone, so it exists however the session ended."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from pytest_nestedpve.report import write_report
from pytest_nestedpve.report.audit_model import RunReport, build, read_audit
from pytest_nestedpve.report.html import section, standalone
from pytest_nestedpve.report.summary import summary_lines
from pytest_nestedpve.report.timeline import duration, tick_distance, timeline

RUN = "3fa9c2d41b07"


class Log:
    """Entries of an audit log, with a simulated clock."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.entries: list[dict[str, Any]] = []

    def add(self, event: str, **fields: Any) -> Log:
        self.entries.append({"ts": self.now, "run": RUN, "event": event, **fields})
        return self

    def phase(self, name: str, seconds: float, status: str = "done", **fields: Any) -> Log:
        self.add("phase_start", phase=name, title=f"the phase {name}")
        self.now += seconds
        return self.add("phase_end", phase=name, status=status, ms=seconds * 1000, **fields)

    def report(self) -> RunReport:
        return build(self.entries)

    def write(self, directory: Path, cut: int = 0) -> Path:
        text = "\n".join(json.dumps(entry) for entry in self.entries)
        (directory / "audit.jsonl").write_text(text[: len(text) - cut])
        return directory


def passed_run() -> Log:
    log = Log()
    log.add("call", host="father", phase="preflight", cmd="get /version", rc=0, ms=40)
    log.phase("preflight", 1.5)
    log.phase("provision", 3, facts={"name": "nested-pve-x", "vmid": 99901})
    log.add("phase_start", phase="ensure_pve")
    log.add("call", host="father", phase="ensure_pve", cmd="true", rc=0, ms=500)
    log.add(
        "playbook",
        phase="ensure_pve",
        playbook="/somewhere/pve-install.yml",
        rc=0,
        ms=60_000,
        recap={"nested": {"ok": 14, "changed": 9, "failures": 0, "dark": 0, "skipped": 2}},
    )
    log.now += 61
    log.add("phase_end", phase="ensure_pve", status="done", ms=61_000, facts={"version": "9.2.1"})
    log.add("teardown", phase="discover", status="found", vmid=99901, cause="in the run's pool")
    log.phase("discover", 0.5)
    log.add("teardown", phase="cleanup_inner", status="clean")
    log.phase("cleanup_inner", 3)
    log.add("phase_start", phase="destroy")
    log.add("teardown", phase="destroy", status="gone", vmid=99901, host="father")
    log.now += 2
    log.add("phase_end", phase="destroy", status="done", ms=2000)
    return log.add("teardown", phase="destroy", status="clean", host="father")


def failed_run() -> Log:
    log = Log()
    log.phase("preflight", 1)
    log.phase("setup_network", 4, "failed", cause="vmbr0 has no address\nexpected one within 60 s")
    return log


def test_the_log_becomes_steps_in_order_with_what_each_did() -> None:
    report = passed_run().report()
    assert [(step.name, step.status, step.seconds) for step in report.steps] == [
        ("preflight", "done", 1.5),
        ("provision", "done", 3.0),
        ("ensure_pve", "done", 61.0),
    ]
    assert [(step.name, step.status, step.seconds) for step in report.teardown_steps] == [
        ("discover", "done", 0.5),
        ("cleanup_inner", "done", 3.0),
        ("destroy", "done", 2.0),
    ]
    assert (report.run, report.host, report.pve_version) == (RUN, "father", "9.2.1")
    assert report.verdict == "passed"
    ensure_pve = report.steps[2]
    assert (ensure_pve.calls, ensure_pve.call_seconds) == (1, 0.5)
    assert ensure_pve.playbooks[0].name == "pve-install.yml"
    assert ensure_pve.playbooks[0].recap[0].changed == 9
    assert [(line.what, line.outcome) for line in report.teardown[::2]] == [
        ("VM 99901", "found"),
        ("VM 99901", "destroyed"),
    ]


def test_a_clean_nested_pve_does_not_prove_a_clean_host() -> None:
    log = passed_run()
    del log.entries[-2:]
    report = log.report()
    assert not report.proved_empty
    assert report.teardown_steps[-1].status == "interrupted"
    assert "before the teardown proved that there are no leftovers" in standalone(report)


def test_a_run_whose_log_ends_inside_a_phase_is_reported_as_interrupted(tmp_path: Path) -> None:
    log = passed_run()
    log.entries = log.entries[:8]
    log.write(tmp_path, cut=7)  # the process was killed while it wrote a line
    report = read_audit(tmp_path / "audit.jsonl")
    assert report.steps[-1].status == "interrupted"
    assert report.verdict == "interrupted"
    page = standalone(report)
    assert "interrupted" in page
    assert "No teardown is in the log" in page


def test_an_interrupt_is_not_shown_as_a_failure() -> None:
    log = Log()
    log.phase("wait_ip", 2, "failed", cause="interrupted: SIGINT")
    assert log.report().failed is None
    assert log.report().verdict == "interrupted"


def test_leftovers_are_listed_with_the_command_that_destroys_them() -> None:
    log = passed_run()
    log.add("leak", vmid=99901, reason="VM is locked (backup)")
    report = log.report()
    assert report.verdict == "left"
    page = standalone(report)
    assert "VM is locked (backup)" in page
    assert f"pytest --nested-destroy-only --nested-run {RUN}" in page
    assert "found nothing of this run" not in page


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_values_from_hosts_and_logs_are_escaped() -> None:
    evil = "<script>alert(1)</script>\"' onload=x <b>"
    log = Log()
    log.add("call", host=evil, phase=evil)
    log.phase(evil, 1, facts={evil: evil, "did": evil})
    log.add("phase_start", phase="setup_ssh", title=evil)
    log.add("playbook", phase="setup_ssh", playbook=evil, rc=2, recap={evil: {"ok": evil}}, failures=[evil])
    log.add("phase_end", phase="setup_ssh", status="failed", cause=evil)
    log.phase("odd", 1, evil)
    log.add("teardown", what=evil, outcome=evil, reason=evil)
    log.add("leak", what=evil, reason=evil)
    for page in (standalone(log.report()), section([log.report()], ['javascript:"<b>'])):
        elements = Elements()
        elements.feed(page)
        assert "script" not in {tag for tag, _ in elements.tags}
        assert "b" not in {tag for tag, attributes in elements.tags if "onload" in attributes}
        assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
        assert "<script>" not in page


def test_the_page_has_no_external_resources_and_fits_a_telephone() -> None:
    page = standalone(passed_run().report())
    elements = Elements()
    elements.feed(page)
    assert not {"link", "script", "img"} & {tag for tag, _ in elements.tags}
    assert not [tag for tag, attributes in elements.tags if "src" in attributes]
    assert 'name="viewport"' in page
    pictures = [attributes for tag, attributes in elements.tags if tag == "svg"]
    assert [picture["width"] for picture in pictures] == ["100%"]
    assert "prefers-color-scheme: dark" in page


def test_the_page_is_for_its_owner_only(tmp_path: Path) -> None:
    page = write_report(passed_run().write(tmp_path))
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["audit.jsonl", "report.html"]


def test_the_report_of_a_killed_run_can_be_written_by_hand(tmp_path: Path) -> None:
    passed_run().write(tmp_path)
    command = [sys.executable, "-m", "pytest_nestedpve.report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    missing = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True, check=False)
    assert missing.returncode == 4
    assert "Traceback" not in missing.stderr


def test_malformed_log_lines_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").write_text('\n{"event": 3}\n[]\nnull\n{"event":"phase_end"}\n\x00{\n')
    assert standalone(read_audit(tmp_path / "audit.jsonl"))
    malformed = build([{"event": "phase_end", "phase": "a", "ms": "x", "facts": 3, "ts": "yesterday"}])
    assert malformed.steps[0].seconds == 0.0


def test_the_summary_of_a_failure_has_the_cause_and_commands_to_log_in_resume_and_clean_up(
    tmp_path: Path,
) -> None:
    (tmp_path / "ssh_config").write_text("")
    log = failed_run()
    log.add("teardown", phase="destroy", status="clean")
    text = "\n".join(summary_lines(log.report(), tmp_path / "report.html"))
    assert "first cause, in setup_network: vmbr0 has no address" in text
    assert f"ssh -F {tmp_path}/ssh_config nested" in text
    assert "pytest -k setup_network" in text
    assert "nothing to do" in text
    log.add("leak", what="VM 99901", reason="locked")
    text = "\n".join(
        summary_lines(
            log.report(),
            tmp_path / "report.html",
            finishing_command="pytest --xyz",
            rerun_command="pytest --pve-host father",
        )
    )
    assert "clean up: pytest --xyz" in text
    assert "resume:   pytest --pve-host father -k setup_network" in text


def test_durations_are_formatted_with_suitable_units() -> None:
    assert [duration(s) for s in (None, 0.04, 9.94, 59.4, 59.6, 185, 3700)] == [
        "not finished",
        "0.0 s",
        "9.9 s",
        "59 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 01 min",
    ]


def test_the_bars_of_the_timeline_are_inside_the_picture() -> None:
    report = passed_run().report()
    assert timeline((), 0) == ""
    picture = timeline((*report.steps, *report.teardown_steps), report.ended or 0)
    elements = Elements()
    elements.feed(picture)
    bars = [attributes for tag, attributes in elements.tags if tag == "rect"]
    assert len(bars) == 6
    for bar in bars:
        x, width = (float(str(bar[name]).rstrip("%")) for name in ("x", "width"))
        assert 0 <= x <= 100
        assert 0 < width <= 100.001 - x
    for span in (0.5, 1, 7, 100, 5000, 100_000, 1_000_000):
        assert span / tick_distance(span) <= 6
