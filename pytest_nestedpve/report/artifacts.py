"""What helps to understand a failure, and how it is had: from the outer host, the VM, the guest inside."""

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
from pytest_nestedpve.report.collect import ITEM, Item, NotThere

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection

TASKS = 15
"""Task logs that are fetched, the latest ones."""
REACH = 6.0
"""Seconds (nominal) until a guest has to take a login; after that its agent is asked."""
_LINES = 5000  # of one log, its last ones
_LEAF_PHASES = ("leaf_provision", "leaf_start", "leaf_wait_ip", "sync_repos", "verify_ssh_chain")

_SHOW = 'show() { for f in "$@"; do [ -f "$f" ] && { echo; echo "== $f"; cat "$f"; }; done; }; '
_TOLD = 'told() { echo; echo "== $*"; "$@" 2>&1; }; '

#: What a guest is asked: (file, in words, kind, shell text). What a guest does not have is left out. Logs by
#: lines: a secret that is cut in half would not be known as one.
QUESTIONS: tuple[tuple[str, str, str, str], ...] = (
    (
        "journal.txt", "journal since the boot", "journal",
        f"journalctl -b --no-pager -o short-precise -n {_LINES}",
    ),
    (
        "cloud-init.log", "cloud-init's log", "cloud-init",
        f"tail -n {_LINES} /var/log/cloud-init.log",
    ),
    (
        "cloud-init-output.log", "what cloud-init's commands said", "cloud-init",
        f"tail -n {_LINES} /var/log/cloud-init-output.log",
    ),
    (
        "network.txt", "network: addresses, routes, resolver, configuration", "state",
        _SHOW + _TOLD + "told ip addr; told ip route; told ip -6 route; told ip neigh; told bridge link; "
        "show /etc/resolv.conf /etc/hosts /etc/network/interfaces /etc/network/interfaces.d/* "
        "/etc/netplan/*.yaml /etc/systemd/network/*; "
        "command -v networkctl >/dev/null && told networkctl --no-pager list; true",
    ),
    (
        "cloud-init.txt", "cloud-init: how it ended", "cloud-init",
        "cloud-init status --long; cloud-init --version; ls -la /var/lib/cloud/instance/ /run/cloud-init/",
    ),
    (
        "services.txt", "units that failed, PVE's services and version, room", "state",
        "exec 2>&1; systemctl --failed --no-pager --plain; "
        "systemctl --no-pager --plain status pve-cluster pvedaemon pveproxy pvestatd networking ssh "
        "| tail -n 200; pveversion; df -h; free -m; true",
    ),
    ("dmesg.txt", "the kernel's messages", "journal", "dmesg | tail -n 400"),
)  # fmt: skip


def after_phase(env: Environment, phase: str) -> list[Item]:
    """What is fetched when a phase failed, or a test (`phase` is empty): the nearest to the cause first."""
    found: list[Item] = []
    if not env.attached:
        nested = ProvisionFacts.known(env.facts)
        known = AddressFacts.phase in env.facts
        found += _of_guest(env, nested, "nested", "the nested VM", lambda: env.outer, address_known=known)
    elif ProvisionFacts.phase in env.facts:
        found += _inside("nested", "the nested PVE", lambda script: _said(env.outer, script))
    if phase in _LEAF_PHASES or not phase:
        leaf = LeafProvisionFacts.known(env.facts)
        known = LeafAddressFacts.phase in env.facts
        found += _of_guest(env, leaf, "leaf", "the VM inside", lambda: env.inner, address_known=known)
    tasks = _tasks(env)
    # The last tasks are near to the cause; the others can wait.
    return [*tasks[:4], *found, *tasks[4:]]


def after_teardown(env: Environment, lines: list[str]) -> list[Item]:
    """What is fetched when something is left: task logs, and what the VMs that are named look like."""
    found = _tasks(env)
    for vmid, node in dict.fromkeys(re.findall(r"^VM (\d+) on ([\w-]+):", "\n".join(lines), re.MULTILINE)):
        found += _of_vm(lambda: env.outer, str(node), int(vmid), f"left-{vmid}", f"VM {vmid}")
    return found


# -- the outer side ----------------------------------------------------------------------------------------


def _of_guest(
    env: Environment,
    facts: ProvisionFacts | None,
    name: str,
    title: str,
    host: Callable[[], PveHost],
    *,
    address_known: bool,
) -> list[Item]:
    if facts is None or not facts.vmid or not facts.node:
        return []
    node, vmid = facts.node, facts.vmid
    guest = _Guest(env, host, node, vmid, name if address_known else "")
    return [
        *_of_vm(host, node, vmid, name, title),
        Item(
            f"{name}-console.log", f"serial console of {title}", "console",
            lambda: _console(host(), node, vmid),
        ),
        *_inside(name, title, guest.ask),
        Item(f"{name}-screen.ppm", f"screen of {title}", "picture", lambda: _screen(host(), vmid)),
    ]  # fmt: skip


def _of_vm(host: Callable[[], PveHost], node: str, vmid: int, name: str, title: str) -> list[Item]:
    path = f"/nodes/{node}/qemu/{vmid}"
    return [
        Item(
            f"{name}-config.json", f"configuration of {title}", "state",
            lambda: _json(host().api, f"{path}/config"),
        ),
        Item(
            f"{name}-status.json", f"state of {title}", "state",
            lambda: _json(host().api, f"{path}/status/current"),
        ),
    ]  # fmt: skip


