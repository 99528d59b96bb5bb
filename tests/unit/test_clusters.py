"""Outer hosts in a cluster: a VM is located on its current node, and no other VM is mistaken for it."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from standin_environment import Make, environments
from standin_host import GIB, IMAGE, NESTED, StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.discover import discover
from pytest_nestedpve.ownership.marker import Marker, new_uuid
from pytest_nestedpve.ownership.pool import create_pool, host_clock, pool_name
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve import deadline, qemu
from pytest_nestedpve.pve.cluster import Member, NodeSsh, node_of, read_cluster
from pytest_nestedpve.pve.errors import GuestNotFound, NodeUnreachable, PveError, SshError, UnreadableAnswer
from pytest_nestedpve.pve.ssh.command import CommandResult
from pytest_nestedpve.setup import snapshots, vendor_data, vm
from pytest_nestedpve.setup.preflight import PreflightError, preflight
from pytest_nestedpve.teardown import plan
from pytest_nestedpve.teardown.teardown import teardown


@pytest.fixture
def host(host: StandinHost) -> StandinHost:
    """Two nodes; the connection ends on father."""
    host.join("father2")
    return host


@pytest.fixture
def environment(tmp_path: Path, host: StandinHost) -> Iterator[Make]:
    with environments(host, tmp_path) as make:
        yield make


@pytest.fixture
def env(environment: Make) -> Environment:
    env = environment()
    create_pool(env.outer.api, env.run, env.settings, host_clock(env.outer))
    return env


def create_ours(env: Environment, node: str = "father", *, running: bool = True) -> int:
    host = env.outer.at(node)
    created = create_marked(host, env.run, env.settings)
    qemu.configure(host.api, created.node, created.vmid, scsi0="local:8,format=qcow2", ide2="local:cloudinit")
    snippet = vendor_data.write_snippet(host, "local", env.run.id, "#cloud-config\n")
    qemu.configure(host.api, created.node, created.vmid, cicustom=f"vendor={snippet}")
    if running:
        qemu.start(host.api, created.node, created.vmid)
    facts = {
        "vmid": created.vmid,
        "node": created.node,
        "name": created.name,
        "uuid": created.uuid,
        "mac": "x",
    }
    env.facts["provision"] = facts
    return created.vmid


def check_no_leftovers(host: StandinHost) -> None:
    assert (host.vms(), host.pools()) == ([], {})
    assert {node: host.volumes(node) for node in host.nodes()} == {node: [IMAGE] for node in host.nodes()}


def report_memory(host: StandinHost, node: str, used: int) -> None:
    """Have the cluster report that so many bytes of the node's memory are in use."""
    host.report(node, node={"mem": used})
    host.broadcast()


# -- the cluster's own answers -------------------------------------------------------------------------


def test_the_recorded_two_nodes_are_read() -> None:
    # cluster-018 of the recordings of PVE 9.2, sent to nodeb.
    cluster = read_cluster(
        [
            {"id": "cluster", "name": "lab", "nodes": 2, "quorate": 1, "type": "cluster", "version": 2},
            {"id": "node/nodeb", "ip": "10.77.9.12", "level": "", "local": 1, "name": "nodeb", "nodeid": 2,
             "online": 1, "type": "node"},
            {"id": "node/nodea", "ip": "10.77.9.11", "level": "", "local": 0, "name": "nodea", "nodeid": 1,
             "online": 1, "type": "node"},
        ]
    )  # fmt: skip
    assert (cluster.name, cluster.several, cluster.local.name) == ("lab", True, "nodeb")
    assert cluster.member("nodea") == Member("nodea", True, False, "10.77.9.11")


def test_a_single_host_is_no_cluster() -> None:
    cluster = read_cluster([{"type": "node", "name": "father", "local": 1, "online": 1, "nodeid": 0}])
    assert (cluster.name, cluster.several) == (None, False)


@pytest.mark.parametrize("odd", [None, [], [3], [{"type": "node", "name": "../x", "local": 1}], {}], ids=str)
def test_an_answer_without_a_local_node_is_an_error(odd: object) -> None:
    with pytest.raises(UnreadableAnswer, match="local=1"):
        read_cluster(odd)


