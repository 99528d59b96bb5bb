"""A dry run of the set-up: the phases in order, what would be done, how long it takes. Touches nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.phases import ATTACHED, needed_before
from pytest_nestedpve.run import kept_runs

if TYPE_CHECKING:
    import pytest

    from pytest_nestedpve.environment.phases import Phase
    from pytest_nestedpve.session.state import SessionState


DONE, SKIPPED, CHOSEN = "done, if unchanged", "taken as done", "to do"


def rows(state: SessionState, chosen: list[pytest.Item]) -> list[dict[str, Any]]:
    """One row per phase that the chosen tests need, in order: phase, title, what, seconds."""
    from pytest_nestedpve.report.usual_times import usual_times
    from pytest_nestedpve.session.pytest_compat import requested_phase

    kept = kept_runs.find_resumable(state.settings, state.config.rootpath)
    done = kept_runs.read_done_phases(kept) if kept is not None else frozenset()
    usual = usual_times(state.config.rootpath / state.settings.run_dir, state.settings.host or "")
    asked: dict[str, str] = {}
    for item in chosen:
        own = getattr(item, "phase_name", None)
        if own is None and "nested_pve" not in getattr(item, "fixturenames", ()):
            continue
        last = own if own is not None else state.last_phase(requested_phase(item))
        if last is None:
            continue
        for need in needed_before(state.phases, last):
            asked.setdefault(need, "to do, needed first")
        asked[last] = CHOSEN if own is not None else asked.get(last, "to do, needed first")
    return [
        {
            "phase": phase.name,
            "title": phase.title,
            "what": _what(state, phase, asked[phase.name], done),
            "seconds": usual.get(phase.name, phase.usual),
        }
        for phase in state.permitted_phases()
        if phase.name in asked
    ]


def _what(state: SessionState, phase: Phase, what: str, done: frozenset[str]) -> str:
    """The plan for a phase: skipped, done in a kept run, or attached; else `what`."""
    if phase.name in state.settings.skip:
        return SKIPPED
    if phase.name in done and not (state.settings.redo and what == CHOSEN):
        return DONE
    if phase.outcome == ATTACHED:
        return ATTACHED
    if phase.guard is not None:
        return "probed; " + ("done if need be" if phase.guard.selected else "not done")
    return what


def show(state: SessionState, chosen: list[pytest.Item]) -> None:
    """Print the rows, and write them to --nested-json."""
    import json

    from pytest_nestedpve.report.timeline import duration

    found = rows(state, chosen)
    reporter: Any = state.config.pluginmanager.getplugin("terminalreporter")
    if state.settings.json_file is not None:
        state.settings.json_file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if reporter is None:
        return
    reporter.write_sep("-", "nested-pve: dry run")
    if not found:
        reporter.write_line("no test that was chosen needs a nested PVE: nothing would be made")
        return
    kept = kept_runs.find_resumable(state.settings, state.config.rootpath)
    going_on = f", going on with the kept run {kept.run}" if kept is not None else ""
    host = state.settings.host or "a host that is not named yet"
    reporter.write_line(f"on {host}{going_on}, in this order:")
    for row in found:
        usual = "" if row["seconds"] is None else f"about {duration(row['seconds'])}"
        reporter.write_line(f"  {row['phase']:<18} {row['what']:<22} {usual:<18} {row['title']}".rstrip())
    todo = [row["seconds"] for row in found if row["what"] not in (DONE, SKIPPED)]
    known = [seconds for seconds in todo if seconds is not None]
    keep = state.settings.keep
    if len(known) == len(todo):
        teardown = " and the teardown" if keep != "always" else ""
        expected = f"expected, by earlier runs: about {duration(sum(known))}{teardown}"
    else:
        expected = "no earlier run here did all of this, so how long it takes is not known"
    if state.settings.make_template:
        reporter.write_line("then the nested VM is generalised, and becomes a template, which stays")
    if state.settings.exec_command is not None:
        reporter.write_line(f"then this runs: {state.settings.exec_command}")
    what = "what was made inside" if state.settings.attach is not None else "everything"
    end = f"{what} is kept" if keep == "always" else f"{what} is destroyed"
    end += ", unless something failed" if keep == "on-failure" else ""
    reporter.write_line(f"then {end}; {expected}")
