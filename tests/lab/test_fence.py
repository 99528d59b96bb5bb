"""The line that PVE itself draws around a run, on a lab: by the pool's token, by no trust in the harness."""

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

MEDDLES = """
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
    """The host as a run acts on it that has a pool and no VM."""
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
    made = Project(tmp_path / "project", hand_lab, LOW + 10, LOW + 19, tmp_path / "state")
    made.write()
    with (made.path / "conftest.py").open("a") as file:
        file.write(MEDDLES)
    return made


def user_cfg(lab: HandLab) -> list[str]:
    """The lines of father's user.cfg about tokens, pools and rights of ours."""
    # Not there before the first change of a lab that is new.
    return [line for line in lab.ask("cat /etc/pve/user.cfg", check=False).splitlines() if "npve-" in line]


def test_a_delete_of_an_id_that_is_somebody_elses_by_now_is_refused_by_the_host(
    hand_lab: HandLab, father: PveHost, fenced: PveHost
) -> None:
    pool = f"npve-{RUN}"
    qemu.create_diskless(fenced.api, father.node, LOW, name="nested-pve-ours", pool=pool)
    # Behind the session's back: ours goes, and somebody's VM gets its id.
    hand_lab.ask(f"qm destroy {LOW} && qm create {LOW} --name nested-pve-theirs --description mine")
    before = hand_lab.configurations()
    for blow in (
        lambda: qemu.destroy(fenced.api, father.node, LOW),
        lambda: qemu.stop(fenced.api, father.node, LOW),
        lambda: fenced.api.put(f"/nodes/{father.node}/qemu/{LOW}/config", tags="nestedpve"),
    ):
        with pytest.raises(PermissionDenied, match=rf"403 Permission check failed \(/vms/{LOW}, VM\."):
            blow()
    assert hand_lab.configurations() == before
    hand_lab.ask(f"qm destroy {LOW}")


def test_what_is_in_the_pool_can_be_made_and_ended_and_nothing_else_is_seen_by_its_token(
    hand_lab: HandLab, father: PveHost, fenced: PveHost
) -> None:
    api, node, pool = fenced.api, father.node, f"npve-{RUN}"
    qemu.create_diskless(api, node, LOW + 1, name="nested-pve-whole", pool=pool)
    api.put(f"/nodes/{node}/qemu/{LOW + 1}/config", tags="nestedpve")
    qemu.configure(api, node, LOW + 1, scsi0="local:1", ide2="local:cloudinit", net0="virtio,bridge=vmbr0")
    qemu.start(api, node, LOW + 1)
    qemu.stop(api, node, LOW + 1)
    qemu.destroy(api, node, LOW + 1)
    acting = json.loads(hand_lab.ask("pveum acl list --output-format json"))
    held = {(line["path"], line["roleid"]) for line in acting if f"!npve-{RUN}-" in line["ugid"]}
    assert held == {
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
    assert project.left() == []


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
            id="the-tokens-go",
        ),
    ],
)
def test_a_session_goes_on_when(project: Project, hand_lab: HandLab, meddle: str, by_pvesh: bool) -> None:
    status = project.run("test_steps.py", "-k", "start_vm", env={"MEDDLE": meddle})
    hand_lab.ask("systemctl start pveproxy")
    assert status == 0, project.output()
    by = {line["transport"] for line in project.audit() if line["event"] == "call"}
    assert ("pvesh" in by) is by_pvesh
    gone = [line for line in project.audit() if line.get("status") == "gone"]
    assert len(gone) == 1
    assert project.left() == []
    # Without HTTPS tokens are asked for, and removed, by pvesh.
    assert [line for line in user_cfg(hand_lab) if not re.match(r"token:root@pam!npve-see-", line)] == []


def test_what_a_killed_session_was_allowed_goes_with_what_it_made(
    project: Project, hand_lab: HandLab
) -> None:
    before = user_cfg(hand_lab)
    process = project.start("test_steps.py", "-k", "start_vm")
    project.wait_for(process, lambda line: line["event"] == "phase_start" and line["phase"] == "start_vm")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(line.startswith("token:root@pam!npve-") and ":1:" in line for line in user_cfg(hand_lab))
    assert project.run("--nested-destroy-only") == 0, project.output()
    assert project.left() == []
    # The killed session's token that sees has minutes to live; nothing else is left of it.
    left = [line for line in user_cfg(hand_lab) if line not in before]
    assert [line for line in left if not re.fullmatch(r"token:root@pam!npve-see-\w+:\d+:0::", line)] == []
    assert len(left) == 1


def test_tokens_that_have_expired_go_with_the_next_session(father: PveHost, hand_lab: HandLab) -> None:
    hand_lab.ask("pveum user token add root@pam npve-see-00000000 --privsep 0 --expire 1000000000")
    hand_lab.ask("pveum user token add root@pam npve-of-somebody --privsep 0 --expire 1000000000")
    father.api.get("/version")
    names = hand_lab.ask("pveum user token list root@pam --output-format json")
    assert "npve-see-00000000" not in names
    assert "npve-of-somebody" in names
    hand_lab.ask("pveum user token remove root@pam npve-of-somebody")
