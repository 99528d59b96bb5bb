"""The number of run directories in a project is limited."""

from __future__ import annotations

import json
import os

from acceptance.conftest import Project

from pytest_nestedpve.run.old_runs import NEWEST


def test_a_new_run_replaces_the_oldest_finished_one(project: Project) -> None:
    folder = project.path / ".nested-pve" / "runs"
    for number in range(NEWEST + 2):
        log = folder / f"{number:012x}" / "audit.jsonl"
        log.parent.mkdir(parents=True)
        log.write_text(json.dumps({"event": "teardown", "phase": "destroy", "status": "clean"}) + "\n")
        os.utime(log, (1_700_000_000 - number,) * 2)
    result = project.run("-q", "test_steps.py", "-k", "preflight")
    assert result.ret == 0, result.output
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert {f"{number:012x}" for number in range(NEWEST)} < names
    assert len(names) == NEWEST + 1
