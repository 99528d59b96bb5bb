"""A cluster of two stand-in nodes: calls for the other node, migrations, an offline node."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from standin_machines import FakeMachines
from standin_support import Node, fake_machines, make_root

from pytest_nestedpve.lab.node.api import access, forward, tree
from pytest_nestedpve.lab.node.api.errors import PveFailure
from pytest_nestedpve.lab.node.state import cluster_fs, guests, members

DATA = Path(__file__).parents[1] / "data" / "cluster-recorded.jsonl"
ADDRESSES = {"nodea": "10.77.9.11", "nodeb": "10.77.9.12"}
_REFUSED = "ssh: connect to host {} port 22: Connection refused\n"


@dataclass
class Pair:
    """Two nodes with one cluster directory. The nodes' SSH is a call in this process."""

    nodes: dict[str, Node]
    locks: dict[str, IO[str]]
    patch: pytest.MonkeyPatch

    def on(self, name: str) -> Node:
        """Select the node for the next commands."""
        node = self.nodes[name]
        self.patch.setenv("NESTEDPVE_NODE_ROOT", str(node.root))
        self.patch.setenv("NESTEDPVE_NODE_NAME", name)
        fake_machines(node.machines, self.patch)
        return node

    def off(self, name: str) -> None:
        self.locks.pop(name).close()

    def ssh(self, argv: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        """A replacement of `subprocess.run`: SSH between nodes is a call in this process."""
        aliases = [word.partition("=")[2] for word in argv if word.startswith("-oHostKeyAlias=")]
        if not aliases:
            return _run(argv, **options)
        (name,) = aliases
        before = os.environ["NESTEDPVE_NODE_NAME"]
        if name not in self.locks:
            return subprocess.CompletedProcess(argv, 255, "", _REFUSED.format(ADDRESSES[name]))
        words = shlex.split(argv[-1])
        if words[0] not in ("pvesh", "pvesm"):
            translated = argv[-1].replace(str(self.nodes[before].root), str(self.nodes[name].root))
            return _run(["sh", "-c", translated], **options)
        try:
            answer = self.on(name).run(*words)
        finally:
            self.on(before)
        return subprocess.CompletedProcess(argv, answer.rc, answer.stdout, answer.stderr)


_run = subprocess.run


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    cluster = tmp_path / "cluster"
    (cluster / "fs").mkdir(parents=True)
    (cluster / "online").mkdir()
    (cluster / "fs/corosync.conf").write_text(members.config("lab", ADDRESSES))
    pair = Pair({}, {}, monkeypatch)
    for name in ADDRESSES:
        root = make_root(tmp_path / name)
        (root / "var/lib/pve-cluster").symlink_to(cluster)
        pair.nodes[name] = Node(root, FakeMachines(root / "machines"))
        pair.locks[name] = (cluster / "online" / name).open("w")
        fcntl.flock(pair.locks[name], fcntl.LOCK_EX)
    for name in ("LC_ALL", "LANG"):
        monkeypatch.setenv(name, "en_US.UTF-8")
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr(subprocess, "run", pair.ssh)
    pair.on("nodea")
    yield pair
    for lock in pair.locks.values():
        lock.close()


def normalized(text: str) -> str:
    """The text with placeholders for values that differ between runs."""
    text = re.sub(r"UPID:(\w+)(:[0-9A-F]{8}){3}", r"UPID:\1:PID:START:TIME", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|\d\d:\d\d:\d\d", "TIME", text)
    return re.sub(r"(?m)^Date: .*|^Ring ID: .*", "", text)


def test_two_nodes_answer_as_recorded(pair: Pair) -> None:
    differences = []
    for line in DATA.read_text().splitlines()[1:]:
        recorded = json.loads(line)
        node = pair.on(recorded["on"])
        if "off" in recorded:
            pair.off(recorded["on"])
        elif "do" in recorded:
            answer = node.run(*shlex.split(recorded["do"]))
            assert answer.rc == 0, answer
        else:
            answer = node.run(*shlex.split(recorded["cmd"]))
            expected = recorded["rc"], normalized(recorded["stdout"]), normalized(recorded["stderr"])
            actual = answer.rc, normalized(answer.stdout), normalized(answer.stderr)
            if actual != expected:
                differences.append(f"{recorded['id']} {recorded['cmd']}\n  want {expected}\n  got  {actual}")
    assert not differences, "\n".join(differences)


def answer_of(node: Node, *words: str) -> list[dict[str, Any]]:
    return list(json.loads(node.ok("pvesh", "get", *words, "--output-format", "json")))


def test_a_stopped_vm_is_migrated_with_its_local_disk_and_without_leftovers(pair: Pair) -> None:
    first = pair.on("nodea")
    first.ok("qm", "create", "100", "--scsi0", "local:1,format=qcow2", "--name", "moves")
    first.ok("qm", "snapshot", "100", "before")
    disk = "/var/lib/vz/images/100/vm-100-disk-0.qcow2"
    folder = first.file("/var/lib/vz/images/100/.vm-100-disk-0.qcow2.d/upper/etc")
    folder.mkdir()
    (folder / "hostname").write_text("moves\n")
    log = first.run("qm", "migrate", "100", "nodeb").stdout
    # All lines but those of the progress of the copy [cluster-060].
    for line in (
        "starting migration of VM 100 to node 'nodeb' (10.77.9.12)",
        "found local disk 'local:100/vm-100-disk-0.qcow2' (attached)",
        "copying local disk images",
        "volume 'local:100/vm-100-disk-0.qcow2' is 'local:100/vm-100-disk-0.qcow2' on the target",
        "migration finished successfully (duration 00:00:0",
    ):
        assert line in log
    assert not list(first.file("/var/lib/vz/images").iterdir())
    assert not first.file("/var/lib/pve-cluster/fs/nodes/nodea/qemu-server/100.conf").exists()
    second = pair.on("nodeb")
    assert second.file(disk).exists()
    copied = second.file("/var/lib/vz/images/100/.vm-100-disk-0.qcow2.d/upper/etc/hostname")
    assert copied.read_text() == "moves\n"
    assert "lock" not in second.ok("qm", "config", "100")
    assert "before" in second.ok("qm", "listsnapshot", "100")
    second.ok("qm", "destroy", "100")
    assert not list(second.file("/var/lib/vz/images").iterdir())


def test_a_migration_to_an_offline_node_does_not_change_the_vm(pair: Pair) -> None:
    first = pair.on("nodea")
    first.ok("qm", "create", "100", "--scsi0", "local:1")
    pair.off("nodeb")
    answer = first.run("qm", "migrate", "100", "nodeb")
    assert (answer.rc, answer.stderr) == (255, "migration aborted\n")
    assert "Connection refused" in answer.stdout
    assert "lock" not in first.ok("qm", "config", "100")
    assert first.file("/var/lib/vz/images/100/vm-100-disk-0.raw").exists()


def test_a_failed_migration_removes_its_copies_and_no_foreign_file(pair: Pair) -> None:
    first = pair.on("nodea")
    first.ok("qm", "create", "100", "--scsi0", "local:1", "--scsi1", "local:1")
    foreign = pair.nodes["nodeb"].file("/var/lib/vz/images/100/vm-100-disk-1.raw")
    foreign.parent.mkdir(parents=True)
    foreign.write_text("foreign")
    answer = first.run("qm", "migrate", "100", "nodeb")
    assert (answer.rc, answer.stderr) == (255, "migration aborted\n")
    assert "lock" not in first.ok("qm", "config", "100")
    assert foreign.read_text() == "foreign"
    assert not foreign.with_name("vm-100-disk-0.raw").exists()
    assert first.file("/var/lib/vz/images/100/vm-100-disk-0.raw").exists()


def test_a_vm_is_on_exactly_one_node_at_any_moment_of_a_migration(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, seen = pair.on("nodea"), pair.nodes["nodea"].file("/seen")
    first.ok("qm", "create", "100")

    def observed(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*arguments: Any) -> None:
            change(*arguments)
            files = list(cluster_fs.fs().glob("nodes/*/qemu-server/100.conf"))
            with seen.open("a") as out:
                out.write(f"{len(files)}{len(guests.everywhere())} ")

        return changed

    for name in ("show", "hide"):
        monkeypatch.setattr(cluster_fs, name, observed(getattr(cluster_fs, name)))
    first.ok("qm", "migrate", "100", "nodeb")
    assert set(seen.read_text().split()) <= {"11", "21"}
    assert len(list(cluster_fs.fs().glob("nodes/*/qemu-server/100.conf"))) == 1


def test_a_linked_clone_on_local_storage_is_not_migrated(pair: Pair) -> None:
    first = pair.on("nodea")
    first.ok("qm", "create", "100", "--scsi0", "local:1,format=qcow2")
    first.ok("qm", "template", "100")
    first.ok("qm", "clone", "100", "101")
    answer = first.run("qm", "migrate", "101", "nodeb")
    assert answer.rc == 255
    assert "as it's a clone of" in answer.stdout
    refused = first.run("qm", "clone", "100", "102", "--target", "nodeb")
    assert refused.stderr == "can't clone VM to node 'nodeb' (VM uses local storage)\n"


def test_on_shared_storage_a_vm_is_migrated_without_a_copy_and_cloned_to_the_other_node(
    pair: Pair, tmp_path: Path
) -> None:
    (tmp_path / "shared").mkdir()
    for node in pair.nodes.values():
        node.file("/mnt").mkdir()
        node.file("/mnt/shared").symlink_to(tmp_path / "shared")
    first = pair.on("nodea")
    first.ok("pvesm", "add", "dir", "common", "--path", "/mnt/shared", "--shared", "1", "--content", "images")
    first.ok("qm", "create", "100", "--scsi0", "common:1,format=qcow2")
    first.ok("qm", "clone", "100", "101", "--target", "nodeb")
    assert "local disk" not in first.ok("qm", "migrate", "100", "nodeb")
    second = pair.on("nodeb")
    assert [line.split()[0] for line in second.ok("qm", "list").splitlines()[1:]] == ["100", "101"]
    assert (tmp_path / "shared/images/100/vm-100-disk-0.qcow2").exists()


def test_a_storage_of_some_nodes_is_disabled_on_the_others(pair: Pair) -> None:
    first = pair.on("nodea")
    first.ok("pvesm", "set", "local", "--nodes", "nodea", "--content", "images")
    rows = answer_of(first, "/nodes/nodeb/storage")
    assert [(row["enabled"], row["active"]) for row in rows] == [(0, 0)]
    answer = pair.on("nodeb").run("qm", "create", "100", "--scsi0", "local:1")
    assert "storage 'local' is not available on node 'nodeb'" in answer.stderr


def test_an_offline_node_is_listed_with_its_guests_and_without_measured_values(pair: Pair) -> None:
    second = pair.on("nodeb")
    second.ok("qm", "create", "100", "--name", "there", "--memory", "64")
    second.tick()
    pair.off("nodeb")
    first = pair.on("nodea")
    (guest,) = json.loads(
        first.ok("pvesh", "get", "/cluster/resources", "--type", "vm", "--output-format", "json")
    )
    assert (guest["name"], guest["node"], guest["status"]) == ("there", "nodeb", "stopped")
    nodes = {row["node"]: row for row in answer_of(first, "/nodes")}
    assert nodes["nodea"]["status"] == "online"
    assert "mem" in nodes["nodea"]
    # nodedown-004
    known = {"id", "level", "maxcpu", "maxdisk", "maxmem", "node", "status", "type"}
    assert (nodes["nodeb"]["status"], set(nodes["nodeb"])) == ("offline", known)
    assert first.run("qm", "create", "100").stderr.endswith("VM 100 already exists on node 'nodeb'\n")


def test_the_memory_of_running_guests_counts_as_used(pair: Pair) -> None:
    def used(name: str) -> int:
        pair.on(name).tick()
        rows = answer_of(pair.on("nodea"), "/nodes")
        return next(int(row["mem"]) for row in rows if row["node"] == name)

    before = used("nodeb")
    second = pair.on("nodeb")
    second.ok("qm", "create", "100", "--memory", "2048", "--kvm", "0")
    second.ok("qm", "start", "100")
    assert used("nodeb") - before > 1 << 30
    assert used("nodea") < used("nodeb")
    answer = json.loads(second.ok("pvesh", "get", "/nodes/nodeb/status", "--output-format", "json"))
    assert answer["memory"]["used"] - before > 1 << 30


def test_a_task_is_listed_on_its_node_alone(pair: Pair) -> None:
    first = pair.on("nodea")
    upid = first.ok("pvesh", "create", "/nodes/nodeb/qemu", "--vmid", "100").strip()
    assert upid.startswith("UPID:nodeb:")
    listed = answer_of(first, "/nodes/nodea/tasks")
    assert [row["upid"] for row in listed] == []
    (row,) = answer_of(first, "/nodes/nodeb/tasks")
    assert row["upid"] == upid
    assert "no such task" in first.run("pvesh", "get", f"/nodes/nodea/tasks/{upid}/status").stderr
    (row,) = answer_of(first, "/cluster/tasks")
    assert row["node"] == "nodeb"


def test_a_call_over_https_for_an_unreachable_node_is_595(pair: Pair) -> None:
    authority = pair.nodes["nodea"].file("/var/lib/pve-cluster/fs/pve-root-ca.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ed25519",
        "-nodes",
        "-subj",
        "/CN=ca",
        "-keyout",
        "/dev/null",
    ]
    _run([*command, "-out", str(authority)], check=True, capture_output=True)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        member = members.Member("nodeb", 2, "127.0.0.1")
        with pytest.raises(PveFailure) as refused:
            forward.by_https(member, unused.getsockname()[1], "GET", "/api2/json/nodes/nodeb/qemu", [], b"")
    assert (refused.value.status, refused.value.text) == (595, "Connection refused")


def test_a_call_for_another_node_is_never_answered_by_this_one(pair: Pair) -> None:
    del pair
    with pytest.raises(PveFailure, match="not supported by the lab"):
        tree.call("GET", "/nodes/nodeb/qemu", {}, access.ROOT)
