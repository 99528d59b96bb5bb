"""What the tests against whole labs share: helpers are imported as `lab.on_lab`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

# Here, and not in the files that use them: so each is made once for all of these.
from lab.playbook_fixtures import bridged, changed, fresh, installed, playbook_lab
from lab.setup_fixtures import finished, keyed, served

if TYPE_CHECKING:
    from lab.on_lab import HandLab

__all__ = ["bridged", "changed", "finished", "fresh", "installed", "keyed", "playbook_lab", "served"]


@pytest.fixture(scope="module")
def hand_lab() -> Iterator[HandLab]:
    """A lab of this file's own, started and stopped by hand as a person does it."""
    from lab.on_lab import start_by_hand, stop_by_hand

    lab = start_by_hand()
    yield lab
    stop_by_hand(lab)
