"""Creating the nested VM: its owner's marker from the first moment, its options, its first boot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from standin_environment import Make, environments
from standin_host import IMAGE, StandinHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.ownership.marker import parse_marker
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve import deadline
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
def environment(tmp_path: Path, host: StandinHost) -> Iterator[Make]:
    with environments(host, tmp_path) as make:
        yield make


def do_phases(env: Environment, *names: str) -> None:
    for phase in default_phases():
        if phase.name in names:
            env.facts[phase.name] = dict(phase.do(env) or {})


def test_the_vm_is_proved_ours_and_has_the_configured_options(environment: Make, host: StandinHost) -> None:
    env = environment(memory=4096, cores=3)
    do_phases(env, "preflight", "provision")
    facts = env.facts["provision"]
    assert prove(env.outer.api, env.settings, ProvisionFacts.read(facts).vm, env.run).ok
    config = host.config(facts["vmid"])
    assert config["name"] == facts["name"] == f"nested-pve-{env.run.id}"
    assert config["memory"] == "4096"
    assert config["cores"] == "3"
    assert config["cpu"] == "host"
    assert "firewall=0" in config["net0"]
    assert "bridge=vmbr0" in config["net0"]
    assert facts["mac"] in config["net0"].lower()
    assert vm.disk_size(config["scsi0"]) == 64
    assert "qcow2" in config["scsi0"]
    assert config["ciupgrade"] == "0"
    assert config["cicustom"] == f"vendor=local:snippets/npve-{env.run.id}-vendor.yaml"
    assert unquote(config["sshkeys"]).split()[:2] == env.run.directory.ensure_key("").split()[:2]
    assert config["tags"] == f"nestedpve;{env.run.tag}"


def test_the_pool_is_created_first_and_the_vm_without_a_disk(environment: Make, host: StandinHost) -> None:
    do_phases(environment(), "preflight", "provision")
    changes = [call for call in host.calls() if not call.startswith("GET ")]
    assert changes[0].startswith("POST /pools")
    create = changes[1].split()
    assert create[:2] == ["POST", "/nodes/father/qemu"]
    assert "pool" in create
    assert "description" in create
    assert not [word for word in create if word.startswith(("scsi0", "ide", "virtio"))]


def test_without_kvm_the_cpu_is_max_and_vm_options_override_defaults(
    environment: Make, host: StandinHost
) -> None:
    env = environment(vm_options={"kvm": "0", "machine": "q35"})
    do_phases(env, "preflight", "provision")
    config = host.config(env.facts["provision"]["vmid"])
    assert config["cpu"] == "max"
    assert config["kvm"] == "0"
    assert config["machine"] == "q35"


def test_provision_is_not_done_while_the_vm_has_no_disk(environment: Make) -> None:
    env = environment()
    assert vm.probe_provision(env, vm.NESTED) is None
    do_phases(env, "preflight", "provision")
    assert vm.probe_provision(env, vm.NESTED) is not None
    facts = env.facts["provision"]
    env.outer.api.put(f"/nodes/father/qemu/{facts['vmid']}/config", delete="scsi0")
    assert vm.probe_provision(env, vm.NESTED) is None


def test_a_second_start_is_no_error_and_the_probe_sees_the_running_vm(environment: Make) -> None:
    env = environment()
    do_phases(env, "preflight", "provision")
    assert vm.probe_start(env, vm.NESTED) is None
    do_phases(env, "start_vm")
    assert vm.probe_start(env, vm.NESTED) is not None
    do_phases(env, "start_vm")


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("serial", [True, False], ids=["serial", "no serial"])
def test_a_guest_without_an_answering_agent_is_reported_with_its_consoles(
    environment: Make, monkeypatch: pytest.MonkeyPatch, running: bool, serial: bool
) -> None:
    monkeypatch.setattr(deadline, "_scale", 0.02)
    env = environment(vm_options={} if serial else {"serial0": "/dev/ttyS7"})
    do_phases(env, "preflight", "provision", *(["start_vm"] if running else []))
    with pytest.raises(PveError) as caught:
        wait_ip(env, vm.NESTED, 10.0)
    vmid = env.facts["provision"]["vmid"]
    assert ("Has the image an agent" if running else "stopped while") in str(caught.value)
    assert (f"`qm terminal {vmid}` on father" in str(caught.value)) is serial
    assert f"console of VM {vmid} in the web interface of father" in str(caught.value)


def test_the_vm_of_a_failed_import_is_destroyed_by_the_teardown(environment: Make, host: StandinHost) -> None:
    env = environment()
    do_phases(env, "preflight")
    host.fault("POST", "/nodes/father/qemu/*/config", text="no space left on device")
    with pytest.raises(Exception, match="no space left"):
        do_phases(env, "provision")
    assert teardown(env).left == ()
    assert host.vms() == []
    assert host.pools() == {}
    assert host.volumes() == [IMAGE]
    assert list(host.file("/var/lib/vz/snippets").iterdir()) == []


def test_a_clone_of_a_template_is_ours_by_marker_and_uuid(environment: Make, host: StandinHost) -> None:
    options = {"description": "theirs", "tags": "gold", "scsi0": "local:8", "net0": "virtio,bridge=vmbr9"}
    host.create_vm(9000, name="golden", **options)
    host.connect().api.post("/nodes/father/qemu/9000/template")
    before = host.configuration(9000)
    env = environment(template="golden")
    do_phases(env, "preflight", "provision")
    facts = env.facts["provision"]
    assert prove(env.outer.api, env.settings, ProvisionFacts.read(facts).vm, env.run).ok
    marker = parse_marker(host.config(facts["vmid"])["description"])
    assert marker is not None
    assert marker.run == env.run.id
    assert host.configuration(9000) == before


def test_vendor_data_installs_the_agent_and_sets_the_mirror() -> None:
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


class Answers:
    """A host that answers `ip addr` and `ip neigh`."""

    def __init__(self, addresses: list[dict[str, Any]], neighbours: list[dict[str, Any]]) -> None:
        self._answers = {"addr": addresses, "neigh": neighbours}

    def run(self, command: list[str], **_: Any) -> CommandResult:
        answer = next((text for word, text in self._answers.items() if word in command), [])
        return CommandResult(" ".join(command), 0, json.dumps(answer).encode(), b"", 0.1)


def with_neighbour(neighbour: str | None, local: str = "10.0.0.1") -> PveHost:
    addresses = [{"ifname": "vmbr0", "addr_info": [{"local": local, "prefixlen": 24}]}]
    entries = [{"dst": "10.0.0.50", "lladdr": neighbour, "state": ["REACHABLE"]}] if neighbour else []
    return PveHost("father", Answers(addresses, entries), None, "father")  # type: ignore[arg-type]


def test_an_address_of_the_vms_network_card_is_accepted() -> None:
    check_address(with_neighbour(MAC.upper()), "vmbr0", "10.0.0.50", MAC, Deadline(5))


def test_an_address_of_another_network_card_is_refused() -> None:
    with pytest.raises(ForeignAddress, match="no login was tried there"):
        check_address(with_neighbour("bc:24:11:99:99:99"), "vmbr0", "10.0.0.50", MAC, Deadline(5))


def test_the_hosts_own_address_is_refused() -> None:
    with pytest.raises(ForeignAddress, match="has itself"):
        check_address(with_neighbour(MAC, local="10.0.0.50"), "vmbr0", "10.0.0.50", MAC, Deadline(5))


@pytest.mark.parametrize("ip", ["127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0"])
def test_an_address_of_no_machine_is_refused(ip: str) -> None:
    with pytest.raises(ForeignAddress):
        check_address(with_neighbour(MAC), "vmbr0", ip, MAC, Deadline(5))


def test_without_an_address_of_the_host_on_the_bridge_only_the_host_key_is_checked() -> None:
    check_address(with_neighbour(None, local="192.0.2.1"), "vmbr0", "10.0.0.50", MAC, Deadline(5))


class Booting:
    """A machine that raises these errors at logins, one after the other, and accepts later logins."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def run(self, command: list[str], **_: Any) -> CommandResult:
        if self.errors:
            raise self.errors.pop(0)
        return CommandResult(" ".join(command), 0, b"", b"", 0.1)


def test_logins_are_retried_until_sshd_listens_and_pmxcfs_has_the_keys() -> None:
    machine = Booting(HostUnreachable("Connect failed"), LoginRefused("no key of the run is accepted"))
    await_login(machine, Deadline(10))  # type: ignore[arg-type]
    assert machine.errors == []


@pytest.mark.parametrize("error", [HostUnreachable, LoginRefused])
def test_a_login_that_is_refused_for_longer_than_a_boot_raises_its_last_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadline, "_scale", 0.005)
    with pytest.raises(error, match="refused"):
        await_login(Booting(*[error("refused")] * 1000), Deadline(100_000))  # type: ignore[arg-type]


def test_a_login_with_another_host_key_is_not_retried() -> None:
    machine = Booting(HostKeyMismatch("not the key that was pinned"), HostUnreachable("never reached"))
    with pytest.raises(HostKeyMismatch):
        await_login(machine, Deadline(10))  # type: ignore[arg-type]
    assert len(machine.errors) == 1
