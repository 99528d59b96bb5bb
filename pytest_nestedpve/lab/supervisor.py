"""The process a lab hangs on: it starts father, boots him again, and takes the lab down.

python -m pytest_nestedpve.lab.supervisor NAME, started by `world.start`. When it dies, the lab dies with
it; what is then left (directories, an empty cgroup) the next lab command removes.
"""

from __future__ import annotations

import fcntl
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

from . import allocation, father, marks, programs
from .names import FATHER, LabError, Subnets, lab_dir
from .node import cgroups, launcher

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
    lock = (folder / "supervisor.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / "supervisor.pid").write_text(str(os.getpid()))
    before = allocation.own_cgroup()
    subnets = allocation.take()
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
    cgroups.remove(group / FATHER)
    subprocess.run(["ip", "link", "del", subnets.link], capture_output=True, check=False)
    if return_to is not None:
        (return_to / "cgroup.procs").write_text(str(os.getpid()))
    cgroups.remove(group)
    shutil.rmtree(folder, ignore_errors=True)


def _supervise(folder: Path, subnets: Subnets, report: Any) -> None:
    settings = json.loads((folder / "start.json").read_text())
    made = father.Father(
        Path(settings["image"]),
        tuple(Path(layer) for layer in settings["layers"]),
        Path(settings["mirror_site"]),
        Path(settings["pve_site"]),
    )
    father.prepare(
        folder / "upper",
        folder / "vz",
        made,
        subnets,
        (folder / "id_ed25519.pub").read_text(),
        folder / "host_ed25519",
    )
    container = _container(folder, made, subnets)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGHUP, _stop)
    while True:
        started = launcher.launch(container)
        state = {
            "number": subnets.number,
            "pid": started.init,
            "supervisor": os.getpid(),
            "address": subnets.uplink_father,
            "bridge": subnets.bridge,
        }
        temporary = folder / "lab.json.new"
        temporary.write_text(json.dumps(state))
        temporary.rename(folder / "lab.json")
        if not report.closed:
            _tell(report, {"ok": True, **state})
            threading.Thread(target=_watch_sessions, args=(folder,), daemon=True).start()
        ended = started.wait()
        print(f"father: {ended}", flush=True)
        if ended != launcher.REBOOT:
            return
        launcher.cleanup(container)


def _container(folder: Path, made: father.Father, subnets: Subnets) -> launcher.Container:
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
        ),
        binds=(
            launcher.Bind(folder / "vz", "/var/lib/vz", writable=True),
            launcher.Bind(made.mirror_site, f"/srv/www/{made.mirror_site.name}"),
            launcher.Bind(made.pve_site, f"/srv/www/{made.pve_site.name}"),
        ),
    )


def _watch_sessions(folder: Path) -> None:
    """Stop the lab when no session uses it any more and no marked VM is left in it. A lab that a person
    started stays. Sessions hold a shared lock on `session.lock`; getting it alone means there are none."""
    if (folder / "hand").exists():
        return
    pause = threading.Event()
    while True:
        with open(folder / "session.lock", "a") as sessions:
            fcntl.flock(sessions, fcntl.LOCK_EX)
        try:
            marked = marks.marked_guests(folder)
        except LabError as e:
            print(f"sessions are over, but father cannot be asked for their VMs: {e}", flush=True)
            (folder / "kept").write_text("father cannot be asked for the VMs of runs\n")
            pause.wait(30)
            continue
        if marked:
            (folder / "kept").write_text(f"VMs of runs are there: {', '.join(marked)}\n")
            pause.wait(10)
            continue
        # Nobody can begin a session while the lab's lock is held.
        with open(lock_file(folder), "a") as lab, open(folder / "session.lock", "a") as own:
            fcntl.flock(lab, fcntl.LOCK_EX)
            try:
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if (folder / "hand").exists():
                return
            _lock_held.set()
            os.kill(os.getpid(), signal.SIGTERM)
            # Until the process ends, with it the thread and the lock.
            pause.wait()


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
