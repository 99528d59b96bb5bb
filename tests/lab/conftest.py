"""Fixtures of the tests against whole labs; functions are imported from `lab.on_lab`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported here, not in the test files, so that each fixture is set up once for all of them.
from lab.playbook_fixtures import bridged, changed, fresh, installed, playbook_lab
from lab.setup_fixtures import finished, keyed, served

if TYPE_CHECKING:
    from lab.on_lab import HandLab

__all__ = ["bridged", "changed", "finished", "fresh", "installed", "keyed", "playbook_lab", "served"]


@pytest.fixture(scope="module")
def hand_lab() -> Iterator[HandLab]:
    """One lab per test file, started and stopped by the command as a person does."""
    from lab.on_lab import start_by_hand, stop_by_hand

    lab = start_by_hand()
    yield lab
    stop_by_hand(lab)
