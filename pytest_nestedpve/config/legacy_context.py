"""The context file of earlier tools: ids to look at, addresses; what it holds besides survives a save."""

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
    """The context; empty when there is no file yet. Raises ContextError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as e:
        raise ContextError(
            f"expected a JSON object in {path}, found that it cannot be read: {e}; "
            "mend it, or name another file"
        ) from e
    if not isinstance(found, dict):
        raise ContextError(
            f"expected a JSON object in {path}, found {type(found).__name__}; mend it, or name another file"
        )
    return found


def vmids(context: Mapping[str, Any]) -> frozenset[int]:
    """All VM ids that a context names, under any name."""
    found: set[int] = set()
    for key, value in context.items():
        if key.endswith("_vm_id"):
            found |= _ids(value)
        elif key in _LISTS and isinstance(value, list):
            for each in value:
                found |= _ids(each.get("vmid", each.get("vm_id")) if isinstance(each, dict) else each)
    return frozenset(found)


def _ids(value: Any) -> set[int]:
    found = whole(value)
    return {found} if found is not None and 100 <= found <= 999_999_999 else set()


def save(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what the phases found out into the file; other keys stay. Raises ContextError."""
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
        others = [each for each in _listed(context) if _ids(_id_of(each)) != {int(nested["vmid"])}]
        context["provisioned_vms"] = [*others, {"name": name, "vmid": nested["vmid"]}]
    _write(path, context)


def forget(path: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Take out what `save` put in for these facts: the VMs are gone. Raises ContextError."""
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
        context["provisioned_vms"] = [each for each in _listed(context) if not _ids(_id_of(each)) & gone]
    _write(path, context)


def _listed(context: Mapping[str, Any]) -> list[Any]:
    found = context.get("provisioned_vms")
    return list(found) if isinstance(found, list) else []


def _id_of(each: Any) -> Any:
    return each.get("vmid", each.get("vm_id")) if isinstance(each, dict) else each


def _write(path: Path, context: Mapping[str, Any]) -> None:
    try:
        local_file.write(path, json.dumps(context, indent=2) + "\n", mode=0o666)
    except OSError as e:
        raise ContextError(f"cannot write {path}: {e}") from e