def _json(api: Api, path: str) -> str:
    from pytest_nestedpve.pve.api import call_limit

    with call_limit(ITEM):
        return json.dumps(api.get(path), indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _said(host: PveHost, script: str, timeout: float = ITEM) -> str:
    result = host.run(["sh", "-c", script], timeout=timeout)
    text = result.stdout + (f"\n{result.stderr}" if result.stderr.strip() else "")
    if not text.strip():
        raise NotThere(f"nothing was said (exit status {result.rc})")
    return text


def _console(host: PveHost, node: str, vmid: int) -> str:
    """What the serial device said, where the host keeps that; else what it says now.

    QEMU keeps no history of a socket: a log there is only if the VM's `args` name one, or the host writes one
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
        "echo '[the host keeps no log of this console; this is what it says now, after a carriage return]'; "
        f"( printf '\\r'; sleep 3 ) | timeout 5 socat - UNIX-CONNECT:{socket}; true; else exit 3; fi",
        timeout=ITEM,
    )
    if not result.ok:
        raise NotThere("the host keeps no log of a serial device of this VM, and none could be listened to")
    if not result.stdout.strip():
        raise NotThere("the log of the VM's serial device is there, and empty")
    return result.stdout


def _screen(host: PveHost, vmid: int) -> bytes:
    """The screen as a picture, in QEMU's own format (PPM). Only root's `qm monitor` makes one (facts of PVE
    9.2, 44); QEMU writes it on its own, so its end is waited for."""
    result = host.run(
        f"d=$(mktemp -d) || exit 1; trap 'rm -rf \"$d\"' EXIT; printf 'screendump %s\\nquit\\n' \"$d/s\" | "
        f"timeout 5 qm monitor {vmid} >/dev/null 2>&1; n=0; s=0; while [ $n -lt 30 ]; do "
        'o=$s; s=$(stat -c %s "$d/s" 2>/dev/null || echo 0); [ "$s" -gt 0 ] && [ "$s" = "$o" ] && break; '
        'n=$((n+1)); sleep 0.1; done; cat "$d/s"',
        timeout=ITEM,
    )
    if not result.ok or result.stdout_bytes[:2] not in (b"P6", b"\x89P"):
        raise NotThere("QEMU's monitor gave no picture of a screen")
    return result.stdout_bytes


# -- the inside --------------------------------------------------------------------------------------------


def _inside(name: str, title: str, ask: Callable[[str], str]) -> list[Item]:
    def fetch(script: str) -> Callable[[], str]:
        return lambda: ask(script)

    return [
        Item(f"{name}-{file}", f"{what} ({title})", kind, fetch(script), limit=ITEM + REACH)
        for file, what, kind, script in QUESTIONS
    ]


class _Guest:
    """Shell text run in a guest: over SSH if it takes a login, else by its agent; found out once."""

    def __init__(
        self, env: Environment, host: Callable[[], PveHost], node: str, vmid: int, level: str
    ) -> None:
        self._env, self._host, self._node, self._vmid = env, host, node, vmid
        self._level = level  # "" while its address is not known
        self._lock = threading.Lock()
        self._tried = False
        self._ssh: SshConnection | None = None

    def ask(self, script: str) -> str:
        ssh = self._login()
        if ssh is None:
            return by_agent(self._host().api, self._node, self._vmid, script)
        result = ssh.run(["sh", "-c", script], timeout=ITEM)
        text = result.stdout + (f"\n{result.stderr}" if result.stderr.strip() else "")
        if not text.strip():
            raise NotThere(f"the guest said nothing (exit status {result.rc})")
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
                except Exception:  # whatever it is, there is another way
                    ssh.close()
                else:
                    self._env.on_close(ssh.close)
                    self._ssh = ssh
            return self._ssh


def by_agent(api: Api, node: str, vmid: int, script: str) -> str:
    """The output of shell text that a guest's agent runs. Raises NotThere when it is empty, and PveError."""
    from pytest_nestedpve.pve import agent
    from pytest_nestedpve.pve.api import call_limit
    from pytest_nestedpve.pve.deadline import Deadline

    with call_limit(ITEM):
        ended = agent.execute(
            api, node, vmid, ["sh", "-c", script], deadline=Deadline(ITEM), what="the guest's answer"
        )
    text = ended.stdout + ended.stderr
    if not text.strip():
        raise NotThere(f"the guest said nothing (exit status {ended.rc})")
    return text + ("\n[cut off by the guest agent]\n" if ended.truncated else "")


# -- tasks -------------------------------------------------------------------------------------------------


def _tasks(env: Environment) -> list[Item]:
    """The logs of the run's own tasks, the latest first: their ids stand in the audit log."""
    found = []
    for number, (upid, host) in enumerate(reversed(_upids(env)[-TASKS:]), 1):
        found.append(_task(env, upid, host, number))
    return [each for each in found if each is not None]


def _task(env: Environment, upid: str, host: str, number: int) -> Item | None:
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

    about = f"{task.type} {task.id}".strip()
    safe = re.sub(r"[^A-Za-z0-9]+", "-", about).strip("-")[:40]
    return Item(f"task-{number:02d}-{safe}.log", f"log of the task {about} on {task.node}", "task", fetch)


def _upids(env: Environment) -> list[tuple[str, str]]:
    found: dict[str, str] = {}
    for line in env.audit.path.read_text(encoding="utf-8", errors="replace").splitlines():
        if '"event": "task"' not in line:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry.get("upid"), str):
            found[entry["upid"]] = str(entry.get("host") or "")
    return list(found.items())