def test_ssh_between_nodes_checks_host_keys_and_quotes_the_command(env: Environment) -> None:
    class Recorder:
        def run(self, command: Any, **_: Any) -> Any:
            self.command = command
            return replace(answer, command="")

    answer = env.outer.run(["date", "+%s"])
    recorder = Recorder()
    NodeSsh(recorder, Member("father2", True, False, "10.77.7.12")).run(["rm", "--", "a b; reboot"])
    assert recorder.command[0] == "ssh"
    assert "StrictHostKeyChecking=yes" in recorder.command
    assert "HostKeyAlias=father2" in recorder.command
    assert recorder.command[-2:] == ["root@10.77.7.12", "rm -- 'a b; reboot'"]


def test_a_node_that_refuses_the_login_is_reported_with_the_fix(env: Environment, host: StandinHost) -> None:
    host.set_logins("father2", False)
    with pytest.raises(NodeUnreachable, match=r"father2 \(10.77.7.12\).*pvecm updatecerts"):
        env.outer.at("father2").run(["true"])


def test_an_unknown_node_is_an_error(env: Environment) -> None:
    with pytest.raises(NodeUnreachable, match=r"it has: father, father2\Z"):
        env.outer.at("father3")


# -- migrated VMs --------------------------------------------------------------------------------------


def test_a_migrated_vm_is_proved_on_its_new_node(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env)
    created = ProvisionFacts.read(env.facts["provision"]).vm
    host.migrate(vmid, "father2")
    proof = prove(env.outer.api, env.settings, created, env.run)
    assert (proof.ok, proof.node, proof.gone) == (True, "father2", False)


def test_a_vm_that_migrates_while_it_is_read_is_proved(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env)
    created = ProvisionFacts.read(env.facts["provision"]).vm
    host.before("GET", f"/nodes/father/qemu/{vmid}/status/current", lambda: host.migrate(vmid, "father2"))
    assert prove(env.outer.api, env.settings, created, env.run).ok


def test_only_a_vm_on_no_node_is_gone(env: Environment) -> None:
    vmid = create_ours(env, running=False)
    created = ProvisionFacts.read(env.facts["provision"]).vm
    qemu.destroy(env.outer.api, "father", vmid)
    assert prove(env.outer.api, env.settings, created, env.run).gone


@pytest.mark.parametrize("to", ["father", "father2"])
def test_a_migration_between_provision_and_teardown_causes_no_leftovers(
    env: Environment, host: StandinHost, to: str
) -> None:
    vmid = create_ours(env, "father" if to == "father2" else "father2")
    host.migrate(vmid, to)
    report = teardown(env)
    assert report.left == ()
    assert report.destroyed == (f"VM {vmid}",)
    check_no_leftovers(host)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/nodes/father/qemu/{}/status/current"),
        ("GET", "/nodes/father/qemu/{}/config"),
        ("POST", "/nodes/father/qemu/{}/status/stop"),
        ("DELETE", "/nodes/father/qemu/{}"),
        ("GET", "/nodes/father/tasks"),
        ("GET", "/pools"),
        ("GET", "/cluster/resources"),
        ("GET", "/nodes/father/storage/local/content"),
    ],
)
@pytest.mark.parametrize("running", [True, False])
def test_a_vm_that_migrates_during_its_destruction_is_destroyed(
    env: Environment, host: StandinHost, method: str, path: str, running: bool
) -> None:
    vmid = create_ours(env, running=running)
    host.before(method, path.format(vmid), lambda: host.migrate(vmid, "father2"))
    assert teardown(env).left == ()
    check_no_leftovers(host)


def test_a_vm_that_migrates_back_and_forth_is_destroyed(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env)
    host.before("POST", f"/nodes/father/qemu/{vmid}/status/stop", lambda: host.migrate(vmid, "father2"))
    host.before("POST", f"/nodes/father2/qemu/{vmid}/status/stop", lambda: host.migrate(vmid, "father"))
    assert teardown(env).left == ()
    check_no_leftovers(host)


def test_a_running_migration_is_awaited_and_its_lock_not_removed(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env, running=False)
    host.migrate(vmid, "father2")
    host.edit_vm(vmid, lock="migrate")
    upid = host.add_task("qmigrate", vmid, None)
    events: list[str] = []

    def end_migration() -> None:
        events.append("ended")
        host.edit_task(upid, status="OK", endtime=int(host.now()))

    host.before("DELETE", f"/nodes/father2/qemu/{vmid}", lambda: events.append("destroyed"))
    timer = threading.Timer(1.5, end_migration)
    timer.start()
    assert teardown(env).left == ()
    timer.join()
    assert events == ["ended", "destroyed"]
    check_no_leftovers(host)


