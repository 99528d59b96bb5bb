"""The supervisor of one machine: boots it, boots it again after a reboot, ends when it is off.

python3 -m nestedpve_node.machine.supervisor VMID. Stands in for the `kvm` process: the machine runs exactly
as long as the supervisor. Prints "running" once the first boot is launched, or the error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from ..state import paths
from . import cgroups, disks, launcher, machine

AGENT_PORT = "virtio-ports/org.qemu.guest_agent.0:c:1:3:660"
SEED = "var/lib/cloud/seed/nocloud"


def main() -> int:
    vmid = int(sys.argv[1])
    spec = json.loads((machine.RUN_DIR / str(vmid) / "spec.json").read_text())
    cgroups.enter(machine.supervisor_group(vmid))
    lock = machine.lock_file(vmid).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (machine.RUN_DIR / f"{vmid}.macs").write_text(json.dumps([nic["mac"] for nic in spec["nics"]]))

    def end(_number: int, _frame: FrameType | None) -> None:
        (machine.RUN_DIR / str(vmid) / "stop").touch()
        cgroups.kill(machine.machine_group(vmid))

    signal.signal(signal.SIGTERM, end)
    try:
        running = _boot(spec)
    except (launcher.LaunchError, disks.DiskError, OSError) as e:
        print(str(e).replace("\n", " "), flush=True)
        _clean_up(vmid)
        return 1
    print("running", flush=True)
    # The reader of standard output must not wait for this process's end.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    while True:
        end_reason = running.wait()
        launcher.cleanup(running.container)
        run_dir = machine.RUN_DIR / str(vmid)
        again = run_dir / "again"
        if (run_dir / "stop").exists() or not (end_reason == launcher.REBOOT or again.exists()):
            break
        again.unlink(missing_ok=True)
        try:
            running = _boot(spec)
        except (launcher.LaunchError, disks.DiskError, OSError) as e:
            print(f"{time.time():.0f} reboot failed: {e}", file=sys.stderr, flush=True)
            break
    _clean_up(vmid)
    return 0


def _boot(spec: dict[str, object]) -> launcher.Started:
    vmid = int(str(spec["vmid"]))
    layers = disks.layers(str(spec["disk"]))
    assert layers.image is not None
    _write_seed(layers.upper, spec["seed"])
    nics = spec["nics"]
    assert isinstance(nics, list)
    place = machine.RUN_DIR / str(vmid)
    started = launcher.launch(
        launcher.Container(
            hostname=str(spec["name"]),
            state=place / "container",
            cgroup=machine.machine_group(vmid),
            console=place / "console.log",
            images=(layers.image,),
            lowers=layers.lowers,
            upper=layers.upper,
            work=layers.work,
            links=tuple(
                launcher.Link(
                    outside=f"tap{vmid}i{nic['index']}",
                    inside=nic["inside"] or f"eth{nic['index']}",
                    mac=nic["mac"].lower(),
                    bridge=nic["bridge"],
                    up=not nic["link_down"],
                )
                for nic in nics
            ),
            binds=(launcher.Bind(layers.sub, "/var/lib/vz", writable=True), *_delays_bind()),
            devices=("kvm:c:10:232:660", *((AGENT_PORT,) if spec["agent"] else ())),
        )
    )
    state = {"supervisor": os.getpid(), "init": started.init, "started": time.time()}
    machine.write_state(vmid, state)
    return started


def _delays_bind() -> tuple[launcher.Bind, ...]:
    """The file of the node's delays, which a guest shares if it becomes a node."""
    file = paths.pace_file()
    if not file.exists():  # on a nested node it is the outer node's file, and read-only
        file.touch()
    return (launcher.Bind(file, "/etc/nestedpve-lab.json"),)


def _write_seed(upper: Path, seed: object) -> None:
    """Write the cloud-init drive's files to a directory of the NoCloud source; none without a drive."""
    place = upper / SEED
    shutil.rmtree(place, ignore_errors=True)
    if not isinstance(seed, dict):
        return
    place.mkdir(parents=True)
    for name, text in seed.items():
        file = place / name
        file.touch(mode=0o600)
        file.write_text(text)


def _clean_up(vmid: int) -> None:
    with contextlib.suppress(OSError):
        (machine.RUN_DIR / str(vmid) / "state.json").unlink()
    with contextlib.suppress(cgroups.CgroupError, OSError):
        cgroups.remove(machine.machine_group(vmid))
    # A group cannot be removed by a process in it: move this process to the parent group first.
    with contextlib.suppress(OSError, cgroups.CgroupError):
        scope = cgroups.root() / "init.scope"
        target = scope if scope.is_dir() else cgroups.root()
        (target / "cgroup.procs").write_text(str(os.getpid()))
        machine.supervisor_group(vmid).rmdir()


if __name__ == "__main__":
    sys.exit(main())
