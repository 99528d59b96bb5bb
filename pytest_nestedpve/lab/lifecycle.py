"""Labs on this machine: starting, finding, entering, stopping them; removing what killed ones left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_nestedpve.pve import lock_file
from pytest_nestedpve.pve.deadline import Deadline, wait_until

from . import outer_node, programs, requirements, run_leftovers, supervisor
from .build import image, keys
from .names import FATHER, UNCLE, LabError, LabUsage, Subnets, check_name, lab_dir, labs_dir
from .node.machine import cgroups
from .node.machine.alive import held

_BOOT_LIMIT = 90.0
_STOP_LIMIT = 60.0


@dataclass(frozen=True)
class LabInfo:
    """A running lab. `pid` is father's PID 1 as seen here, `pids` has that of each outer node that is on;
    `ca_file` is there once his CA is; `state` is one of "session" (stops after its last session), "hand"
    (until stopped), "kept: …" (the reason)."""

    name: str
    dir: str
    ssh_config: str
    host: str
    api_url: str
    ca_file: str
    pid: int
    pids: dict[str, int]
    supervisor: int
    networks: tuple[str, str]
    state: str

    def json(self) -> str:
        return json.dumps(asdict(self))


def prepared(say: Callable[[str], None]) -> outer_node.Father:
    """What labs start from. Makes the cheap part (seconds) if it is not there; LabUnavailable if the image
    is not."""
    requirements.image_there(image.base_dir())
    keys.make()
    with building():
        return outer_node.build(say)


def start(name: str, *, hand: bool, say: Callable[[str], None], nodes: int = 1) -> LabInfo:
    """Start lab `name` and wait until its outer nodes (one or two) are up; if it runs already, that one. A
    lab started by `hand` stays until it is stopped. LabUnavailable, LabError."""
    check_name(name)
    requirements.check()
    sweep()
    with lab_lock(name):
        return start_locked(name, hand=hand, say=say, nodes=nodes)


def start_locked(name: str, *, hand: bool, say: Callable[[str], None], nodes: int = 1) -> LabInfo:
    """`start` for who holds the lab's lock and has checked what is required."""
    folder = lab_dir(name)
    running = find(name)
    if running is not None:
        if nodes > _nodes_of(folder):
            raise LabError(f"lab {name} runs with one node; stop it first: `nestedpve-lab stop {name}`")
        if hand:
            (folder / "hand").touch()
        return find(name) or running
    _remove_dead(folder)
    made = prepared(say)
    say(f"starting lab {name}")
    folder.mkdir(parents=True, mode=0o700)
    try:
        _write(folder, made, hand, nodes)
        _spawn(name)
        _finish_ssh(folder)
        _await_father(folder)
        if nodes > 1:
            _await_uncle(folder)
    except BaseException:
        stop_locked(name)
        raise
    found = find(name)
    if found is None:
        raise LabError(f"lab {name} ended while it was starting")
    return found


def find(name: str) -> LabInfo | None:
    """The lab if it runs."""
    folder = lab_dir(name)
    if not _alive(folder):
        return None
    try:
        known = json.loads((folder / "lab.json").read_text())
    except (OSError, ValueError):
        return None
    subnets = Subnets(int(known["number"]))
    pids = {FATHER: int(known["pid"])}
    with contextlib.suppress(OSError, ValueError):
        pids[UNCLE] = int(supervisor.pid_file(folder).read_text())
    state = "hand" if (folder / "hand").exists() else "session"
    with contextlib.suppress(OSError):
        state = f"kept: {(folder / 'kept').read_text().strip()}" if state == "session" else state
    return LabInfo(
        name=name,
        dir=str(folder),
        ssh_config=str(folder / "ssh_config"),
        host=FATHER,
        api_url=f"https://{subnets.uplink_father}:8006",
        ca_file=str(folder / "pve-root-ca.pem"),
        pid=pids[FATHER],
        pids=pids,
        supervisor=int(known["supervisor"]),
        networks=(subnets.uplink, subnets.bridge),
        state=state,
    )


def need(name: str) -> LabInfo:
    """The lab, which runs. LabError if it does not."""
    lab = find(name)
    if lab is None:
        shown = ", ".join(one.name for one in running()) or "none"
        raise LabError(f"lab {name!r} does not run; running: {shown}. `nestedpve-lab start {name}` starts it")
    return lab


def running() -> list[LabInfo]:
    """All labs of this cache that run."""
    return [lab for name in names() if (lab := find(name)) is not None]


def names() -> list[str]:
    """Labs that have a directory, running or not."""
    return sorted(path.name for path in labs_dir().glob("[a-z0-9]*") if path.is_dir())