def test_phases_use_the_current_node_of_the_vm(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env, running=False)
    env.facts["provision"]["storage"] = "local"
    host.migrate(vmid, "father2")
    host.edit_vm(vmid, cicustom=None)  # its snippet is on a storage of its former node
    assert "started" in vm.start(env, vm.NESTED)["did"]
    assert vm.probe_start(env, vm.NESTED) is not None
    assert env.facts["provision"]["node"] == "father2"
    assert any("moved from father to father2" in remark for remark in env.remarks)
    assert vm.NESTED.host(env).name == "father2"


@pytest.mark.parametrize("how", ["started", "rolled back"])
def test_a_snippet_is_written_again_on_the_node_of_a_migrated_vm(
    env: Environment, host: StandinHost, how: str
) -> None:
    vmid = create_ours(env, running=False)
    snippet = qemu.guest_config(env.outer.api, "father", vmid)["cicustom"].partition("=")[2]
    env.facts["provision"]["snippet"] = snippet
    assert snapshots.take(env, "npve_provision", "")
    host.migrate(vmid, "father2")
    if how == "started":
        assert "started" in vm.start(env, vm.NESTED)["did"]
    else:
        back = f"/nodes/father2/qemu/{vmid}/snapshot/npve_provision/rollback"
        host.fault("POST", back, text=f"volume '{snippet}' does not exist", times=1)
        snapshots.roll_back(env, "npve_provision")
    assert vm.probe_start(env, vm.NESTED) is not None
    assert env.facts["provision"]["node"] == "father2"
    assert [volid for volid in host.volumes("father2") if env.run.id in volid]
    assert teardown(env).left == ()
    check_no_leftovers(host)


def test_a_foreign_vm_with_the_same_id_on_another_node_is_not_touched(
    env: Environment, host: StandinHost
) -> None:
    vmid = create_ours(env, running=False)
    qemu.destroy(env.outer.api, "father", vmid)
    host.create_vm(vmid, "father2", name="foreign", scsi0="local:4")
    before = host.configuration(vmid)
    with pytest.raises(GuestNotFound):
        vm.start(env, vm.NESTED)
    assert env.facts["provision"]["node"] == "father"
    report = teardown(env)
    assert report.left == ()
    assert host.configuration(vmid) == before


# -- foreign objects -----------------------------------------------------------------------------------


def test_a_similar_vm_on_the_other_node_remains(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env)
    name = env.facts["provision"]["name"]
    other = 99998 if vmid != 99998 else 99997
    forged = Marker(env.run.id, vmid, new_uuid()).to_text()
    host.create_vm(other, "father2", name=name, description=forged, scsi0="local:4")
    before = host.configuration(other)
    report = teardown(env)
    assert report.left == ()
    assert [line for line in report.kept if str(other) in line]
    assert host.configuration(other) == before
    assert f"local:{other}/vm-{other}-disk-0.raw" in host.volumes("father2")


def test_an_id_in_use_on_the_other_node_is_not_selected(environment: Make, host: StandinHost) -> None:
    env = environment(vmid_ranges=((99901, 99902),))
    create_pool(env.outer.api, env.run, env.settings, host_clock(env.outer))
    host.create_vm(99901, "father2", name="foreign")
    assert create_marked(env.outer, env.run, env.settings).vmid == 99902


def test_after_a_conflict_on_the_other_node_the_next_id_is_used(environment: Make, host: StandinHost) -> None:
    env = environment(vmid_ranges=((99901, 99902),))
    create_pool(env.outer.api, env.run, env.settings, host_clock(env.outer))
    # Recorded: cluster-029.
    host.fault(
        "POST", "/nodes/father/qemu",
        text="unable to create VM 99901 - VM 99901 already exists on node 'father2'",
    )  # fmt: skip
    created = create_marked(env.outer, env.run, env.settings)
    assert created.node == "father"
    assert prove(env.outer.api, env.settings, created, env.run).ok


def test_a_foreign_volume_on_the_other_node_remains_and_is_reported(
    env: Environment, host: StandinHost
) -> None:
    vmid = create_ours(env)
    orphan = f"local:{vmid}/vm-{vmid}-disk-7.raw"
    host.volume(orphan, node="father2")
    host.migrate(vmid, "father2")
    report = teardown(env)
    assert len(report.left) == 1
    assert orphan in report.left[0]
    assert orphan in host.volumes("father2")


