"""The end of a run: from discovery, inner guests first, and a second discovery that must come back empty."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.ownership.discover import Candidate, discover
from pytest_nestedpve.ownership.proof import RunProver, prove
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import CommandTimeout, NoPve
from pytest_nestedpve.run.audit_log import task_ids
from pytest_nestedpve.teardown.destroy import Outcome, destroy

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import Listener
    from pytest_nestedpve.pve.host import PveHost

from pytest_nestedpve.teardown.leftovers import clear_rest

Say = Callable[[str], None]

ROUNDS = 3
CUT_OFF = 6.0
"""Seconds after which a call that was cut off has shown what it makes (`pvesh` takes 1 to 2 to begin)."""
INNER_BUDGET = 60.0
"""Seconds for a guest inside the nested PVE, which goes with that one's disk anyway."""


@dataclass(frozen=True)
class TeardownReport:
    """`left`: lines about what is ours and still there; `kept`: about what was not ours and is untouched."""

    destroyed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def teardown(env: Environment, shown: Listener | None = None) -> TeardownReport:
    """Remove everything of the run from the outer host. Raises PveError when the host cannot be asked: what
    could not be undone then is in the error's notes.

    `shown` is told what this is at, as it is of the set-up; its `progress` also from other threads.
    """
    audit, host = env.audit, env.outer
    try:
        with _phase(env, shown, "discover", "what may be the run's is looked for") as say:
            candidates = _candidates(env, say)
        with _phase(env, shown, "cleanup_inner", "guests inside the nested PVE go first") as say:
            _inner_first(env, candidates or [], say)
        title = "proved, stopped, proved, destroyed; then looked for again"
        with _phase(env, shown, "destroy", title) as say:
            report = TeardownReport() if candidates is None else clear(env, host, candidates, say)
            report = replace(report, left=(*report.left, *_undo(env)))
    except BaseException as e:
        # What a phase noted is often but files, which go without the API too.
        for line in _undo(env):
            audit.write("leak", status="left", cause=line, host=host.name)
            e.add_note(line)
        raise
    for line in report.left:
        audit.write("leak", status="left", cause=line, host=host.name)
    audit.write("teardown", phase="destroy", status="left" if report.left else "clean", host=host.name)
    return report


def _undo(env: Environment) -> list[str]:
    """What phases added to a PVE that stays; lines about what could not be taken away."""
    lines: list[str] = []
    while env.undo:
        try:
            lines += env.undo.pop()()
        except Exception as e:
            lines.append(f"what a phase added to {env.outer.name}: {type(e).__name__}: {e}")
    return lines


def _candidates(env: Environment, say: Say) -> list[Candidate] | None:
    """The candidates; None where nothing can be: PVE was to be made of a plain Debian, and never was."""
    try:
        return _look(env, env.outer, say)
    except NoPve:
        awaited = env.facts.get("preflight", {}).get("awaited", {})
        if env.attached and "PVE" in awaited and not env.has_lease:
            return None
        raise


def _look(env: Environment, host: PveHost, say: Say) -> list[Candidate]:
    """The candidates. A call that makes something and was cut off may still be at work on the host (a command
    outlives its connection): what it makes is waited for a little."""
    say("looking for what may be the run's")
    extra = _context_ids(env)
    found = discover(host, env.settings, env.run.id, extra)
    cut_off = env.audit.cut_off
    if cut_off is not None:
        before = {each.vmid for each in found}
        say("waiting for what a call that was cut off makes")
        rest = Deadline(max(0.0, CUT_OFF - (time.monotonic() - cut_off)))
        with contextlib.suppress(CommandTimeout):
            found = wait_until(
                lambda: _more_than(before, discover(host, env.settings, env.run.id, extra)),
                deadline=rest,
                what="what a call that was cut off makes",
                interval=(0.5, 1.0),
            )
    for each in found:
        env.audit.write("teardown", phase="discover", status="found", vmid=each.vmid, cause=each.why)
    return found


def _context_ids(env: Environment) -> frozenset[int]:
    """The ids that the context file names: further candidates, which pass the same proof."""
    if env.settings.context_file is None:
        return frozenset()
    from pytest_nestedpve.config import legacy_context

    try:
        return legacy_context.vmids(legacy_context.load(env.settings.context_file))
    except legacy_context.ContextError as e:
        env.audit.write("teardown", phase="discover", status="skipped", cause=str(e))
        return frozenset()


def _more_than(before: set[int], found: list[Candidate]) -> list[Candidate] | None:
    return found if {each.vmid for each in found} - before else None


