"""Artifacts of a failure: items to collect from the outer host, the nested VM and the VM inside."""

from __future__ import annotations

import json
import re
import shlex
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.facts import (
    AddressFacts,
    LeafAddressFacts,
    LeafProvisionFacts,
    ProvisionFacts,
)
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.report.collect import ITEM, Item, NotAvailable

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection

TASKS = 15
"""Number of task logs to collect, the latest ones."""
REACH = 6.0
"""Seconds (nominal) for a login to a guest; after that its agent is used."""
_LINES = 5000  # of one log, counted from its end
_LEAF_PHASES = ("leaf_provision", "leaf_start", "leaf_wait_ip", "sync_repos", "verify_ssh_chain")

_SHOW = 'show() { for f in "$@"; do [ -f "$f" ] && { echo; echo "== $f"; cat "$f"; }; done; }; '
_RUN = 'run() { echo; echo "== $*"; "$@" 2>&1; }; '

#: Files collected from a guest: (file, description, kind, shell text). The shell text skips what the guest
#: lacks. Logs are cut at line ends: half of a secret would not be masked.
GUEST_FILES: tuple[tuple[str, str, str, str], ...] = (
    (
        "journal.txt", "journal since the boot", "journal",
        f"journalctl -b --no-pager -o short-precise -n {_LINES}",
    ),
    (
        "cloud-init.log", "cloud-init's log", "cloud-init",
        f"tail -n {_LINES} /var/log/cloud-init.log",
    ),
    (
        "cloud-init-output.log", "output of cloud-init's commands", "cloud-init",
        f"tail -n {_LINES} /var/log/cloud-init-output.log",
    ),
    (
        "network.txt", "network: addresses, routes, resolver, configuration", "state",
        _SHOW + _RUN + "run ip addr; run ip route; run ip -6 route; run ip neigh; run bridge link; "
        "show /etc/resolv.conf /etc/hosts /etc/network/interfaces /etc/network/interfaces.d/* "
        "/etc/netplan/*.yaml /etc/systemd/network/*; "
        "command -v networkctl >/dev/null && run networkctl --no-pager list; true",
    ),
    (
        "cloud-init.txt", "cloud-init: status", "cloud-init",
        "cloud-init status --long; cloud-init --version; ls -la /var/lib/cloud/instance/ /run/cloud-init/",
    ),
    (
        "services.txt", "failed units, PVE's services and version, free space", "state",
        "exec 2>&1; systemctl --failed --no-pager --plain; "
        "systemctl --no-pager --plain status pve-cluster pvedaemon pveproxy pvestatd networking ssh "
        "| tail -n 200; pveversion; df -h; free -m; true",
    ),
    ("dmesg.txt", "kernel messages", "journal", "dmesg | tail -n 400"),
)  # fmt: skip


def select_after_phase(env: Environment, phase: str) -> list[Item]:
    """Items after a failed phase, or failed tests (`phase` is empty), the nearest to the cause first."""
    items: list[Item] = []
    if not env.attached:
        nested = ProvisionFacts.known(env.facts)
        has_address = AddressFacts.phase in env.facts
        items += _guest_items(
            env, nested, "nested", "the nested VM", lambda: env.outer, has_address=has_address
        )
    elif ProvisionFacts.phase in env.facts:
        items += _inside_items("nested", "the nested PVE", lambda script: _run_script(env.outer, script))
    if phase in _LEAF_PHASES or not phase:
        leaf = LeafProvisionFacts.known(env.facts)
        has_address = LeafAddressFacts.phase in env.facts
        items += _guest_items(env, leaf, "leaf", "the VM inside", lambda: env.inner, has_address=has_address)
    tasks = _task_items(env)
    # The latest tasks are the nearest to the cause.
    return [*tasks[:4], *items, *tasks[4:]]


def select_after_teardown(env: Environment, lines: list[str]) -> list[Item]:
    """Items after a teardown with leftovers: task logs, and the VMs named in `lines`."""
    items = _task_items(env)
    for vmid, node in dict.fromkeys(re.findall(r"^VM (\d+) on ([\w-]+):", "\n".join(lines), re.MULTILINE)):
        items += _vm_items(lambda: env.outer, str(node), int(vmid), f"left-{vmid}", f"VM {vmid}")
    return items


# -- the outer side ----------------------------------------------------------------------------------------


