"""What docs/clusters.md says of directories as storages: by whole sessions, on a lab's father with two."""

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
# No operating system is on these: what is to be seen is where volumes lie. Below /var/lib/vz, as only that is
# a real file system there.
TEMPLATES = f"""
set -e
mkdir -p /var/lib/vz/disks && pvesm add dir disks --path /var/lib/vz/disks --content images
qm create {LOW} --name raw-template --net0 virtio,bridge=vmbr0 --scsi0 disks:1,format=raw && qm template {LOW}
qm create {LOW + 1} --name grown-template --net0 virtio,bridge=vmbr0 --scsi0 disks:1,format=raw
qm template {LOW + 1} && qm set {LOW + 1} --scsi1 disks:1,format=raw
"""


@dataclass(frozen=True)
class Kept:
    """A run that was kept, as the host shows its VM."""

    output: str
    config: dict[str, str]
    snapshots: list[str]


@dataclass(frozen=True)
class Story:
    """The runs by what they were made from, and what the host had of all of them after their end."""

    elsewhere: Kept
    raw: Kept
    linked: Kept
    copied: Kept
    end: str
    left: list[str]
    volumes: list[str]


@pytest.fixture(scope="module")
def story(hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory) -> Story:
    state = tmp_path_factory.mktemp("state")
    hand_lab.ask(TEMPLATES)

    def session(path: Path, *args: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        shape = [f"nested_pve_vmid_range={LOW + 2}-{HIGH}", "nested_pve_memory=1024", "nested_pve_disk=8"]
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-v", "-p", "no:randomly"),
                *("--pve-host", f"lab:{hand_lab.name}"),
                *(word for each in shape for word in ("-o", each)),
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

    def kept(step: str, *args: str) -> Kept:
        path = tmp_path_factory.mktemp("project")
        (path / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
        output = session(path, "--nested-keep", "-k", step, *args)
        (log,) = path.glob(".nested-pve/runs/*/audit.jsonl")
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        (vmid,) = {line["facts"]["vmid"] for line in lines if line.get("facts", {}).get("vmid")}
        config = dict(line.partition(": ")[::2] for line in hand_lab.ask(f"qm config {vmid}").splitlines())
        listed = json.loads(
            hand_lab.ask(f"pvesh get /nodes/father/qemu/{vmid}/snapshot --output-format json")
        )
        return Kept(output, config, [each["name"] for each in listed if each["name"] != "current"])

    raw = f"nested_pve_vm_options=scsi0=disks:0,import-from={IMAGE},format=raw"
    runs = {
        "elsewhere": kept("wait_ip and not leaf", *STORAGE),
        "raw": kept("wait_ip and not leaf", *STORAGE, "-o", raw),
        "linked": kept("test_provision", *STORAGE, "-o", "nested_pve_template=raw-template"),
        "copied": kept("test_provision", *STORAGE, "-o", "nested_pve_template=grown-template"),
    }
    end = session(tmp_path_factory.mktemp("end"), "--nested-destroy-only")
    volumes = hand_lab.ask(
        "find /var/lib/vz/disks /var/lib/vz/images -type f -name 'vm-*'; ls /var/lib/vz/snippets"
    )
    return Story(**runs, end=end, left=hand_lab.left(LOW + 2, HIGH, []), volumes=volumes.split())


@pytest.mark.thorough
def test_the_disk_lies_where_it_is_wanted_and_the_files_where_they_can(story: Story) -> None:
    config = story.elsewhere.config
    assert config["scsi0"].startswith("disks:")
    assert config["scsi0"].split(",")[0].endswith("-disk-0.qcow2")
    assert config["ide2"].startswith("disks:")
    assert config["cicustom"].startswith("vendor=local:snippets/npve-")


@pytest.mark.thorough
def test_a_qcow2_file_has_snapshots_and_a_kept_run_takes_them(story: Story) -> None:
    assert story.elsewhere.snapshots == ["npve_wait_ip"]


@pytest.mark.thorough
def test_a_raw_file_has_none_and_a_kept_run_says_so(story: Story) -> None:
    assert story.raw.config["scsi0"].split(",")[0].endswith("-disk-0.raw")
    assert story.raw.snapshots == []
    assert "the storage of the nested VM has no snapshots: none is taken" in story.raw.output


@pytest.mark.thorough
def test_a_template_is_cloned_linked_by_a_qcow2_file_over_whatever_it_has(story: Story) -> None:
    disk = story.linked.config["scsi0"].split(",")[0]
    assert disk.startswith(f"disks:{LOW}/base-{LOW}-disk-0.raw/")
    assert disk.endswith(".qcow2")


@pytest.mark.thorough
def test_a_template_with_a_disk_that_cannot_be_linked_is_copied_in_full(story: Story) -> None:
    for name in ("scsi0", "scsi1"):
        disk = story.copied.config[name].split(",")[0]
        assert "base-" not in disk
        assert disk.startswith("disks:")
        assert disk.endswith(".qcow2")


@pytest.mark.thorough
def test_clones_and_snapshots_go_and_their_templates_stay(story: Story) -> None:
    assert "4 passed" in story.end
    assert story.left == []
    assert [Path(each).name for each in story.volumes] == [f"vm-{LOW + 1}-disk-1.raw"]
