"""The process a lab hangs on: it starts father, boots him again, and takes the lab down.

python -m pytest_nestedpve.lab.supervisor NAME, started by `world.start`. When it dies, the lab dies with
it; what is then left (directories, an empty cgroup) the next lab command removes.
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
from .names import FATHER, UNCLE, LabError, Subnets, lab_dir
from .node.machine import cgroups, launcher

SHARED = "/mnt/shared"
"""A directory that both nodes of a cluster have, for a storage that is shared."""

_closing = threading.Event()
_launching = threading.Lock()  # of uncle; none is launched any more once the lab goes down
_lock_held = threading.Event()  # by this process: the lab's, while the lab goes down by itself


class Stop(Exception):
    """The lab shall go down."""


def main(arguments: list[str]) -> int:
    """Report `ok` or the trouble as one line of JSON on standard output once father has been started (it is
    not up yet then), and stay until the lab is down."""
    name = arguments[0]
    folder = lab_dir(name)
    if os.fork():
        os._exit(0)  # nobody's child: it outlives the one who started it, and leaves him no zombie
    report = os.fdopen(os.dup(1), "w")
    _to_log(folder / "supervisor.log")
    lock(folder / "supervisor.lock", wait=False)  # until this process ends
    (folder / "supervisor.pid").write_text(str(os.getpid()))
    before = subnet_allocation.own_cgroup()
    subnets = subnet_allocation.take()
    try:
        _supervise(folder, subnets, report)
    except Stop:
        pass
    except Exception as e:
        _tell(report, {"error": str(e)})
        raise
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        _closing.set()
        with _launching:
            pass
        take_down(folder, subnets, before)
        if _lock_held.is_set():
            lock_file(folder).unlink(missing_ok=True)
    return 0


def lock_file(folder: Path) -> Path:
    """Held while a lab is started, stopped or joined; beside the lab's directory, which comes and goes."""
    return folder.with_name(f".{folder.name}.lock")


def take_down(folder: Path, subnets: Subnets, return_to: Path | None = None) -> None:
    """End everything of the lab and remove its directory. Done by the supervisor itself, or by another
    process for one that was killed."""
    group = cgroups.root() / subnets.cgroup
    for node in (FATHER, UNCLE):
        cgroups.remove(group / node)
    subprocess.run(["ip", "link", "del", subnets.link], capture_output=True, check=False)
    if return_to is not None:
        (return_to / "cgroup.procs").write_text(str(os.getpid()))
    cgroups.remove(group)
    shutil.rmtree(folder, ignore_errors=True)


def _supervise(folder: Path, subnets: Subnets, report: Any) -> None:
    settings = json.loads((folder / "start.json").read_text())
    made = outer_node.Father(
        Path(settings["image"]),
        tuple(Path(layer) for layer in settings["layers"]),
        Path(settings["mirror_site"]),
        Path(settings["pve_site"]),
    )
    second = settings["nodes"] > 1
    outer_node.prepare(
        folder / "upper",
        folder / "vz",
        made,
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
        key = folder / "host_uncle_ed25519"
        outer_node.prepare_uncle(folder / "upper-uncle", folder / "vz-uncle", made, subnets, key)
        switch = _switch()
        uncle = _uncle(folder, made, subnets, switch)
        begun = _launch_uncle(folder, uncle)
        threading.Thread(target=_keep_uncle, args=(folder, uncle, begun), daemon=True).start()
    container = _container(folder, made, subnets, switch)
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
            _tell(report, {"ok": True, **state})
            threading.Thread(target=_watch_sessions, args=(folder,), daemon=True).start()
        ended = started.wait()
        print(f"father: {ended}", flush=True)
        if ended != launcher.REBOOT:
            return
        launcher.cleanup(container)


def _container(
    folder: Path, made: outer_node.Father, subnets: Subnets, switch: int | None
) -> launcher.Container:
    lan, common = ((), ()) if switch is None else (_lan(FATHER, subnets, switch), _common(folder))
    return launcher.Container(
        hostname=FATHER,
        state=folder / "state",
        cgroup=cgroups.root() / subnets.cgroup / FATHER,
        console=folder / "console.log",
        images=(made.image,),
        lowers=made.layers,
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
            launcher.Bind(made.mirror_site, f"/srv/www/{made.mirror_site.name}"),
            launcher.Bind(made.pve_site, f"/srv/www/{made.pve_site.name}"),
            *common,
        ),
    )


# -- the second node of a cluster