def test_an_unreferenced_volume_of_the_vm_is_deleted(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env, "father2")
    orphan = f"local:{vmid}/vm-{vmid}-disk-7.raw"
    host.volume(orphan, node="father2")
    assert teardown(env).left == ()
    check_no_leftovers(host)


# -- offline nodes ------------------------------------------------------------------------------------


def test_a_vm_on_an_offline_node_is_reported_at_once_as_left_over(
    env: Environment, host: StandinHost
) -> None:
    vmid = create_ours(env, "father2")
    host.set_online("father2", False)
    spent = deadline.Deadline(20)
    report = teardown(env)
    assert not spent.expired, "an offline node is not awaited"
    assert report.destroyed == ()
    assert any(f"VM {vmid} on father2: its node father2 is offline" in line for line in report.left)
    assert any(pool_name(env.settings, env.run) in line for line in report.left)
    host.set_online("father2", True)
    assert teardown(env).left == ()
    check_no_leftovers(host)


def test_the_plan_has_a_vm_on_an_offline_node(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env, "father2")
    host.advance(30 * 86400)
    host.set_online("father2", False)
    rows = plan.plan(env.outer, env.settings)
    assert [(row.vmid, row.verdict, row.is_leftover) for row in rows] == [(vmid, "keep", True)]
    assert "father2 cannot be reached" in rows[0].reason


def test_an_offline_node_does_not_prevent_teardown_on_another(env: Environment, host: StandinHost) -> None:
    create_ours(env)
    host.set_online("father2", False)
    assert teardown(env).left == ()


def test_snippets_that_cannot_be_removed_on_the_other_node_are_reported(
    env: Environment, host: StandinHost
) -> None:
    vmid = create_ours(env, "father2")
    host.set_logins("father2", False)
    report = teardown(env)
    assert report.destroyed == (f"VM {vmid}",)
    assert any("snippet local:snippets/npve-" in line and "father2" in line for line in report.left)


def test_discovery_finds_a_vm_that_migrates_meanwhile(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env)
    # Identified by its marker only:
    host.connect().api.put("/pools", poolid=pool_name(env.settings, env.run), vms=vmid, delete=1)
    host.before("GET", f"/nodes/father/qemu/{vmid}/config", lambda: host.migrate(vmid, "father2"))
    assert [(vm.vmid, vm.node) for vm in discover(env.outer, env.settings, env.run.id)] == [(vmid, "father2")]


def test_the_node_of_a_vm_is_read_from_the_cluster(env: Environment, host: StandinHost) -> None:
    vmid = create_ours(env)
    assert node_of(env.outer.api, vmid) == "father"
    host.migrate(vmid, "father2")
    assert node_of(env.outer.api, vmid) == "father2"
    assert node_of(env.outer.api, 12345) is None


# -- node choice ---------------------------------------------------------------------------------------


def choose(env: Environment) -> tuple[str, str]:
    facts = preflight(env)
    return str(facts["node"]), str(facts["did"])


def test_the_node_with_the_most_free_memory_is_selected_with_its_reason(
    environment: Make, host: StandinHost
) -> None:
    host.join("father3")
    report_memory(host, "father3", 4 * GIB)
    node, did = choose(environment())
    assert node == "father3"
    assert "most free memory of the suitable nodes (60.0 GiB of memory free)" in did
    assert "father: less, 48.0 GiB" in did
    assert "father2: less, 48.0 GiB" in did


def test_among_equal_nodes_the_connected_one_is_selected(environment: Make) -> None:
    assert choose(environment())[0] == "father"


UNSUITABLE: dict[str, tuple[Callable[[StandinHost], object], str]] = {
    "bridge": (
        lambda host: host.bridges("father2", vmbr1="10.88.0.1/24"),
        "bridge: no such bridge; existing: vmbr1",
    ),
    "storage": (lambda host: host.storage("local", nodes="father"), "storage: no such storage"),
    "image": (lambda host: host.remove_volume(IMAGE, "father2"), "image: none"),
    "offline": (lambda host: host.set_online("father2", False), "it is offline"),
    "login": (lambda host: host.set_logins("father2", False), "no login from node to node"),
    "nesting": (lambda host: host.file(NESTED, "father2").write_text("N\n"), "nested virtualisation: N"),
}


