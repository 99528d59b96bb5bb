"""Labs on this machine: start, find, enter and stop them; remove leftovers of killed ones."""

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
from .names import FATHER, SECOND_NODE, LabError, LabUsage, Subnets, check_name, lab_dir, labs_dir
from .node.machine import cgroups
from .node.machine.alive import held

_BOOT_LIMIT = 90.0
_STOP_LIMIT = 60.0


@dataclass(frozen=True)
class LabInfo:
    """A running lab. `pid` is father's PID 1 as this machine sees it, `pids` has that of each running outer
    node; `ca_file` exists once father has a CA; `state` is one of "session" (stops after its last session),
    "hand" (runs until it is stopped), "kept: …" (the reason)."""

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


def prepare_files(report: Callable[[str], None]) -> outer_node.NodeFiles:
    """The files from which outer nodes start. Builds missing ones except the image (seconds). LabUnavailable
    without an image."""
    requirements.check_image(image.base_dir())
    keys.create()
    with building():
        return outer_node.build(report)


def start(name: str, *, hand: bool, report: Callable[[str], None], nodes: int = 1) -> LabInfo:
    """Start lab `name` unless it runs, and wait until its outer nodes (one or two) are up. A lab started by
    `hand` runs until it is stopped. LabUnavailable, LabError."""
    check_name(name)
    requirements.check()
    sweep()
    with lab_lock(name):
        return start_locked(name, hand=hand, report=report, nodes=nodes)


def start_locked(name: str, *, hand: bool, report: Callable[[str], None], nodes: int = 1) -> LabInfo:
    """`start` for a caller that holds the lab's lock and has checked the requirements."""
    folder = lab_dir(name)
    running = find(name)
    if running is not None:
        if nodes > _nodes_of(folder):
            raise LabError(f"lab {name} runs with one node; stop it first: `nestedpve-lab stop {name}`")
        if hand:
            (folder / "hand").touch()
        return find(name) or running
    _remove_leftovers(folder)
    files = prepare_files(report)
    report(f"starting lab {name}")
    folder.mkdir(parents=True, mode=0o700)
    try:
        _write(folder, files, hand, nodes)
        _spawn(name)
        _finish_ssh(folder)
        _await_father(folder)
        if nodes > 1:
            _await_second(folder)
    except BaseException:
        stop_locked(name)
        raise
    lab = find(name)
    if lab is None:
        raise LabError(f"lab {name} ended while it was starting")
    return lab


def find(name: str) -> LabInfo | None:
    """The lab; None if it does not run."""
    folder = lab_dir(name)
    if not _is_alive(folder):
        return None
    try:
        state = json.loads((folder / "lab.json").read_text())
    except (OSError, ValueError):
        return None
    subnets = Subnets(int(state["number"]))
    pids = {FATHER: int(state["pid"])}
    with contextlib.suppress(OSError, ValueError):
        pids[SECOND_NODE] = int(supervisor.pid_file(folder).read_text())
    lifetime = "hand" if (folder / "hand").exists() else "session"
    with contextlib.suppress(OSError):
        lifetime = f"kept: {(folder / 'kept').read_text().strip()}" if lifetime == "session" else lifetime
    return LabInfo(
        name=name,
        dir=str(folder),
        ssh_config=str(folder / "ssh_config"),
        host=FATHER,
        api_url=f"https://{subnets.uplink_father}:8006",
        ca_file=str(folder / "pve-root-ca.pem"),
        pid=pids[FATHER],
        pids=pids,
        supervisor=int(state["supervisor"]),
        networks=(subnets.uplink, subnets.bridge),
        state=lifetime,
    )


def get(name: str) -> LabInfo:
    """The running lab. LabError if it does not run."""
    lab = find(name)
    if lab is None:
        labs = ", ".join(lab.name for lab in list_running()) or "none"
        raise LabError(f"lab {name!r} does not run; running: {labs}. `nestedpve-lab start {name}` starts it")
    return lab


def list_running() -> list[LabInfo]:
    """All running labs of this cache."""
    return [lab for name in list_names() if (lab := find(name)) is not None]


def list_names() -> list[str]:
    """Names of labs that have a directory, running or not."""
    return sorted(path.name for path in labs_dir().glob("[a-z0-9]*") if path.is_dir())


