"""Markers of tests, pytest's capturing, and the timer of pytest-timeout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest


def requested_phase(item: pytest.Item | None) -> str | None:
    """The last phase that a test's marker requests; None for all, as a clean state always needs."""
    mark = item.get_closest_marker("nested_pve") if item is not None else None
    if mark is None or "nested_pve_clean" in getattr(item, "fixturenames", ()):
        return None
    upto = mark.kwargs.get("upto", mark.args[0] if mark.args else None)
    return str(upto) if upto is not None else None


def clean_scope(item: pytest.Item) -> str:
    """The id of the test, class or module whose tests share one clean state. Raises UsageError."""
    mark = item.get_closest_marker("nested_pve_clean")
    scope = mark.kwargs.get("scope", mark.args[0] if mark.args else "function") if mark else "function"
    kinds: dict[str, type[pytest.Item | pytest.Collector]] = {
        "function": pytest.Item, "class": pytest.Class, "module": pytest.Module,
    }  # fmt: skip
    if scope not in kinds:
        raise pytest.UsageError(f"nested_pve_clean(scope={scope!r}): expected one of {', '.join(kinds)}")
    node = item.getparent(kinds[scope]) or item
    return node.nodeid


@contextlib.contextmanager
def uncaptured(config: pytest.Config) -> Iterator[None]:
    """Suspend pytest's capturing in the body."""
    manager = config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled() if manager else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def timer_stopped(config: pytest.Config, item: pytest.Item | None, stage: str) -> Iterator[None]:
    """Stop pytest-timeout's timer of the current test in the body: its limit is for the test, and would
    abort a set-up or a teardown.

    The timer starts again in the stages "setup" and "call"; no other `stage` starts it. An item's attributes
    do not show whether its timer still runs.
    """
    if item is None or not hasattr(config.hook, "pytest_timeout_cancel_timer"):
        yield
        return
    module = sys.modules.get("pytest_timeout")
    limits: Any = module._get_item_settings(item) if module else None
    limited = limits is not None and bool(limits.timeout) and limits.timeout > 0
    stages = ("call",) if limited and limits.func_only else ("setup", "call")
    held = limited and stage in stages and getattr(item, "cancel_timeout", None) is not None
    config.hook.pytest_timeout_cancel_timer(item=item)
    try:
        yield
    finally:
        if held:
            config.hook.pytest_timeout_set_timer(item=item, settings=limits)
