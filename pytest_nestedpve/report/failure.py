"""After a failure: what helps is collected, known symptoms are looked for, both are written to the audit log.

Reports read them there. Nothing here may fail, or hide, anything else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.phases import Listener

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import Phase, PhaseEnded
    from pytest_nestedpve.report.collect import Item, Kept
    from pytest_nestedpve.report.symptoms import Text

#: The directory of what was collected after a phase: below `artifacts` of the run.
FOLDER = "failure-{}"
LOOK = 15.0
"""Seconds (nominal) for the look through all that was collected."""
_OUTPUT_LIMIT = 400_000  # bytes of a playbook's output


class FailureListener(Listener):
    """Told of a run's phases; acts on those that fail. Comes before whoever shows the failure."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        self._began = 0.0

    def phase_started(self, phase: Phase) -> None:
        """Remember when."""
        del phase
        self._began = time.time()

    def phase_finished(self, ended: PhaseEnded) -> None:
        """Look into a failure; what a signal cut off is none."""
        cause = ended.cause
        if ended.status == "failed" and cause is not None and not cause.startswith("interrupted:"):
            after_phase(self._env, ended.phase.name, cause, self._began)


def after_phase(env: Environment, phase: str, cause: str, began: float = 0.0) -> None:
    """A phase failed, with this cause, at work since `began` (epoch seconds). Raises no Exception."""
    from pytest_nestedpve.report import artifacts
    from pytest_nestedpve.report.symptoms import Text

    with contextlib.suppress(Exception):
        texts = [Text("error", "the error itself", cause), *_outputs(env, began)]
        _look_into(env, phase, texts, lambda: artifacts.after_phase(env, phase))


def after_tests(env: Environment) -> None:
    """Tests failed and no phase did: what helps is collected before the environment goes."""
    from pytest_nestedpve.report import artifacts

    with contextlib.suppress(Exception):
        _collect(env, "tests", lambda: artifacts.after_phase(env, ""))


def after_teardown(env: Environment, lines: list[str], *, collect: bool) -> None:
    """The teardown left something: a line for each. `collect`: there is time for it. Raises no Exception."""
    from pytest_nestedpve.report import artifacts
    from pytest_nestedpve.report.symptoms import Text

    def items() -> list[Item]:
        return artifacts.after_teardown(env, lines) if collect else []

    with contextlib.suppress(Exception):
        _look_into(env, "destroy", [Text("error", "what the teardown says", "\n".join(lines))], items)


def _look_into(env: Environment, phase: str, texts: list[Text], items: Callable[[], list[Item]]) -> None:
    from pytest_nestedpve.report.symptoms import Text, recognise
    from pytest_nestedpve.run.signals import limit

    kept: tuple[Kept, ...] = ()
    with contextlib.suppress(Exception):
        kept = _collect(env, phase, items)
    texts += [Text(each.kind, each.file, each.words) for each in kept if each.words]
    with limit(LOOK, "the look for known symptoms"):
        recognised = recognise(texts, phase)
    for found in recognised:
        env.audit.write(
            "symptom",
            phase=phase,
            name=found.symptom.name,
            title=found.symptom.title,
            explanation=found.explanation,
            fix=found.fix,
            source=found.symptom.source,
            line=found.line,
            where=found.where,
        )


def _collect(env: Environment, phase: str, items: Callable[[], list[Item]]) -> tuple[Kept, ...]:
    from pytest_nestedpve.report.collect import collect

    wanted = items()
    if not wanted:
        return ()
    with contextlib.suppress(Exception):
        env.progress("it failed: collecting logs and states")
    folder = FOLDER.format(phase)
    collection = collect(wanted, env.run.directory.artifacts / folder, env.audit.masker.mask)
    env.audit.write(
        "artifacts",
        phase=phase,
        directory=f"{env.run.directory.artifacts.name}/{folder}",
        files=[{"file": each.file, "what": each.what, "bytes": each.size} for each in collection.kept],
        missing=[{"what": each.what, "why": each.why} for each in collection.missing],
        ms=round(collection.seconds * 1000, 1),
    )
    return collection.kept


def _outputs(env: Environment, began: float) -> list[Text]:
    """What playbooks said since then, the latest first."""
    from pytest_nestedpve.report.symptoms import Text

    found = []
    for path in sorted(env.run.directory.artifacts.glob("[0-9]*-*/stdout"), reverse=True):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= began:
                found.append(Text("ansible", f"the output of {path.parent.name}", _end_of(path)))
    return found


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _OUTPUT_LIMIT))
        return file.read().decode("utf-8", "replace")
