"""Directories as storages, as docs/clusters.md describes them: whole sessions on a lab with two storages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.on_lab import HandLab

LOW, HIGH = 97100, 97119
IMAGE = "local:import/debian-13-genericcloud-amd64.raw"
STORAGE = ("-o", "nested_pve_storage=disks")
# Templates without an operating system: the tests check the places of volumes. Below /var/lib/vz, the only
# real file system of the node.
TEMPLATES = f"""
set -e
mkdir -p /var/lib/vz/disks && pvesm add dir disks --path /var/lib/vz/disks --content images
qm create {LOW} --name raw-template --net0 virtio,bridge=vmbr0 --scsi0 disks:1,format=raw && qm template {LOW}
qm create {LOW + 1} --name grown-template --net0 virtio,bridge=vmbr0 --scsi0 disks:1,format=raw
qm template {LOW + 1} && qm set {LOW + 1} --scsi1 disks:1,format=raw
"""


@dataclass(frozen=True)
class KeptRun:
    """A kept run: its output, and its VM's configuration and snapshots on the host."""

    output: str
    config: dict[str, str]
    snapshots: list[str]


@dataclass(frozen=True)
class Runs:
    """Runs with different sources of their disk, and leftovers on the host after their teardown."""

    elsewhere: KeptRun
    raw: KeptRun
    linked: KeptRun
    copied: KeptRun
    end: str
    leftovers: list[str]
    volumes: list[str]


@pytest.fixture(scope="module")
def runs(hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    state = tmp_path_factory.mktemp("state")
    hand_lab.run(TEMPLATES)

    def session(path: Path, *args: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        options = [f"nested_pve_vmid_range={LOW + 2}-{HIGH}", "nested_pve_memory=1024", "nested_pve_disk=8"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-v", "-p", "no:randomly"),
                *("--pve-host", f"lab:{hand_lab.name}"),
                *(word for option in options for word in ("-o", option)),
                *args,
            ],
            cwd=path,
            env={**clean, "XDG_STATE_HOME": str(state), "COLUMNS": "160"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def keep_run(step: str, *args: str) -> KeptRun:
        path = tmp_path_factory.mktemp("project")
        (path / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
        output = session(path, "--nested-keep", "-k", step, *args)
        (log,) = path.glob(".nested-pve/runs/*/audit.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        (vmid,) = {line["facts"]["vmid"] for line in lines if line.get("facts", {}).get("vmid")}
        config = dict(line.partition(": ")[::2] for line in hand_lab.run(f"qm config {vmid}").splitlines())
        snapshots = json.loads(
            hand_lab.run(f"pvesh get /nodes/father/qemu/{vmid}/snapshot --output-format json")
        )
        return KeptRun(output, config, [s["name"] for s in snapshots if s["name"] != "current"])

    raw = f"nested_pve_vm_options=scsi0=disks:0,import-from={IMAGE},format=raw"
    by_source = {
        "elsewhere": keep_run("wait_ip and not leaf", *STORAGE),
        "raw": keep_run("wait_ip and not leaf", *STORAGE, "-o", raw),
        "linked": keep_run("test_provision", *STORAGE, "-o", "nested_pve_template=raw-template"),
        "copied": keep_run("test_provision", *STORAGE, "-o", "nested_pve_template=grown-template"),
    }
    end = session(tmp_path_factory.mktemp("end"), "--nested-destroy-only")
    volumes = hand_lab.run(
        "find /var/lib/vz/disks /var/lib/vz/images -type f -name 'vm-*'; ls /var/lib/vz/snippets"
    )
    return Runs(
        **by_source, end=end, leftovers=hand_lab.leftovers(LOW + 2, HIGH, []), volumes=volumes.split()
    )


@pytest.mark.thorough
def test_the_disk_is_on_the_configured_storage_and_snippets_on_one_that_has_them(runs: Runs) -> None:
    config = runs.elsewhere.config
    assert config["scsi0"].startswith("disks:")
    assert config["scsi0"].split(",")[0].endswith("-disk-0.qcow2")
    assert config["ide2"].startswith("disks:")
    assert config["cicustom"].startswith("vendor=local:snippets/npve-")


@pytest.mark.thorough
def test_a_kept_run_takes_snapshots_of_a_qcow2_file(runs: Runs) -> None:
    assert runs.elsewhere.snapshots == ["npve_wait_ip"]


@pytest.mark.thorough
def test_a_kept_run_reports_that_a_raw_file_has_no_snapshots(runs: Runs) -> None:
    assert runs.raw.config["scsi0"].split(",")[0].endswith("-disk-0.raw")
    assert runs.raw.snapshots == []
    assert "the storage of the nested VM does not support snapshots: none is taken" in runs.raw.output


@pytest.mark.thorough
def test_a_linked_clone_is_a_qcow2_file_over_the_templates_disk(runs: Runs) -> None:
    disk = runs.linked.config["scsi0"].split(",")[0]
    assert disk.startswith(f"disks:{LOW}/base-{LOW}-disk-0.raw/")
    assert disk.endswith(".qcow2")


@pytest.mark.thorough
def test_a_template_with_a_disk_that_cannot_be_linked_is_cloned_in_full(runs: Runs) -> None:
    for name in ("scsi0", "scsi1"):
        disk = runs.copied.config[name].split(",")[0]
        assert "base-" not in disk
        assert disk.startswith("disks:")
        assert disk.endswith(".qcow2")


@pytest.mark.thorough
def test_clones_and_snapshots_are_deleted_and_their_templates_kept(runs: Runs) -> None:
    assert "4 passed" in runs.end
    assert runs.leftovers == []
    assert [Path(file).name for file in runs.volumes] == [f"vm-{LOW + 1}-disk-1.raw"]