def stop(name: str) -> bool:
    """Stop the lab and wait until all of it is removed. False if it did not exist. LabError at the limit."""
    check_name(name)
    if not lab_dir(name).exists():
        return False
    with lab_lock(name):
        return stop_locked(name)


def stop_locked(name: str) -> bool:
    """`stop` for a caller that holds the lab's lock."""
    folder = lab_dir(name)
    if not folder.exists():
        return False
    process = _supervisor_pid(folder)
    if process is not None and not _terminate(process, _STOP_LIMIT):
        raise LabError(
            f"lab {name}: its supervisor, process {process}, did not end within {_STOP_LIMIT:g} s; "
            f"see its log {folder}/supervisor.log"
        )
    _remove_leftovers(folder)
    supervisor.lock_file(folder).unlink(missing_ok=True)
    return True


def sweep() -> list[str]:
    """Remove leftovers of labs whose supervisor was killed; the labs' names. A lab that is being started or
    stopped is skipped."""
    removed = []
    for name in list_names():
        with contextlib.suppress(BlockingIOError), lab_lock(name, wait=False):
            if lab_dir(name).exists() and not _is_alive(lab_dir(name)):
                _remove_leftovers(lab_dir(name))
                removed.append(name)
    for path in labs_dir().glob(".*.lock"):
        if not lab_dir(path.name[1:-5]).exists():
            with contextlib.suppress(BlockingIOError, OSError), lock_file.locked(path, wait=False):
                path.unlink()
    return removed


def enter(name: str, node: str, command: Sequence[str]) -> int:
    """Run a command on a node of a running lab with this process's streams; its exit status.

    `node` is father, father2, `nested` (a VM of father), `leaf` (a VM of nested), or a chain of vmids or
    names such as `9900/101` or `father2/9900`. LabError if the lab or the node does not run.
    """
    from .enter import namespace_command

    argv = namespace_command(get(name).pids, node, command)
    return subprocess.run(argv, env={**os.environ, "PATH": programs.search_path()}, check=False).returncode


def power(name: str, node: str, *, on: bool) -> None:
    """Switch the second node off as by pulling the plug, or on until it is up. LabError, LabUsage."""
    if node != SECOND_NODE:
        raise LabUsage(f"power: expected {SECOND_NODE}, found {node!r}; `nestedpve-lab stop` ends {FATHER}")
    lab = get(name)
    folder = Path(lab.dir)
    if _nodes_of(folder) < 2:
        raise LabError(f"lab {name} has one node; `nestedpve-lab start NAME --nodes 2` starts two")
    if on and SECOND_NODE in lab.pids:
        _await_second(folder)
        return
    number = int(json.loads((folder / "lab.json").read_text())["number"])
    group = cgroups.root() / Subnets(number).cgroup / SECOND_NODE

    def is_off() -> bool:
        if supervisor.off_file(folder).exists():
            return True
        # At each poll: a node that was booting has processes only now.
        cgroups.kill(group)
        return False

    wait_until(
        (lambda: _switch_on(supervisor.power_file(folder))) if on else is_off,
        deadline=Deadline(_BOOT_LIMIT),
        what=f"{SECOND_NODE} to be off",
        interval=(0.02, 0.2),
    )
    if on:
        _await_second(folder)


