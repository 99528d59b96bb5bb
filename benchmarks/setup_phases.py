"""The three set-up phases that are playbooks: by the harness, and by `ansible-playbook` on a command line.

Both begin at the same snapshot of one nested PVE, with the same ansible.cfg, inventory and variables. The
baseline is three commands one after another, as in a shell script.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import labs
from benchmarks.rows import Row
from pytest_nestedpve.pve.deadline import Deadline, wait_until

ROOT = Path(__file__).parent.parent
LIMIT = 1.15
ROUNDS = 3
PHASES = ("setup_network", "setup_ssh", "setup_repos")
START = "npve_ensure_pve"
ANSIBLE_CFG = """[defaults]
interpreter_python = auto_silent
retry_files_enabled = False

[ssh_connection]
pipelining = True
retries = 3
"""
# Records the harness's arguments of each playbook, for the baseline.
CONFTEST = """
import functools, json, os
from pathlib import Path
from pytest_nestedpve.setup.ansible import playbooks

run = playbooks.run_playbook

@functools.wraps(run)
def record(env, playbook, *, inventory, variables, **options):
    file = Path(__file__).parent / f"arguments-{playbook.stem}.json"
    arguments = {"playbook": str(playbook), "inventory": inventory.to_data(), "variables": dict(variables)}
    arguments["ssh_config"] = str(Path(env.run.dir).absolute() / "ssh_config")
    file.write_text(json.dumps(arguments, default=str))
    return run(env, playbook, inventory=inventory, variables=variables, **options)

playbooks.run_playbook = record
"""


def measure() -> list[Row]:
    """One row. Raises RuntimeError when a session or a playbook fails."""
    with labs.lab("setup") as name, tempfile.TemporaryDirectory(prefix="bench-setup-") as folder:
        project = Path(folder)
        _write(project)
        ours, baseline = [], []
        _session(project, name, "-k", "ensure_pve")
        try:
            for _ in range(ROUNDS):
                labs.set_delays(name, cli_delay_s=labs.REAL_DELAY)
                ours.append(_measure_harness(project, name))
                _roll_back(name)
                labs.set_delays(name, cli_delay_s=labs.REAL_DELAY)
                baseline.append(_measure_commands(project))
                _roll_back(name)
        finally:
            labs.set_delays(name)
            subprocess.run(
                _pytest(name, "--nested-destroy-only"), cwd=project, capture_output=True, check=False
            )
    note = f"{', '.join(PHASES)}; by ansible-playbook three commands, each {ROUNDS} times from one snapshot"
    return [Row("setup_phases", "s", tuple(ours), tuple(baseline), LIMIT, "ratio", note)]


def _write(project: Path) -> None:
    (project / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
    (project / "conftest.py").write_text(CONFTEST)
    (project / "ansible.cfg").write_text(ANSIBLE_CFG)
    (project / "source").mkdir()
    (project / "source" / "README").write_text("a source\n")
    (project / "pytest.ini").write_text(
        "[pytest]\nnested_pve_playbook_dir = playbooks\nnested_pve_sources = mine=source\n"
    )
    shutil.copytree(ROOT / "playbooks", project / "playbooks")


def _pytest(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--pve-host", f"lab:{name}", *arguments]


def _session(project: Path, name: str, *arguments: str) -> None:
    done = subprocess.run(
        _pytest(name, "--nested-keep", "-o", "nested_pve_redo=true", "test_steps.py", *arguments),
        cwd=project,
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        output = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{output}")


def _measure_harness(project: Path, name: str) -> float:
    """Seconds of the three phases in a session, by its audit log."""
    log = next((project / ".nested-pve" / "runs").glob("*/audit.jsonl"))
    before = len(log.read_text().splitlines())
    _session(project, name, "-k", " or ".join(PHASES))
    lines = [json.loads(line) for line in log.read_text().splitlines()[before:] if line.strip()]
    ends = {line["phase"]: line for line in lines if line["event"] == "phase_end"}
    if any(ends[phase]["status"] != "done" for phase in PHASES):
        raise RuntimeError(f"expected the phases to be done, found {[ends[p]['status'] for p in PHASES]}")
    return round(sum(float(ends[phase]["ms"]) for phase in PHASES) / 1000, 2)


def _measure_commands(project: Path) -> float:
    """Seconds of the three `ansible-playbook` commands."""
    seconds = 0.0
    for stem in ("nested-pve-network", "nested-pve-ssh", "nested-pve-repos"):
        arguments = json.loads((project / f"arguments-{stem}.json").read_text())
        (project / "inventory.json").write_text(json.dumps(arguments["inventory"]))
        variables = project / "variables.json"
        variables.write_text(json.dumps(arguments["variables"]))
        command = [
            str(Path(sys.executable).parent / "ansible-playbook"),
            *("-i", str(project / "inventory.json"), "-e", f"@{variables}"),
            *("--ssh-common-args", f"-F {arguments['ssh_config']}", arguments["playbook"]),
        ]
        environment = {**os.environ, "ANSIBLE_CONFIG": str(project / "ansible.cfg"), "LC_ALL": "C.UTF-8"}
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=project, env=environment, text=True, capture_output=True, check=False
        )
        seconds += time.perf_counter() - began
        if done.returncode:
            output = (done.stdout + done.stderr)[-3000:]
            raise RuntimeError(f"ansible-playbook {stem} ended with {done.returncode}:\n{output}")
    return round(seconds, 2)


def _roll_back(name: str) -> None:
    """Roll the nested PVE back to its state after ensure_pve and wait until it is up. Not measured."""
    labs.set_delays(name)
    vmid = labs.run_on(name, "sh", "-c", "qm list | sed -n '2s/^ *\\([0-9]*\\) .*/\\1/p'").strip()
    snapshots = labs.run_on(name, "qm", "listsnapshot", vmid).split()
    for phase in reversed(PHASES):
        if f"npve_{phase}" in snapshots:
            labs.run_on(name, "qm", "delsnapshot", vmid, f"npve_{phase}")
    labs.run_on(name, "qm", "stop", vmid)
    labs.run_on(name, "qm", "rollback", vmid, START)
    labs.run_on(name, "qm", "start", vmid)

    def is_up() -> bool:
        try:
            labs.run_on(name, "qm", "agent", vmid, "ping")
            labs.run_on(name, "systemctl", "is-active", "ssh", "pveproxy", node="nested")
        except RuntimeError:
            return False
        return True

    wait_until(is_up, deadline=Deadline(120), what="the nested PVE to be up again")