@pytest.mark.parametrize("defect", UNSUITABLE)
def test_an_unsuitable_node_is_rejected_with_its_reason(
    environment: Make, host: StandinHost, defect: str
) -> None:
    report_memory(host, "father2", 0)
    change, reason = UNSUITABLE[defect]
    change(host)
    node, did = choose(environment(**{"bridge": "vmbr0"} if defect == "bridge" else {}))
    assert node == "father"
    assert reason in did


def test_a_configured_storage_limits_the_choice_to_its_node(environment: Make, host: StandinHost) -> None:
    host.storage("tank", "zfspool", "images", nodes="father2")
    report_memory(host, "father2", 60 * GIB)
    node, did = choose(environment(storage="tank"))
    assert node == "father2"
    assert "father: storage: it is disabled or not active" in did


def test_if_no_node_is_suitable_the_reason_of_each_is_reported(environment: Make) -> None:
    with pytest.raises(PreflightError) as caught:
        preflight(environment(bridge="vmbr7"))
    assert "father: bridge: no such bridge" in str(caught.value)
    assert "father2: bridge: no such bridge" in str(caught.value)


def test_a_network_without_an_address_of_the_connected_node_is_a_warning(
    environment: Make, host: StandinHost
) -> None:
    host.bridges("father2", vmbr0="10.99.0.1/24")
    report_memory(host, "father2", 0)
    env = environment()
    assert choose(env)[0] == "father2"
    assert any("through whose SSH server every login goes" in remark for remark in env.remarks)


@pytest.mark.parametrize("shared", [True, False])
def test_a_template_on_shared_storage_may_be_cloned_to_another_node(
    environment: Make, host: StandinHost, shared: bool
) -> None:
    host.storage("nas", "nfs", "images", shared=1)
    report_memory(host, "father2", 0)
    env = environment(template="golden")
    api = env.outer.api
    disk = "nas:8,format=qcow2" if shared else "local:8"
    api.post("/nodes/father/qemu", vmid=500, name="golden", scsi0=disk)
    api.post("/nodes/father/qemu/500/template")
    host.broadcast()
    env.facts["preflight"] = preflight(env)
    assert env.facts["preflight"]["node"] == ("father2" if shared else "father")
    public_key = env.run.directory.ensure_key("a run")
    shape = vm.Shape("nas", "vmbr0", 2, 2048, 8, (public_key,), template=500)
    created = vm.provision(env, vm.NESTED, shape)
    assert created["node"] == env.facts["preflight"]["node"]
    assert teardown(env).left == ()


def test_the_vm_and_its_snippet_are_created_on_the_selected_node(
    environment: Make, host: StandinHost
) -> None:
    report_memory(host, "father2", 0)
    env = environment()
    env.facts["preflight"] = resources = preflight(env)
    public_key = env.run.directory.ensure_key("a run")
    shape = vm.Shape(
        resources["storage"], resources["bridge"], 2, 2048, 8, (public_key,),
        image=resources["image"], format=resources["format"], snippets=resources["snippets"],
    )  # fmt: skip
    facts = vm.provision(env, vm.NESTED, shape)
    assert facts["node"] == "father2"
    env.facts["provision"] = dict(facts)
    vm.start(env, vm.NESTED)
    snippet = f"local:snippets/npve-{env.run.id}-vendor.yaml"
    disk = f"local:{facts['vmid']}/vm-{facts['vmid']}-disk-0.qcow2"
    assert {snippet, disk} <= {*host.volumes("father2")}
    assert host.volumes() == [IMAGE]
    assert teardown(env).left == ()
    check_no_leftovers(host)


# -- ssh between nodes, with a shell -------------------------------------------------------------------


class Shell:
    """A login whose commands run in a local shell; its `ssh` is a program that runs its last argument."""

    def __init__(self, folder: Path) -> None:
        self._program = folder / "ssh"
        self.path = f"{folder}:{os.environ['PATH']}"
        self.forward("exec")

    def forward(self, prefix: str) -> None:
        """Let `ssh` run its last argument after the shell text `prefix`."""
        self._program.write_text(f'#!/bin/sh\nfor last; do :; done\n{prefix} sh -c "$last"\n')
        self._program.chmod(0o755)

    def run(self, command: Any, *, stdin: Any = None, **_: Any) -> CommandResult:
        data = stdin.read() if hasattr(stdin, "read") else stdin
        argv = ["sh", "-c", command] if isinstance(command, str) else list(command)
        done = subprocess.run(
            argv, input=data or b"", capture_output=True, check=False, env={**os.environ, "PATH": self.path}
        )
        return CommandResult(str(command), done.returncode, done.stdout, done.stderr, 1.0)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    programs = tmp_path / "programs"
    programs.mkdir()
    return Shell(programs)


