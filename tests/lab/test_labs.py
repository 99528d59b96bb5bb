"""Whole labs: start, several at once, stop, and no leftovers after any kind of end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_nestedpve.lab import lifecycle
from pytest_nestedpve.lab.lifecycle import LabInfo
from pytest_nestedpve.lab.names import LabError, Subnets, lab_dir
from pytest_nestedpve.lab.node.machine import cgroups
from pytest_nestedpve.pve.deadline import Deadline, wait_until

CLI = [sys.executable, "-m", "pytest_nestedpve.lab.cli"]


def start(name: str, nodes: int = 1) -> LabInfo:
    return lifecycle.start(name, hand=True, report=lambda _text: None, nodes=nodes)


def run_on_father(lab: LabInfo, command: str, check: bool = True) -> str:
    done = subprocess.run(
        ["ssh", "-F", lab.ssh_config, lab.host, command], capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def number(lab: LabInfo) -> int:
    return int(lab.networks[0].split(".")[2])


def network_namespace(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def leftovers(lab: LabInfo, namespace: str) -> list[str]:
    """Leftovers of a lab: processes, links, mounts, control groups, directories."""
    subnets = Subnets(number(lab))
    entries = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue  # exited; its parent has not read the status yet
            if f"/{subnets.cgroup}/" in (process / "cgroup").read_text():
                entries.append(f"process {process.name} in the lab's cgroup")
            if os.readlink(process / "ns/net") == namespace:
                entries.append(f"process {process.name} in father's network namespace")
        except OSError:
            continue
    if Path("/sys/class/net", subnets.link).exists():
        entries.append(f"link {subnets.link}")
    if (cgroups.root() / subnets.cgroup).exists():
        entries.append(f"cgroup {subnets.cgroup}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if f"{lab.dir}/" in line:
            entries.append(f"mount {line}")
    if Path(lab.dir).exists():
        entries.append(f"directory {lab.dir}")
    return entries


def loop_devices(vmid: int) -> list[str]:
    """The machine's loop devices of a VM's disk, by the path of their files in the lab."""
    files = (path.read_text() for path in Path("/sys/block").glob("loop*/loop/backing_file"))
    return [text.strip() for text in files if f"vm-{vmid}-disk" in text]


def await_no_leftovers(lab: LabInfo, namespace: str, seconds: float = 30.0) -> None:
    last: list[str] = []

    def check() -> bool:
        last[:] = leftovers(lab, namespace)
        return not last

    wait_until(check, deadline=Deadline(seconds), what=lambda: f"no leftovers of the lab, found {last}")


@pytest.fixture
def names() -> Iterator[tuple[str, str]]:
    """Two lab names for this test; the labs are stopped at its end."""
    pair = (f"test-{os.getpid()}-a", f"test-{os.getpid()}-b")
    yield pair
    for name in pair:
        lifecycle.stop(name)


def test_a_lab_is_a_whole_pve_host_and_a_stopped_lab_leaves_nothing(names: tuple[str, str]) -> None:
    lab = start(names[0])
    namespace = network_namespace(lab.pid)
    assert run_on_father(lab, "hostname").strip() == "father"
    assert run_on_father(lab, "systemctl is-system-running").strip() == "running"
    assert run_on_father(lab, "pveversion").startswith("pve-manager/")
    assert "[nested-pve]" in run_on_father(lab, "cat /etc/nested-pve.ini")
    assert leftovers(lab, namespace)
    assert lifecycle.stop(names[0])
    assert leftovers(lab, namespace) == []
    assert not lifecycle.stop(names[0])


def test_two_labs_run_at_once_on_separate_networks(names: tuple[str, str]) -> None:
    first, other = start(names[0]), start(names[1])
    assert first.networks != other.networks
    for lab in (first, other):
        assert (
            run_on_father(lab, "ip -4 -o address show vmbr0").split()[3].startswith(f"10.211.{number(lab)}.")
        )
        run_on_father(lab, "pvesh create /pools --poolid only-here")
    namespace = network_namespace(first.pid)
    assert {lab.name for lab in lifecycle.list_running()} >= set(names)
    lifecycle.stop(names[0])
    assert leftovers(first, namespace) == []
    assert "only-here" in run_on_father(other, "pvesh get /pools --output-format json")


def test_starting_a_running_lab_returns_the_same_lab(names: tuple[str, str]) -> None:
    assert start(names[0]).pid == start(names[0]).pid


def test_a_lab_ends_with_its_supervisor_and_the_next_command_removes_its_leftovers(
    names: tuple[str, str],
) -> None:
    lab = start(names[0])
    vmid = 1_000_000 + os.getpid()  # not used in another lab
    image = "local:import/debian-13-genericcloud-amd64.raw"
    disk = f"local:0,import-from={image},format=qcow2"
    run_on_father(lab, f"qm create {vmid} --memory 1024 --scsi0 {disk} && qm start {vmid}")
    assert loop_devices(vmid)
    namespace = network_namespace(lab.pid)
    # Commands of other tests remove leftovers too, but not while the lab's lock is held.
    with lifecycle.lab_lock(lab.name):
        os.kill(lab.supervisor, signal.SIGKILL)
        wait_until(
            lambda: not Path(f"/proc/{lab.pid}").exists(),
            deadline=Deadline(20),
            what="father to end with its supervisor",
        )
        assert leftovers(lab, namespace)
    subprocess.run([*CLI, "list"], check=True, capture_output=True)
    await_no_leftovers(lab, namespace)
    assert loop_devices(vmid) == []


def test_a_second_node_reboots_is_switched_off_and_on_and_ends_with_the_lab(
    names: tuple[str, str],
) -> None:
    def power(node: str, state: str) -> int:
        command = [*CLI, "power", lab.name, node, state]
        return subprocess.run(command, capture_output=True, check=False).returncode

    def nodes() -> list[str]:
        return [
            line.split()[2]
            for line in run_on_father(lab, "pvecm nodes").splitlines()
            if line.strip()[:1].isdigit()
        ]

    lab = start(names[0], nodes=2)
    first = lab.pids["father2"]
    assert nodes() == ["father", "father2"]
    subprocess.run([*CLI, "exec", lab.name, "--node", "father2", "--", "systemctl", "reboot"], check=True)
    wait_until(
        lambda: lifecycle.get(lab.name).pids.get("father2", first) != first,
        deadline=Deadline(30),
        what="father2 to reboot",
    )
    assert power("father", "off") == 4
    assert power("father2", "off") == 0
    assert nodes() == ["father"]
    assert list(lifecycle.get(lab.name).pids) == ["father"]
    assert power("father2", "on") == 0
    assert nodes() == ["father", "father2"]
    assert lifecycle.start(lab.name, hand=True, report=print).pids == lifecycle.get(lab.name).pids
    namespace = network_namespace(lifecycle.get(lab.name).pids["father2"])
    os.kill(lab.supervisor, signal.SIGKILL)
    wait_until(
        lambda: lifecycle.find(lab.name) is None,
        deadline=Deadline(20),
        what="the lab to end with its supervisor",
    )
    subprocess.run([*CLI, "list"], check=True, capture_output=True)
    await_no_leftovers(lab, namespace)


def test_the_last_session_stops_the_lab(names: tuple[str, str]) -> None:
    from pytest_nestedpve.lab.session import acquire, is_running

    first, second = acquire(names[0]), acquire(names[0])
    lab = lifecycle.find(names[0])
    assert lab is not None
    namespace = network_namespace(lab.pid)
    first.release()
    assert is_running(names[0])
    second.release()
    await_no_leftovers(lab, namespace)
    assert not is_running(names[0])


def test_a_killed_session_no_longer_holds_its_lab(names: tuple[str, str], tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"""
        import signal, pathlib
        from pytest_nestedpve.lab.session import acquire
        lab = acquire({names[0]!r})
        pathlib.Path({str(ready)!r}).touch()
        signal.pause()
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stderr=subprocess.DEVNULL)
    try:
        wait_until(
            ready.exists, deadline=Deadline(120), what="the session to have its lab", interval=(0.1, 0.2)
        )
        lab = lifecycle.find(names[0])
        assert lab is not None
        namespace = network_namespace(lab.pid)
    finally:
        process.kill()
        process.wait()
    await_no_leftovers(lab, namespace)


