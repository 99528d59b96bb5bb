"""Start of a system container with a layered root: namespaces, mounts, network cards, init.

The container's mounts, links and network exist in its own namespaces as long as its processes, so ending its
cgroup removes them; only an empty cgroup and the state directory remain. Used by the lab for its outer nodes
and by every node for its guests.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shlex
import shutil
import struct
import subprocess
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from . import cgroups

REBOOT, POWEROFF = "reboot", "poweroff"

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_READ_ONLY, _LO_AUTOCLEAR = 1, 4


class LaunchError(Exception):
    """A container cannot be started; the text is the cause."""


@dataclass(frozen=True)
class Link:
    """A veth pair: `outside` here (on `bridge`, or with `address`), `inside` in the container. With
    `switch`, a process id, `outside` is in the network namespace of that process."""

    outside: str
    inside: str
    mac: str
    bridge: str | None = None
    address: str | None = None
    up: bool = True
    switch: int | None = None

    def ip(self) -> list[str]:
        """The `ip` command for the network namespace of the outside end."""
        return ["ip"] if self.switch is None else ["nsenter", f"--net=/proc/{self.switch}/ns/net", "ip"]


@dataclass(frozen=True)
class Bind:
    """A file or directory of this machine, mounted in the container at `target`."""

    source: Path
    target: str
    writable: bool = False


@dataclass(frozen=True)
class Container:
    """A container to start. `state` is a directory for the launcher; `images` are squashfs files at the
    bottom, `lowers` directories above them (both topmost first), `upper` and `work` the writable side;
    `devices` further device nodes as name:c|b:major:minor:mode; `nested` the value of
    /sys/module/kvm_*/parameters/nested."""

    hostname: str
    state: Path
    cgroup: Path
    console: Path
    images: tuple[Path, ...]
    lowers: tuple[Path, ...]
    upper: Path
    work: Path
    links: tuple[Link, ...] = ()
    binds: tuple[Bind, ...] = ()
    devices: tuple[str, ...] = ("kvm:c:10:232:660",)
    nested: bool = True


@dataclass
class Started:
    """A launched container: `process` ends with it; `init` is the id of its PID 1 on this machine."""

    process: subprocess.Popen[bytes]
    init: int
    container: Container = field(repr=False)

    def wait(self) -> str:
        """Wait for the end; REBOOT, POWEROFF or a text for any other end. The kernel ends a PID namespace's
        init by SIGHUP when that requests a reboot, by SIGINT when it requests power off or halt."""
        code = self.process.wait()
        return {129: REBOOT, -1: REBOOT, 130: POWEROFF, -2: POWEROFF}.get(code, f"ended with status {code}")


def launch(container: Container) -> Started:
    """Start the container; returns when its init is about to run. LaunchError after a failure and cleanup."""
    _prepare(container)
    loops: list[int] = []
    process: subprocess.Popen[bytes] | None = None
    try:
        devices = []
        for image in container.images:
            device, descriptor = _attach_loop(image)
            loops.append(descriptor)
            devices.append(device)
        process = _spawn(container, devices)
        assert process.stdin is not None
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise LaunchError(_failure(container, "its namespaces could not be created"))
        init = _init_of(container, process)
        _wire(container.links, process.pid)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"go\n")
            process.stdin.close()
        if process.stdout.readline() != b"mounted\n":
            raise LaunchError(_failure(container, "its root could not be mounted"))
        process.stdout.close()
        return Started(process, init, container)
    except BaseException as e:
        if process is not None:
            process.kill()
            process.wait()
        cleanup(container)
        if isinstance(e, (OSError, subprocess.CalledProcessError, cgroups.CgroupError)):
            raise LaunchError(f"{container.hostname} cannot be started: {e}") from e
        raise
    finally:
        for descriptor in loops:
            # The mounts keep the devices in use; an unused device is released by autoclear.
            os.close(descriptor)


def cleanup(container: Container) -> None:
    """End remaining processes of the container; remove its cgroup, links and state directories."""
    cgroups.remove(container.cgroup)
    for link in container.links:
        # The kernel removes a link with its namespace, a moment after the last process.
        subprocess.run([*link.ip(), "link", "del", link.outside], capture_output=True, check=False)
    shutil.rmtree(container.state, ignore_errors=True)


def _prepare(container: Container) -> None:
    state = container.state
    shutil.rmtree(state, ignore_errors=True)
    root = state / "root"
    root.mkdir(parents=True)
    # An overlay refuses a work directory that a volatile mount has used before.
    if container.work.exists():
        shutil.rmtree(container.work)
    container.work.mkdir(parents=True)
    container.upper.mkdir(parents=True, exist_ok=True)
    container.cgroup.mkdir(parents=True, exist_ok=True)
    (state / "boot_id").write_text(f"{uuid.uuid4()}\n")
    binds = [Bind(state / "boot_id", "/proc/sys/kernel/random/boot_id"), *container.binds]
    module = state / "module"
    for name in ("kvm_intel", "kvm_amd"):
        (module / name / "parameters").mkdir(parents=True)
        (module / name / "parameters" / "nested").write_text("Y\n" if container.nested else "N\n")
    binds.append(Bind(module, "/sys/module"))
    lines = []
    for bind in binds:
        if any(character.isspace() for character in f"{bind.source}{bind.target}"):
            raise LaunchError(f"paths with white space cannot be bound: {bind.source} on {bind.target}")
        lines.append(f"{'rw' if bind.writable else 'ro'} {bind.source} {bind.target}\n")
    (state / "binds").write_text("".join(lines))


def _spawn(container: Container, devices: list[str]) -> subprocess.Popen[bytes]:
    script = Path(__file__).with_name("machine-init.sh")
    unshare = [
        "unshare",
        "--net",
        "--uts",
        "--ipc",
        "--pid",
        "--cgroup",
        "--mount",
        "--propagation",
        "private",
    ]
    # The container ends with the launching process: every process is killed with its parent.
    command = ["setpriv", "--pdeathsig=KILL", *unshare, "--fork", "--kill-child", "sh", str(script)]
    into = shlex.join(["cd", "/"]) + f"; echo $$ >{shlex.quote(str(container.cgroup / 'cgroup.procs'))}"
    environment = {
        "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        "ROOT": str(container.state / "root"),
        "NAME": container.hostname,
        "IMAGES": " ".join(devices),
        "LOWERS": ":".join(map(str, container.lowers)),
        "UPPER": str(container.upper),
        "WORK": str(container.work),
        "BINDS": str(container.state / "binds"),
        "DEVICES": " ".join(container.devices),
    }
    with open(container.console, "ab") as console:
        return subprocess.Popen(
            ["sh", "-c", f"{into} && exec {shlex.join(command)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=console,
            env=environment,
            start_new_session=True,
        )


def _init_of(container: Container, process: subprocess.Popen[bytes]) -> int:
    """The process that is number 1 in the new PID namespace."""
    for pid in cgroups.processes(container.cgroup):
        if pid in (0, process.pid):
            continue
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("NSpid:") and line.split()[-1] == "1":
                    return pid
    raise LaunchError(_failure(container, "its first process has ended already"))


def _wire(links: tuple[Link, ...], namespace_of: int) -> None:
    for link in links:
        subprocess.run([*link.ip(), "link", "del", link.outside], capture_output=True, check=False)
        # Higher than a real card's: a bridge without a fixed address takes the lowest of its ports.
        outside_mac = "fe:" + ":".join(f"{random.randrange(256):02x}" for _ in range(5))
        # The card's address is set at creation: a veth has no permanent address to return to.
        steps = [
            f"link add name {link.outside} address {outside_mac} type veth "
            f"peer name {link.inside} address {link.mac} netns {namespace_of}"
        ]
        if link.bridge is not None:
            steps.append(f"link set {link.outside} master {link.bridge}")
        if link.address is not None:
            steps.append(f"address add {link.address} dev {link.outside}")
        steps.append(f"link set {link.outside} {'up' if link.up else 'down'}")
        process = subprocess.run(
            [*link.ip(), "-batch", "-"],
            input="\n".join(steps) + "\n",
            text=True,
            capture_output=True,
            check=False,
        )
        if process.returncode != 0:
            raise LaunchError(f"network card {link.outside}: {process.stderr.strip()}")


def _attach_loop(image: Path) -> tuple[str, int]:
    """A loop device over `image`, released with its last user: its device node and an open descriptor."""
    with open(image, "rb") as backing, open("/dev/loop-control", "rb") as control:
        # loop_config: fd, block_size, loop_info64 (lo_flags at offset 52 of it), 8 reserved numbers.
        info = bytearray(232)
        struct.pack_into("=I", info, 52, _LO_READ_ONLY | _LO_AUTOCLEAR)
        config = struct.pack("=II", backing.fileno(), 0) + bytes(info) + bytes(64)
        for _ in range(100):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            # On a machine the kernel has created the node already; in a container mknod does.
            node = Path(f"/dev/loop{number}")
            with contextlib.suppress(FileExistsError):
                os.mknod(node, 0o600 | 0o060000, os.makedev(7, number))
            device = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as e:
                os.close(device)
                if e.errno != errno.EBUSY:  # the number is in use by now: get the next one
                    raise LaunchError(f"image {image} cannot be attached to a loop device: {e}") from e
            else:
                return str(node), device
    raise LaunchError(f"image {image}: no free loop device after 100 tries")


def _failure(container: Container, what: str) -> str:
    try:
        tail = container.console.read_text(errors="replace").strip().splitlines()[-5:]
    except OSError:
        tail = []
    return f"{container.hostname} did not start, {what}: " + (" / ".join(tail) or "its console is empty")
