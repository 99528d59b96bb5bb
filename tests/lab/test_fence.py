"""Permissions of a run's token on a lab: PVE itself refuses calls for VMs outside the run's pool."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.on_lab import HandLab, Project

from pytest_nestedpve.config import hosts
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.errors import PermissionDenied
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.tokens import remove_grants, remove_tokens, run_tokens

LOW = 96700
RUN = "a1b2c3d4e5f6"

MEDDLING = """
import os
from pathlib import Path

def pytest_nestedpve_phase_finished(phase, environment, status):
    if phase.name == "provision" and status == "done" and os.environ.get("MEDDLE"):
        environment.outer.run(os.environ["MEDDLE"], timeout=60).check()
"""


@pytest.fixture
def father(hand_lab: HandLab) -> Iterator[PveHost]:
    host = hosts.connect(hosts.resolve(f"lab:{hand_lab.name}"))
    yield host
    host.close()


@pytest.fixture
def fenced(father: PveHost) -> Iterator[PveHost]:
    """The host by the token of a run with a pool and without a VM."""
    pool = f"npve-{RUN}"
    father.api.post("/pools", poolid=pool)
    yield father.within(lambda: pool)
    names = run_tokens(father.api, RUN)
    assert len(names) == 1
    remove_grants(father.api, names)
    father.api.delete("/pools", poolid=pool)
    remove_tokens(father.api, names)


@pytest.fixture
def project(hand_lab: HandLab, tmp_path: Path) -> Project:
    project = Project(tmp_path / "project", hand_lab, LOW + 10, LOW + 19, tmp_path / "state")
    project.create()
    with (project.path / "conftest.py").open("a") as file:
        file.write(MEDDLING)
    return project


def user_cfg(lab: HandLab) -> list[str]:
    """The lines of father's user.cfg about tokens, pools and rights of runs."""
    # A new lab has no such file before the first change.
    return [line for line in lab.run("cat /etc/pve/user.cfg", check=False).splitlines() if "npve-" in line]


def test_the_host_refuses_to_delete_a_foreign_vm_that_reused_an_id_of_the_run(
    hand_lab: HandLab, father: PveHost, fenced: PveHost
) -> None:
    pool = f"npve-{RUN}"
    qemu.create_diskless(fenced.api, father.node, LOW, name="nested-pve-ours", pool=pool)
    # Unknown to the session, the run's VM is destroyed and a foreign VM gets its id.
    hand_lab.run(f"qm destroy {LOW} && qm create {LOW} --name nested-pve-theirs --description mine")
    before = hand_lab.configurations()
    for change in (
        lambda: qemu.destroy(fenced.api, father.node, LOW),
        lambda: qemu.stop(fenced.api, father.node, LOW),
        lambda: fenced.api.put(f"/nodes/{father.node}/qemu/{LOW}/config", tags="nestedpve"),
    ):
        with pytest.raises(PermissionDenied, match=rf"403 Permission check failed \(/vms/{LOW}, VM\."):
            change()
    assert hand_lab.configurations() == before
    hand_lab.run(f"qm destroy {LOW}")


def test_a_runs_token_manages_vms_of_its_pool_and_has_no_other_rights(
    hand_lab: HandLab, father: PveHost, fenced: PveHost
) -> None:
    api, node, pool = fenced.api, father.node, f"npve-{RUN}"
    qemu.create_diskless(api, node, LOW + 1, name="nested-pve-whole", pool=pool)
    api.put(f"/nodes/{node}/qemu/{LOW + 1}/config", tags="nestedpve")
    qemu.configure(api, node, LOW + 1, scsi0="local:1", ide2="local:cloudinit", net0="virtio,bridge=vmbr0")
    qemu.start(api, node, LOW + 1)
    qemu.stop(api, node, LOW + 1)
    qemu.destroy(api, node, LOW + 1)
    entries = json.loads(hand_lab.run("pveum acl list --output-format json"))
    rights = {(line["path"], line["roleid"]) for line in entries if f"!npve-{RUN}-" in line["ugid"]}
    assert rights == {
        (f"/pool/{pool}", "PVEVMAdmin"),
        (f"/pool/{pool}", "PVEPoolAdmin"),
        ("/storage/local", "PVEDatastoreUser"),
        ("/sdn/zones/localnetwork/vmbr0", "PVESDNUser"),
    }