@pytest.fixture
def other(shell: Shell) -> NodeSsh:
    return NodeSsh(shell, Member("father2", True, False, "10.77.7.12"))


def test_a_command_for_another_node_keeps_arguments_input_and_exit_status(other: NodeSsh) -> None:
    printed = other.run(["printf", "%s|", "a b", "$HOME", "it's", '"'])
    assert printed.stdout == "a b|$HOME|it's|\"|"
    assert other.run("cat; exit 7", stdin=b"\x00given").stdout_bytes == b"\x00given"
    assert other.run("exit 7").rc == 7
    assert other.run("exit 255").rc == 255


@pytest.mark.parametrize("from_file", [False, True])
def test_a_file_is_written_whole_on_the_other_node_without_leftovers(
    other: NodeSsh, tmp_path: Path, from_file: bool
) -> None:
    content = b"\x00\xff" * 100_000
    source, folder = tmp_path / "image.raw", tmp_path / "a folder's"
    source.write_bytes(content)
    folder.mkdir()
    before = set(Path("/var/tmp").glob(".nestedpve-*"))
    other.put(source if from_file else content, f"{folder}/image.raw", mode=0o644)
    assert [path.name for path in folder.iterdir()] == ["image.raw"]
    assert (folder / "image.raw").read_bytes() == content
    assert (folder / "image.raw").stat().st_mode & 0o777 == 0o644
    assert other.get(f"{folder}/image.raw") == content
    assert set(Path("/var/tmp").glob(".nestedpve-*")) == before


@pytest.mark.parametrize("from_file", [False, True])
def test_a_file_that_cannot_be_written_is_an_error_without_leftovers(
    other: NodeSsh, tmp_path: Path, from_file: bool
) -> None:
    source = tmp_path / "image.raw"
    source.write_bytes(b"x")
    before = set(Path("/var/tmp").glob(".nestedpve-*"))
    with pytest.raises(PveError, match="no such folder"):
        other.put(source if from_file else b"x", f"{tmp_path}/no such folder/image.raw")
    assert set(Path("/var/tmp").glob(".nestedpve-*")) == before


@pytest.mark.parametrize("from_file", [False, True])
def test_an_interrupted_transfer_between_nodes_keeps_the_old_file(
    shell: Shell, other: NodeSsh, tmp_path: Path, from_file: bool
) -> None:
    source, folder = tmp_path / "image.raw", tmp_path / "images"
    source.write_bytes(b"new" * 1000)
    folder.mkdir()
    (folder / "image.raw").write_text("old")
    shell.forward("head -c 1500 |")
    with pytest.raises(PveError, match=r"image\.raw is unchanged: .*expected 3000 bytes, received 1500"):
        other.put(source if from_file else source.read_bytes(), f"{folder}/image.raw")
    assert (folder / "image.raw").read_text() == "old"
    assert [path.name for path in folder.iterdir()] == ["image.raw"]


def test_a_lost_connection_leaves_no_copy_on_the_connected_node(
    shell: Shell, other: NodeSsh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connected node's ssh runs, and no further command after it."""
    source = tmp_path / "image.raw"
    source.write_bytes(b"x" * 100)
    before = set(Path("/var/tmp").glob(".nestedpve-*"))
    commands: list[Any] = []

    def run(command: Any, **_: Any) -> CommandResult:
        commands.append(command)
        raise SshError("the connection was lost")

    monkeypatch.setattr(shell, "run", run)
    with pytest.raises(SshError, match="lost"):
        other.put(source, f"{tmp_path}/copy.raw")
    assert [command[0] for command in commands] == ["ssh"]
    assert set(Path("/var/tmp").glob(".nestedpve-*")) == before


def test_a_file_larger_than_the_limit_is_an_error_and_not_truncated(other: NodeSsh, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(1000))
    with pytest.raises(SshError, match="large on father2: expected at most 999 bytes"):
        other.get(f"{tmp_path}/large", limit=999)
    assert other.get(f"{tmp_path}/large", limit=1000) == bytes(1000)
