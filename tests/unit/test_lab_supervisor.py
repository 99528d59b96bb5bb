"""A lab that stays for VMs of runs looks again when a session was there, not when its pause is over."""

from __future__ import annotations

import threading
from pathlib import Path

from pytest_nestedpve.lab import supervisor


def test_a_session_that_came_ends_the_pause(tmp_path: Path) -> None:
    staying = threading.Thread(
        target=supervisor._stay, args=(tmp_path, "VMs of runs are there: 9900", 3600), daemon=True
    )
    staying.start()
    kept = tmp_path / "kept"
    while staying.is_alive() and not (kept.exists() and kept.read_text().endswith("9900\n")):
        staying.join(0.01)
    assert staying.is_alive()
    kept.unlink()
    staying.join(30)
    assert not staying.is_alive()
    assert not kept.exists(), "the word of the next look is another one"
