"""The teardown destroys exactly the run's VMs: similar VMs, created by `qm` and `pvesh`, keep every byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lab.on_lab import HandLab, Line, Project

LOW, HIGH = 97000, 97029
OUTSIDE = 96990
OTHER_RUN = "0123456789ab"


CLEAR_VMS = (
    "rm -f /etc/pve/lxc/*.conf; for id in $(qm list | awk 'NR > 1 { print $1 }'); do qm destroy $id ||"
    " { qm set $id --protection 0; qm unlock $id; qm stop $id; qm destroy $id; }; done >/dev/null 2>&1; true"
)
CLEAR = (
    f"{CLEAR_VMS}; for pool in $(pvesh get /pools --output-format json | grep -o 'npve-[0-9a-f]*' | sort -u);"
    " do pvesh delete /pools --poolid $pool; done >/dev/null 2>&1; true"
)


def is_waiting(line: Line) -> bool:
    return line.get("cmd") == "waiting"


@dataclass
class LookAlikes:
    """A run's VMs on the lab and VMs similar to them. `ids`: of the similar ones, by their difference."""

    lab: HandLab
    run: str
    own: int
    ids: dict[str, int] = field(default_factory=dict)
    further: list[int] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    _next: int = LOW

    @property
    def name(self) -> str:
        return f"nested-pve-{self.run}"

    def reserve(self, what: str, vmid: int | None = None) -> int:
        while vmid is None or vmid == self.own:
            vmid, self._next = self._next, self._next + 1
        self.ids[what] = vmid
        return vmid

    def create(self, vmid: int, name: str | None, *words: str) -> None:
        name_option = ["--name", name] if name else []
        self.commands.append(" ".join(["qm create", str(vmid), "--memory 16", *name_option, *words]))

    def create_marked(
        self, vmid: int, name: str, pool: str, *words: str, as_uuid: str = "", text: str = ""
    ) -> None:
        """Add a VM with a valid marker, or with the uuid `as_uuid` or the text `text` in the marker."""
        own = str(uuid.uuid4())
        fields = {"v": 1, "run": self.run, "vmid": vmid, "uuid": as_uuid or own, "role": "nested"}
        marker = text or f"nestedpve: {json.dumps(fields, separators=(',', ':'))}"
        self.create(vmid, name, f"--smbios1 uuid={own} --pool {pool} --description '{marker}'", *words)

    def build(self) -> None:
        name, pool, add = self.name, f"npve-{self.run}", self.commands.append
        lease = {
            "v": 1, "owner": "somebody@elsewhere", "client": "0" * 16, "session": "1" * 16, "state": "live",
            "created": 1_700_000_000, "expires": 4_000_000_000, "hard": 4_000_000_000,
        }  # fmt: skip
        add(f"pvesh create /pools --poolid npve-{OTHER_RUN} --comment '{json.dumps(lease)}'")
        self.create(self.reserve("the name, outside the range", OUTSIDE), name)
        self.create_marked(self.reserve("all but the range", OUTSIDE + 1), name, pool)
        self.create(self.reserve("in the range, another name"), "web", "--pool", pool)
        self.create_marked(self.reserve("all but the name"), "web", pool)
        self.create_marked(self.reserve("in another run's pool"), name, f"npve-{OTHER_RUN}")
        self.create_marked(
            self.reserve("a forged marker"), name, pool, text=f"nestedpve: {{run: {self.run}}}"
        )
        self.create_marked(self.reserve("another uuid"), name, pool, as_uuid=str(uuid.uuid4()))
        self.create_marked(self.reserve("a template"), name, pool)
        add(f"qm template {self.ids['a template']}")
        self.create_marked(self.reserve("protected"), name, pool, "--protection 1")
        self.create(self.reserve("unnamed"), None)
        self.create(self.reserve("unnamed, in the pool"), None, "--pool", pool)
        container = self.reserve("a container")
        add(f"printf 'hostname: {name}\\nrootfs: local:0\\n' >/etc/pve/lxc/{container}.conf")
        add(f"qm clone {self.own} {self.reserve('a clone of ours')} --name {name} --pool {pool} --full 1")
        add(f"qm snapshot {self.own} before")
        copy = self.reserve("a clone from a snapshot of ours")
        add(f"qm clone {self.own} {copy} --name {name} --pool {pool} --snapname before --full 1")
        reused = self.reserve("an id of ours, used again")
        self.create_marked(reused, name, pool)
        add(f"qm destroy {reused}")
        self.create(reused, name, "--pool", pool)
        self.create(self.reserve("the name alone"), name)
        # Further VMs of the run.
        for words in ((), ("--lock backup",)):
            vmid = self.reserve("ours")
            self.ids.pop("ours")
            self.create_marked(vmid, name, pool, *words)
            self.further.append(vmid)
        add(f"qm start {self.further[0]}")
        self.run_commands()

    def run_commands(self) -> None:
        """Run all commands at once: entering the lab takes longer than most of them."""
        self.lab.run("set -e; " + "; ".join(self.commands))

    def files(self) -> dict[str, str]:
        """The configuration files of all VMs and containers, in base64, by path."""
        output = self.lab.run(
            "cd /etc/pve && for f in qemu-server/*.conf lxc/*.conf; do"
            " [ -e $f ] && echo $f $(base64 -w0 $f); done; true"
        )
        return {line.split()[0]: line.split()[1] for line in output.splitlines()}

    def others(self) -> dict[str, str]:
        ours = {f"qemu-server/{vmid}.conf" for vmid in (self.own, *self.further)}
        return {name: data for name, data in self.files().items() if name not in ours}


