"""Commands to a guest's agent. A guest is not trusted: its answers are checked before use."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pytest_nestedpve.pve.answers import entries, flag, mapping, shown, text, whole
from pytest_nestedpve.pve.api import Api, call_limit
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import (
    AgentUnavailable,
    ApiError,
    CommandTimeout,
    NotRunning,
    UnreadableAnswer,
)
from pytest_nestedpve.pve.qemu import path_of

T = TypeVar("T")

# Without an agent PVE answers after 3 to 5 seconds, with one that hangs after 10 or more.
_LIMIT = 30.0
_KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ssh-rsa")
_LONGEST_KEY = 20_000  # characters; an RSA key of 16,384 bits has 2,800
_KEY_FILES = tuple(f"/etc/ssh/ssh_host_{kind}_key.pub" for kind in ("ed25519", "ecdsa", "rsa"))


@dataclass(frozen=True)
class Interface:
    """A network interface as the guest describes it; `mac` in lower case."""

    name: str
    mac: str
    ipv4: tuple[str, ...]
    ipv6: tuple[str, ...]


@dataclass(frozen=True)
class Execution:
    """A command that ended in a guest. `rc`: exit status, -1 after `signal`; `truncated`: output is cut."""

    rc: int
    stdout: str
    stderr: str
    signal: int | None = None
    truncated: bool = False


def ping(api: Api, node: str, vmid: int) -> bool:
    """Whether the agent answers; False also for a VM that is not running.

    Raises the errors of the host, not those of the guest.
    """
    try:
        with call_limit(_LIMIT):
            api.post(_path(node, vmid, "ping"))
    except (AgentUnavailable, NotRunning, CommandTimeout):
        return False
    return True


def interfaces(api: Api, node: str, vmid: int) -> tuple[Interface, ...]:
    """The guest's interfaces. Raises AgentUnavailable, NotRunning, UnreadableAnswer."""
    path = _path(node, vmid, "network-get-interfaces")
    with call_limit(_LIMIT):
        answer = _result(api.get(path), path)
    cards = []
    for entry in entries(answer, call=f"get {path}"):
        name, mac = text(entry.get("name")), text(entry.get("hardware-address"))
        if name is None or mac is None or not re.fullmatch(r"(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}", mac):
            continue
        addresses = entry.get("ip-addresses")
        parsed = [_address(item) for item in addresses] if isinstance(addresses, list) else []
        cards.append(
            Interface(
                name,
                mac.lower(),
                tuple(str(item) for item in parsed if isinstance(item, ipaddress.IPv4Address)),
                tuple(str(item) for item in parsed if isinstance(item, ipaddress.IPv6Address)),
            )
        )
    return tuple(cards)