@contextlib.contextmanager
def _phase(env: Environment, shown: Listener | None, name: str, title: str) -> Iterator[Say]:
    """A phase in the audit log and for who watches; yields what says how far it is."""
    phase = Phase(name, title, lambda _env: None)

    def say(text: str) -> None:
        # Nothing of a teardown may fail because it cannot be shown.
        with contextlib.suppress(Exception):
            if shown is not None:
                shown.progress(text)

    env.audit.write("phase_start", phase=name, title=title)
    with contextlib.suppress(Exception):
        if shown is not None:
            shown.phase_started(phase)
    started, status = time.monotonic(), "failed"
    try:
        yield say
        status = "done"
    finally:
        took = time.monotonic() - started
        env.audit.write("phase_end", phase=name, status=status, ms=round(took * 1000, 1))
        with contextlib.suppress(Exception):
            if shown is not None:
                shown.phase_finished(phase, status, took, {}, None)


def destroying(total: int, gone: int = 0) -> str:
    """`destroying 3 VMs, 1 gone`."""
    return f"destroying {total} VM{'s' * (total != 1)}" + (f", {gone} gone" if gone else "")


def clear(env: Environment, host: PveHost, candidates: list[Candidate], say: Say) -> TeardownReport:
    """Destroy, volumes and snippets and pool, then look a second time."""
    settings, run = env.settings, env.run
    gone: set[int] = set()

    def told(outcome: Outcome) -> None:
        env.audit.write(
            "teardown",
            phase="destroy",
            status=outcome.result,
            vmid=outcome.vmid,
            host=host.name,
            cause=outcome.reason or None,
        )
        (gone.add if outcome.result == "gone" else gone.discard)(outcome.vmid)
        say(destroying(len(candidates), len(gone)))

    ours = task_ids(run.directory.audit)
    outcomes: dict[int, Outcome] = {}
    for _ in range(ROUNDS):
        # A round more for what came to be meanwhile: the end of a create that nobody waited for.
        if candidates:
            gone.clear()
            say(destroying(len(candidates)))
        prover = RunProver(host.api, settings, run.id, ours)
        for outcome in destroy(host, prover, candidates, force_stop=settings.force_stop, on_outcome=told):
            outcomes[outcome.vmid] = outcome
        say("looking again")
        settled = {vmid for vmid, each in outcomes.items() if each.result != "gone"}
        candidates = [each for each in discover(host, settings, run.id) if each.vmid not in settled]
        if not candidates:
            break
    left = [_line(each) for each in outcomes.values() if each.result == "left"]
    left += [f"VM {each.vmid} on {each.node}: found again, {each.why}" for each in candidates]
    left += clear_rest(host, settings, run.id)
    seen = set(outcomes) - {vmid for vmid, each in outcomes.items() if each.result == "gone"}
    seen |= {each.vmid for each in candidates}
    for each in discover(host, settings, run.id):
        if each.vmid not in seen:
            left.append(f"VM {each.vmid} on {each.node}: found again after the teardown, {each.why}")
    return TeardownReport(
        tuple(f"VM {each.vmid}" for each in outcomes.values() if each.result == "gone"),
        tuple(left),
        tuple(_line(each) for each in outcomes.values() if each.result == "foreign"),
    )


def _line(outcome: Outcome) -> str:
    return f"VM {outcome.vmid} on {outcome.node}: {outcome.reason}"


def _inner_first(env: Environment, candidates: list[Candidate], say: Say) -> None:
    """Guests inside the nested PVE, best effort: they go with its disk anyway. Only through a VM that was
    just proved to be ours."""
    if env.attached or ("leaf_provision" not in env.facts and "download_image" not in env.facts):
        return
    vmid = env.facts.get("provision", {}).get("vmid")
    try:
        outer = [each for each in candidates if each.vmid == vmid]
        if not outer or not prove(env.outer.api, env.settings, outer[0], env.run).ok:
            return
        inner, settings = env.inner, replace(env.settings, pool_parent=None)
        inside = discover(inner, settings, env.run.id)
        say(f"{destroying(len(inside))} inside the nested PVE")
        ours = task_ids(env.run.directory.audit)
        prover = RunProver(inner.api, settings, env.run.id, ours)
        outcomes = destroy(inner, prover, inside, force_stop=settings.force_stop, budget=INNER_BUDGET)
        status = "left" if any(each.result == "left" for each in outcomes) else "clean"
        env.audit.write("teardown", phase="cleanup_inner", status=status, host=inner.name)
    except Exception as e:
        env.audit.write("teardown", phase="cleanup_inner", status="skipped", cause=f"{type(e).__name__}: {e}")
