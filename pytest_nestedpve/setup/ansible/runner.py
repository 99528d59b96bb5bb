"""Run playbooks through ansible-runner in a separate process, without leftovers.

No secret is in a command line, an environment or a file of the run directory: variables are sent through a
pipe into a 0600 file of a private directory, which the process deletes; the artifacts are 0700 and masked
at the end.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import CommandTimeout, PveError
from pytest_nestedpve.run.masking import MASK, PASSWORD_IN_ADDRESS
from pytest_nestedpve.setup.ansible import ansible_cfg
from pytest_nestedpve.setup.ansible.ansible_cfg import GUARDS, AnsibleConfig
from pytest_nestedpve.setup.ansible.inventory import Inventory, InventoryHost, nested_inventory

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings

__all__ = [
    "AnsibleArgs", "AnsibleConfig", "HostRecap", "Inventory", "InventoryHost", "PlaybookEvent",
    "PlaybookFailed", "PlaybookResult", "PlaybookTimeout", "TaskRecord", "nested_inventory", "playbook_path",
    "project_config", "run_playbook",
]  # fmt: skip

_CHILD = Path(__file__).with_name("child.py")
# No other variables are passed on: the artifacts contain the environment of the process.
_PASSED_ON = (
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "SSH_AUTH_SOCK",
    "XDG_RUNTIME_DIR",
)
_TASK_ENDS = {
    "runner_on_ok": "ok",
    "runner_on_failed": "failed",
    "runner_on_unreachable": "unreachable",
    "runner_on_skipped": "skipped",
}
_WAITS = ("wait_for_connection", "reboot")
_TERM_GRACE = 15.0
_TEXT_LIMIT = 2000


@dataclass(frozen=True)
class AnsibleArgs:
    """Directories, configuration and secrets for a playbook.

    `run_dir`: parent of `artifacts/`; `ssh_config`: for `ssh -F` (None: ssh's defaults); `secrets`: replaced
    in the artifacts after the playbook has ended; `config`: a project's ansible.cfg.
    """

    run_dir: Path
    ssh_config: Path | None = None
    roles_path: tuple[Path, ...] = ()
    collections_path: tuple[Path, ...] = ()
    secrets: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # further arguments of ansible-playbook, such as --limit
    config: AnsibleConfig | None = None


@dataclass(frozen=True)
class PlaybookEvent:
    """An event of a running playbook. `kind`: play, task, ok, failed, unreachable, skipped."""

    kind: str
    name: str
    host: str = ""
    role: str = ""
    changed: bool = False


@dataclass(frozen=True)
class TaskRecord:
    """The result of one task on one host; `seconds`: measured by Ansible."""

    host: str
    name: str
    role: str
    status: str
    changed: bool
    seconds: float


@dataclass(frozen=True)
class HostRecap:
    """Ansible's own counts for one host."""

    ok: int = 0
    changed: int = 0
    unreachable: int = 0
    failed: int = 0
    skipped: int = 0
    rescued: int = 0
    ignored: int = 0

    def __str__(self) -> str:
        return (
            f"ok={self.ok} changed={self.changed} unreachable={self.unreachable} failed={self.failed} "
            f"skipped={self.skipped} rescued={self.rescued} ignored={self.ignored}"
        )


@dataclass(frozen=True)
class PlaybookResult:
    """How a playbook ended.

    `failures`: one text per failed task, without output that `no_log` hides; `stats`: data of set_stats.
    """

    playbook: str
    rc: int
    recap: Mapping[str, HostRecap]
    failures: tuple[str, ...]
    tasks: tuple[TaskRecord, ...]
    artifacts: Path
    stats: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """Tasks that changed something, over all hosts."""
        return sum(recap.changed for recap in self.recap.values())

    @property
    def unreachable(self) -> bool:
        """Whether a host did not answer (its address may have changed)."""
        return any(task.status == "unreachable" for task in self.tasks)

    @property
    def ok(self) -> bool:
        return self.rc == 0


class PlaybookFailed(PveError):
    """A playbook could not run, or ended with a status other than 0 (then with `result`)."""

    def __init__(self, text: str, result: PlaybookResult | None = None) -> None:
        super().__init__(text)
        self.result = result


class PlaybookTimeout(PlaybookFailed, CommandTimeout):
    """A playbook did not end within its limit; it and every process below it were killed."""


def run_playbook(
    env_or_args: Any,
    playbook: Path,
    *,
    inventory: Inventory,
    variables: Mapping[str, Any] | None = None,
    timeout: float,
    on_event: Callable[[PlaybookEvent], None] | None = None,
    check: bool = True,
) -> PlaybookResult:
    """Run `playbook` within `timeout` seconds (nominal) and return how it ended.

    `env_or_args`: AnsibleArgs, or an Environment with run directory, ssh_config, roles and collections.
    `variables`: data that JSON can represent; they override the inventory's. When this function returns or
    raises, every process of the playbook has ended.

    Raises PlaybookTimeout; PlaybookFailed when Ansible cannot run, or, unless `check` is false, when the
    playbook fails.
    """
    args = env_or_args if isinstance(env_or_args, AnsibleArgs) else _args_of(env_or_args)
    if not playbook.is_file():
        raise PlaybookFailed(f"expected a playbook at {playbook}, found no file")
    deadline = Deadline(timeout)
    artifacts = _artifacts_root(args.run_dir)
    ident = _next_ident(artifacts, playbook.stem)
    collector = _Collector(on_event)
    job = {
        "parent": os.getpid(),
        "playbook": str(playbook.resolve()),
        "inventory": inventory.to_data(),
        "variables": dict(variables or {}),
        "ssh_config": str(args.ssh_config.absolute()) if args.ssh_config else "",
        "roles_path": _absolute(args.roles_path, args.config.roles if args.config else ()),
        "collections_path": _absolute(args.collections_path, args.config.collections if args.config else ())
        + _user_collections(),
        "guards": GUARDS,
        "key": str(key.absolute()) if (key := args.run_dir / "key").exists() else "",
        **_config_data(args.config),
        "artifacts": str(artifacts),
        "ident": ident,
        "secrets": [secret for secret in args.secrets if secret],
        "password_in_address": PASSWORD_IN_ADDRESS.pattern,
        "arguments": list(args.arguments),
    }
    with tempfile.TemporaryFile() as stderr:
        process = _start(job, stderr)
        try:
            for line in _lines(process, deadline):
                collector.add(json.loads(line))
            rc = process.wait(timeout=max(1.0, deadline.remaining()))
        except (CommandTimeout, subprocess.TimeoutExpired) as e:
            _end(process)
            where = f" in the task '{collector.current}'" if collector.current else ""
            raise PlaybookTimeout(
                f"playbook {playbook.name} did not end within {deadline.limit:g} s{where}; it was killed. "
                f"Its output so far: {artifacts / ident / 'stdout'}",
                collector.result(playbook, 254, artifacts / ident),
            ) from e
        finally:
            _end(process)
        stderr.seek(0)
        output = stderr.read()[-_TEXT_LIMIT:].decode(errors="replace").strip()
    if collector.error is not None:
        raise PlaybookFailed(
            f"playbook {playbook.name} could not be run: {collector.error}\n{output}".rstrip()
        )
    result = collector.result(playbook, rc, artifacts / ident)
    if check and rc != 0:
        raise PlaybookFailed(_failure_text(result, output), result)
    return result


def playbook_path(name: str, settings: Settings | None = None) -> Path:
    """The path of the playbook `name` (with suffix), in the project's playbook_dir or in the package.

    Raises PlaybookFailed with the searched directories.
    """
    configured = getattr(settings, "playbook_dir", None)
    package = Path(__file__).parents[2]
    directories = [
        *([Path(configured)] if configured else []),
        package / "playbooks",
        package.parent / "playbooks",
    ]
    for directory in directories:
        if (directory / name).is_file():
            return directory / name
    searched = ", ".join(str(directory) for directory in directories)
    raise PlaybookFailed(f"expected the playbook {name} in one of {searched}; found it in none")


def _args_of(env: Any) -> AnsibleArgs:
    run_dir = Path(env.run.dir)
    ssh_config = run_dir / "ssh_config"
    return AnsibleArgs(
        run_dir=run_dir,
        ssh_config=ssh_config if ssh_config.exists() else None,
        roles_path=tuple(env.settings.roles_path),
        collections_path=tuple(env.settings.collections_path),
        secrets=tuple(getattr(env, "secrets", ())),
        config=project_config(env.rootdir),
    )


def project_config(rootdir: Path) -> AnsibleConfig | None:
    """The ansible.cfg of a project, or None. Raises PlaybookFailed for one that cannot be used."""
    try:
        return ansible_cfg.find(rootdir)
    except ansible_cfg.UnusableConfig as e:
        raise PlaybookFailed(str(e)) from e


def _absolute(*lists: tuple[Path, ...]) -> list[str]:
    return list(dict.fromkeys(str(path.absolute()) for paths in lists for path in paths))


def _config_data(config: AnsibleConfig | None) -> dict[str, Any]:
    """A project's ansible.cfg as part of the job."""
    if config is None:
        return {"config": "", "replaced": [], "callbacks": []}
    return {
        "config": str(config.path),
        "replaced": list(config.replaced),
        "callbacks": [str(path) for path in config.callbacks],
    }


def _user_collections() -> list[str]:
    return [str(Path.home() / ".ansible" / "collections"), "/usr/share/ansible/collections"]


def _artifacts_root(run_dir: Path) -> Path:
    root = run_dir.absolute() / "artifacts"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    root.chmod(0o700)
    return root


def _next_ident(artifacts: Path, stem: str) -> str:
    numbers = [int(match[1]) for path in artifacts.iterdir() if (match := re.match(r"(\d+)-", path.name))]
    return f"{max(numbers, default=0) + 1:02d}-{re.sub(r'[^A-Za-z0-9_.-]', '_', stem)}"


def _start(job: Mapping[str, Any], stderr: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    path = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    environment |= {"PATH": os.pathsep.join(path), "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
    environment.setdefault("LC_ALL", "C.UTF-8")  # Ansible refuses to start without a UTF-8 locale
    # A separate process session: Ctrl-C reaches pytest alone, and the process group can be killed.
    process = subprocess.Popen(
        [sys.executable, "-E", "-P", str(_CHILD)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        env=environment, cwd="/", start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(job, default=str).encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once; the caller reads its standard error
    except BaseException:
        _end(process)
        raise
    return process


def _lines(process: subprocess.Popen[bytes], deadline: Deadline) -> Iterator[bytes]:
    """Complete lines of the child's output. Raises CommandTimeout at the deadline."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(deadline.remaining()):
                raise CommandTimeout(f"the playbook did not end within {deadline.limit:g} s")
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            yield from lines


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the child with SIGTERM, by which it kills its descendants, or its process group with SIGKILL."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_TERM_GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout is not None:
        process.stdout.close()


class _Collector:
    """Converts ansible-runner's events to PlaybookEvents and the result."""

    def __init__(self, on_event: Callable[[PlaybookEvent], None] | None) -> None:
        self.on_event = on_event
        self.current = ""
        self.error: str | None = None
        self.tasks: list[TaskRecord] = []
        self.failures: list[str] = []
        self.recap: dict[str, HostRecap] = {}
        self.stats: dict[str, Any] = {}

    def add(self, message: Mapping[str, Any]) -> None:
        if "error" in message:
            self.error = str(message["error"])
        kind, data = message.get("event"), message.get("data") or {}
        task, role, host = str(data.get("task", "")), str(data.get("role", "")), str(data.get("host", ""))
        if kind == "playbook_on_play_start":
            self._emit(PlaybookEvent("play", str(data.get("name") or data.get("play", ""))))
        elif kind in ("playbook_on_task_start", "playbook_on_handler_task_start"):
            self.current = task
            self._emit(PlaybookEvent("task", task, role=role))
        elif kind in _TASK_ENDS:
            self._add_task(_TASK_ENDS[kind], data, host, task, role)
        elif kind == "playbook_on_stats":
            self._add_stats(data)

    def _add_task(self, status: str, data: Mapping[str, Any], host: str, task: str, role: str) -> None:
        raw = data.get("res")
        answer: Mapping[str, Any] = raw if isinstance(raw, dict) else {}
        changed = bool(answer.get("changed"))
        seconds = float(data.get("duration") or 0.0)
        if status == "failed" and str(data.get("task_action", "")).rpartition(".")[2] in _WAITS:
            status = "unreachable"  # Ansible reports `failed`, but the host does not answer
        ignored = status == "failed" and bool(data.get("ignore_errors"))
        self.tasks.append(TaskRecord(host, task, role, "ignored" if ignored else status, changed, seconds))
        if status in ("failed", "unreachable") and not ignored:
            self.failures.append(f"{role + ' : ' if role else ''}{task} on {host}: {_reason(answer)}")
        self._emit(PlaybookEvent(status, task, host, role, changed))

    def _add_stats(self, data: Mapping[str, Any]) -> None:
        columns = {"ok": "ok", "changed": "changed", "dark": "unreachable", "failures": "failed",
                   "skipped": "skipped", "rescued": "rescued", "ignored": "ignored"}  # fmt: skip
        hosts = {host for column in columns for host in data.get(column) or ()}
        for host in sorted(hosts):
            counts = {name: int((data.get(column) or {}).get(host, 0)) for column, name in columns.items()}
            self.recap[host] = HostRecap(**counts)
        custom = data.get("artifact_data")
        self.stats = dict(custom) if isinstance(custom, dict) else {}

    def _emit(self, event: PlaybookEvent) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def result(self, playbook: Path, rc: int, artifacts: Path) -> PlaybookResult:
        return PlaybookResult(
            playbook.name, rc, dict(self.recap), tuple(self.failures), tuple(self.tasks), artifacts,
            dict(self.stats),
        )  # fmt: skip


def _reason(answer: Mapping[str, Any]) -> str:
    if answer.get("_ansible_no_log") or "censored" in answer:
        return "it failed; its output is hidden because it handles a secret (no_log)"
    parts = [
        str(answer[key]).strip() for key in ("msg", "stderr", "module_stderr", "stdout") if answer.get(key)
    ]
    for item in answer.get("results") or ():
        if isinstance(item, dict) and item.get("failed"):
            parts.append(_reason(item))
    unique = list(dict.fromkeys(part for part in parts if part))
    text = PASSWORD_IN_ADDRESS.sub(rf"\g<1>{MASK}\g<2>", "\n".join(unique))
    return text[:_TEXT_LIMIT] or "no reason reported"


def _failure_text(result: PlaybookResult, output: str) -> str:
    causes = "".join(f"\n  {text}" for text in result.failures) or (f"\n  {output}" if output else "")
    if not causes:
        causes = f"\n  {_tail(result.artifacts / 'stdout')}"
    return (
        f"playbook {result.playbook} failed (ansible-playbook ended with {result.rc}):{causes}\n"
        f"  its output: {result.artifacts / 'stdout'}"
    )


def _tail(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[-_TEXT_LIMIT:]
    except OSError:
        return "no output"
