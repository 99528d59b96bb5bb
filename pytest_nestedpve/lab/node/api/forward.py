"""Calls for another node of the cluster, forwarded as by PVE: those of pvesh by root's SSH between nodes,
those of port 8006 to the other node's port 8006."""

from __future__ import annotations

import http.client
import json
import shlex
import ssl
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..state import cluster_fs, members, paths
from ..state.members import Member
from .errors import PveFailure

CONNECT_LIMIT = 10  # seconds
ANSWER_LIMIT = 75.0


def other(address: str) -> Member | None:
    """The other node of the cluster that a call is for; None for this node or none."""
    parts = address.strip("/").split("/")
    member = members.find(parts[1]) if len(parts) > 1 and parts[0] == "nodes" else None
    return member if member is not None and not member.local else None


def login(member: Member) -> list[str]:
    """The command line of the SSH client for another node, without the remote command."""
    known = paths.at(f"/etc/pve/nodes/{member.name}/ssh_known_hosts")
    options = ["BatchMode=yes", f"HostKeyAlias={member.name}", f"UserKnownHostsFile={known}"]
    options += ["GlobalKnownHostsFile=none", f"ConnectTimeout={CONNECT_LIMIT}"]
    return ["ssh", "-e", "none", *(f"-o{option}" for option in options), f"root@{member.address}"]


def by_ssh(member: Member, word: str, address: str, values: Mapping[str, Any]) -> Any:
    """The result of `pvesh WORD ADDRESS` on the member. The output is parsed without its line breaks: with a
    task's lines before the result it is no JSON, and returned as text [cluster-052]."""
    command = ["pvesh", word, address, "--noproxy", "1", "--output-format", "json"]
    for name, value in values.items():
        for item in value if isinstance(value, list) else [value]:
            command += [f"--{name}", str(item)]
    process = subprocess.run(
        [*login(member), "--", shlex.join(command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    errors = process.stderr.splitlines()
    if process.returncode:
        last = errors.pop() if errors else f"exit code {process.returncode}"
        sys.stderr.writelines(f"{line}\n" for line in errors)
        raise PveFailure(f"proxy handler failed: {last}")
    sys.stderr.write(process.stderr)
    text = "".join(process.stdout.splitlines())
    try:
        return json.loads(text)
    except ValueError:
        return text or None


@dataclass(frozen=True)
class Relayed:
    """The answer of the other node's port 8006."""

    status: int
    reason: str
    body: bytes
    kind: str


def by_https(
    member: Member, port: int, verb: str, target: str, headers: Sequence[tuple[str, str]], body: bytes
) -> Relayed:
    """Send the request to the other node. PveFailure with status 595 if it is unreachable."""
    context = ssl.create_default_context(cafile=str(cluster_fs.fs() / "pve-root-ca.pem"))
    connection = http.client.HTTPSConnection(member.address, port, timeout=CONNECT_LIMIT, context=context)
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_LIMIT)
        connection.request(verb, target, body or None, dict(headers))
        answer = connection.getresponse()
        kind = answer.headers.get("Content-Type", "")
        return Relayed(answer.status, answer.reason, answer.read(), kind)
    except (OSError, http.client.HTTPException) as e:
        text = getattr(e, "strerror", None) or str(e) or e.__class__.__name__
        raise PveFailure(text, status=595) from e
    finally:
        connection.close()