def stop(name: str) -> bool:
    """Stop the lab and wait until nothing of it is left; whether there was one. LabError at the limit."""
    check_name(name)
    if not lab_dir(name).exists():
        return False
    with lab_lock(name):
        return stop_locked(name)


def stop_locked(name: str) -> bool:
    """`stop` for who holds the lab's lock."""
    folder = lab_dir(name)
    if not folder.exists():
        return False
    process = _supervisor(folder)
    if process is not None and not _ask_to_end(process, _STOP_LIMIT):
        raise LabError(
            f"lab {name}: its supervisor, process {process}, did not end within {_STOP_LIMIT:g} s; "
            f"its log is {folder}/supervisor.log"
        )
    _remove_dead(folder)
    supervisor.lock_file(folder).unlink(missing_ok=True)
    return True


def sweep() -> list[str]:
    """Remove what labs left whose supervisor was killed; their names. A lab that is just being started or
    stopped is left alone."""
    swept = []
    for name in names():
        with contextlib.suppress(BlockingIOError), lab_lock(name, wait=False):
            if lab_dir(name).exists() and not _alive(lab_dir(name)):
                _remove_dead(lab_dir(name))
                swept.append(name)
    for left in labs_dir().glob(".*.lock"):
        if not lab_dir(left.name[1:-5]).exists():
            with contextlib.suppress(BlockingIOError, OSError), lock_file.locked(left, wait=False):
                left.unlink()
    return swept


def enter(name: str, node: str, command: Sequence[str]) -> int:
    """Run a command on a node of a running lab with this process's streams; its exit status.

    `node` is father, uncle, `nested` (a VM of father's), `leaf` (a VM of nested's), or a chain of vmids or
    names such as `9900/101` or `uncle/9900`. LabError if the lab or node is not there.
    """
    from .enter import namespace_command

    argv = namespace_command(need(name).pids, node, command)
    return subprocess.run(argv, env={**os.environ, "PATH": programs.search_path()}, check=False).returncode


def power(name: str, node: str, *, on: bool) -> None:
    """Switch uncle on, and wait until he is up, or off, as by pulling the plug. LabError, LabUsage."""
    if node != UNCLE:
        raise LabUsage(f"power: expected {UNCLE}, found {node!r}: with {FATHER} the lab itself ends")
    lab = need(name)
    folder = Path(lab.dir)
    if _nodes_of(folder) < 2:
        raise LabError(f"lab {name} has one node; `nestedpve-lab start NAME --nodes 2` has two")
    if on and UNCLE in lab.pids:
        _await_uncle(folder)
        return
    number = int(json.loads((folder / "lab.json").read_text())["number"])
    group = cgroups.root() / Subnets(number).cgroup / UNCLE

    def is_off() -> bool:
        if supervisor.off_file(folder).exists():
            return True
        # Each time: one that was just booting has begun only now.
        cgroups.kill(group)
        return False

    wait_until(
        (lambda: _press(supervisor.power_file(folder))) if on else is_off,
        deadline=Deadline(_BOOT_LIMIT),
        what=f"{UNCLE} to be quite off",
        interval=(0.02, 0.2),
    )
    if on:
        _await_uncle(folder)


def _press(button: Path) -> bool:
    """Whether somebody waits for it; a pipe without a reader cannot be opened for writing."""
    try:
        os.close(os.open(button, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _nodes_of(folder: Path) -> int:
    return int(json.loads((folder / "start.json").read_text()).get("nodes", 1))


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Held while something is made in the cache, or taken out of it."""
    labs_dir().parent.mkdir(parents=True, exist_ok=True)
    with lock_file.locked(labs_dir().parent / "build.lock"):
        yield


@contextlib.contextmanager
def lab_lock(name: str, *, wait: bool = True) -> Iterator[None]:
    """Held while a lab is started, stopped or joined. BlockingIOError if it is held and `wait` is false."""
    path = supervisor.lock_file(lab_dir(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.locked(path, wait=wait):
        yield


def _alive(folder: Path) -> bool:
    """Whether the lab's supervisor lives."""
    return held(folder / "supervisor.lock")


def _supervisor(folder: Path) -> int | None:
    if not _alive(folder):
        return None
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "supervisor.pid").read_text())
    return None


