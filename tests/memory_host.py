"""A PVE host in memory: memory_model's rules behind the API's paths and a few commands, kept in a JSON file.

The file is locked for each call, so that several processes and threads may share one host.
"""

from __future__ import annotations

import fcntl
import fnmatch
import json
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

from memory_model import Model, State, fail, new_state
from memory_routes import ROUTES

from pytest_nestedpve.pve.errors import CommandTimeout, SshError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.ssh.connection import CommandResult


class MemoryHost:
    """The host that the JSON file holds; made with new_state at first use."""

    def __init__(self, path: Path, node: str = "father") -> None:
        self.path = path
        self.name = node
        if not path.exists():
            with self.open() as model:
                del model

    @contextmanager
    def open(self) -> Iterator[Model]:
        """The model, for reading and changing; saved at the end, also after an error."""
        with self.path.with_suffix(".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            text = self.path.read_text() if self.path.exists() else ""
            model = Model(json.loads(text) if text else new_state(self.name))
            model.settle()
            try:
                yield model
            finally:
                temporary = self.path.with_suffix(".new")
                temporary.write_text(json.dumps(model.state))
                temporary.replace(self.path)

    def connect(self) -> PveHost:
        """The host as the package knows one."""
        return PveHost(self.name, MemorySsh(self), MemoryApi(self), self.name)

    def fault(self, method: str, path: str, *, do: str = "fail", text: str = "", times: int = 1) -> None:
        """Have calls (`path` is a pattern that must match whole) fail, or work with the reply `lose`d."""
        with self.open() as model:
            model.state["faults"].append(
                {"method": method, "path": path, "do": do, "text": text, "times": times}
            )

    def configuration(self, vmid: int) -> str:
        """The configuration file of a VM, for comparisons."""
        with self.open() as model:
            return model.text(vmid)


class MemoryApi:
    """The API tree of a MemoryHost."""

    transport = "memory"

    def __init__(self, host: MemoryHost) -> None:
        self._host = host

    def get(self, path: str, /, **params: Any) -> Any:
        return self._call("GET", path, params)

    def post(self, path: str, /, **params: Any) -> Any:
        return self._call("POST", path, params)

    def put(self, path: str, /, **params: Any) -> Any:
        return self._call("PUT", path, params)

    def delete(self, path: str, /, **params: Any) -> Any:
        return self._call("DELETE", path, params)

    def _call(self, method: str, path: str, params: State) -> Any:
        given = {k: int(v) if isinstance(v, bool) else v for k, v in params.items() if v is not None}
        with self._host.open() as model:
            model.state["commands"].append(f"{method} {path} {' '.join(sorted(given))}".strip())
            fault = _fault(model, method, path)
            if fault is not None and fault["do"] == "migrate":  # text: id and node
                vmid, _, target = fault["text"].partition(":")
                model.migrate(int(vmid), target)
                fault = None
            _reach(model, path)
            if fault is not None and fault["do"] == "fail":
                raise fail(fault["text"])
            for verb, pattern, route in ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    answer = route(model, given, *match.groups())
                    if fault is not None:
                        raise CommandTimeout(f"{method} {path}: no reply")
                    return json.loads(json.dumps(answer))
        raise fail(f"No '{method}' handler defined for '{path}'", 1)


def _reach(model: Model, path: str) -> None:
    """As a node hands calls on to another one (recorded: nodedown-022, facts 7)."""
    asked = re.match(r"/nodes/([^/]+)/", path)
    others = model.state.get("others", {})
    if asked is None or not others or asked[1] == model.node:
        return
    if asked[1] not in others:
        raise fail(f"hostname lookup '{asked[1]}' failed - failed to get address info for: {asked[1]}")
    if not others[asked[1]]["online"]:
        ip = others[asked[1]]["ip"]
        raise fail(f"proxy handler failed: ssh: connect to host {ip} port 22: Connection refused")


def _fault(model: Model, method: str, path: str) -> State | None:
    for each in model.state["faults"]:
        if each["times"] > 0 and each["method"] == method and re.fullmatch(each["path"], path):
            each["times"] -= 1
            return dict(each)
    return None


class MemorySsh:
    """A login at a MemoryHost that knows a few commands."""

    def __init__(self, host: MemoryHost) -> None:
        self._host = host

    def run(
        self,
        command: Any,
        *,
        stdin: bytes | BinaryIO | None = None,
        timeout: float = 60.0,
        secret: bool = False,
        logged: bool = True,
    ) -> CommandResult:
        del timeout, secret, logged
        text = command if isinstance(command, str) else shlex.join(command)
        words = shlex.split(text)
        out, rc = "", 0
        with self._host.open() as model:
            model.state.setdefault("shell", []).append(text)
            node = model.node
            if words[0] == "ssh":  # from this node to another one
                ip = words[-2].partition("@")[2]
                node, there = next((n, o) for n, o in model.state["others"].items() if o["ip"] == ip)
                if not (there["online"] and there["ssh"]):
                    said = f"ssh: connect to host {ip} port 22: Connection refused\n".encode()
                    return CommandResult(text, 255, b"", said, 0.1)
                words = shlex.split(words[-1])
            files = model.site(node)["files"]
            match words:
                case ["sh", "-c", script] if "mv -fT -- " in script:
                    files[shlex.split(script.partition("mv -fT -- ")[2])[1]] = _content(stdin).decode()
                case ["command", "-v", "pveversion", *_]:
                    rc = 0 if model.state.get("installed", True) else 1
                case ["date", "+%s"]:
                    out = f"{int(model.now)}\n"
                case ["id", "-u"]:
                    out = f"{model.state.get('uid', 0)}\n"
                case ["if", "[", "-e", path, *_]:  # how the host profile is read
                    out = model.state["files"].get(path, "")
                case ["test", "-e", path]:
                    rc = 0 if path in files else 1
                case ["/usr/sbin/sshd", "-T", *_] if model.state.get("sshd"):
                    out = model.state["sshd"]
                case ["mkdir", "-p", _]:
                    pass
                case ["cat", *_, path] if path in files:
                    out = files[path]
                case ["cat", "--", "/etc/pve/user.cfg"]:
                    for name, pool in model.state["pools"].items():
                        out += f"pool:{name}:{quote(pool['comment'])}:{','.join(map(str, pool['vms']))}::\n"
                case ["cat", "--", path] if match_config(model, path) is not None:
                    out = model.text(match_config(model, path) or 0)
                case ["find", folder, *rest] if "-name" in rest:
                    names = [rest[n + 1] for n, word in enumerate(rest) if word == "-name"]
                    out = "".join(f"{path}\n" for path in _find(files, folder, names, "-delete" in rest))
                case ["rm", "-f", "--", path]:
                    files.pop(path, None)
                case ["true"]:
                    pass
                case _:
                    rc = 127
        said = b"" if rc == 0 else f"bash: {words[0]}: command not found\n".encode()
        return CommandResult(text, rc, out.encode(), said, 0.1)

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        del mode
        content = data if isinstance(data, bytes) else Path(str(data)).read_bytes()
        with self._host.open() as model:
            model.state.setdefault("shell", []).append(f"put {remote}")
            model.state["files"][remote] = content.decode()

    def get(self, remote: str, limit: int = 1 << 20) -> bytes:
        with self._host.open() as model:
            content = str(model.state["files"][remote]).encode()
        if len(content) > limit:
            raise SshError(f"{remote}: expected at most {limit} bytes, found more")
        return content

    def open_channel(self, host: str, port: int) -> Any:
        raise CommandTimeout(f"no network behind this host: {host}:{port}")

    def close(self) -> None:
        pass


def _content(stdin: bytes | BinaryIO | None) -> bytes:
    return b"" if stdin is None else stdin if isinstance(stdin, bytes) else stdin.read()


def match_config(model: Model, path: str) -> int | None:
    """The VM whose configuration file that is."""
    match = re.fullmatch(r"/etc/pve/nodes/([^/]+)/qemu-server/(\d+)\.conf", path)
    vm = model.state["vms"].get(match[2]) if match else None
    return int(match[2]) if match and vm and (vm["node"], vm["kind"]) == (match[1], "qemu") else None


def _find(files: State, folder: str, names: list[str], delete: bool) -> list[str]:
    found = [
        path
        for path in sorted(files)
        if path.rpartition("/")[0] == folder
        and any(fnmatch.fnmatchcase(path.rpartition("/")[2], name) for name in names)
    ]
    for path in found if delete else ():
        del files[path]
    return found


def at(moment: float) -> int:
    """Epoch seconds `moment` from now."""
    return int(time.time() + moment)
