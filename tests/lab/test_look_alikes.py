"""Exactly ours go: VMs that look like a run's, made by `qm` and `pvesh`, stay as they are to the byte."""

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
STRANGER = "0123456789ab"


CLEAR_VMS = (
    "rm -f /etc/pve/lxc/*.conf; for id in $(qm list | awk 'NR > 1 { print $1 }'); do qm destroy $id ||"
    " { qm set $id --protection 0; qm unlock $id; qm stop $id; qm destroy $id; }; done >/dev/null 2>&1; true"
)
CLEAR = (
    f"{CLEAR_VMS}; for pool in $(pvesh get /pools --output-format json | grep -o 'npve-[0-9a-f]*' | sort -u);"
    " do pvesh delete /pools --poolid $pool; done >/dev/null 2>&1; true"
)


def waiting(line: Line) -> bool:
    return line.get("cmd") == "waiting"


@dataclass
class Village:
    """A run's VMs on the lab and those that look like them. `ids`: by what is particular about each."""

    lab: HandLab
    run: str
    own: int
    ids: dict[str, int] = field(default_factory=dict)
    more: list[int] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    _next: int = LOW

    @property
    def name(self) -> str:
        return f"nested-pve-{self.run}"

    def take(self, what: str, vmid: int | None = None) -> int:
        while vmid is None or vmid == self.own:
            vmid, self._next = self._next, self._next + 1
        self.ids[what] = vmid
        return vmid

    def create(self, vmid: int, name: str | None, *words: str) -> None:
        named = ["--name", name] if name else []
        self.commands.append(" ".join(["qm create", str(vmid), "--memory 16", *named, *words]))

    def marked(self, vmid: int, name: str, pool: str, *words: str, as_uuid: str = "", text: str = "") -> None:
        """With a marker that is right, unless `as_uuid` or `text` say otherwise."""
        own = str(uuid.uuid4())
        said = {"v": 1, "run": self.run, "vmid": vmid, "uuid": as_uuid or own, "role": "nested"}
        marker = text or f"nestedpve: {json.dumps(said, separators=(',', ':'))}"
        self.create(vmid, name, f"--smbios1 uuid={own} --pool {pool} --description '{marker}'", *words)

    def build(self) -> None:
        name, pool, ask = self.name, f"npve-{self.run}", self.commands.append
        lease = {
            "v": 1, "owner": "somebody@elsewhere", "client": "0" * 16, "session": "1" * 16, "state": "live",
            "created": 1_700_000_000, "expires": 4_000_000_000, "hard": 4_000_000_000,
        }  # fmt: skip
        ask(f"pvesh create /pools --poolid npve-{STRANGER} --comment '{json.dumps(lease)}'")
        self.create(self.take("the name, outside the range", OUTSIDE), name)
        self.marked(self.take("all but the range", OUTSIDE + 1), name, pool)
        self.create(self.take("in the range, another name"), "web", "--pool", pool)
        self.marked(self.take("all but the name"), "web", pool)
        self.marked(self.take("in another run's pool"), name, f"npve-{STRANGER}")
        self.marked(self.take("a forged marker"), name, pool, text=f"nestedpve: {{run: {self.run}}}")
        self.marked(self.take("another uuid"), name, pool, as_uuid=str(uuid.uuid4()))
        self.marked(self.take("a template"), name, pool)
        ask(f"qm template {self.ids['a template']}")
        self.marked(self.take("protected"), name, pool, "--protection 1")
        self.create(self.take("unnamed"), None)
        self.create(self.take("unnamed, in the pool"), None, "--pool", pool)
        container = self.take("a container")
        ask(f"printf 'hostname: {name}\\nrootfs: local:0\\n' >/etc/pve/lxc/{container}.conf")
        ask(f"qm clone {self.own} {self.take('a clone of ours')} --name {name} --pool {pool} --full 1")
        ask(f"qm snapshot {self.own} before")
        copy = self.take("a clone from a snapshot of ours")
        ask(f"qm clone {self.own} {copy} --name {name} --pool {pool} --snapname before --full 1")
        reused = self.take("an id of ours, used again")
        self.marked(reused, name, pool)
        ask(f"qm destroy {reused}")
        self.create(reused, name, "--pool", pool)
        self.create(self.take("the name alone"), name)
        # Ours as much as the one that the session made.
        for words in ((), ("--lock backup",)):
            vmid = self.take("ours")
            self.ids.pop("ours")
            self.marked(vmid, name, pool, *words)
            self.more.append(vmid)
        ask(f"qm start {self.more[0]}")
        self.make()

    def make(self) -> None:
        """All at once: entering the lab takes longer than most of the commands."""
        self.lab.ask("set -e; " + "; ".join(self.commands))

    def files(self) -> dict[str, str]:
        """What the configurations of all VMs and containers say, in base64, by id."""
        told = self.lab.ask(
            "cd /etc/pve && for f in qemu-server/*.conf lxc/*.conf; do"
            " [ -e $f ] && echo $f $(base64 -w0 $f); done; true"
        )
        return {line.split()[0]: line.split()[1] for line in told.splitlines()}

    def others(self) -> dict[str, str]:
        ours = {f"qemu-server/{vmid}.conf" for vmid in (self.own, *self.more)}
        return {name: data for name, data in self.files().items() if name not in ours}


