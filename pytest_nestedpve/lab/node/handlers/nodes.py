# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes and /nodes/N without guests and storages: status, network, tasks, services."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

from ..api import access
from ..api.access import Caller
from ..api.errors import BadParameters
from ..api.tree import api
from ..state import broadcast, clock, cluster_fs, guests, paths, reported, tasks, vitals


def fingerprint(node: str) -> str | None:
    file = cluster_fs.fs() / "nodes" / node / "pve-ssl.pem"
    if not file.exists():
        return None
    digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(file.read_text())).hexdigest().upper()
    return ":".join(digest[n : n + 2] for n in range(0, 64, 2))


@api("GET", "/nodes")
def nodes(caller: Caller, params: dict[str, Any]) -> Any:
    rows = broadcast.node_rows(caller)
    for row in rows:
        row.pop("cgroup-mode")
        if (digest := fingerprint(row["node"])) is not None:
            row["ssl_fingerprint"] = digest
    return rows


@api("GET", "/nodes/{node}/version")
def version(caller: Caller, params: dict[str, Any]) -> Any:
    versions = {"version": paths.VERSION, "release": paths.RELEASE, "repoid": paths.REPOID}
    return versions | reported.of("version")


@api("GET", "/nodes/{node}/time")
def now(caller: Caller, params: dict[str, Any]) -> Any:
    seconds = int(clock.now())
    return {"localtime": seconds + time.localtime().tm_gmtoff, "time": seconds, "timezone": _timezone()}


def _timezone() -> str:
    try:
        return paths.at("/etc/timezone").read_text().strip()
    except OSError:
        return "Etc/UTC"


@api("GET", "/nodes/{node}/dns")
def dns(caller: Caller, params: dict[str, Any]) -> Any:
    answer: dict[str, str] = {}
    try:
        lines = paths.at("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        return answer
    for line in lines:
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            answer[f"dns{sum(key.startswith('dns') for key in answer) + 1}"] = words[1]
        elif words[:1] in (["search"], ["domain"]) and len(words) > 1:
            answer["search"] = words[1]
    return answer


@api("GET", "/nodes/{node}/status")
def status(caller: Caller, params: dict[str, Any]) -> Any:
    memory, disk = vitals.memory(), os.statvfs("/")
    size = disk.f_frsize
    return {
        "boot-info": {"mode": "legacy-bios"},
        "cpu": round(os.getloadavg()[0] / (os.cpu_count() or 1), 4),
        "cpuinfo": _cpuinfo() | reported.of("cpuinfo"),
        "current-kernel": {
            "machine": os.uname().machine,
            "release": paths.KERNEL,
            "sysname": "Linux",
            "version": os.uname().version,
        },
        "idle": 0,
        "ksm": {"shared": 0},
        "kversion": f"Linux {paths.KERNEL} {os.uname().version}",
        "loadavg": [f"{load:.2f}" for load in os.getloadavg()],
        "memory": {
            "available": memory["MemAvailable"],
            "free": memory["MemFree"],
            "total": memory["MemTotal"],
            "used": memory["MemTotal"] - memory["MemAvailable"],
        }
        | reported.of("memory"),
        "pveversion": f"pve-manager/{paths.VERSION}/{paths.REPOID}",
        "rootfs": {
            "avail": disk.f_bavail * size,
            "free": disk.f_bfree * size,
            "total": disk.f_blocks * size,
            "used": (disk.f_blocks - disk.f_bfree) * size,
        },
        "swap": {
            "free": memory["SwapFree"],
            "total": memory["SwapTotal"],
            "used": memory["SwapTotal"] - memory["SwapFree"],
        },
        "uptime": vitals.uptime(),
        "wait": 0,
    }


def _cpuinfo() -> dict[str, Any]:
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip(), value.strip())
    return {
        "cores": int(facts.get("cpu cores", os.cpu_count() or 1)),
        "cpus": os.cpu_count() or 1,
        "flags": facts.get("flags", ""),
        "hvm": "1",
        "mhz": facts.get("cpu MHz", "0"),
        "model": facts.get("model name", ""),
        "sockets": 1,
        "user_hz": os.sysconf("SC_CLK_TCK"),
    }


