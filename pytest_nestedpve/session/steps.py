"""Steps: a test per phase in the file that imports the sentinel `pytest_nestedpve.steps`, and their order."""

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
        # The function is defined here, but the test belongs to the user's file.
        return self.path, 0, self.name


def _step_function(phase_name: str) -> Callable[..., None]:
    def step(_nested_pve_step: Callable[[], None]) -> None:
        _nested_pve_step()

    step.__name__ = step.__qualname__ = PREFIX + phase_name
    return step


def expand(collector: pytest.Module, phases: Any) -> list[pytest.Item]:
    """The steps of `phases` as items below `collector`."""
    items: list[pytest.Item] = []
    for phase in phases:
        item = StepItem.from_parent(collector, name=PREFIX + phase.name, callobj=_step_function(phase.name))
        item.phase_name = phase.name
        if hasattr(collector.config.hook, "pytest_timeout_set_timer"):
            # A step has its phase's own limit, whose error names the condition that was not met.
            item.add_marker(pytest.mark.timeout(0))
        items.append(item)
    return items


def sort_steps(
    items: list[pytest.Item], phases: Any, uses: Callable[[pytest.Item], bool]
) -> list[pytest.Item]:
    """`items` with the steps in the order of the phases, file by file, before the first user of a fixture."""
    steps = [item for item in items if isinstance(item, StepItem)]
    if not steps:
        return items
    position = {phase.name: number for number, phase in enumerate(phases)}
    files: dict[Any, int] = {}
    for item in steps:
        files.setdefault(item.path, len(files))
    steps.sort(key=lambda item: (files[item.path], position[item.phase_name]))
    others = [item for item in items if not isinstance(item, StepItem)]
    first_use = next((number for number, item in enumerate(others) if uses(item)), None)
    before_steps = 0
    for candidate in items:
        if isinstance(candidate, StepItem):
            break
        before_steps += 1
    index = before_steps if first_use is None else min(first_use, before_steps)
    return [*others[:index], *steps, *others[index:]]
