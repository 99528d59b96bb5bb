# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/agent: calls of the guest's qemu-ga, with PVE's answers and errors."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from ..api.access import Caller
from ..api.errors import PveFailure
from ..api.tree import api
from ..machine import machine
from ..state import guests
from ..state.guests import Guest
from .power import agent_enabled

BASE = "/nodes/{node}/qemu/{vmid}/agent"
READS = [
    "get-fsinfo",
    "get-host-name",
    "get-memory-block-info",
    "get-memory-blocks",
    "get-osinfo",
    "get-time",
    "get-timezone",
    "get-users",
    "get-vcpus",
    "info",
    "network-get-interfaces",
]
WRITES = [
    "fsfreeze-freeze",
    "fsfreeze-status",
    "fsfreeze-thaw",
    "fstrim",
    "ping",
    "shutdown",
    "suspend-disk",
    "suspend-hybrid",
    "suspend-ram",
]
CHUNK_BYTES, MAX_BYTES = 1024 * 1024, 16 * 1024 * 1024


def require_agent(vmid: str) -> Guest:
    guest = guests.load(vmid)
    if not agent_enabled(guest):
        raise PveFailure("No QEMU guest agent configured")
    if not guests.running(guest.vmid):
        raise PveFailure(f"VM {guest.vmid} is not running", rc=2)
    return guest


def call_agent(
    vmid: str, name: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 3.0
) -> Any:
    """Run one agent command; its `return` value. PveFailure with PVE's messages."""
    require_agent(vmid)
    try:
        return machine.agent(int(vmid), name, arguments, timeout)
    except machine.AgentError as e:
        if e.kind == "failed":
            raise PveFailure(f"Agent error: Guest agent command failed, error was '{e}'", rc=29) from e
        if e.kind == "not running":
            raise PveFailure(f"VM {vmid} is not running", rc=2) from e
        raise PveFailure("QEMU guest agent is not running") from e


def run_command(vmid: str, name: str) -> Any:
    command = f"guest-{name}"
    timeout = 60.0 if name in ("fsfreeze-freeze", "fstrim") else 3.0
    return call_agent(vmid, command, timeout=timeout)


def _register(name: str) -> None:
    def handler(caller: Caller, params: dict[str, Any]) -> Any:
        return {"result": run_command(params["vmid"], name)}

    api("GET" if name in READS else "POST", f"{BASE}/{name}")(handler)


for _name in (*READS, *WRITES):
    _register(_name)


@api("POST", BASE)
def command(caller: Caller, params: dict[str, Any]) -> Any:
    return {"result": run_command(params["vmid"], params["command"])}


@api("POST", BASE + "/exec")
def execute(caller: Caller, params: dict[str, Any]) -> Any:
    words = params["command"]
    words = [words] if isinstance(words, str) else list(words)
    arguments: dict[str, Any] = {"path": words[0], "arg": words[1:], "capture-output": True}
    if "input-data" in params:
        arguments["input-data"] = base64.b64encode(params["input-data"].encode()).decode()
    answer = call_agent(params["vmid"], "guest-exec", arguments)
    return {"pid": answer["pid"]}


@api("GET", BASE + "/exec-status")
def exec_status(caller: Caller, params: dict[str, Any]) -> Any:
    return status_of(params["vmid"], int(params["pid"]))


def status_of(vmid: str, pid: int) -> dict[str, Any]:
    answer = call_agent(vmid, "guest-exec-status", {"pid": pid})
    status: dict[str, Any] = {}
    for key, value in answer.items():
        if key in ("out-data", "err-data"):
            status[key] = base64.b64decode(value).decode(errors="replace")
            status.setdefault(key.replace("data", "truncated"), 0)
        else:
            status[key] = int(value) if isinstance(value, bool) else value
    return status


@api("GET", BASE + "/file-read")
def file_read(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = params["vmid"]
    handle = call_agent(vmid, "guest-file-open", {"path": params["file"], "mode": "r"})
    data, truncated = b"", False
    try:
        while True:
            piece = call_agent(vmid, "guest-file-read", {"handle": handle, "count": CHUNK_BYTES}, timeout=10)
            data += base64.b64decode(piece["buf-b64"])
            if piece["eof"]:
                break
            if len(data) >= MAX_BYTES:
                truncated = True
                break
    finally:
        call_agent(vmid, "guest-file-close", {"handle": handle})
    content = data.decode("utf-8", errors="replace")
    return {"bytes-read": len(data), "content": content} | ({"truncated": 1} if truncated else {})


@api("POST", BASE + "/file-write")
def file_write(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, content = params["vmid"], params["content"]
    encoded = content
    if params.get("encode", "1") == "1":
        encoded = base64.b64encode(content.encode()).decode()
    handle = call_agent(vmid, "guest-file-open", {"path": params["file"], "mode": "wb"})
    try:
        call_agent(vmid, "guest-file-write", {"handle": handle, "buf-b64": encoded}, timeout=10)
    finally:
        call_agent(vmid, "guest-file-close", {"handle": handle})


@api("POST", BASE + "/set-user-password")
def set_password(caller: Caller, params: dict[str, Any]) -> Any:
    encoded = base64.b64encode(params["password"].encode()).decode()
    arguments = {
        "username": params["username"],
        "password": encoded,
        "crypted": params.get("crypted", "0") == "1",
    }
    return {"result": call_agent(params["vmid"], "guest-set-user-password", arguments)}
