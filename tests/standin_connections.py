"""The two ways to a stand-in host in this process: its API, and a login with a few commands."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_nestedpve.lab.node.api import tree
from pytest_nestedpve.lab.node.api.access import Caller
from pytest_nestedpve.lab.node.api.errors import NoReply, NotImplementedHere, PveFailure
from pytest_nestedpve.lab.node.commands import pvecm, pvesh, pvesm, pveum, pveversion, qm
from pytest_nestedpve.lab.node.state import clock, members, output, paths, tasks
from pytest_nestedpve.pve.api import Verbs
from pytest_nestedpve.pve.errors import CommandTimeout, classify
from pytest_nestedpve.pve.ssh.connection import CommandResult

if TYPE_CHECKING:
    from standin_host import StandinHost

ROOT = Caller(sync=False)
COMMANDS: dict[str, Callable[[], int]] = {
    "qm": qm.main,
    "pvesh": pvesh.main,
    "pvesm": pvesm.main,
    "pveum": pveum.main,
    "pvecm": pvecm.main,
    "pveversion": pveversion.main,
}
# Real ones, with their paths below the node's directory.
TOOLS = {"cat", "find", "head", "if", "mkdir", "mv", "rm", "stat", "test"}
_PATH = re.compile(r"(?<![\w./*?$})\]-])/(?!dev/null)(?=[\w.])")
_streams = threading.Lock()


class StandinApi(Verbs):
    """The API tree of a StandinHost, as root: a call that starts a task returns its UPID."""

    transport = "stand-in"

    def __init__(self, host: StandinHost) -> None:
        self._host = host

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        values = {name: _value(value) for name, value in params.items() if value is not None}
        call, verb = f"{verb} {path}", verb.upper()
        self._host.note_call(verb, path, values)
        lines = io.StringIO()
        try:
            with self._host.on(self._node_of(path)), output.streams(lines, lines):
                answer = tree.call(verb, path, values, ROOT)
        except NotImplementedHere as e:
            raise classify(f"No '{verb.lower()}' handler defined for '{path}'", e.rc, call) from e
        except PveFailure as e:
            raise classify(e.for_cli(), e.rc, call) from e
        except NoReply as e:
            raise CommandTimeout(f"{call}: {e}") from e
        answer = json.loads(json.dumps(answer.upid if isinstance(answer, tasks.Started) else answer))
        return self._host.changed_answer(verb, path, answer)

    def _node_of(self, path: str) -> str:
        """The node that answers. A call for another one is handed on (recorded: nodedown-022, facts 7)."""
        match = re.match(r"/nodes/([^/]+)/", path)
        if match is None or match[1] in (self._host.name, "localhost"):
            return self._host.name
        with self._host.on():
            member = members.find(match[1])
        if member is None:
            name = match[1]
            raise PveFailure(f"hostname lookup '{name}' failed - failed to get address info for: {name}")
        if not self._host.is_online(member.name):
            refused = f"ssh: connect to host {member.address} port 22: Connection refused"
            raise PveFailure(f"proxy handler failed: {refused}")
        return member.name


def _value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_value(item) for item in value]
    return str(int(value)) if isinstance(value, bool) else str(value)


class StandinSsh:
    """A login at a StandinHost: the node's own commands, and a few tools in its directory."""

    def __init__(self, host: StandinHost) -> None:
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
        self._host.note_command(text)
        words = shlex.split(text)
        node = self._host.name
        if words[0] == "ssh":  # from this node to another one
            address = words[-2].partition("@")[2]
            node = self._host.node_at(address)
            if not self._host.accepts_logins(node):
                refused = f"ssh: connect to host {address} port 22: Connection refused\n"
                return CommandResult(text, 255, b"", refused.encode(), 0.1)
            words = shlex.split(words[-1])
        with self._host.on(node):
            data = stdin if stdin is None or isinstance(stdin, bytes) else stdin.read()
            rc, out, err = self._run(words, text if words[0] == "if" else None, data)
        return CommandResult(text, rc, out, err, 0.1)

    def _run(self, words: list[str], script: str | None, stdin: bytes | None) -> tuple[int, bytes, bytes]:
        login = self._host.login()
        match words:
            case ["true"]:
                return 0, b"", b""
            case ["date", "+%s"]:
                return 0, f"{int(clock.now())}\n".encode(), b""
            case ["id", "-u"]:
                return 0, f"{login.get('uid', 0)}\n".encode(), b""
            case ["uname", "-n"] | ["hostname", "-s"]:
                return 0, f"{paths.node()}\n".encode(), b""
            case ["command", "-v", "pveversion", *_]:
                return int(not login.get("installed", True)), b"", b""
            case ["/usr/sbin/sshd", "-T", *_] if "sshd" in login:
                return 0, str(login["sshd"]).encode(), b""
            case ["sh", "-c", text] if "mv -fT -- " in text:
                return _tool(["sh", "-c", _moved(text)], stdin)
            case ["env", *assigned, name, _, _] if "=" not in name and name in COMMANDS:
                words = words[len(assigned) + 1 :]
        while words[0] == "env" or "=" in words[0]:
            words = words[1:]
        if words[0] in COMMANDS:
            return _command(words, stdin)
        if words[0] not in TOOLS:
            return 127, b"", f"bash: {words[0]}: command not found\n".encode()
        if script is not None:
            return _tool(["sh", "-c", _moved(script)], stdin)
        return _tool([str(paths.at(word)) if word.startswith("/") else word for word in words], stdin)

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        self._host.note_command(f"put {remote}")
        content = data if isinstance(data, bytes) else _content(data)
        file = self._host.file(remote)
        temporary = file.with_name(f".{file.name}.part")
        try:
            temporary.write_bytes(content)
        except OSError as e:
            CommandResult(f"put {remote}", 1, b"", f"{remote}: {e.strerror}\n".encode(), 0.1).check()
        temporary.chmod(mode)
        temporary.replace(file)

    def get(self, remote: str, limit: int = 1 << 20) -> bytes:
        return self.run(["head", "-c", str(limit), "--", remote]).check().stdout_bytes

    def open_channel(self, host: str, port: int) -> Any:
        raise CommandTimeout(f"no network behind this host: {host}:{port}")

    def close(self) -> None:
        pass


def _content(data: BinaryIO | Path) -> bytes:
    return data.read_bytes() if isinstance(data, Path) else data.read()


def _moved(script: str) -> str:
    """A script for the real root directory as one for the node's."""
    return _PATH.sub(lambda _: f"{paths.root()}/", script)


def _tool(words: list[str], stdin: bytes | None) -> tuple[int, bytes, bytes]:
    done = subprocess.run(words, input=stdin or b"", capture_output=True, check=False)
    root = str(paths.root()).encode()
    return done.returncode, done.stdout.replace(root, b""), done.stderr.replace(root, b"")


def _command(words: list[str], stdin: bytes | None) -> tuple[int, bytes, bytes]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_streams)
        stack.enter_context(_arguments(words, io.StringIO((stdin or b"").decode())))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(output.streams(out, err))
        rc = COMMANDS[words[0]]()
    return rc, out.getvalue().encode(), err.getvalue().encode()


@contextlib.contextmanager
def _arguments(words: list[str], stdin: io.StringIO) -> Iterator[None]:
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = words, stdin
    try:
        yield
    finally:
        sys.argv, sys.stdin = before
