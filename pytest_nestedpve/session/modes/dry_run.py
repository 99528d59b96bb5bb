"""The dry run of a set-up: the phases in order, with action and expected time. Changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.phases import ATTACHED, needed_before
from pytest_nestedpve.run import kept_runs

if TYPE_CHECKING:
    import pytest

    from pytest_nestedpve.environment.phases import Phase
    from pytest_nestedpve.session.state import SessionState


DONE, SKIPPED, SELECTED = "done, if unchanged", "taken as done", "to do"


def rows(state: SessionState, selected: list[pytest.Item]) -> list[dict[str, Any]]:
    """One row per phase that the selected tests need, in order, with the keys phase, title, what, seconds."""
    from pytest_nestedpve.report.usual_times import usual_times
    from pytest_nestedpve.session.pytest_compat import requested_phase

    kept = kept_runs.find_resumable(state.settings, state.config.rootpath)
    done = kept_runs.read_done_phases(kept) if kept is not None else frozenset()
    usual = usual_times(state.config.rootpath / state.settings.run_dir, state.settings.host or "")
    actions: dict[str, str] = {}
    for item in selected:
        step_phase = getattr(item, "phase_name", None)
        if step_phase is None and "nested_pve" not in getattr(item, "fixturenames", ()):
            continue
        last = step_phase if step_phase is not None else state.last_phase(requested_phase(item))
        if last is None:
            continue
        for need in needed_before(state.phases, last):
            actions.setdefault(need, "to do, needed first")
        actions[last] = SELECTED if step_phase is not None else actions.get(last, "to do, needed first")
    return [
        {
            "phase": phase.name,
            "title": phase.title,
            "what": _action(state, phase, actions[phase.name], done),
            "seconds": usual.get(phase.name, phase.usual),
        }
        for phase in state.permitted_phases()
        if phase.name in actions
    ]


def _action(state: SessionState, phase: Phase, action: str, done: frozenset[str]) -> str:
    """The action on a phase: skipped, done in a kept run, attached or probed; else `action`."""
    if phase.name in state.settings.skip:
        return SKIPPED
    if phase.name in done and not (state.settings.redo and action == SELECTED):
        return DONE
    if phase.outcome == ATTACHED:
        return ATTACHED
    if phase.guard is not None:
        return "probed; " + ("done if need be" if phase.guard.selected else "not done")
    return action


def show(state: SessionState, selected: list[pytest.Item]) -> None:
    """Print the rows, and write them to --nested-json."""
    import json

    from pytest_nestedpve.report.timeline import duration

    plan = rows(state, selected)
    reporter: Any = state.config.pluginmanager.getplugin("terminalreporter")
    if state.settings.json_file is not None:
        state.settings.json_file.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    if reporter is None:
        return
    reporter.write_sep("-", "nested-pve: dry run")
    if not plan:
        reporter.write_line("no selected test needs a nested PVE: nothing would be created")
        return
    kept = kept_runs.find_resumable(state.settings, state.config.rootpath)
    resumed = f", resuming the kept run {kept.run}" if kept is not None else ""
    host = state.settings.host or "a host that is not configured yet"
    reporter.write_line(f"on {host}{resumed}, in this order:")
    for row in plan:
        usual = "" if row["seconds"] is None else f"about {duration(row['seconds'])}"
        reporter.write_line(f"  {row['phase']:<18} {row['what']:<22} {usual:<18} {row['title']}".rstrip())
    todo = [row["seconds"] for row in plan if row["what"] not in (DONE, SKIPPED)]
    known = [seconds for seconds in todo if seconds is not None]
    keep = state.settings.keep
    if len(known) == len(todo):
        teardown = " and the teardown" if keep != "always" else ""
        expected = f"expected, by earlier runs: about {duration(sum(known))}{teardown}"
    else:
        expected = "the expected time is unknown: no earlier run of this project did all of these phases"
    if state.settings.make_template:
        reporter.write_line("then the nested VM is generalised and converted to a template, which is kept")
    if state.settings.exec_command is not None:
        reporter.write_line(f"then this command runs: {state.settings.exec_command}")
    what = "everything created inside" if state.settings.attach is not None else "everything"
    end = f"{what} is kept" if keep == "always" else f"{what} is destroyed"
    end += ", unless something failed" if keep == "on-failure" else ""
    reporter.write_line(f"then {end}; {expected}")
