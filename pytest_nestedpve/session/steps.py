"""The phases as tests of the file that imports the sentinel `pytest_nestedpve.steps`, and their order."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

PREFIX = "test_"


class StepItem(pytest.Function):
    """A phase as a test of the file that imports the sentinel."""

    phase_name: str = ""

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        # The function is made here, but the test belongs to the user's file.
        return self.path, 0, self.name


def _body(phase_name: str) -> Callable[..., None]:
    def step(_nested_pve_step: Callable[[], None]) -> None:
        _nested_pve_step()

    step.__name__ = step.__qualname__ = PREFIX + phase_name
    return step


def expand(collector: pytest.Module, phases: Any) -> list[pytest.Item]:
    """The steps of `phases` as items below `collector`."""
    made: list[pytest.Item] = []
    for phase in phases:
        item = StepItem.from_parent(collector, name=PREFIX + phase.name, callobj=_body(phase.name))
        item.phase_name = phase.name
        if hasattr(collector.config.hook, "pytest_timeout_set_timer"):
            # A step is bounded by its phase's own limit, which also says what it was waiting for.
            item.add_marker(pytest.mark.timeout(0))
        made.append(item)
    return made


def in_order(items: list[pytest.Item], phases: Any, uses: Callable[[pytest.Item], bool]) -> list[pytest.Item]:
    """`items` with the steps in the order of the phases, file by file, before the fixtures' first user."""
    steps = [item for item in items if isinstance(item, StepItem)]
    if not steps:
        return items
    place = {phase.name: number for number, phase in enumerate(phases)}
    files: dict[Any, int] = {}
    for item in steps:
        files.setdefault(item.path, len(files))
    steps.sort(key=lambda item: (files[item.path], place[item.phase_name]))
    others = [item for item in items if not isinstance(item, StepItem)]
    first = next((number for number, item in enumerate(others) if uses(item)), None)
    before_steps = 0
    for each in items:
        if isinstance(each, StepItem):
            break
        before_steps += 1
    at = before_steps if first is None else min(first, before_steps)
    return [*others[:at], *steps, *others[at:]]
