"""The process that runs a lab: it starts the outer nodes, restarts rebooted ones, and removes the lab.

python -m pytest_nestedpve.lab.supervisor NAME, started by `lifecycle.start`. If it is killed, all processes
of the lab end with it; the next lab command removes its leftovers (directories, an empty cgroup).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import CommandTimeout
from pytest_nestedpve.pve.lock_file import lock, locked

from . import outer_node, programs, run_leftovers, subnet_allocation
from .names import FATHER, SECOND_NODE, LabError, Subnets, lab_dir
from .node.machine import cgroups, launcher

SHARED = "/mnt/shared"
"""A directory that both nodes of a cluster share, for a shared storage."""

_closing = threading.Event()
# Held while the second node is launched; with `_closing` set the launch is refused.
_launching = threading.Lock()
# Set if this process holds the lab's lock, as it stops the lab after the last session.
_lock_held = threading.Event()


class Stop(Exception):
    """A signal to stop the lab."""


def main(arguments: list[str]) -> int:
    """Run the lab until it is stopped. Once father was started (not booted yet), or failed to start, write
    one line of JSON to standard output: `ok` with the lab's state, or `error`."""
    name = arguments[0]
    folder = lab_dir(name)
    if os.fork():
        os._exit(0)  # a child of init outlives the process that started it, and is no zombie of it
    report = os.fdopen(os.dup(1), "w")
    _redirect_output(folder / "supervisor.log")
    lock(folder / "supervisor.lock", wait=False)  # until this process ends
    (folder / "supervisor.pid").write_text(str(os.getpid()))
    former_cgroup = subnet_allocation.process_cgroup()
    subnets = subnet_allocation.allocate()
    try:
        _supervise(folder, subnets, report)
    except Stop:
        pass
    except Exception as e:
        _send(report, {"error": str(e)})
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _closing.set()
        with _launching:
            pass
        take_down(folder, subnets, former_cgroup)
        if _lock_held.is_set():
            lock_file(folder).unlink(missing_ok=True)
    return 0


def lock_file(folder: Path) -> Path:
    """Locked while a lab is started, stopped or joined; outside the lab's directory, which is removed."""
    return folder.with_name(f".{folder.name}.lock")


def take_down(folder: Path, subnets: Subnets, return_to: Path | None = None) -> None:
    """End all processes of the lab and remove its directory. Called by the supervisor itself, or by another
    process if the supervisor was killed."""
    group = cgroups.root() / subnets.cgroup
    for node in (FATHER, SECOND_NODE):
        cgroups.remove(group / node)
    subprocess.run(["ip", "link", "del", subnets.link], capture_output=True, check=False)
    if return_to is not None:
        (return_to / "cgroup.procs").write_text(str(os.getpid()))
    cgroups.remove(group)
    shutil.rmtree(folder, ignore_errors=True)


def _supervise(folder: Path, subnets: Subnets, report: Any) -> None:
    settings = json.loads((folder / "start.json").read_text())
    files = outer_node.NodeFiles(
        Path(settings["image"]),
        tuple(Path(layer) for layer in settings["layers"]),
        Path(settings["mirror_site"]),
        Path(settings["pve_site"]),
    )
    second = settings["nodes"] > 1
    outer_node.prepare(
        folder / "upper",
        folder / "vz",
        files,
        subnets,
        (folder / "id_ed25519.pub").read_text(),
        folder / "host_ed25519",
        second=second,
    )
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGHUP, _stop)
    switch = None
    if second:
        outer_node.prepare_cluster(folder / "pve-cluster", folder.name, subnets)
        (folder / "shared").mkdir()
        key = folder / "host_father2_ed25519"
        outer_node.prepare_second(folder / "upper-father2", folder / "vz-father2", files, subnets, key)
        switch = _start_switch()
        container = _second_container(folder, files, subnets, switch)
        started = _launch_second(folder, container)
        threading.Thread(target=_supervise_second, args=(folder, container, started), daemon=True).start()
    container = _father_container(folder, files, subnets, switch)
    while True:
        started = launcher.launch(container)
        state = {
            "number": subnets.number,
            "pid": started.init,
            "supervisor": os.getpid(),
            "address": subnets.uplink_father,
            "bridge": subnets.bridge,
        }
        local_file.write(folder / "lab.json", json.dumps(state), mode=0o666)
        if not report.closed:
            _send(report, {"ok": True, **state})
            threading.Thread(target=_watch_sessions, args=(folder,), daemon=True).start()
        ended = started.wait()
        print(f"{FATHER}: {ended}", flush=True)
        if ended != launcher.REBOOT:
            return
        launcher.cleanup(container)


def _father_container(
    folder: Path, files: outer_node.NodeFiles, subnets: Subnets, switch: int | None
) -> launcher.Container:
    lan, shared = ((), ()) if switch is None else (_lan_link(FATHER, subnets, switch), _shared_binds(folder))
    return launcher.Container(
        hostname=FATHER,
        state=folder / "state",
        cgroup=cgroups.root() / subnets.cgroup / FATHER,
        console=folder / "console.log",
        images=(files.image,),
        lowers=files.layers,
        upper=folder / "upper",
        work=folder / "work",
        links=(
            launcher.Link(
                outside=subnets.link,
                inside="eth0",
                mac=f"02:4e:50:56:01:{subnets.number:02x}",
                address=f"{subnets.uplink_machine}/30",
            ),
            *lan,
        ),
        binds=(
            launcher.Bind(folder / "vz", "/var/lib/vz", writable=True),
            launcher.Bind(files.mirror_site, f"/srv/www/{files.mirror_site.name}"),
            launcher.Bind(files.pve_site, f"/srv/www/{files.pve_site.name}"),
            *shared,
        ),
    )


