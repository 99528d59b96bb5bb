"""Phases against the stand-ins of the lab, by the same commands as on a real host."""

from __future__ import annotations

import base64
import shlex
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from standin_connections import COMMANDS
from standin_support import Answer, Node, _node  # noqa: F401 (a fixture)
from test_standin_guests import IMAGE

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve.answers import read_answer
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.pve.tasks import wait_task
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.setup import address, vm
from pytest_nestedpve.setup.phases import default_phases
from pytest_nestedpve.teardown.teardown import teardown

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEc0000000000000000000000000000000000000000"


class LocalSsh:
    """Runs the node's commands in this process, and answers a few others from its files."""

    def __init__(self, node: Node) -> None:
        self.node = node
        # Stand-ins are separate processes in the lab; here one thread owns their state.
        self.thread = ThreadPoolExecutor(1)

    def run_command(self, *words: str, stdin: str = "") -> Answer:
        return self.thread.submit(lambda: self.node.run(*words, stdin=stdin)).result()

    def run(self, command: Any, *, stdin: bytes | None = None, **_: Any) -> CommandResult:
        words = shlex.split(command) if isinstance(command, str) else list(command)
        text = command if isinstance(command, str) else shlex.join(command)
        while words[0] == "env" or "=" in words[0]:
            words.pop(0)
        if words[0] in COMMANDS:
            answer = self.run_command(*words, stdin=(stdin or b"").decode())
            return CommandResult(text, answer.rc, answer.stdout.encode(), answer.stderr.encode(), 1.0)
        out, rc = "", 0
        match words:
            case ["id", "-u"]:
                out = "0\n"
            case ["date", "+%s"]:
                out = f"{int(time.time())}\n"
            case ["cat", path] if path.startswith("/sys/"):
                out = "Y\n"
            case ["test", "-e", "/dev/kvm"] | ["if", *_]:
                pass
            case ["find", path, *rest]:
                done = subprocess.run(
                    ["find", str(self.node.file(path)), *rest], capture_output=True, text=True, check=False
                )
                out, rc = done.stdout, done.returncode
            case ["cat", "--", path] if self.node.file(path).is_file():
                out = self.node.file(path).read_text()
            case ["mkdir", "-p", path]:
                self.node.file(path).mkdir(parents=True, exist_ok=True)
            case _:
                rc, out = 127, ""
        return CommandResult(text, rc, out.encode(), b"", 1.0)

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        assert isinstance(data, bytes)
        self.node.file(remote).write_bytes(data)
        self.node.file(remote).chmod(mode)

    def get(self, remote: str, limit: int = 1 << 20) -> bytes:
        return self.node.file(remote).read_bytes()[:limit]

    def open_channel(self, host: str, port: int) -> Any:
        raise AssertionError(f"nothing to connect to: {host}:{port}")

    def close(self) -> None:
        self.thread.shutdown()


@pytest.fixture
def env(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Environment]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    node.file("/var/lib/vz/import/debian-13-genericcloud-amd64.raw").write_bytes(IMAGE)
    ssh = LocalSsh(node)
    assert ssh.run_command("pvesm", "set", "local", "--content", "images,import,snippets,iso").rc == 0
    interfaces = node.file("/etc/network/interfaces")
    interfaces.parent.mkdir(exist_ok=True)
    interfaces.write_text("auto vmbr0\niface vmbr0 inet static\n\taddress 10.0.0.1/24\n\tbridge-ports none\n")
    settings = replace(Settings(run_dir=tmp_path / "runs"), storage="local", disk=8, bridge="vmbr0")
    run = Run.create(settings, tmp_path)
    audit = AuditLog(run.directory.audit, run.id)
    environment = Environment(
        settings=settings,
        run=run,
        connect=lambda: PveHost("father", ssh, PveshApi(ssh)),
        audit=audit,
        progress=lambda _: None,
        rootdir=tmp_path,
    )
    yield environment
    environment.close()
    ssh.close()
    audit.close()


def do(env: Environment, *names: str) -> None:
    for phase in default_phases():
        if phase.name in names:
            env.facts[phase.name] = dict(phase.do(env) or {})


def test_a_vm_is_created_started_proved_and_destroyed(env: Environment, node: Node) -> None:
    do(env, "preflight", "provision", "start_vm")
    (snippet,) = node.file("/var/lib/vz/snippets").iterdir()
    assert snippet.stat().st_mode & 0o777 == 0o600, "a URL in it may contain a password"
    facts = env.facts["provision"]
    assert prove(env.outer.api, env.settings, ProvisionFacts.read(facts).vm, env.run).ok
    assert vm.probe_provision(env, vm.NESTED) is not None
    assert vm.probe_start(env, vm.NESTED) is not None
    api = env.outer.api
    config = api.get(f"/nodes/father/qemu/{facts['vmid']}/config")
    assert vm.disk_size(config["scsi0"]) == 8
    assert config["ide2"].startswith("local:")
    assert teardown(env).left == ()
    assert api.get("/nodes/father/qemu") == []
    assert api.get("/pools") == []
    assert api.get("/nodes/father/storage/local/content", content="snippets") == []


def test_a_foreign_vm_in_the_pool_and_a_look_alike_remain(env: Environment) -> None:
    do(env, "preflight", "provision")
    facts, api = env.facts["provision"], env.outer.api
    first, second = [vmid for vmid in (99_900, 99_901, 99_902) if vmid != facts["vmid"]][:2]
    for vmid, pool in ((first, facts["pool"]), (second, None)):
        description = api.get(f"/nodes/father/qemu/{facts['vmid']}/config")["description"]
        options = {"pool": pool} if pool else {}
        wait_task(
            api,
            api.post("/nodes/father/qemu", vmid=vmid, name=facts["name"], description=description, **options),
            timeout=30,
        )
    before = [api.get(f"/nodes/father/qemu/{vmid}/config") for vmid in (first, second)]
    report = teardown(env)
    assert report.destroyed == (f"VM {facts['vmid']}",)
    assert [api.get(f"/nodes/father/qemu/{vmid}/config") for vmid in (first, second)] == before
    assert [line for line in report.left if f"still contains {first}" in line]


def test_the_result_of_the_first_boot_is_read_through_the_agent(env: Environment, node: Node) -> None:
    do(env, "preflight", "provision", "start_vm")
    created = ProvisionFacts.read(env.facts["provision"]).vm
    commands: list[dict[str, Any]] = []

    def agent(execute: str, arguments: dict[str, Any]) -> Any:
        if execute == "guest-exec":
            commands.append(arguments)
            return {"pid": 77}
        if execute == "guest-exec-status":
            output = base64.b64encode(b"status: done\nrecoverable_errors:\nWARNING:\n\t- a deprecated key\n")
            return {"exited": True, "exitcode": 2, "out-data": output.decode()}
        return {}

    node.machines.agents[created.vmid] = agent
    state, warnings = address.wait_cloud_init(env.outer, created, Deadline(30))
    assert (state, warnings) == ("done with warnings", "a deprecated key")
    assert commands[0]["path"] == "/bin/sh"
    assert commands[0]["arg"][0] == "-c"


def test_output_of_a_configuration_change_is_not_its_answer() -> None:
    # Recordings config-022 and config-024 of PVE 9.2.
    assert read_answer("update VM 161: -memory 96\n") is None
    upid = "UPID:father:000011CE:0008B6F1:6B04D45B:qmconfig:161:root@pam:"
    assert read_answer(f'update VM 161: -memory 84\n"{upid}"\n') == upid
