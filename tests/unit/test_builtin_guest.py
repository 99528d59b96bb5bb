"""Creation of the VM: its proof from the first moment, its options, its first boot, and its address."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from memory_host import MemoryHost
from standin_environment import Make, environments

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.ownership.marker import parse_marker
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve import agent, deadline
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import HostKeyMismatch, HostUnreachable, LoginRefused, PveError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.setup import vendor_data, vm
from pytest_nestedpve.setup.address import ForeignAddress, await_login, check_address, wait_ip
from pytest_nestedpve.setup.phases import default_phases
from pytest_nestedpve.teardown.teardown import teardown

MAC = "bc:24:11:00:00:01"


@pytest.fixture
def make(tmp_path: Path, host: MemoryHost) -> Iterator[Make]:
    with environments(host, tmp_path) as create:
        yield create


def do(env: Environment, *names: str) -> None:
    for phase in default_phases():
        if phase.name in names:
            env.facts[phase.name] = dict(phase.do(env) or {})


def config(host: MemoryHost, vmid: int) -> dict[str, Any]:
    answer = host.connect().api.get(f"/nodes/father/qemu/{vmid}/config")
    assert isinstance(answer, dict)
    return answer


def test_the_vm_is_proved_the_runs_own_and_has_the_requested_options(make: Make, host: MemoryHost) -> None:
    env = make(memory=4096, cores=3)
    do(env, "preflight", "provision")
    facts = env.facts["provision"]
    assert prove(env.outer.api, env.settings, ProvisionFacts.read(facts).vm, env.run).ok
    vm_config = config(host, facts["vmid"])
    assert vm_config["name"] == facts["name"] == f"nested-pve-{env.run.id}"
    assert str(vm_config["memory"]) == "4096"
    assert str(vm_config["cores"]) == "3"
    assert vm_config["cpu"] == "host"
    assert "firewall=0" in vm_config["net0"]
    assert "bridge=vmbr0" in vm_config["net0"]
    assert facts["mac"] in vm_config["net0"].lower()
    assert vm.disk_size(vm_config["scsi0"]) == 64
    assert "qcow2" in vm_config["scsi0"]
    assert str(vm_config["ciupgrade"]) == "0"
    assert vm_config["cicustom"] == f"vendor=local:snippets/npve-{env.run.id}-vendor.yaml"
    assert unquote(vm_config["sshkeys"]).split()[:2] == env.run.directory.ensure_key("").split()[:2]
    assert vm_config["tags"] == f"nestedpve;{env.run.tag}"


def test_the_pool_is_created_first_and_the_vm_without_a_disk(make: Make, host: MemoryHost) -> None:
    do(make(), "preflight", "provision")
    with host.open() as model:
        changes = [call for call in model.state["commands"] if not call.startswith("GET ")]
    assert changes[0].startswith("POST /pools")
    create = changes[1].split()
    assert create[:2] == ["POST", "/nodes/father/qemu"]
    assert "pool" in create
    assert "description" in create
    assert not [word for word in create if word.startswith(("scsi0", "ide", "virtio"))]


def test_without_kvm_the_cpu_is_max_and_options_override_all(make: Make, host: MemoryHost) -> None:
    env = make(vm_options={"kvm": "0", "machine": "q35"})
    do(env, "preflight", "provision")
    vm_config = config(host, env.facts["provision"]["vmid"])
    assert vm_config["cpu"] == "max"
    assert str(vm_config["kvm"]) == "0"
    assert vm_config["machine"] == "q35"


def test_the_probe_of_provision_fails_until_the_disk_exists(make: Make) -> None:
    env = make()
    assert vm.probe_provision(env, vm.NESTED) is None
    do(env, "preflight", "provision")
    assert vm.probe_provision(env, vm.NESTED) is not None
    facts = env.facts["provision"]
    env.outer.api.put(f"/nodes/father/qemu/{facts['vmid']}/config", delete="scsi0")
    assert vm.probe_provision(env, vm.NESTED) is None


def test_starting_twice_is_no_error_and_the_probe_reports_the_vm_as_running(make: Make) -> None:
    env = make()
    do(env, "preflight", "provision")
    assert vm.probe_start(env, vm.NESTED) is None
    do(env, "start_vm")
    assert vm.probe_start(env, vm.NESTED) is not None
    do(env, "start_vm")


@pytest.mark.parametrize("running", [True, False], ids=["silent", "stopped"])
@pytest.mark.parametrize("serial", [True, False], ids=["serial", "no serial"])
def test_the_error_about_a_silent_agent_names_the_consoles_of_the_vm(
    make: Make, monkeypatch: pytest.MonkeyPatch, running: bool, serial: bool
) -> None:
    monkeypatch.setattr(agent, "ping", lambda *_: False)
    monkeypatch.setattr(deadline, "_scale", 0.02)
    env = make(vm_options={} if serial else {"serial0": "/dev/ttyS7"})
    do(env, "preflight", "provision", *(["start_vm"] if running else []))
    with pytest.raises(PveError) as caught:
        wait_ip(env, vm.NESTED, 10.0)
    vmid = env.facts["provision"]["vmid"]
    assert ("Has the image an agent" if running else "stopped while") in str(caught.value)
    assert (f"`qm terminal {vmid}` on father" in str(caught.value)) is serial
    assert f"console of VM {vmid} in the web interface of father" in str(caught.value)


def test_the_teardown_destroys_the_vm_of_a_failed_import(make: Make, host: MemoryHost) -> None:
    env = make()
    do(env, "preflight")
    host.fault("POST", r"/nodes/father/qemu/\d+/config", text="no space left on device")
    with pytest.raises(Exception, match="no space left"):
        do(env, "provision")
    assert teardown(env).left == ()
    with host.open() as model:
        assert model.state["vms"] == {}
        assert model.state["pools"] == {}
        assert not [path for path in model.state["files"] if "npve-" in path]


def test_a_clone_of_a_template_is_the_runs_own_by_marker_and_uuid(make: Make, host: MemoryHost) -> None:
    api = host.connect().api
    api.post("/nodes/father/qemu", vmid=9000, name="golden", description="theirs", tags="gold")
    api.post("/nodes/father/qemu/9000/config", scsi0="local:8", net0="virtio,bridge=vmbr9")
    api.post("/nodes/father/qemu/9000/template")
    before = host.configuration(9000)
    env = make(template="golden")
    do(env, "preflight", "provision")
    facts = env.facts["provision"]
    assert prove(env.outer.api, env.settings, ProvisionFacts.read(facts).vm, env.run).ok
    marker = parse_marker(config(host, facts["vmid"])["description"])
    assert marker is not None
    assert marker.run == env.run.id
    assert host.configuration(9000) == before


def test_vendor_data_installs_the_agent_and_configures_the_mirror() -> None:
    text = vendor_data.user_data(
        Settings(mirror="http://mirror.example/debian", http_proxy="http://proxy:3128")
    )
    head, _, body = text.partition("\n")
    assert head == "#cloud-config"
    data = json.loads(body)
    assert data["apt"]["primary"] == [{"arches": ["default"], "uri": "http://mirror.example/debian"}]
    assert data["apt"]["http_proxy"] == "http://proxy:3128"
    script = data["runcmd"][0][2]
    assert "command -v qemu-ga" in script
    assert "install qemu-guest-agent" in script


class Addresses:
    """A host with these addresses and neighbours."""

    def __init__(self, addresses: list[dict[str, Any]], neighbours: list[dict[str, Any]]) -> None:
        self._answers = {"addr": addresses, "neigh": neighbours}

    def run(self, command: list[str], **_: Any) -> CommandResult:
        answer = next((text for word, text in self._answers.items() if word in command), [])
        return CommandResult(" ".join(command), 0, json.dumps(answer).encode(), b"", 0.1)


def host_with(neighbour: str | None, local: str = "10.0.0.1") -> PveHost:
    addresses = [{"ifname": "vmbr0", "addr_info": [{"local": local, "prefixlen": 24}]}]
    entries = [{"dst": "10.0.0.50", "lladdr": neighbour, "state": ["REACHABLE"]}] if neighbour else []
    return PveHost("father", Addresses(addresses, entries), None, "father")  # type: ignore[arg-type]


def test_an_address_that_belongs_to_the_card_is_accepted() -> None:
    check_address(host_with(MAC.upper()), "vmbr0", "10.0.0.50", MAC, Deadline(5))


def test_an_address_of_another_card_is_refused() -> None:
    with pytest.raises(ForeignAddress, match="no login was tried there"):
        check_address(host_with("bc:24:11:99:99:99"), "vmbr0", "10.0.0.50", MAC, Deadline(5))


def test_the_hosts_own_address_is_refused() -> None:
    with pytest.raises(ForeignAddress, match="has itself"):
        check_address(host_with(MAC, local="10.0.0.50"), "vmbr0", "10.0.0.50", MAC, Deadline(5))


@pytest.mark.parametrize("ip", ["127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0"])
def test_an_address_that_no_machine_can_have_is_refused(ip: str) -> None:
    with pytest.raises(ForeignAddress):
        check_address(host_with(MAC), "vmbr0", ip, MAC, Deadline(5))


def test_without_an_address_of_the_host_on_the_bridge_only_the_host_key_decides() -> None:
    check_address(host_with(None, local="192.0.2.1"), "vmbr0", "10.0.0.50", MAC, Deadline(5))


class Booting:
    """A machine at which logins fail with these errors, and then succeed."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def run(self, command: list[str], **_: Any) -> CommandResult:
        if self.errors:
            raise self.errors.pop(0)
        return CommandResult(" ".join(command), 0, b"", b"", 0.1)


def test_a_login_is_waited_for_until_sshd_listens_and_pmxcfs_has_the_keys() -> None:
    machine = Booting(HostUnreachable("Connect failed"), LoginRefused("no key is accepted"))
    await_login(machine, Deadline(10))  # type: ignore[arg-type]
    assert machine.errors == []


@pytest.mark.parametrize("error", [HostUnreachable, LoginRefused])
def test_an_error_that_lasts_longer_than_a_boot_is_raised_as_it_is(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "_scale", 0.005)
    with pytest.raises(error, match="refused"):
        await_login(Booting(*[error("refused")] * 1000), Deadline(100_000))  # type: ignore[arg-type]


def test_a_wrong_host_key_ends_the_wait_at_once() -> None:
    machine = Booting(HostKeyMismatch("not the key that was pinned"), HostUnreachable("not reached"))
    with pytest.raises(HostKeyMismatch):
        await_login(machine, Deadline(10))  # type: ignore[arg-type]
    assert len(machine.errors) == 1