@dataclass(frozen=True)
class WaitingSession:
    """A session that waits in its test, and the look-alikes of its VM."""

    project: Project
    process: subprocess.Popen[bytes]
    look_alikes: LookAlikes
    before: dict[str, str]


def begin(lab: HandLab, path: Path, *args: str) -> WaitingSession:
    project = Project(path, lab, LOW, HIGH, path / "state")
    project.create()
    process = project.start("-q", "test_users.py", "-k", "waits and not more", *args)
    project.wait_for_line(process, is_waiting)
    (run,) = project.runs()
    own = next(line["facts"]["vmid"] for line in project.audit() if line.get("facts", {}).get("uuid"))
    look_alikes = LookAlikes(lab, run, own)
    look_alikes.build()
    before = look_alikes.others()
    assert len(before) == len(look_alikes.ids)
    return WaitingSession(project, process, look_alikes, before)


def assert_only_ours_are_destroyed(session: WaitingSession) -> None:
    """All other VMs and the pool that contains some of them remain; everything else of the run is removed."""
    lab, look_alikes = session.look_alikes.lab, session.look_alikes
    assert look_alikes.files() == session.before, session.project.output()
    listed = lab.run("qm list; ls -A /var/lib/vz/images").split()
    for vmid in (look_alikes.own, *look_alikes.further):
        assert str(vmid) not in listed
    for what in ("a clone of ours", "a clone from a snapshot of ours"):
        assert listed.count(str(look_alikes.ids[what])) == 2  # the VM and its volumes
    assert lab.run("ls -A /var/lib/vz/snippets") == ""
    assert session.project.local_leftovers() == []
    assert "Traceback" not in session.project.output()


def assert_kept_vms_are_reported(session: WaitingSession) -> None:
    """The output names each VM that differs in one property, with the property, and the pool that is kept."""
    output, ids = session.project.output(), session.look_alikes.ids
    for what, reason in (
        ("all but the range", "outside the range"),
        ("all but the name", "does not match the pattern"),
        ("in another run's pool", "not in the pool"),
        ("a template", "it is a template"),
        ("protected", "it is protected"),
    ):
        assert any(str(ids[what]) in line and reason in line for line in output.splitlines()), (what, output)
    assert f"pool npve-{session.look_alikes.run}: it still contains" in output


@pytest.fixture
def lab(hand_lab: HandLab) -> Iterator[HandLab]:
    """The lab; all VMs are destroyed afterwards."""
    yield hand_lab
    hand_lab.run(CLEAR)
    assert hand_lab.run("qm list; ls -A /var/lib/vz/snippets") == ""


def test_the_teardown_of_a_session_destroys_exactly_ours(lab: HandLab, tmp_path: Path) -> None:
    session = begin(lab, tmp_path / "project")
    session.project.open_gate()
    assert session.project.wait_for_exit(session.process) == 1
    assert_only_ours_are_destroyed(session)
    assert_kept_vms_are_reported(session)