def _guest_items(
    env: Environment,
    facts: ProvisionFacts | None,
    name: str,
    title: str,
    host: Callable[[], PveHost],
    *,
    has_address: bool,
) -> list[Item]:
    if facts is None or not facts.vmid or not facts.node:
        return []
    node, vmid = facts.node, facts.vmid
    guest = _Guest(env, host, node, vmid, name if has_address else "")
    return [
        *_vm_items(host, node, vmid, name, title),
        Item(
            f"{name}-console.log", f"serial console of {title}", "console",
            lambda: _read_console(host(), node, vmid),
        ),
        *_inside_items(name, title, guest.run),
        Item(f"{name}-screen.ppm", f"screen of {title}", "picture", lambda: _take_screenshot(host(), vmid)),
    ]  # fmt: skip


def _vm_items(host: Callable[[], PveHost], node: str, vmid: int, name: str, title: str) -> list[Item]:
    path = f"/nodes/{node}/qemu/{vmid}"
    return [
        Item(
            f"{name}-config.json", f"configuration of {title}", "state",
            lambda: _read_json(host().api, f"{path}/config"),
        ),
        Item(
            f"{name}-status.json", f"state of {title}", "state",
            lambda: _read_json(host().api, f"{path}/status/current"),
        ),
    ]  # fmt: skip