@api("GET", "/nodes/{node}/services")
def services(caller: Caller, params: dict[str, Any]) -> Any:
    names = (
        "pve-cluster",
        "pvedaemon",
        "pveproxy",
        "pvestatd",
        "ssh",
        "systemd-journald",
        "chrony",
        "postfix",
    )
    rows = []
    for name in names:
        process = subprocess.run(
            ["systemctl", "show", name, "-p", "ActiveState,SubState,UnitFileState,Description,LoadState"],
            capture_output=True,
            text=True,
            check=False,
        )
        properties = dict(line.split("=", 1) for line in process.stdout.splitlines() if "=" in line)
        rows.append(
            {
                "active-state": properties.get("ActiveState", "unknown"),
                "desc": properties.get("Description", name),
                "name": name,
                "service": name,
                "state": properties.get("SubState", "unknown"),
                "unit-state": properties.get("UnitFileState") or properties.get("LoadState", "unknown"),
            }
        )
    return rows


@api("GET", "/nodes/{node}/lxc")
def containers(caller: Caller, params: dict[str, Any]) -> Any:
    rows = []
    for vmid, body in guests.containers(params["node"]).items():
        if caller.is_root or access.has(caller, f"/vms/{vmid}", ["VM.Audit"]):
            row: dict[str, Any] = {"name": body.get("hostname", f"CT{vmid}"), "vmid": vmid, "type": "lxc"}
            row |= dict.fromkeys(("cpu", "disk", "diskread", "diskwrite", "maxdisk", "maxswap", "mem"), 0)
            row |= {"cpus": 1, "maxmem": int(body.get("memory", 512)) * 1024**2, "netin": 0, "netout": 0}
            rows.append(row | {"status": "stopped", "swap": 0, "uptime": 0})
    return rows


# -- network


def _interfaces_file() -> dict[str, dict[str, Any]]:
    """The configuration in /etc/network/interfaces, by interface."""
    interfaces: dict[str, dict[str, Any]] = {}
    auto: set[str] = set()
    current: dict[str, Any] | None = None
    try:
        lines = paths.at("/etc/network/interfaces").read_text().splitlines()
    except OSError:
        return {}
    for line in lines:
        words = line.split("#")[0].split()
        if not words:
            continue
        if words[0] in ("auto", "allow-hotplug"):
            auto.update(words[1:])
        elif words[0] == "iface" and len(words) >= 4:
            current = interfaces.setdefault(words[1], {"method": "manual", "method6": "manual"})
            current["method" if words[2] == "inet" else "method6"] = words[3]
        elif current is not None:
            current[words[0].replace("bridge-", "bridge_")] = " ".join(words[1:])
    for name in auto & set(interfaces):
        interfaces[name]["autostart"] = 1
    return interfaces


def _links() -> dict[str, Any]:
    """The kernel's network interfaces, by name."""
    try:
        process = subprocess.run(["ip", "-j", "-d", "addr"], capture_output=True, text=True, check=True)
        return {link["ifname"]: link for link in json.loads(process.stdout or "[]") if link}
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {}


@api("GET", "/nodes/{node}/network")
def network(caller: Caller, params: dict[str, Any]) -> Any:
    rows, only = [], params.get("type")
    configured = _interfaces_file()
    links = {name: {"flags": ["UP"]} for name in configured} if paths.in_process() else _links()
    names = [name for name in {**configured, **links} if name != "lo" and not name.startswith(("tap", "fw"))]
    for number, name in enumerate(sorted(names, key=lambda n: (n.startswith("vmbr"), n)), start=3):
        row = _network_row(name, configured.get(name, {}), links.get(name, {}), number)
        if only in (None, row["type"]) or (only == "any_bridge" and row["type"] == "bridge"):
            rows.append(row)
    return rows


def _network_row(name: str, configured: dict[str, Any], link: dict[str, Any], number: int) -> dict[str, Any]:
    bridge = link.get("linkinfo", {}).get("info_kind") == "bridge" or "bridge_ports" in configured
    row: dict[str, Any] = {"families": ["inet"], "iface": name, "priority": number}
    row["type"] = "bridge" if bridge else "eth"
    row["method"], row["method6"] = configured.get("method", "manual"), configured.get("method6", "manual")
    if link and "UP" in link.get("flags", []):
        row["active"] = 1
    if configured.get("autostart"):
        row["autostart"] = 1
    if bridge:
        row["bridge_ports"] = configured.get("bridge_ports", "").replace("none", "")
        row["bridge_stp"] = configured.get("bridge_stp", "off")
        row["bridge_fd"] = configured.get("bridge_fd", "0")
    if "address" in configured:
        address, _, length = configured["address"].partition("/")
        row |= {"address": address, "netmask": length or configured.get("netmask", "24")}
        row["cidr"] = f"{address}/{row['netmask']}"
    if "gateway" in configured:
        row["gateway"] = configured["gateway"]
    return row


@api("GET", "/nodes/{node}/network/{iface}")
def one_network(caller: Caller, params: dict[str, Any]) -> Any:
    for row in network(caller, {"node": params["node"]}):
        if row.pop("iface") == params["iface"]:
            return row
    raise BadParameters({"iface": "interface does not exist"}, rc=255)