def test_a_lab_with_a_vm_of_a_run_is_kept_after_its_sessions_until_the_vm_is_destroyed(
    names: tuple[str, str],
) -> None:
    from pytest_nestedpve.lab.session import acquire, is_running

    session = acquire(names[0])
    lab = lifecycle.find(names[0])
    assert lab is not None
    namespace = network_namespace(lab.pid)
    run_on_father(lab, "pvesh create /pools --poolid npve-0123456789ab")
    run_on_father(lab, "qm create 9901 --name nested-pve-0123456789ab --pool npve-0123456789ab")
    session.release()
    assert is_running(names[0])
    kept = lab_dir(names[0]) / "kept"
    wait_until(kept.exists, deadline=Deadline(30), what="the reason why the lab is kept")
    assert "npve-0123456789ab" in kept.read_text()
    with acquire(names[0]):
        run_on_father(lab, "qm destroy 9901 && pvesh delete /pools/npve-0123456789ab")
    await_no_leftovers(lab, namespace)


def test_a_lab_started_by_hand_runs_on_after_its_sessions(names: tuple[str, str]) -> None:
    from pytest_nestedpve.lab.session import acquire, is_running

    start(names[0])
    acquire(names[0]).release()
    assert is_running(names[0])


def test_exec_runs_on_father_and_passes_input_output_and_status(names: tuple[str, str]) -> None:
    start(names[0])
    done = subprocess.run(
        [*CLI, "exec", names[0], "--", "sh", "-c", "cat; hostname; pwd; exit 7"],
        input="input\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7
    assert done.stdout == "input\nfather\n/\n"
    with pytest.raises(LabError, match="expected exactly one VM booted on father, found: none"):
        lifecycle.enter(names[0], "nested", ["true"])


def set_delays(lab: str, *pairs: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, "set", lab, *pairs], capture_output=True, text=True, check=False)