def _ask_to_end(process: int, limit: float) -> bool:
    """Send SIGTERM and wait for the end; whether it came within the limit (seconds)."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        return True
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        return bool(select.select([handle], [], [], limit)[0])
    except ProcessLookupError:
        return True
    finally:
        os.close(handle)


def _remove_dead(folder: Path) -> None:
    """Everything of a lab without a supervisor."""
    if not folder.exists():
        return
    number = None
    with contextlib.suppress(OSError, ValueError, KeyError):
        number = int(json.loads((folder / "lab.json").read_text())["number"])
    if number is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        supervisor.take_down(folder, Subnets(number))
    except cgroups.CgroupError as e:
        raise LabError(f"lab {folder.name} cannot be removed: {e}") from e


def _write(folder: Path, made: outer_node.Father, hand: bool, nodes: int) -> None:
    for name in ("id_ed25519", "host_ed25519", *(["host_uncle_ed25519"] if nodes > 1 else [])):
        comment = f"{name} of lab {folder.name}"
        command: list[str | Path] = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"]
        command.append(folder / name)
        programs.run(command, what="making the lab's keys")
    if hand:
        (folder / "hand").touch()
    settings: dict[str, Any] = {
        "image": str(made.image),
        "layers": [str(layer) for layer in made.layers],
        "mirror_site": str(made.mirror_site),
        "pve_site": str(made.pve_site),
        "nodes": nodes,
    }
    (folder / "start.json").write_text(json.dumps(settings))
    (folder / "session.lock").touch()


def _spawn(name: str) -> None:
    """Start the supervisor and wait until it has launched father. LabError says what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest_nestedpve.lab.supervisor", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd="/",
        env=_supervisor_environment(),
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        line = process.stdout.readline()
        said = {} if line.strip() else {"error": process.stderr.read().decode(errors="replace").strip()}
    process.wait()  # the supervisor itself is its child, and nobody's after this
    said = json.loads(line) if line.strip() else said
    if not said.get("ok"):
        raise LabError(f"lab {name} did not start: {said.get('error') or 'its supervisor said nothing'}")


def _supervisor_environment() -> dict[str, str]:
    """What the supervisor needs of ours; it lives longer than the shell it was started from."""
    here = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("HOME", "NESTED_PVE_CACHE", "LANG") if name in os.environ}
    return {**kept, "PATH": programs.search_path(), "PYTHONPATH": here, "PYTHONDONTWRITEBYTECODE": "1"}


def _finish_ssh(folder: Path) -> None:
    known = json.loads((folder / "lab.json").read_text())
    public = " ".join((folder / "host_ed25519.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"{known['address']} {public}\n{FATHER} {public}\n")
    (folder / "ssh_config").write_text(
        f"Host {FATHER}\n"
        f"  HostName {known['address']}\n"
        "  User root\n"
        f"  HostKeyAlias {FATHER}\n"
        f"  IdentityFile {folder}/id_ed25519\n"
        "  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n"
        "  GlobalKnownHostsFile /dev/null\n"
        "  StrictHostKeyChecking yes\n"
        "  ConnectTimeout 10\n"
        "  ServerAliveInterval 15\n"
    )


def _await_father(folder: Path) -> None:
    """Until he answers over SSH and his services have started."""
    _await_boot(folder, FATHER, "")
    # What his administrator has set: a fresh PVE's `local` takes no import volumes (recording basic-017).
    done = run_leftovers.ssh(
        folder, "pvesm set local --content images,rootdir,vztmpl,backup,iso,snippets,import"
    )
    if done.returncode:
        raise LabError(f"father's storage cannot be set up: {(done.stderr or done.stdout).strip()}")
    # His CA, for who talks to port 8006 from here.
    ca = run_leftovers.ssh(folder, "cat /etc/pve/pve-root-ca.pem")
    if ca.returncode == 0:
        (folder / "pve-root-ca.pem").write_text(ca.stdout)


def _await_uncle(folder: Path) -> None:
    """Until his services have started, as father sees him over the nodes' own SSH."""
    known = f"-o UserKnownHostsFile=/etc/pve/nodes/{UNCLE}/ssh_known_hosts"
    login = f"ssh -o BatchMode=yes -o ConnectTimeout=5 {known} -o StrictHostKeyChecking=yes {UNCLE} "
    _await_boot(folder, UNCLE, login, "console-uncle.log")


def _await_boot(folder: Path, node: str, login: str, console: str = "console.log") -> None:
    """`login`: father's command to get to the node, a blank at its end."""
    deadline = Deadline(_BOOT_LIMIT)
    last = "nothing yet"

    def up() -> bool:
        nonlocal last
        if not _alive(folder):
            raise LabError(f"{node} ended while booting; {_tail(folder, console)}")
        command = f"{login}systemctl is-system-running --wait || true"
        try:
            done = run_leftovers.ssh(folder, command, limit=deadline.remaining() + 1)
        except LabError as e:
            last = str(e)
            return False
        last = done.stdout.strip() or done.stderr.strip()
        return last in ("running", "degraded")

    wait_until(up, deadline=deadline, what=lambda: f"{node} to boot (last: {last})", interval=(0.05, 0.5))


def _tail(folder: Path, console: str) -> str:
    with contextlib.suppress(OSError):
        return "the end of his console: " + " / ".join((folder / console).read_text().splitlines()[-5:])
    return "his console said nothing"
