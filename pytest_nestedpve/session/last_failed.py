"""Steps that `--lf` deselects: it reruns tests that failed, not the steps that were skipped after them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_nestedpve.session.exit_status import Tally

SKIPPED = "nestedpve/skipped-steps"
#: The key of failed tests in pytest's cache.
_FAILED = "cache/lastfailed"


def deselected_steps(config: pytest.Config, tally: Tally) -> str | None:
    """A line about the steps that an earlier session skipped and that `--lf` deselected in this one."""
    if not getattr(config.option, "lf", False):
        return None
    number = len(_stored(config) - tally.steps_run - tally.steps_skipped)
    if not number:
        return None
    steps, are, them = ("1 step", "is", "it") if number == 1 else (f"{number} steps", "are", "them")
    return (
        f"{steps}, skipped last time because an earlier one had failed, {are} not in this run: "
        f"pytest without --lf runs {them}"
    )


def store_skipped_steps(config: pytest.Config, tally: Tally) -> None:
    """Write the skipped steps to pytest's cache if there is one, as long as it has failed tests for `--lf`.

    To be called after pytest has written the failed tests.
    """
    cache: Any = getattr(config, "cache", None)
    if cache is None or hasattr(config, "workerinput"):
        return
    stored = _stored(config)
    new = (stored - tally.steps_run) | tally.steps_skipped if cache.get(_FAILED, None) else set()
    if new != stored:
        cache.set(SKIPPED, sorted(new))


def _stored(config: pytest.Config) -> set[str]:
    cache: Any = getattr(config, "cache", None)
    names = cache.get(SKIPPED, None) if cache is not None else None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