def test_a_lab_has_the_configured_delays(names: tuple[str, str]) -> None:
    lab = start(names[0])
    output = set_delays(names[0], "cli_delay_s=1.5").stdout
    assert "cli_delay_s=1.5\n" in output
    assert set_delays(names[0]).stdout == output
    before = time.monotonic()
    run_on_father(lab, "qm list")
    assert time.monotonic() - before >= 1.5
    assert "cli_delay_s=0\n" in set_delays(names[0], "cli_delay_s=0").stdout
    assert "cli_delay_s" in run_on_father(lab, "cat /etc/nestedpve-lab.json")
    assert " qm list" in run_on_father(lab, "cat /var/log/nestedpve-lab-commands.log")
    missing = set_delays(names[1], "stop_s=1")
    assert (missing.returncode, "does not run" in missing.stderr) == (1, True)


def fault(lab: str, *words: str) -> list[dict[str, Any]]:
    done = subprocess.run([*CLI, "fault", lab, *words], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_fault_rule_of_a_lab_is_used_by_commands_and_requests_and_no_more_often(
    names: tuple[str, str],
) -> None:
    lab = start(names[0])
    rule = {"on": {"method": "GET", "path": "/version"}, "do": "fail", "text": "by rule", "times": 2}
    assert fault(names[0], "add", json.dumps(rule)) == [rule]
    assert "by rule" in run_on_father(lab, "pvesh get /version 2>&1 || true")
    assert fault(names[0], "list") == [{**rule, "times": 1}]
    assert "by rule" in run_on_father(lab, "pvesh get /version 2>&1 || true")
    assert fault(names[0], "list") == []
    assert "9.2" in run_on_father(lab, "pvesh get /version")
    fault(names[0], "add", "--path", "/version", "--do", "drop")
    assert run_on_father(lab, "pvesh get /version; echo $?").strip() == "137"  # killed without a word
    fault(names[0], "add", "--vmid", "100", "--do", "hang")
    assert fault(names[0], "clear") == []


def test_processes_of_a_lab_cannot_change_the_machines_clock_and_kernel(names: tuple[str, str]) -> None:
    """Checked by their capabilities and read-only mounts, not by trying."""
    lab = start(names[0])
    clock, modules = 1 << 25, 1 << 16
    for status in (
        run_on_father(lab, "cat /proc/self/status"),
        run_on_father(lab, "cat /proc/1/status"),
        subprocess.run(
            [*CLI, "exec", names[0], "--", "cat", "/proc/self/status"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout,
    ):
        capabilities = int(
            next(line for line in status.splitlines() if line.startswith("CapBnd:")).split()[1], 16
        )
        assert capabilities & clock == 0
        assert capabilities & modules == 0
    mounts = {
        line.split()[1]: line.split()[3] for line in run_on_father(lab, "cat /proc/self/mounts").splitlines()
    }
    assert mounts["/proc/sys"].startswith("ro,")
    assert mounts["/sys"].startswith("ro,")


def test_start_prints_as_json_how_to_reach_the_lab(names: tuple[str, str]) -> None:
    done = subprocess.run([*CLI, "start", names[0], "--json"], capture_output=True, text=True, check=True)
    printed = json.loads(done.stdout)
    assert {"name", "dir", "ssh_config", "host", "api_url", "ca_file", "pid"} <= printed.keys()
    listed = json.loads(subprocess.run([*CLI, "list", "--json"], capture_output=True, check=True).stdout)
    assert names[0] in [lab["name"] for lab in listed]
    assert Path(printed["ca_file"]).read_text().startswith("-----BEGIN CERTIFICATE-----")
