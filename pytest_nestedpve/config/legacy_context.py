"""The context file of earlier tools: VM ids and addresses; other keys are preserved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.answers import whole
from pytest_nestedpve.pve.errors import PveError

ROLE = "nested-pve"
_LISTS = ("provisioned_vms", "discovered_vms")


class ContextError(PveError):
    """The context file cannot be read or written."""


def load(path: Path) -> dict[str, Any]:
    """The context; empty if the file does not exist. Raises ContextError."""
    try:
        context = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ContextError(
            f"expected a JSON object in {path}, found that it cannot be read: {e}; "
            "fix it, or set another file"
        ) from e
    if not isinstance(context, dict):
        raise ContextError(
            f"expected a JSON object in {path}, found {type(context).__name__}; fix it, or set another file"
        )
    return context


def vmids(context: Mapping[str, Any]) -> frozenset[int]:
    """All VM ids in a context, under any key."""
    ids: set[int] = set()
    for key, value in context.items():
        if key.endswith("_vm_id"):
            ids |= _ids(value)
        elif key in _LISTS and isinstance(value, list):
            for entry in value:
                ids |= _ids(_id_of(entry))
    return frozenset(ids)


def _ids(value: Any) -> set[int]:
    vmid = whole(value)
    return {vmid} if vmid is not None and 100 <= vmid <= 999_999_999 else set()


def save(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the facts of the phases into the file, and preserve other keys. Raises ContextError."""
    context = load(path)
    nested, leaf = facts.get("provision", {}), facts.get("leaf_provision", {})
    ip = facts.get("setup_network", {}).get("ip") or facts.get("wait_ip", {}).get("ip")
    name = str(nested.get("name") or ROLE)
    for key, value in (
        ("inner_ip", ip),
        ("node_ip", ip),
        (f"{ROLE}_vm_id", nested.get("vmid")),
        (f"{name}_vm_id", nested.get("vmid")),
        (f"{name}_ip", ip),
        (f"{leaf.get('name')}_vm_id", leaf.get("vmid")),
        ("leaf_ip", facts.get("leaf_wait_ip", {}).get("ip")),
    ):
        if value is not None:
            context[key] = value
    if nested.get("vmid") is not None:
        others = [entry for entry in _listed(context) if _ids(_id_of(entry)) != {int(nested["vmid"])}]
        context["provisioned_vms"] = [*others, {"name": name, "vmid": nested["vmid"]}]
    _write(path, context)


def forget(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Remove the keys that `save` wrote for these facts, of deleted VMs. Raises ContextError."""
    context = load(path)
    gone = {
        facts[phase]["vmid"] for phase in ("provision", "leaf_provision") if facts.get(phase, {}).get("vmid")
    }
    names = {str(facts.get(phase, {}).get("name")) for phase in ("provision", "leaf_provision")}
    for key in list(context):
        named = any(key in (f"{name}_vm_id", f"{name}_ip") for name in names)
        if named or (key.endswith("_vm_id") and context[key] in gone):
            del context[key]
    if gone:
        for key in ("inner_ip", "node_ip", "leaf_ip"):
            context.pop(key, None)
        context["provisioned_vms"] = [entry for entry in _listed(context) if not _ids(_id_of(entry)) & gone]
    _write(path, context)


def _listed(context: Mapping[str, Any]) -> list[Any]:
    entries = context.get("provisioned_vms")
    return list(entries) if isinstance(entries, list) else []


def _id_of(entry: Any) -> Any:
    return entry.get("vmid", entry.get("vm_id")) if isinstance(entry, dict) else entry


def _write(path: Path, context: Mapping[str, Any]) -> None:
    try:
        local_file.write(path, json.dumps(context, indent=2) + "\n", mode=0o666)
    except OSError as e:
        raise ContextError(f"cannot write {path}: {e}") from e
