"""The process that runs one playbook through ansible-runner; started by `ansible.run_playbook`, by path.

A process of its own because umask, environment and signals are a whole process's: here they are tight
without touching pytest's. It reads one JSON job from standard input, writes one JSON object a line (an
event of ansible-runner, at the end `{"end": …}`) to standard output, and takes every process below it,
SSH masters included, along when it ends, is told to end, or loses its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import shlex
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
CANCELLED = 143
MASK = "********"
# ssh needs room below 108 bytes for the socket's name and its own temporary suffix.
LONGEST_PRIVATE_DIR = 50


def parent_of(pid: str) -> int:
    """The parent of `pid`, 0 if it is gone."""
    try:
        text = Path("/proc", pid, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The name in parentheses may hold anything, so count from its end.
    return int(text.rpartition(")")[2].split()[1])


def descendants(root: int) -> list[int]:
    """All processes below `root`."""
    parents = {int(name): parent_of(name) for name in os.listdir("/proc") if name.isdigit()}
    found: list[int] = []
    front = [root]
    while front:
        front = [pid for pid, parent in parents.items() if parent in front]
        found += front
    return found


def kill_descendants() -> None:
    """End every process below this one; orphans come here because this process is their subreaper."""
    for _ in range(250):
        below = descendants(os.getpid())
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        if not below:
            return
        select.select([], [], [], 0.02)


def mask_artifacts(directory: Path, secrets: list[str], password_in_address: str) -> None:
    """Replace secrets in every file below `directory`, and close files and directories to others.

    `password_in_address` is a pattern: addresses come with settings, variables and what commands say.
    """
    in_address = re.compile(password_in_address.encode())
    # As JSON holds them too: a line break in a key is \n there.
    texts = {form for secret in secrets if secret for form in (secret, json.dumps(secret)[1:-1])}
    needles = sorted((text.encode() for text in texts), key=len, reverse=True)
    for path in [directory, *directory.rglob("*")]:
        if path.is_symlink():
            continue
        if path.is_dir():
            path.chmod(0o700)
        elif path.is_file():
            path.chmod(0o600)
            before = path.read_bytes()
            after = before
            for needle in needles:
                after = after.replace(needle, MASK.encode())
            after = in_address.sub(rb"\g<1>%s\g<2>" % MASK.encode(), after)
            if after != before:
                path.write_bytes(after)


def private_directory() -> Path:
    """A new directory of ours alone with a path short enough for SSH's control sockets."""
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp"):
        if len(base) < LONGEST_PRIVATE_DIR - 20 and os.access(base, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="npve-", dir=base))
    return Path(tempfile.mkdtemp(prefix="npve-"))


def environment(job: dict[str, Any], private: Path) -> dict[str, str]:
    """Ansible's settings for this run; of a file, only a project's own applies, and not in what is ours."""
    # An empty file, because /dev/null is refused.
    (private / "ansible.cfg").touch()
    (private / "cp").mkdir()
    defaults = {
        "PIPELINING": "True",
        "SSH_RETRIES": "3",
        "RETRY_FILES_ENABLED": "False",
        "LOCALHOST_WARNING": "False",
        "INVENTORY_UNPARSED_WARNING": "False",
        "PYTHON_INTERPRETER": "auto_silent",
        "TIMEOUT": "15",
    }
    settings = {name: value for name, value in defaults.items() if name not in job["theirs"]} | {
        "CONFIG": job["config"] or str(private / "ansible.cfg"),
        "HOME": str(private / "home"),
        "LOCAL_TEMP": str(private / "tmp"),
        "HOST_KEY_CHECKING": "True",
        "SSH_HOST_KEY_CHECKING": "True",
        "PARAMIKO_HOST_KEY_CHECKING": "True",
        "PARAMIKO_HOST_KEY_AUTO_ADD": "False",
        "SSH_ARGS": ssh_args(job),
        "SSH_CONTROL_PATH_DIR": str(private / "cp"),
        "NOCOLOR": "1",
        "FORCE_COLOR": "False",
        "ROLES_PATH": os.pathsep.join(job["roles_path"]),
        "COLLECTIONS_PATH": os.pathsep.join(job["collections_path"]),
        "CALLBACK_PLUGINS": os.pathsep.join(job["callbacks"]),
    }
    if job["config"]:
        # Else these are so by default.
        settings |= {
            "LOG_PATH": str(private / "log"),
            "TRANSPORT": "ssh",
            "SSH_CONTROL_PATH": "%(directory)s/%%C",
            "PRIVATE_KEY_FILE": job["key"] or str(private / "none"),
            "INVENTORY_ENABLED": "yaml",
            "ASK_PASS": "False",
            "ASK_VAULT_PASS": "False",
            "BECOME_ASK_PASS": "False",
        }
    return {f"ANSIBLE_{name}": value for name, value in settings.items() if value}


