"""The process that runs one playbook through ansible-runner; started by `ansible.run_playbook`, by path.

A separate process, because its umask, environment and signal handlers must not be those of pytest. It reads
one JSON job from standard input and writes one JSON object per line (events of ansible-runner, at the end
`{"end": …}`) to standard output. When it ends, gets SIGTERM or loses its parent, it kills every process below
it, SSH masters included.
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
# The path of a socket, with ssh's temporary suffix, is limited to 108 bytes.
LONGEST_PRIVATE_DIR = 50


def parent_of(pid: str) -> int:
    """The parent of `pid`, 0 if it has ended."""
    try:
        text = Path("/proc", pid, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    # The program's name in parentheses may contain any character, so count from its end.
    return int(text.rpartition(")")[2].split()[1])


def descendants(root: int) -> list[int]:
    """All processes below `root`."""
    parents = {int(name): parent_of(name) for name in os.listdir("/proc") if name.isdigit()}
    below: list[int] = []
    level = [root]
    while level:
        level = [pid for pid, parent in parents.items() if parent in level]
        below += level
    return below


def kill_descendants() -> None:
    """Kill every process below this one, and orphans: this process is their subreaper."""
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
    """Replace secrets in every file below `directory`; files become 0600 and directories 0700.

    `password_in_address`: a pattern for URLs of settings, variables and output of commands.
    """
    in_address = re.compile(password_in_address.encode())
    # Also as JSON, where a line break of a key is written \n.
    forms = {form for secret in secrets if secret for form in (secret, json.dumps(secret)[1:-1])}
    needles = sorted((form.encode() for form in forms), key=len, reverse=True)
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
    """A new directory, mode 0700, with a path short enough for SSH's control sockets."""
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp"):
        if len(base) < LONGEST_PRIVATE_DIR - 20 and os.access(base, os.W_OK | os.X_OK):
            return Path(tempfile.mkdtemp(prefix="npve-", dir=base))
    return Path(tempfile.mkdtemp(prefix="npve-"))


def environment(job: dict[str, Any], private: Path) -> dict[str, str]:
    """Ansible's environment variables; they override the project's ansible.cfg, and no other file is read."""
    # An empty file, because Ansible refuses /dev/null.
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
    settings = {name: value for name, value in defaults.items() if name not in job["replaced"]} | {
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
        # Without a project's file these are the defaults.
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
    """The first arguments of every ssh, which uses the first value of a repeated option."""
    arguments = ["-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes"]
    arguments += ["-o", "ControlMaster=auto", "-o", "ControlPersist=60s"]
    arguments += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]
    return shlex.join(["-F", job["ssh_config"], *arguments] if job["ssh_config"] else arguments)


def send(out: int, message: dict[str, Any]) -> None:
    """Write one line to the parent. Without a parent nothing is written, and the clean-up follows."""
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
        send(out, {"event": event.get("event"), "data": event.get("event_data")})
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
        cancel_callback=lambda: False,  # without it ansible-runner replaces the SIGTERM handler
        quiet=True,
        suppress_env_files=True,
        fact_cache_type="memory",
        settings={"pexpect_timeout": 1, "idle_timeout": None, "job_timeout": None},
    )
    send(out, {"end": {"status": runner.status, "rc": runner.rc}})
    return int(runner.rc)


def main() -> NoReturn:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    os.umask(0o077)
    job = json.loads(sys.stdin.buffer.read())
    out = os.dup(1)
    os.set_inheritable(out, False)
    os.dup2(2, 1)  # output of libraries must not be read as events
    if os.getppid() != job["parent"]:
        os._exit(CANCELLED)  # the parent died before the death signal was requested
    # Blocked until the handler can delete the directory: a signal in between would leave it over.
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
    except BaseException as e:  # the parent raises it with the playbook's name
        # No traceback: it may show the job's variables.
        send(out, {"error": f"{type(e).__name__}: {e}"})
        rc = 1
    finish(rc)


if __name__ == "__main__":
    main()