def _address(entry: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    value = entry.get("ip-address") if isinstance(entry, dict) else None
    try:
        # Without the zone (fe80::1%ens18), the name of an interface in the guest.
        return ipaddress.ip_address(value.partition("%")[0]) if isinstance(value, str) else None
    except ValueError:
        return None


def ipv4_for_mac(cards: tuple[Interface, ...], mac: str) -> str | None:
    """The first usable IPv4 address of the interface with this MAC, or of a bridge that has the same MAC.

    By the MAC, because the first interface may be Docker's. Loopback and link-local addresses are not usable.
    """
    for interface in cards:
        if interface.mac != mac.lower():
            continue
        for value in interface.ipv4:
            address = ipaddress.IPv4Address(value)
            if not (address.is_loopback or address.is_link_local or address.is_unspecified):
                return value
    return None


def read_file(api: Api, node: str, vmid: int, path: str) -> str:
    """The content of a text file in the guest, whole or not at all.

    Raises AgentUnavailable, NotRunning, ApiError (no such file), UnreadableAnswer (the agent cut it).
    """
    call = _path(node, vmid, "file-read")
    with call_limit(_LIMIT):
        answer = mapping(_result(api.get(call, file=path), call), call=f"get {call}")
    content = answer.get("content")
    if not isinstance(content, str) or answer.get("truncated"):
        raise UnreadableAnswer(f"expected the whole content of {path}", call=f"get {call}")
    return content


def execute(
    api: Api, node: str, vmid: int, command: list[str], *, deadline: Deadline, what: str, retry: bool = False
) -> Execution:
    """Run `command`, an argv, in the guest and wait for its end; `what` names it in messages.

    With `retry`, an agent that is unavailable for a moment (its package is being configured) is polled until
    the deadline. Raises CommandTimeout, AgentUnavailable, NotRunning, UnreadableAnswer, ApiError (no such
    command).
    """
    start_path, status_path = _path(node, vmid, "exec"), _path(node, vmid, "exec-status")

    def patient(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except AgentUnavailable:
            if not retry:
                raise
            return None

    def start() -> int:
        answer = mapping(
            _result(api.post(start_path, command=command), start_path), call=f"post {start_path}"
        )
        pid = whole(mapping(answer, call=f"post {start_path}").get("pid"))
        if pid is None:
            raise UnreadableAnswer(f"expected a pid, found {shown(answer)}", call=f"post {start_path}")
        return pid

    def status() -> dict[str, Any] | None:
        answer = mapping(_result(api.get(status_path, pid=pid), status_path), call=f"get {status_path}")
        return answer if flag(answer.get("exited")) else None

    pid = wait_until(
        lambda: patient(start), deadline=deadline, what=f"the agent of VM {vmid} to start {what}"
    )
    answer = wait_until(
        lambda: patient(status),
        deadline=deadline,
        what=f"the end of {what} in VM {vmid}",
        interval=(0.1, 0.3),
    )
    rc = whole(answer.get("exitcode"))
    return Execution(
        -1 if rc is None else rc,
        str(answer.get("out-data") or ""),
        str(answer.get("err-data") or ""),
        signal=whole(answer.get("signal")) if rc is None else None,
        truncated=flag(answer.get("out-truncated")) or flag(answer.get("err-truncated")),
    )


def host_keys(api: Api, node: str, vmid: int) -> tuple[str, ...]:
    """The guest's SSH host keys, exactly `type base64`, read through the host, which is trusted.

    Raises UnreadableAnswer when a file holds anything but one key (a second line would get into
    known_hosts), and when the guest has no key.
    """
    keys = []
    missing: ApiError | None = None
    for file in _KEY_FILES:
        try:
            content = read_file(api, node, vmid, file)
        except (AgentUnavailable, NotRunning, UnreadableAnswer):
            raise
        except ApiError as error:
            missing = error
            continue
        keys.append(one_key(content))
    if not keys:
        raise UnreadableAnswer(
            f"expected an SSH host key in {', '.join(_KEY_FILES)} of guest {vmid}, found none ({missing})"
        ) from missing
    return tuple(keys)


def one_key(content: str) -> str:
    """`type base64` of a public key file; raises UnreadableAnswer unless it holds exactly one key."""
    lines = [line for line in content[:_LONGEST_KEY].split("\n") if line.strip()]
    match = (
        re.fullmatch(r"([a-z0-9-]+) ([A-Za-z0-9+/]+={0,2})(?: [^\r\n\0]*)?", lines[0])
        if len(lines) == 1 and len(content) < _LONGEST_KEY
        else None
    )
    if match is not None and match[1] in _KEY_TYPES:
        try:
            blob = base64.b64decode(match[2], validate=True)
        except (ValueError, binascii.Error):
            blob = b""
        name = match[1].encode()
        # The blob begins with its type; a mismatch is a forgery or garbage.
        if blob.startswith(len(name).to_bytes(4, "big") + name) and len(blob) > len(name) + 4:
            return f"{match[1]} {match[2]}"
    raise UnreadableAnswer(
        f"expected one SSH public key of type {', '.join(_KEY_TYPES)}, found {content[:120]!r}"
    )


def _result(answer: Any, path: str) -> Any:
    # pvesh wraps the agent's answer in an object, except that of file-read.
    if isinstance(answer, dict) and "result" in answer:
        return answer["result"]
    if answer is None:
        raise UnreadableAnswer("expected the agent's answer, found nothing", call=f"get {path}")
    return answer


def _path(node: str, vmid: int, command: str) -> str:
    return f"{path_of(node, vmid)}/agent/{command}"