def ssh_args(job: dict[str, Any]) -> str:
    """The first arguments of every ssh; of an option that is given twice, ssh takes the first."""
    arguments = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
    arguments += ["-o", "ControlMaster=auto", "-o", "ControlPersist=60s"]
    arguments += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]
    return shlex.join(["-F", job["ssh_config"], *arguments] if job["ssh_config"] else arguments)


def tell(out: int, message: dict[str, Any]) -> None:
    """Write one line to the parent; a parent that is gone does not keep us from clearing up."""
    data = json.dumps(message, default=str).encode() + b"\n"
    with contextlib.suppress(BrokenPipeError):
        while data:
            data = data[os.write(out, data) :]


def run(job: dict[str, Any], private: Path, out: int) -> int:
    import ansible_runner

    (private / "inventory.json").write_text(json.dumps(job["inventory"]), encoding="utf-8")
    variables = {**job["variables"], **job["guards"], "ansible_ssh_args": ssh_args(job)}
    (private / "vars.json").write_text(json.dumps(variables), encoding="utf-8")
    os.environ.update(environment(job, private))

    def on_event(event: dict[str, Any]) -> bool:
        tell(out, {"event": event.get("event"), "data": event.get("event_data")})
        return True

    runner = ansible_runner.run(
        private_data_dir=str(private),
        artifact_dir=job["artifacts"],
        ident=job["ident"],
        project_dir=str(Path(job["playbook"]).parent),
        playbook=job["playbook"],
        inventory=str(private / "inventory.json"),
        cmdline=shlex.join(["-e", f"@{private / 'vars.json'}", *job["arguments"]]),
        event_handler=on_event,
        cancel_callback=lambda: False,  # without one, ansible-runner takes our SIGTERM handler away
        quiet=True,
        suppress_env_files=True,
        fact_cache_type="memory",
        settings={"pexpect_timeout": 1, "idle_timeout": None, "job_timeout": None},
    )
    tell(out, {"end": {"status": runner.status, "rc": runner.rc}})
    return int(runner.rc)


def main() -> NoReturn:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    os.umask(0o077)
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    os.set_inheritable(out, False)
    os.dup2(2, 1)  # whatever a library prints is no event
    if os.getppid() != job["parent"]:
        os._exit(CANCELLED)  # the parent died before the death signal was asked for
    # Blocked until the clean-up knows the directory: a signal in between would leave it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    private = private_directory()

    def finish(rc: int) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        kill_descendants()
        mask_artifacts(Path(job["artifacts"]), job["secrets"], job["password_in_address"])
        shutil.rmtree(private, ignore_errors=True)
        os._exit(rc)

    def on_term(_number: int, _frame: FrameType | None) -> None:
        finish(CANCELLED)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        rc = run(job, private, out)
    except BaseException as e:  # reported to the parent, which raises it with the playbook's name
        # repr only: a traceback may show the job's variables
        tell(out, {"error": f"{type(e).__name__}: {e}"})
        rc = 1
    finish(rc)


if __name__ == "__main__":
    main()
