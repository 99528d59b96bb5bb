"""Time to destroy a run's guests: by the harness, with proofs and in parallel, and by shell commands."""

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
    """Eight running guests over an open connection; the ratio to `qm stop` and `qm destroy` over SSH."""
    ours, baseline = [], []
    with labs.lab("teardown") as name, labs.session(name) as (host, settings, run):
        for _ in range(EIGHT_ROUNDS):
            labs.set_delays(name)
            labs.create_guests(host, settings, run, 8, running=True)
            labs.set_delays(name, cli_delay_s=labs.REAL_DELAY)
            ours.append(_measure_destroy(host, settings, run))
            labs.set_delays(name)
            candidates = labs.create_guests(host, settings, run, 8, running=True)
            labs.set_delays(name, cli_delay_s=labs.REAL_DELAY)
            began = time.perf_counter()
            for candidate in candidates:
                labs.run_by_ssh(name, "qm", "stop", str(candidate.vmid))
                labs.run_by_ssh(name, "qm", "destroy", str(candidate.vmid))
            baseline.append(labs.seconds_since(began))
    note = "discovery and proofs included, against qm stop and qm destroy over a new SSH connection each"
    return [Row("teardown8", "s", tuple(ours), tuple(baseline), EIGHT_LIMIT, "ratio", note)]


def measure_fifty() -> list[Row]:
    """Fifty running guests with delays of stop and destroy; the baseline is computed from the width."""
    bound = FIFTY / WIDTH * (STOP + DESTROY)
    with labs.lab("teardown") as name, labs.session(name) as (host, settings, run):
        labs.create_guests(host, settings, run, FIFTY, running=True)
        labs.set_delays(name, cli_delay_s=labs.REAL_DELAY, stop_s=STOP, destroy_s=DESTROY)
        ours = _measure_destroy(host, settings, run)
    note = f"stop {STOP:g} s, destroy {DESTROY:g} s; baseline: {FIFTY} / {WIDTH} at a time x 5 s"
    return [Row("teardown50", "s", (ours,), (bound,), FIFTY_LIMIT, "ratio", note)]


def _measure_destroy(host: PveHost, settings: Settings, run: Run) -> float:
    began = time.perf_counter()
    prover = RunProver(host.api, settings, run.id)
    outcomes = destroy(host, prover, discover(host, settings, run.id), force_stop=True)
    seconds = labs.seconds_since(began)
    remaining = [outcome for outcome in outcomes if outcome.result != "gone"]
    if remaining or discover(host, settings, run.id):
        raise RuntimeError(f"not all guests are destroyed: {remaining}")
    return seconds
