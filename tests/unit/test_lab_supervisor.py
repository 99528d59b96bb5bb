"""A lab kept for VMs of runs checks for them after each session, and not only after a pause."""

from __future__ import annotations

import threading
from pathlib import Path

from pytest_nestedpve.lab import supervisor


def test_a_session_ends_the_pause_of_a_kept_lab(tmp_path: Path) -> None:
    pause = threading.Thread(
        target=supervisor._pause, args=(tmp_path, "VMs of runs remain: 9900", 3600), daemon=True
    )
    pause.start()
    reason = tmp_path / "kept"
    while pause.is_alive() and not (reason.exists() and reason.read_text().endswith("9900\n")):
        pause.join(0.01)
    assert pause.is_alive()
    reason.unlink()
    pause.join(30)
    assert not pause.is_alive()
    assert not reason.exists(), "the reason is written again only after the next check"
