"""Destroying a run's guests: ours, each proved before each blow, and a shell's way, one after another."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks import labs
from benchmarks.rows import Row
from pytest_nestedpve.ownership.discover import discover
from pytest_nestedpve.ownership.proof import RunProver
from pytest_nestedpve.teardown.destroy import WIDTH, destroy

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.run.identity import Run

EIGHT_LIMIT = 0.05
EIGHT_ROUNDS = 3
FIFTY, FIFTY_LIMIT = 50, 1.15
STOP, DESTROY = 2.0, 3.0


def measure_eight() -> list[Row]:
    """Eight running guests, the session open; the ratio to `qm stop` and `qm destroy` over SSH."""
    ours, baseline = [], []
    with labs.lab("teardown") as name, labs.session(name) as (host, settings, run):
        for _ in range(EIGHT_ROUNDS):
            labs.pace(name)
            labs.with_guests(host, settings, run, 8, running=True)
            labs.pace(name, cli_delay_s=labs.SLOW)
            ours.append(_destroyed(host, settings, run))
            labs.pace(name)
            candidates = labs.with_guests(host, settings, run, 8, running=True)
            labs.pace(name, cli_delay_s=labs.SLOW)
            began = time.perf_counter()
            for each in candidates:
                labs.by_ssh(name, "qm", "stop", str(each.vmid))
                labs.by_ssh(name, "qm", "destroy", str(each.vmid))
            baseline.append(labs.seconds(began))
    note = "discovery and proofs included, against qm stop and qm destroy over a new SSH connection each"
    return [Row("teardown8", "s", tuple(ours), tuple(baseline), EIGHT_LIMIT, "ratio", note)]


def measure_fifty() -> list[Row]:
    """Fifty running guests whose stop and destroy take their time; the bound of the width is the baseline."""
    bound = FIFTY / WIDTH * (STOP + DESTROY)
    with labs.lab("teardown") as name, labs.session(name) as (host, settings, run):
        labs.with_guests(host, settings, run, FIFTY, running=True)
        labs.pace(name, cli_delay_s=labs.SLOW, stop_s=STOP, destroy_s=DESTROY)
        ours = _destroyed(host, settings, run)
    note = f"stop {STOP:g} s, destroy {DESTROY:g} s; baseline: {FIFTY} / {WIDTH} at a time x 5 s"
    return [Row("teardown50", "s", (ours,), (bound,), FIFTY_LIMIT, "ratio", note)]


def _destroyed(host: PveHost, settings: Settings, run: Run) -> float:
    began = time.perf_counter()
    prover = RunProver(host.api, settings, run.id)
    outcomes = destroy(host, prover, discover(host, settings, run.id), force_stop=True)
    taken = labs.seconds(began)
    left = [each for each in outcomes if each.result != "gone"]
    if left or discover(host, settings, run.id):
        raise RuntimeError(f"not all guests are gone: {left}")
    return taken