def _uncle(folder: Path, made: outer_node.Father, subnets: Subnets, switch: int) -> launcher.Container:
    return launcher.Container(
        hostname=UNCLE,
        state=folder / "state-uncle",
        cgroup=cgroups.root() / subnets.cgroup / UNCLE,
        console=folder / "console-uncle.log",
        images=(made.image,),
        lowers=made.layers,
        upper=folder / "upper-uncle",
        work=folder / "work-uncle",
        links=_lan(UNCLE, subnets, switch),
        binds=(launcher.Bind(folder / "vz-uncle", "/var/lib/vz", writable=True), *_common(folder)),
    )


def _lan(node: str, subnets: Subnets, switch: int) -> tuple[launcher.Link, ...]:
    """The port of a node's bridge by which both nodes' bridges are one network."""
    number = (FATHER, UNCLE).index(node) + 3
    mac = f"02:4e:50:56:{number:02x}:{subnets.number:02x}"
    return (launcher.Link(outside=node, inside="lan", mac=mac, bridge="lan", switch=switch),)


def _common(folder: Path) -> tuple[launcher.Bind, ...]:
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


def _switch() -> int:
    """A process in whose network namespace there is nothing but a bridge: it ends with this one, and with it
    its namespace. The machine's own network has nothing of it."""
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "sh", "-ec", _SWITCH_SCRIPT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout:
        if process.stdout.readline() != b"ready\n":
            raise LabError("the network between the nodes could not be made")
    return process.pid


def power_file(folder: Path) -> Path:
    """Uncle's button: he waits for a word in it while he is off."""
    return folder / "uncle.power"


def off_file(folder: Path) -> Path:
    """There while uncle is off: neither up, nor going down, nor booting."""
    return folder / "uncle.off"


def pid_file(folder: Path) -> Path:
    """Uncle's PID 1 as seen here; there while he is on."""
    return folder / "uncle.pid"


def _launch_uncle(folder: Path, uncle: launcher.Container) -> launcher.Started:
    with _launching:
        if _closing.is_set():
            raise LabError("the lab goes down")
        started = launcher.launch(uncle)
    local_file.write(pid_file(folder), str(started.init), mode=0o666)
    return started


def _keep_uncle(folder: Path, uncle: launcher.Container, started: launcher.Started) -> None:
    """Boot him again when he reboots, or when he was off and somebody switches him on."""
    button, off = power_file(folder), off_file(folder)
    os.mkfifo(button, 0o600)
    ended = started.wait()
    while True:
        print(f"uncle: {ended}", flush=True)
        launcher.cleanup(uncle)
        pid_file(folder).unlink(missing_ok=True)
        if ended != launcher.REBOOT:
            off.touch()
            button.read_text()
            off.unlink()
        try:
            ended = _launch_uncle(folder, uncle).wait()
        except launcher.LaunchError as e:
            ended = str(e)
        except LabError:
            return


def _watch_sessions(folder: Path) -> None:
    """Stop the lab when no session uses it any more and no marked VM is left in it. A lab that a person
    started stays. Sessions hold a shared lock on `session.lock`; getting it alone means there are none."""
    if (folder / "hand").exists():
        return
    while True:
        with locked(folder / "session.lock"):
            pass
        try:
            marked = run_leftovers.marked_guests(folder)
        except LabError as e:
            print(f"sessions are over, but father cannot be asked for their VMs: {e}", flush=True)
            _stay(folder, "father cannot be asked for the VMs of runs", 30)
            continue
        if marked:
            _stay(folder, f"VMs of runs are there: {', '.join(marked)}", 10)
            continue
        # Nobody can begin a session while the lab's lock is held.
        with locked(lock_file(folder)), contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(folder / "session.lock", wait=False))
            except BlockingIOError:
                continue
            if (folder / "hand").exists():
                return
            _lock_held.set()
            os.kill(os.getpid(), signal.SIGTERM)
            # Until the process ends, with it the thread and the lock.
            threading.Event().wait()


def _stay(folder: Path, reason: str, seconds: float) -> None:
    """Tell why the lab stays, for that long; a session takes the word away, and at its end waits for one."""
    kept = folder / "kept"
    kept.write_text(f"{reason}\n")
    with contextlib.suppress(CommandTimeout):
        wait_until(
            lambda: not kept.exists(), deadline=Deadline(seconds), what="a session", interval=(0.1, 0.1)
        )


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise Stop


def _tell(report: Any, message: Mapping[str, Any]) -> None:
    if not report.closed:
        report.write(json.dumps(message) + "\n")
        report.close()


def _to_log(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


if __name__ == "__main__":
    os.environ["PATH"] = programs.search_path()
    sys.exit(main(sys.argv[1:]))
