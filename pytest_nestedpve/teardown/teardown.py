"""The end of a run: discover, destroy inner guests, destroy, delete leftovers, discover again, report.

The functions are in this order. The run's VMs are discovered on the host each time, not remembered.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.facts import ImageFacts, LeafProvisionFacts, PreflightFacts, ProvisionFacts
from pytest_nestedpve.environment.phases import Phase, PhaseEnded
from pytest_nestedpve.ownership.discover import Candidate, discover
from pytest_nestedpve.ownership.proof import RunProver, prove
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import CommandTimeout, NoPve
from pytest_nestedpve.run.audit_log import task_ids
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.leftovers import delete_leftovers

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import Listener

Progress = Callable[[str], None]

ROUNDS = 3
CUT_OFF = 6.0
"""Seconds after which a create whose call was cut off is visible (`pvesh` takes 1 to 2 to begin)."""
INNER_BUDGET = 60.0
"""Seconds for a guest inside the nested PVE, which is deleted with that PVE's disk anyway."""


@dataclass(frozen=True)
class TeardownReport:
    """Lines about VMs that were `destroyed`; about what is ours and `left` over; about foreign VMs that were
    `kept`, untouched."""

    destroyed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def teardown(env: Environment, listener: Listener | None = None) -> TeardownReport:
    """Remove everything of the run from the outer host.

    Raises PveError when the host cannot be asked; the notes of the error then name additions of phases that
    could not be undone. `listener` gets the phases, and progress also from other threads.
    """
    try:
        with _phase(env, listener, "discover", "searching for VMs that may be the run's") as progress:
            candidates = _discover(env, progress)
        with _phase(env, listener, "cleanup_inner", "destroying guests inside the nested PVE") as progress:
            _destroy_inner_guests(env, candidates or [], progress)
        title = "proving, stopping, proving and destroying; then searching again"
        with _phase(env, listener, "destroy", title) as progress:
            report = TeardownReport() if candidates is None else destroy_run(env, candidates, progress)
            report = replace(report, left=(*report.left, *_undo(env)))
    except BaseException as e:
        # Additions of phases are often only files, which can be removed without the API too.
        for line in _undo(env):
            env.audit.write("leak", status="left", cause=line, host=env.outer.name)
            e.add_note(line)
        raise
    for line in report.left:
        env.audit.write("leak", status="left", cause=line, host=env.outer.name)
    status = "left" if report.left else "clean"
    env.audit.write("teardown", phase="destroy", status=status, host=env.outer.name)
    return report


# -- discover ------------------------------------------------------------------------------------


def _discover(env: Environment, progress: Progress) -> list[Candidate] | None:
    """The candidates; None where no VM can exist: PVE was to be installed on a Debian, and never was."""
    try:
        return _candidates(env, progress)
    except NoPve:
        preflight = PreflightFacts.known(env.facts)
        if env.attached and preflight and "PVE" in preflight.awaited and not env.has_lease:
            return None
        raise


def _candidates(env: Environment, progress: Progress) -> list[Candidate]:
    """The candidates. A create whose call was cut off may still work on the host (a command outlives its
    connection): its VM is awaited for up to `CUT_OFF` seconds."""
    progress("searching for VMs that may be the run's")
    context_ids = _context_ids(env)
    candidates = discover(env.outer, env.settings, env.run.id, context_ids)
    cut_off = env.audit.cut_off
    if cut_off is not None:
        known = {candidate.vmid for candidate in candidates}

        def with_a_new_one() -> list[Candidate] | None:
            current = discover(env.outer, env.settings, env.run.id, context_ids)
            return current if {candidate.vmid for candidate in current} - known else None

        progress("waiting for the VM of a create that was cut off")
        with contextlib.suppress(CommandTimeout):
            candidates = wait_until(
                with_a_new_one,
                deadline=Deadline(max(0.0, CUT_OFF - (time.monotonic() - cut_off))),
                what="the VM of a create that was cut off",
                interval=(0.5, 1.0),
            )
    for candidate in candidates:
        env.audit.write(
            "teardown", phase="discover", status="found", vmid=candidate.vmid, cause=candidate.why
        )
    return candidates


def _context_ids(env: Environment) -> frozenset[int]:
    """Ids in the context file: further candidates, which need the same proof."""
    if env.settings.context_file is None:
        return frozenset()
    from pytest_nestedpve.config import legacy_context

    try:
        return legacy_context.vmids(legacy_context.load(env.settings.context_file))
    except legacy_context.ContextError as e:
        env.audit.write("teardown", phase="discover", status="skipped", cause=str(e))
        return frozenset()


# -- guests inside the nested PVE ----------------------------------------------------------------