def _read_json(api: Api, path: str) -> str:
    from pytest_nestedpve.pve.api import call_limit

    with call_limit(ITEM):
        return json.dumps(api.get(path), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _run_script(host: PveHost, script: str, timeout: float = ITEM) -> str:
    result = host.run(["sh", "-c", script], timeout=timeout)
    text = result.stdout + (f"\n{result.stderr}" if result.stderr.strip() else "")
    if not text.strip():
        raise NotAvailable(f"the command printed nothing (exit status {result.rc})")
    return text


def _read_console(host: PveHost, node: str, vmid: int) -> str:
    """The log of the serial device, if the host keeps one; else three seconds of its output.

    QEMU keeps no history of a socket: a log exists only if the VM's `args` name one, or the host writes one
    beside the socket.
    """
    from pytest_nestedpve.pve.api import call_limit

    with call_limit(ITEM):
        args = str(host.api.get(f"/nodes/{node}/qemu/{vmid}/config").get("args") or "")
    named = re.search(r"logfile=(/[^\s,]+)|-serial\s+file:(/\S+)", args)
    socket = f"/run/qemu-server/{vmid}.serial0"
    log = shlex.quote((named[1] or named[2]) if named else f"{socket}.log")
    result = host.run(
        f"if [ -f {log} ]; then tail -n {_LINES} {log}; "
        f"elif [ -S {socket} ] && command -v socat >/dev/null; then "
        "echo '[the host keeps no log of this console; this is its output now, after a carriage return]'; "
        f"( printf '\\r'; sleep 3 ) | timeout 5 socat - UNIX-CONNECT:{socket}; true; else exit 3; fi",
        timeout=ITEM,
    )
    if not result.ok:
        raise NotAvailable(
            "the host keeps no log of a serial device of this VM, and its socket could not be read"
        )
    if not result.stdout.strip():
        raise NotAvailable("the log of the VM's serial device is empty")
    return result.stdout


def _take_screenshot(host: PveHost, vmid: int) -> bytes:
    """The screen as a PPM picture. Only root's `qm monitor` can write one (facts of PVE 9.2, 44). QEMU writes
    it asynchronously: the shell text waits until its size no longer changes."""
    result = host.run(
        f"d=$(mktemp -d) || exit 1; trap 'rm -rf \"$d\"' EXIT; printf 'screendump %s\\nquit\\n' \"$d/s\" | "
        f"timeout 5 qm monitor {vmid} >/dev/null 2>&1; n=0; s=0; while [ $n -lt 30 ]; do "
        'o=$s; s=$(stat -c %s "$d/s" 2>/dev/null || echo 0); [ "$s" -gt 0 ] && [ "$s" = "$o" ] && break; '
        'n=$((n+1)); sleep 0.1; done; cat "$d/s"',
        timeout=ITEM,
    )
    if not result.ok or result.stdout_bytes[:2] not in (b"P6", b"\x89P"):
        raise NotAvailable("QEMU's monitor wrote no picture of a screen")
    return result.stdout_bytes


# -- inside a guest ----------------------------------------------------------------------------------------


def _inside_items(name: str, title: str, run: Callable[[str], str]) -> list[Item]:
    def fetch(script: str) -> Callable[[], str]:
        return lambda: run(script)

    return [
        Item(f"{name}-{file}", f"{what} ({title})", kind, fetch(script), limit=ITEM + REACH)
        for file, what, kind, script in GUEST_FILES
    ]


class _Guest:
    """Runs shell text in a guest: over SSH if a login succeeds, else by its agent; one attempt to log in."""

    def __init__(
        self, env: Environment, host: Callable[[], PveHost], node: str, vmid: int, level: str
    ) -> None:
        self._env, self._host, self._node, self._vmid = env, host, node, vmid
        self._level = level  # "nested" or "leaf"; "" while the address is unknown
        self._lock = threading.Lock()
        self._tried = False
        self._ssh: SshConnection | None = None

    def run(self, script: str) -> str:
        ssh = self._login()
        if ssh is None:
            return by_agent(self._host().api, self._node, self._vmid, script)
        result = ssh.run(["sh", "-c", script], timeout=ITEM)
        text = result.stdout + (f"\n{result.stderr}" if result.stderr.strip() else "")
        if not text.strip():
            raise NotAvailable(f"the guest printed nothing (exit status {result.rc})")
        return text

    def _login(self) -> SshConnection | None:
        from typing import cast

        with self._lock:
            if not self._tried and self._level:
                self._tried = True
                facts = self._env.facts
                if self._level == "nested":
                    name, ip = ProvisionFacts.of(facts).name, self._env.ip
                else:
                    name, ip = LeafProvisionFacts.of(facts).name, LeafAddressFacts.of(facts).ip
                via = cast("SshConnection", self._host().ssh)
                ssh = self._env.guest_ssh(name, ip, via, timeout=REACH)
                try:
                    ssh.run(["true"], timeout=REACH)
                except Exception:  # any failure: the agent is used instead
                    ssh.close()
                else:
                    self._env.on_close(ssh.close)
                    self._ssh = ssh
            return self._ssh


def by_agent(api: Api, node: str, vmid: int, script: str) -> str:
    """The output of shell text that a guest's agent runs. Raises NotAvailable if empty, and PveError."""
    from pytest_nestedpve.pve import agent
    from pytest_nestedpve.pve.api import call_limit
    from pytest_nestedpve.pve.deadline import Deadline

    with call_limit(ITEM):
        result = agent.execute(
            api, node, vmid, ["sh", "-c", script], deadline=Deadline(ITEM), what="the guest's answer"
        )
    text = result.stdout + result.stderr
    if not text.strip():
        raise NotAvailable(f"the guest printed nothing (exit status {result.rc})")
    return text + ("\n[cut off by the guest agent]\n" if result.truncated else "")


# -- tasks -------------------------------------------------------------------------------------------------


def _task_items(env: Environment) -> list[Item]:
    """Items for the logs of the run's tasks, the latest first; the audit log has their ids."""
    upids = reversed(_read_upids(env)[-TASKS:])
    items = [_task_item(env, upid, host, number) for number, (upid, host) in enumerate(upids, 1)]
    return [item for item in items if item is not None]


def _task_item(env: Environment, upid: str, host: str, number: int) -> Item | None:
    from pytest_nestedpve.pve.tasks import parse_upid, task_log

    try:
        task = parse_upid(upid)
    except PveError:
        return None

    def fetch() -> str:
        from pytest_nestedpve.pve.api import call_limit

        api = env.outer.api if host in ("", env.outer.name) else env.inner.api
        with call_limit(ITEM):
            return f"{upid}\n" + "\n".join(task_log(api, upid, limit=2000)) + "\n"

    subject = f"{task.type} {task.id}".strip()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", subject).strip("-")[:40]
    return Item(f"task-{number:02d}-{slug}.log", f"log of the task {subject} on {task.node}", "task", fetch)


def _read_upids(env: Environment) -> list[tuple[str, str]]:
    hosts: dict[str, str] = {}
    for line in env.audit.path.read_text(encoding="utf-8", errors="replace").splitlines():
        if '"event": "task"' not in line:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry.get("upid"), str):
            hosts[entry["upid"]] = str(entry.get("host") or "")
    return list(hosts.items())
