"""What `--lf` leaves out: it knows of the tests that failed, not of the steps that were skipped for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_nestedpve.session.exit_status import Tally

SKIPPED = "nestedpve/skipped-steps"
#: Where pytest's cacheprovider keeps the tests that failed.
_FAILED = "cache/lastfailed"


def left_out(config: pytest.Config, tally: Tally) -> str | None:
    """A line about the steps that were skipped in an earlier session and that `--lf` left out of this one."""
    if not getattr(config.option, "lf", False):
        return None
    number = len(_known(config) - tally.steps_run - tally.steps_skipped)
    if not number:
        return None
    steps, are, them = ("1 step", "is", "it") if number == 1 else (f"{number} steps", "are", "them")
    return (
        f"{steps}, skipped last time because an earlier one had failed, {are} not in this run: "
        f"pytest without --lf runs {them}"
    )


def remember(config: pytest.Config, tally: Tally) -> None:
    """Keep which steps were skipped, in pytest's cache if there is one, for as long as `--lf` has something
    to choose. To be called when pytest has written what failed."""
    cache: Any = getattr(config, "cache", None)
    if cache is None or hasattr(config, "workerinput"):
        return
    known = _known(config)
    new = (known - tally.steps_run) | tally.steps_skipped if cache.get(_FAILED, None) else set()
    if new != known:
        cache.set(SKIPPED, sorted(new))


def _known(config: pytest.Config) -> set[str]:
    cache: Any = getattr(config, "cache", None)
    found = cache.get(SKIPPED, None) if cache is not None else None
    return {each for each in found if isinstance(each, str)} if isinstance(found, list) else set()
