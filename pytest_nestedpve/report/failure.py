"""After a failure: collects artifacts, searches them for known symptoms, and writes both to the audit log.

Reports read them from that log. An error in this module is suppressed: it must not hide the failure.
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

#: Name of the directory of files collected after a phase, in the run's `artifacts`.
FOLDER = "failure-{}"
SEARCH = 15.0
"""Seconds (nominal) for the search for known symptoms in all texts."""
_OUTPUT_LIMIT = 400_000  # bytes of a playbook's output


class FailureListener(Listener):
    """Examines each failed phase of a run. Must be called before the listeners that show the failure."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        self._began = 0.0

    def phase_started(self, phase: Phase) -> None:
        """Record the start time."""
        del phase
        self._began = time.time()

    def phase_finished(self, ended: PhaseEnded) -> None:
        """Examine a failed phase; an interrupted phase is no failure."""
        cause = ended.cause
        if ended.status == "failed" and cause is not None and not cause.startswith("interrupted:"):
            examine_phase(self._env, ended.phase.name, cause, self._began)


def examine_phase(env: Environment, phase: str, cause: str, began: float = 0.0) -> None:
    """Examine a phase that failed with `cause`; it began at `began` (epoch seconds). Raises no Exception."""
    from pytest_nestedpve.report import artifacts
    from pytest_nestedpve.report.symptoms import Text

    with contextlib.suppress(Exception):
        texts = [Text("error", "the error itself", cause), *_outputs(env, began)]
        _examine(env, phase, texts, lambda: artifacts.select_after_phase(env, phase))


def examine_tests(env: Environment) -> None:
    """Collect artifacts after tests failed, before the environment is destroyed. Raises no Exception."""
    from pytest_nestedpve.report import artifacts

    with contextlib.suppress(Exception):
        _collect(env, "tests", lambda: artifacts.select_after_phase(env, ""))


def examine_teardown(env: Environment, lines: list[str], *, collect: bool) -> None:
    """Examine a teardown with leftovers, a line each. `collect`: artifacts too. Raises no Exception."""
    from pytest_nestedpve.report import artifacts
    from pytest_nestedpve.report.symptoms import Text

    def items() -> list[Item]:
        return artifacts.select_after_teardown(env, lines) if collect else []

    with contextlib.suppress(Exception):
        _examine(env, "destroy", [Text("error", "the teardown's message", "\n".join(lines))], items)


def _examine(env: Environment, phase: str, texts: list[Text], items: Callable[[], list[Item]]) -> None:
    from pytest_nestedpve.report.symptoms import Text, recognise
    from pytest_nestedpve.run.signals import limit

    kept: tuple[Kept, ...] = ()
    with contextlib.suppress(Exception):
        kept = _collect(env, phase, items)
    texts += [Text(file.kind, file.file, file.text) for file in kept if file.text]
    with limit(SEARCH, "the search for known symptoms"):
        matches = recognise(texts, phase)
    for match in matches:
        env.audit.write(
            "symptom",
            phase=phase,
            name=match.symptom.name,
            title=match.symptom.title,
            explanation=match.explanation,
            fix=match.fix,
            source=match.symptom.source,
            line=match.line,
            where=match.where,
        )


def _collect(env: Environment, phase: str, items: Callable[[], list[Item]]) -> tuple[Kept, ...]:
    from pytest_nestedpve.report.collect import collect

    requested = items()
    if not requested:
        return ()
    with contextlib.suppress(Exception):
        env.progress("failed; collecting logs and states")
    folder = FOLDER.format(phase)
    collection = collect(requested, env.run.directory.artifacts / folder, env.audit.masker.mask)
    env.audit.write(
        "artifacts",
        phase=phase,
        directory=f"{env.run.directory.artifacts.name}/{folder}",
        files=[{"file": file.file, "what": file.description, "bytes": file.size} for file in collection.kept],
        missing=[{"what": item.description, "why": item.reason} for item in collection.missing],
        ms=round(collection.seconds * 1000, 1),
    )
    return collection.kept


def _outputs(env: Environment, began: float) -> list[Text]:
    """Outputs of the playbooks that ran since `began` (epoch seconds), the latest first."""
    from pytest_nestedpve.report.symptoms import Text

    texts = []
    for path in sorted(env.run.directory.artifacts.glob("[0-9]*-*/stdout"), reverse=True):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime >= began:
                texts.append(Text("ansible", f"the output of {path.parent.name}", _end_of(path)))
    return texts


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _OUTPUT_LIMIT))
        return file.read().decode("utf-8", "replace")