def _destroy_inner_guests(env: Environment, candidates: list[Candidate], progress: Progress) -> None:
    """Destroy guests inside the nested PVE, best effort: they are deleted with its disk anyway. Only through
    a VM that was just proved to be ours."""
    if env.attached or not {LeafProvisionFacts.phase, ImageFacts.phase} & env.facts.keys():
        return
    facts = ProvisionFacts.known(env.facts)
    vmid = facts.vmid if facts is not None else None
    try:
        nested = [candidate for candidate in candidates if candidate.vmid == vmid]
        if not nested or not prove(env.outer.api, env.settings, nested[0], env.run).ok:
            return
        inner, settings = env.inner, replace(env.settings, pool_parent=None)
        guests = discover(inner, settings, env.run.id)
        progress(f"{destroying(len(guests))} inside the nested PVE")
        prover = RunProver(inner.api, settings, env.run.id, task_ids(env.run.directory.audit))
        force_stop = settings.force_stop
        outcomes = destroy(inner, prover, guests, force_stop=force_stop, budget=INNER_BUDGET)
        status = "left" if any(outcome.result == "left" for outcome in outcomes) else "clean"
        env.audit.write("teardown", phase="cleanup_inner", status=status, host=inner.name)
    except Exception as e:
        env.audit.write("teardown", phase="cleanup_inner", status="skipped", cause=f"{type(e).__name__}: {e}")


# -- destroy, delete leftovers, discover again ---------------------------------------------------


def destroy_run(env: Environment, candidates: list[Candidate], progress: Progress) -> TeardownReport:
    """Destroy the candidates that are proved, delete the run's leftovers, and search a second time."""
    outcomes, remaining = _destroy_vms(env, candidates, progress)
    lines = [_line(outcome) for outcome in outcomes.values() if outcome.result == "left"]
    lines += [f"VM {vm.vmid} on {vm.node}: found again, {vm.why}" for vm in remaining]
    lines += delete_leftovers(env.outer, env.settings, env.run.id)
    reported = {vmid for vmid, outcome in outcomes.items() if outcome.result != "gone"}
    reported |= {vm.vmid for vm in remaining}
    for vm in discover(env.outer, env.settings, env.run.id):
        if vm.vmid not in reported:
            lines.append(f"VM {vm.vmid} on {vm.node}: found again after the teardown, {vm.why}")
    return TeardownReport(
        tuple(f"VM {outcome.vmid}" for outcome in outcomes.values() if outcome.result == "gone"),
        tuple(lines),
        tuple(_line(outcome) for outcome in outcomes.values() if outcome.result == "foreign"),
    )


def _destroy_vms(
    env: Environment, candidates: list[Candidate], progress: Progress
) -> tuple[dict[int, Outcome], list[Candidate]]:
    """Destroy until discovery finds no further VM, at most `ROUNDS` times: outcomes by id, remaining VMs.

    A round can find a VM more: that of a create whose call was cut off.
    """
    host, settings, run = env.outer, env.settings, env.run
    gone: set[int] = set()

    def on_outcome(outcome: Outcome) -> None:
        env.audit.write(
            "teardown",
            phase="destroy",
            status=outcome.result,
            vmid=outcome.vmid,
            host=host.name,
            cause=outcome.reason or None,
        )
        (gone.add if outcome.result == "gone" else gone.discard)(outcome.vmid)
        progress(destroying(len(candidates), len(gone)))

    prover = RunProver(host.api, settings, run.id, task_ids(run.directory.audit))
    outcomes: dict[int, Outcome] = {}
    for _ in range(ROUNDS):
        if candidates:
            gone.clear()
            progress(destroying(len(candidates)))
        force_stop = settings.force_stop
        results = destroy(host, prover, candidates, force_stop=force_stop, on_outcome=on_outcome)
        outcomes.update({outcome.vmid: outcome for outcome in results})
        progress("searching for VMs again")
        settled = {vmid for vmid, outcome in outcomes.items() if outcome.result != "gone"}
        candidates = [vm for vm in discover(host, settings, run.id) if vm.vmid not in settled]
        if not candidates:
            break
    return outcomes, candidates


def _undo(env: Environment) -> list[str]:
    """Remove additions of phases to a PVE that is kept; lines about those that could not be removed."""
    lines: list[str] = []
    while env.undo:
        try:
            lines += env.undo.pop()()
        except Exception as e:
            lines.append(f"an addition of a phase to {env.outer.name}: {type(e).__name__}: {e}")
    return lines


# -- report --------------------------------------------------------------------------------------


def destroying(total: int, gone: int = 0) -> str:
    """`destroying 3 VMs, 1 gone`."""
    return f"destroying {total} VM{'s' * (total != 1)}" + (f", {gone} gone" if gone else "")


def _line(outcome: Outcome) -> str:
    return f"VM {outcome.vmid} on {outcome.node}: {outcome.reason}"


@contextlib.contextmanager
def _phase(env: Environment, listener: Listener | None, name: str, title: str) -> Iterator[Progress]:
    """A phase in the audit log and for the listener; yields the function that reports progress.

    An error of the listener never fails the teardown.
    """
    phase = Phase(name, title, lambda _env: None)

    def notify(call: Callable[[Listener], None]) -> None:
        with contextlib.suppress(Exception):
            if listener is not None:
                call(listener)

    env.audit.write("phase_start", phase=name, title=title)
    notify(lambda to: to.phase_started(phase))
    started, status = time.monotonic(), "failed"
    try:
        yield lambda text: notify(lambda to: to.progress(text))
        status = "done"
    finally:
        seconds = time.monotonic() - started
        env.audit.write("phase_end", phase=name, status=status, ms=round(seconds * 1000, 1))
        notify(lambda to: to.phase_finished(PhaseEnded(phase, status, seconds)))