def test_a_session_leaves_no_token_and_no_right(project: Project, hand_lab: HandLab) -> None:
    before = user_cfg(hand_lab)
    assert project.run("test_steps.py", "-k", "start_vm") == 0, project.output()
    transports = [line["transport"] for line in project.audit() if line["event"] == "call"]
    assert {"https:see", "https:act"} <= set(transports)
    assert "pvesh" not in transports
    assert [line for line in user_cfg(hand_lab) if line not in before] == []
    assert project.leftovers() == []


@pytest.mark.parametrize(
    ("meddle", "by_pvesh"),
    [
        pytest.param("systemctl stop pveproxy", True, id="the-proxy-stops"),
        pytest.param("systemctl restart pveproxy", False, id="the-proxy-restarts"),
        pytest.param(
            "pvecm updatecerts --force && systemctl restart pveproxy", False, id="a-new-certificate"
        ),
        pytest.param(
            "for t in $(pveum user token list root@pam --output-format json | grep -o 'npve-[0-9a-z-]*');"
            " do pveum user token remove root@pam $t; done",
            False,
            id="the-tokens-are-removed",
        ),
    ],
)
def test_a_session_continues_when(project: Project, hand_lab: HandLab, meddle: str, by_pvesh: bool) -> None:
    status = project.run("test_steps.py", "-k", "start_vm", env={"MEDDLE": meddle})
    hand_lab.run("systemctl start pveproxy")
    assert status == 0, project.output()
    transports = {line["transport"] for line in project.audit() if line["event"] == "call"}
    assert ("pvesh" in transports) is by_pvesh
    destroyed = [line for line in project.audit() if line.get("status") == "gone"]
    assert len(destroyed) == 1
    assert project.leftovers() == []
    # Without HTTPS tokens are listed and removed by pvesh.
    assert [line for line in user_cfg(hand_lab) if not re.match(r"token:root@pam!npve-see-", line)] == []


def test_tokens_and_rights_of_a_killed_session_are_deleted_with_its_vm(
    project: Project, hand_lab: HandLab
) -> None:
    before = user_cfg(hand_lab)
    process = project.start("test_steps.py", "-k", "start_vm")
    project.wait_for_line(
        process, lambda line: line["event"] == "phase_start" and line["phase"] == "start_vm"
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(line.startswith("token:root@pam!npve-") and ":1:" in line for line in user_cfg(hand_lab))
    assert project.run("--nested-destroy-only") == 0, project.output()
    assert project.leftovers() == []
    # The killed session's read-only token expires in minutes; nothing else of the session remains.
    remaining = [line for line in user_cfg(hand_lab) if line not in before]
    assert [
        line for line in remaining if not re.fullmatch(r"token:root@pam!npve-see-\w+:\d+:0::", line)
    ] == []
    assert len(remaining) == 1


def test_expired_tokens_of_runs_are_deleted_by_the_next_session(father: PveHost, hand_lab: HandLab) -> None:
    hand_lab.run("pveum user token add root@pam npve-see-00000000 --privsep 0 --expire 1000000000")
    hand_lab.run("pveum user token add root@pam npve-of-somebody --privsep 0 --expire 1000000000")
    father.api.get("/version")
    names = hand_lab.run("pveum user token list root@pam --output-format json")
    assert "npve-see-00000000" not in names
    assert "npve-of-somebody" in names
    hand_lab.run("pveum user token remove root@pam npve-of-somebody")
