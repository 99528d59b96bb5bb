"""The marker: the line in the description of a VM that names its run."""

from __future__ import annotations

import json
import re
import uuid as uuids
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_nestedpve.run.identity import RUN_ID

MARKER = "nestedpve:"
TAG = "nestedpve"
ROLES = ("nested", "leaf")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")


@dataclass(frozen=True)
class Marker:
    """The line in a VM's description that names its run; written at create, never changed."""

    run: str
    vmid: int
    uuid: str
    role: str = "nested"

    def to_text(self) -> str:
        """The line, without its end."""
        data = {"v": 1, "run": self.run, "vmid": self.vmid, "uuid": self.uuid, "role": self.role}
        return f"{MARKER} {json.dumps(data, separators=(',', ':'))}"


def parse_marker(description: object) -> Marker | None:
    """The marker of a description; None unless there is exactly one such line, and it is as we write it."""
    lines = marker_lines(description)
    if len(lines) != 1:
        return None
    data = parse_object(lines[0][len(MARKER) :])
    if data is None or set(data) != {"v", "run", "vmid", "uuid", "role"}:
        return None
    run, vmid, uuid, role = data["run"], data["vmid"], data["uuid"], data["role"]
    if (
        data["v"] != 1
        or type(data["v"]) is not int
        or type(vmid) is not int
        or not 100 <= vmid <= 999_999_999
    ):
        return None
    if not (isinstance(run, str) and RUN_ID.match(run) and isinstance(uuid, str) and _UUID.match(uuid)):
        return None
    return Marker(run, vmid, uuid, role) if isinstance(role, str) and role in ROLES else None


def marker_lines(description: object) -> list[str]:
    """The lines of a description that look like a marker, well-formed or not."""
    if not isinstance(description, str) or MARKER not in description:
        return []
    return [line.strip() for line in description.split("\n") if line.strip().startswith(MARKER)]


def parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object whose keys are distinct; None for any other text."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def uuid_of(config: Mapping[str, Any]) -> str | None:
    """The SMBIOS uuid of a configuration, lower case."""
    for part in str(config.get("smbios1") or "").split(","):
        key, _, value = part.strip().partition("=")
        if key == "uuid":
            text = value.strip().lower()
            return text if _UUID.match(text) else None
    return None


def new_uuid() -> str:
    """A new SMBIOS uuid."""
    return str(uuids.uuid4())