@dataclass(frozen=True)
class Scene:
    """A session that waits in its test, and the look-alikes of its VM."""

    project: Project
    process: subprocess.Popen[bytes]
    village: Village
    before: dict[str, str]


def begin(lab: HandLab, path: Path, *args: str) -> Scene:
    project = Project(path, lab, LOW, HIGH, path / "state")
    project.write()
    process = project.start("-q", "test_users.py", "-k", "waits and not more", *args)
    project.wait_for(process, waiting)
    (run,) = project.runs()
    own = next(line["facts"]["vmid"] for line in project.audit() if line.get("facts", {}).get("uuid"))
    village = Village(lab, run, own)
    village.build()
    before = village.others()
    assert len(before) == len(village.ids)
    return Scene(project, process, village, before)


def only_ours_are_gone(scene: Scene) -> None:
    """The pool stays with what others have put into it; nothing else of the run does."""
    lab, village = scene.village.lab, scene.village
    assert village.files() == scene.before, scene.project.output()
    listed = lab.ask("qm list; ls -A /var/lib/vz/images").split()
    for vmid in (village.own, *village.more):
        assert str(vmid) not in listed
    for what in ("a clone of ours", "a clone from a snapshot of ours"):
        assert listed.count(str(village.ids[what])) == 2  # the VM and its volumes
    assert lab.ask("ls -A /var/lib/vz/snippets") == ""
    assert scene.project.left_here() == []
    assert "Traceback" not in scene.project.output()


def told(scene: Scene) -> None:
    """What could be ours but for one thing is named with it; so is the pool that cannot go."""
    said, ids = scene.project.output(), scene.village.ids
    for what, reason in (
        ("all but the range", "outside the range"),
        ("all but the name", "does not match the pattern"),
        ("in another run's pool", "not in the pool"),
        ("a template", "it is a template"),
        ("protected", "it is protected"),
    ):
        assert any(str(ids[what]) in line and reason in line for line in said.splitlines()), (what, said)
    assert f"pool npve-{scene.village.run}: it still contains" in said


@pytest.fixture
def lab(hand_lab: HandLab) -> Iterator[HandLab]:
    """The lab, without anybody's VM afterwards."""
    yield hand_lab
    hand_lab.ask(CLEAR)
    assert hand_lab.ask("qm list; ls -A /var/lib/vz/snippets") == ""


def test_the_teardown_of_a_session_takes_exactly_ours(lab: HandLab, tmp_path: Path) -> None:
    scene = begin(lab, tmp_path / "project")
    scene.project.open_gate()
    assert scene.project.end(scene.process) == 1
    only_ours_are_gone(scene)
    told(scene)