def _switch_on(button: Path) -> bool:
    """Open the pipe for writing. False if the supervisor does not read it, as the node is not off."""
    try:
        os.close(os.open(button, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _nodes_of(folder: Path) -> int:
    return int(json.loads((folder / "start.json").read_text()).get("nodes", 1))


@contextlib.contextmanager
def building() -> Iterator[None]:
    """Hold the lock under which files of the cache are built and removed."""
    labs_dir().parent.mkdir(parents=True, exist_ok=True)
    with lock_file.locked(labs_dir().parent / "build.lock"):
        yield


@contextlib.contextmanager
def lab_lock(name: str, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock for starting, stopping or joining a lab. BlockingIOError if held and `wait` is false."""
    path = supervisor.lock_file(lab_dir(name))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.locked(path, wait=wait):
        yield


def _is_alive(folder: Path) -> bool:
    """Whether the lab's supervisor runs."""
    return held(folder / "supervisor.lock")


def _supervisor_pid(folder: Path) -> int | None:
    if not _is_alive(folder):
        return None
    with contextlib.suppress(OSError, ValueError):
        return int((folder / "supervisor.pid").read_text())
    return None


def _terminate(process: int, limit: float) -> bool:
    """Send SIGTERM and wait. Whether the process ended within the limit (seconds)."""
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


def _remove_leftovers(folder: Path) -> None:
    """Remove everything of a lab without a supervisor."""
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
        raise LabError(f"lab {folder.name}: its control group cannot be removed: {e}") from e


def _write(folder: Path, files: outer_node.NodeFiles, hand: bool, nodes: int) -> None:
    for name in ("id_ed25519", "host_ed25519", *(["host_father2_ed25519"] if nodes > 1 else [])):
        comment = f"{name} of lab {folder.name}"
        command: list[str | Path] = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f"]
        command.append(folder / name)
        programs.run(command, what="creating the lab's SSH keys")
    if hand:
        (folder / "hand").touch()
    settings: dict[str, Any] = {
        "image": str(files.image),
        "layers": [str(layer) for layer in files.layers],
        "mirror_site": str(files.mirror_site),
        "pve_site": str(files.pve_site),
        "nodes": nodes,
    }
    (folder / "start.json").write_text(json.dumps(settings))
    (folder / "session.lock").touch()


def _spawn(name: str) -> None:
    """Start the supervisor and wait until it has launched father. LabError with the supervisor's message."""
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
        answer = {} if line.strip() else {"error": process.stderr.read().decode(errors="replace").strip()}
    process.wait()  # the supervisor itself is its child, and init's after this
    answer = json.loads(line) if line.strip() else answer
    if not answer.get("ok"):
        raise LabError(f"lab {name} did not start: {answer.get('error') or 'its supervisor wrote nothing'}")


def _supervisor_environment() -> dict[str, str]:
    """The few variables that the supervisor, which outlives the caller's shell, needs."""
    library = str(Path(__file__).resolve().parents[2])
    kept = {name: os.environ[name] for name in ("HOME", "NESTED_PVE_CACHE", "LANG") if name in os.environ}
    return {**kept, "PATH": programs.search_path(), "PYTHONPATH": library, "PYTHONDONTWRITEBYTECODE": "1"}


def _finish_ssh(folder: Path) -> None:
    address = json.loads((folder / "lab.json").read_text())["address"]
    public = " ".join((folder / "host_ed25519.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"{address} {public}\n{FATHER} {public}\n")
    (folder / "ssh_config").write_text(
        f"Host {FATHER}\n"
        f"  HostName {address}\n"
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
    """Wait until father answers over SSH and its services have started."""
    _await_boot(folder, FATHER, "")
    # As an administrator sets it: `local` of a fresh PVE takes no import volumes (recording basic-017).
    done = run_leftovers.ssh(
        folder, "pvesm set local --content images,rootdir,vztmpl,backup,iso,snippets,import"
    )
    if done.returncode:
        raise LabError(f"father: `pvesm set local` failed: {(done.stderr or done.stdout).strip()}")
    # Father's CA, for clients of port 8006 on this machine.
    ca = run_leftovers.ssh(folder, "cat /etc/pve/pve-root-ca.pem")
    if ca.returncode == 0:
        (folder / "pve-root-ca.pem").write_text(ca.stdout)


def _await_second(folder: Path) -> None:
    """Wait until the second node's services have started, as seen from father over the nodes' own SSH."""
    known = f"-o UserKnownHostsFile=/etc/pve/nodes/{SECOND_NODE}/ssh_known_hosts"
    login = f"ssh -o BatchMode=yes -o ConnectTimeout=5 {known} -o StrictHostKeyChecking=yes {SECOND_NODE} "
    _await_boot(folder, SECOND_NODE, login, "console-father2.log")


def _await_boot(folder: Path, node: str, login: str, console: str = "console.log") -> None:
    """Wait until `node` has booted. `login`: the command on father that logs in at the node, or empty."""
    deadline = Deadline(_BOOT_LIMIT)
    last = "no answer yet"

    def up() -> bool:
        nonlocal last
        if not _is_alive(folder):
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
        return "the end of its console: " + " / ".join((folder / console).read_text().splitlines()[-5:])
    return "its console is empty"