def test_destroy_only_destroys_exactly_ours(lab: HandLab, tmp_path: Path) -> None:
    session = begin(lab, tmp_path / "project")
    os.kill(session.process.pid, signal.SIGKILL)
    session.project.wait_for_exit(session.process)
    project = session.project
    assert project.run("--nested-destroy-only", "--nested-dry-run") == 0
    assert session.look_alikes.others() == session.before
    assert len(session.look_alikes.files()) == len(session.before) + 3
    assert project.run("--nested-destroy-only", "-v", "--nested-json", "rows.json") == 1, project.output()
    assert_only_ours_are_destroyed(session)
    rows = {row["vmid"]: row for row in json.loads((project.path / "rows.json").read_text())}
    destroyed = {vmid for vmid, row in rows.items() if row["outcome"] != "kept"}
    assert destroyed == {session.look_alikes.own, *session.look_alikes.further}
    for what in ("protected", "a template", "a clone of ours", "another uuid", "a forged marker"):
        assert rows[session.look_alikes.ids[what]]["verdict"] == "keep", what

    # The run's pool is deleted once the foreign VMs in it are destroyed.
    lab.run(CLEAR_VMS)
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()
    assert f"npve-{session.look_alikes.run}" not in lab.run("pvesh get /pools")


def test_the_context_file_adds_candidates_that_pass_the_same_proof(lab: HandLab, tmp_path: Path) -> None:
    path = tmp_path / "project"
    project = Project(path, lab, LOW, HIGH, path / "state")
    project.create()
    (path / "context.json").write_text(json.dumps({"web_vm_id": OUTSIDE, "discovered_vms": [OUTSIDE + 1]}))
    process = project.start(
        "-q", "test_users.py", "-k", "waits and not more", "--context-file", "context.json"
    )
    project.wait_for_line(process, is_waiting)
    look_alikes = LookAlikes(lab, project.runs()[0], 0)
    look_alikes.create(OUTSIDE, "web")
    look_alikes.commands.append(f"pvesh create /pools --poolid npve-{OTHER_RUN}")
    look_alikes.create_marked(OUTSIDE + 1, "web", f"npve-{OTHER_RUN}")
    look_alikes.run_commands()
    before = look_alikes.files()
    project.open_gate()
    assert project.wait_for_exit(process) == 1, project.output()
    output = project.output()
    assert f"VM {OUTSIDE + 1} on father: ours by its marker, but its id is outside the range" in output
    assert f"VM {OUTSIDE} " not in output
    remaining = {
        name: text for name, text in before.items() if f"/{OUTSIDE}" in name or f"/{OUTSIDE + 1}" in name
    }
    assert len(remaining) == 2
    assert look_alikes.files() == remaining


@pytest.mark.parametrize("how", ["the lease is another session's", "the VM is destroyed"])
def test_a_teardown_after_the_lease_was_lost_removes_everything_of_the_run(
    lab: HandLab, tmp_path: Path, how: str
) -> None:
    project = Project(tmp_path / "project", lab, LOW, HIGH, tmp_path / "project" / "state")
    project.create()
    process = project.start(
        "-q", "test_users.py", "-k", "waits", "-o", "nested_pve_lease=12", env={"FURTHER": "1"}
    )
    project.wait_for_line(process, is_waiting)
    (run,) = project.runs()
    (vmid,) = [name.partition(".")[0] for name in project.configurations()]
    if how == "the VM is destroyed":
        lab.run(f"qm destroy {vmid} && pvesh delete /pools --poolid npve-{run}")
    else:
        lease = json.dumps({**json.loads(lab.comment(run)), "session": "1" * 16})
        lab.run(f"pvesh set /pools --poolid npve-{run} --comment '{lease}'")
    project.wait_for_line(process, lambda line: line.get("event") == "lease" and line.get("status") == "lost")
    project.open_gate()
    assert project.wait_for_exit(process) == 1, project.output()
    output = project.output()
    assert "nothing more is created" in output
    assert "1 passed, " in output
    assert "1 error" in output
    assert "left something behind" not in output
    assert "Traceback" not in output
    assert project.leftovers() == [], output