# -- the second node of a cluster


def _second_container(
    folder: Path, files: outer_node.NodeFiles, subnets: Subnets, switch: int
) -> launcher.Container:
    return launcher.Container(
        hostname=SECOND_NODE,
        state=folder / "state-father2",
        cgroup=cgroups.root() / subnets.cgroup / SECOND_NODE,
        console=folder / "console-father2.log",
        images=(files.image,),
        lowers=files.layers,
        upper=folder / "upper-father2",
        work=folder / "work-father2",
        links=_lan_link(SECOND_NODE, subnets, switch),
        binds=(launcher.Bind(folder / "vz-father2", "/var/lib/vz", writable=True), *_shared_binds(folder)),
    )


def _lan_link(node: str, subnets: Subnets, switch: int) -> tuple[launcher.Link, ...]:
    """The port of a node's bridge that joins both nodes' bridges into one network."""
    number = (FATHER, SECOND_NODE).index(node) + 3
    mac = f"02:4e:50:56:{number:02x}:{subnets.number:02x}"
    return (launcher.Link(outside=node, inside="lan", mac=mac, bridge="lan", switch=switch),)


def _shared_binds(folder: Path) -> tuple[launcher.Bind, ...]:
    return (
        launcher.Bind(folder / "pve-cluster", "/var/lib/pve-cluster", writable=True),
        launcher.Bind(folder / "shared", SHARED, writable=True),
    )


_SWITCH_SCRIPT = """
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6 || true
ip link add name lan type bridge
ip link set lan up
echo ready
exec sleep infinity
"""


def _start_switch() -> int:
    """Start a process whose network namespace holds the bridge between the nodes; return its PID. The process
    and its namespace end with this process; the machine's own network is not changed."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "sh", "-ec", _SWITCH_SCRIPT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        if process.stdout.readline() != b"ready\n":
            raise LabError("the bridge between the two nodes could not be created")
    return process.pid


def power_file(folder: Path) -> Path:
    """The pipe that the supervisor reads while the second node is off: writing to it switches the node on."""
    return folder / "father2.power"


def off_file(folder: Path) -> Path:
    """Exists while the second node is off: neither up, nor shutting down, nor booting."""
    return folder / "father2.off"


def pid_file(folder: Path) -> Path:
    """The PID, as this machine sees it, of the second node's PID 1; exists while the node is on."""
    return folder / "father2.pid"


def _launch_second(folder: Path, container: launcher.Container) -> launcher.Started:
    with _launching:
        if _closing.is_set():
            raise LabError("the lab is being stopped")
        started = launcher.launch(container)
    local_file.write(pid_file(folder), str(started.init), mode=0o666)
    return started


def _supervise_second(folder: Path, container: launcher.Container, started: launcher.Started) -> None:
    """Launch the second node again when it reboots, or is switched on after it was off."""
    button, off = power_file(folder), off_file(folder)
    os.mkfifo(button, 0o600)
    ended = started.wait()
    while True:
        print(f"{SECOND_NODE}: {ended}", flush=True)
        launcher.cleanup(container)
        pid_file(folder).unlink(missing_ok=True)
        if ended != launcher.REBOOT:
            off.touch()
            button.read_text()
            off.unlink()
        try:
            ended = _launch_second(folder, container).wait()
        except launcher.LaunchError as e:
            ended = str(e)
        except LabError:
            return


def _watch_sessions(folder: Path) -> None:
    """Stop the lab when no session uses it and no VM of a run remains in it, unless it was started by hand.
    Sessions hold a shared lock on `session.lock`; an exclusive lock is possible only without sessions."""
    if (folder / "hand").exists():
        return
    while True:
        with locked(folder / "session.lock"):
            pass
        try:
            marked = run_leftovers.marked_guests(folder)
        except LabError as e:
            print(f"all sessions have ended, but listing their VMs on {FATHER} failed: {e}", flush=True)
            _pause(folder, f"listing VMs of runs on {FATHER} failed", 30)
            continue
        if marked:
            _pause(folder, f"VMs of runs remain: {', '.join(marked)}", 10)
            continue
        # No session can begin while the lab's lock is held.
        with locked(lock_file(folder)), contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(folder / "session.lock", wait=False))
            except BlockingIOError:
                continue
            if (folder / "hand").exists():
                return
            _lock_held.set()
            os.kill(os.getpid(), signal.SIGTERM)
            # Keep the lock until the process ends.
            threading.Event().wait()


def _pause(folder: Path, reason: str, seconds: float) -> None:
    """Write to the file `kept` why the lab is kept, and wait. Ends early when a session removes the file; at
    its end that session waits for the file."""
    kept = folder / "kept"
    kept.write_text(f"{reason}\n")
    with contextlib.suppress(CommandTimeout):
        wait_until(
            lambda: not kept.exists(), deadline=Deadline(seconds), what="a session", interval=(0.1, 0.1)
        )


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stop


def _send(report: Any, message: Mapping[str, Any]) -> None:
    if not report.closed:
        report.write(json.dumps(message) + "\n")
        report.close()


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    os.environ["PATH"] = programs.search_path()
    sys.exit(main(sys.argv[1:]))
