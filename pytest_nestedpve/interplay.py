"""How this plugin gets along with others: pytest's capturing, pytest-timeout's timer."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.settings import Settings


def clean_scope(item: pytest.Item) -> str:
    """What shares one clean state with `item`, by its marker. Raises UsageError for another scope."""
    mark = item.get_closest_marker("nested_pve_clean")
    scope = mark.kwargs.get("scope", mark.args[0] if mark.args else "function") if mark else "function"
    kinds: dict[str, type[pytest.Item | pytest.Collector]] = {
        "function": pytest.Item, "class": pytest.Class, "module": pytest.Module,
    }  # fmt: skip
    if scope not in kinds:
        raise pytest.UsageError(f"nested_pve_clean(scope={scope!r}): expected one of {', '.join(kinds)}")
    node = item.getparent(kinds[scope]) or item
    return node.nodeid


def _given(settings: Settings, option: Any, more: Mapping[str, bool]) -> list[str]:
    """What was asked for that goes with nothing but tests; `more` by the option's name."""
    others = {
        "--nested-destroy-only": settings.destroy_only,
        "--nested-exec": settings.exec_command is not None,
        "--nested-env-file": settings.env_file is not None,
        "--nested-keep": settings.keep != "no",
        "--nested-attach": settings.attach is not None,
        **more,
        "--collect-only": getattr(option, "collectonly", False),
        "--setup-only": getattr(option, "setuponly", False),
        "--setup-plan": getattr(option, "setupplan", False),
    }
    return [name for name, is_given in others.items() if is_given]


def against_doctor(settings: Settings, option: Any, selects: bool) -> str | None:
    """Why what was asked for beside --nested-doctor does not go with it; None if nothing does not."""
    given = _given(
        settings,
        option,
        {
            "--nested-dry-run": settings.dry_run,
            "--nested-make-template": settings.make_template,
            "--nested-skip": bool(settings.skip),
            "--context-file": settings.context_file is not None,
        },
    )
    if given:
        return (
            f"--nested-doctor and {', '.join(given)} contradict each other: the doctor only looks, "
            "and makes, runs and destroys nothing"
        )
    if selects:
        return "--nested-doctor collects no tests, so -k selects nothing: leave it out"
    return None


def against_template(settings: Settings, option: Any, selects: bool) -> str | None:
    """Why what was asked for beside --nested-make-template does not go with it; None if nothing does not."""
    given = _given(settings, option, {})
    if given:
        return (
            f"--nested-make-template and {', '.join(given)} contradict each other: the nested VM is made "
            "anew, becomes the template, and no test has it; leave one of them out"
        )
    if selects:
        return "--nested-make-template collects no tests, so -k selects nothing: leave it out"
    return None


@contextlib.contextmanager
def uncaptured(config: pytest.Config) -> Iterator[None]:
    """With the terminal's own descriptors, whatever pytest captures."""
    manager = config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled() if manager else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def timer_stopped(config: pytest.Config, item: pytest.Item | None) -> Iterator[None]:
    """Hold pytest-timeout's timer of the current test: its limit is meant for the test, and would cut a
    set-up or a teardown off half-way."""
    if item is None or not hasattr(config.hook, "pytest_timeout_cancel_timer"):
        yield
        return
    held = getattr(item, "cancel_timeout", None) is not None
    config.hook.pytest_timeout_cancel_timer(item=item)
    try:
        yield
    finally:
        module = sys.modules.get("pytest_timeout")
        limits: Any = module._get_item_settings(item) if module else None
        if held and limits is not None and limits.timeout and limits.timeout > 0:
            config.hook.pytest_timeout_set_timer(item=item, settings=limits)