# -- tasks


def task_row(task: tasks.Task) -> dict[str, Any]:
    """A row of a list of tasks; a finished task of a token has user and tokenid apart (facts 62)."""
    row: dict[str, Any] = {
        "id": task.id,
        "node": task.node,
        "pid": task.pid,
        "pstart": task.pstart,
        "starttime": task.starttime,
        "type": task.type,
        "upid": task.upid,
        "user": task.user,
    }
    if task.running:
        return row | {"status": "RUNNING"}
    user, mark, token = task.user.partition("!")
    if mark:
        row |= {"user": user, "tokenid": token}
    return row | {"endtime": task.endtime, "status": task.status}


def _is_own(caller: Caller, task: tasks.Task) -> bool:
    return caller.is_root or task.user == caller.id


@api("GET", "/nodes/{node}/tasks")
def task_list(caller: Caller, params: dict[str, Any]) -> Any:
    source = params.get("source", "archive")
    audit = caller.is_root or access.has(caller, f"/nodes/{params['node']}", ["Sys.Audit"])
    rows = []
    for task in tasks.every(params.get("vmid")):
        if task.running and source == "archive":
            continue
        if not task.running and source == "active" and clock.now() - (task.endtime or 0) > 1:
            continue
        row = task_row(task)
        if not (audit or task.user == caller.id):
            continue
        if "typefilter" in params and task.type != params["typefilter"]:
            continue
        if "userfilter" in params and params["userfilter"] not in row["user"]:
            continue
        if params.get("errors") == "1" and row["status"] in ("OK", "RUNNING"):
            continue
        if "since" in params and task.starttime < int(params["since"]):
            continue
        if "until" in params and task.starttime > int(params["until"]):
            continue
        if "statusfilter" in params and not _status_fits(row["status"], params["statusfilter"]):
            continue
        if task.running:
            row["saved"] = "0"
        rows.append(row)
    first = int(params.get("start", 0))
    return rows[first : first + int(params.get("limit", 50))]


def _status_fits(status: str, statuses: str) -> bool:
    kind = {"OK": "ok", "RUNNING": "unknown"}.get(status) or (
        "warning" if status.startswith("WARNINGS") else "error"
    )
    return kind in statuses.split(",")


def _task(params: dict[str, Any]) -> tasks.Task:
    tasks.parse(params["upid"])
    task = tasks.find(params["upid"])
    if task is None or task.node != paths.node():
        raise BadParameters({"upid": "no such task"})
    return task


@api("GET", "/nodes/{node}/tasks/{upid}")
def task_index(caller: Caller, params: dict[str, Any]) -> Any:
    return [{"name": "log"}, {"name": "status"}]


@api("GET", "/nodes/{node}/tasks/{upid}/status")
def task_status(caller: Caller, params: dict[str, Any]) -> Any:
    task = _task(params)
    if not _is_own(caller, task):
        access.check(caller, f"/nodes/{params['node']}", ["Sys.Audit"])
    row = task_row(task)
    row.pop("endtime", None)
    ended = row.pop("status")
    if "!" in task.user:
        row["user"], _, row["tokenid"] = task.user.partition("!")
    if task.running:
        return row | {"status": "running"}
    return row | {"status": "stopped", "exitstatus": ended}


@api("GET", "/nodes/{node}/tasks/{upid}/log")
def task_log(caller: Caller, params: dict[str, Any]) -> Any:
    user = tasks.parse(params["upid"]).user
    if not caller.is_root and user != caller.id:
        access.check(caller, f"/nodes/{params['node']}", ["Sys.Audit"])
    try:
        lines = tasks.log_file(params["upid"]).read_text().split("\n")
    except OSError:
        return [{"n": 1, "t": "unable to open file - No such file or directory"}]
    if lines and not lines[-1]:
        lines.pop()
    first = int(params.get("start", 0))
    limit = int(params.get("limit", 50)) or len(lines)
    return [{"n": n + 1, "t": line} for n, line in enumerate(lines)][first : first + limit] or [
        {"n": 1, "t": "no content"}
    ]


@api("DELETE", "/nodes/{node}/tasks/{upid}")
def stop_task(caller: Caller, params: dict[str, Any]) -> Any:
    """Interrupt a task, which cleans up (facts 59)."""
    upid = tasks.parse(params["upid"])
    if not caller.is_root and upid.user != caller.id:
        access.check(caller, f"/nodes/{params['node']}", ["Sys.Modify"])
    tasks.stop(upid.text)