def test_destroy_only_takes_exactly_ours(lab: HandLab, tmp_path: Path) -> None:
    scene = begin(lab, tmp_path / "project")
    os.kill(scene.process.pid, signal.SIGKILL)
    scene.project.end(scene.process)
    project = scene.project
    assert project.run("--nested-destroy-only", "--nested-dry-run") == 0
    assert scene.village.others() == scene.before
    assert len(scene.village.files()) == len(scene.before) + 3
    assert project.run("--nested-destroy-only", "-v", "--nested-json", "rows.json") == 1, project.output()
    only_ours_are_gone(scene)
    rows = {row["vmid"]: row for row in json.loads((project.path / "rows.json").read_text())}
    gone = {vmid for vmid, row in rows.items() if row["outcome"] != "kept"}
    assert gone == {scene.village.own, *scene.village.more}
    for what in ("protected", "a template", "a clone of ours", "another uuid", "a forged marker"):
        assert rows[scene.village.ids[what]]["verdict"] == "keep", what

    # The run's pool goes once others have taken theirs out of it.
    lab.ask(CLEAR_VMS)
    assert project.run("--nested-destroy-only", "-q") == 0, project.output()
    assert f"npve-{scene.village.run}" not in lab.ask("pvesh get /pools")


def test_the_context_file_adds_candidates_that_pass_the_same_proof(lab: HandLab, tmp_path: Path) -> None:
    path = tmp_path / "project"
    project = Project(path, lab, LOW, HIGH, path / "state")
    project.write()
    (path / "context.json").write_text(json.dumps({"web_vm_id": OUTSIDE, "discovered_vms": [OUTSIDE + 1]}))
    process = project.start(
        "-q", "test_users.py", "-k", "waits and not more", "--context-file", "context.json"
    )
    project.wait_for(process, waiting)
    village = Village(lab, project.runs()[0], 0)
    village.create(OUTSIDE, "web")
    village.commands.append(f"pvesh create /pools --poolid npve-{STRANGER}")
    village.marked(OUTSIDE + 1, "web", f"npve-{STRANGER}")
    village.make()
    before = village.files()
    project.open_gate()
    assert project.end(process) == 1, project.output()
    said = project.output()
    assert f"VM {OUTSIDE + 1} on father: ours by its marker, but its id is outside the range" in said
    assert f"VM {OUTSIDE} " not in said
    left = {name: text for name, text in before.items() if f"/{OUTSIDE}" in name or f"/{OUTSIDE + 1}" in name}
    assert len(left) == 2
    assert village.files() == left


@pytest.mark.parametrize("how", ["the lease is another's", "everything is gone"])
def test_a_teardown_after_the_lease_was_lost_clears_what_is_ours(
    lab: HandLab, tmp_path: Path, how: str
) -> None:
    project = Project(tmp_path / "project", lab, LOW, HIGH, tmp_path / "project" / "state")
    project.write()
    process = project.start(
        "-q", "test_users.py", "-k", "waits", "-o", "nested_pve_lease=12", env={"FURTHER": "1"}
    )
    project.wait_for(process, waiting)
    (run,) = project.runs()
    (vmid,) = [name.partition(".")[0] for name in project.configurations()]
    if how == "everything is gone":
        lab.ask(f"qm destroy {vmid} && pvesh delete /pools --poolid npve-{run}")
    else:
        lease = json.dumps({**json.loads(lab.comment(run)), "session": "1" * 16})
        lab.ask(f"pvesh set /pools --poolid npve-{run} --comment '{lease}'")
    project.wait_for(process, lambda line: line.get("event") == "lease" and line.get("status") == "lost")
    project.open_gate()
    assert project.end(process) == 1, project.output()
    said = project.output()
    assert "nothing more is created" in said
    assert "1 passed, " in said
    assert "1 error" in said
    assert "left something behind" not in said
    assert "Traceback" not in said
    assert project.left() == [], said
