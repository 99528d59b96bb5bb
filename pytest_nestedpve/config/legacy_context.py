"""The context file of earlier tools: VM ids and addresses; other keys are preserved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
            f"expected a JSON object in {path}, but it cannot be read: {e}; fix it, or set another file"
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


@dataclass(frozen=True)
class ContextVm:
    """A VM in the context file; None where a value is not known."""

    name: str | None = None
    vmid: int | None = None
    ip: str | None = None


def save(path: Path, nested: ContextVm, leaf: ContextVm) -> None:
    """Write the two VMs into the file; other keys remain. Raises ContextError."""
    context = load(path)
    name = nested.name or ROLE
    for key, value in (
        ("inner_ip", nested.ip),
        ("node_ip", nested.ip),
        (f"{ROLE}_vm_id", nested.vmid),
        (f"{name}_vm_id", nested.vmid),
        (f"{name}_ip", nested.ip),
        (f"{leaf.name}_vm_id", leaf.vmid),
        ("leaf_ip", leaf.ip),
    ):
        if value is not None:
            context[key] = value
    if nested.vmid is not None:
        others = [entry for entry in _listed(context) if _ids(_id_of(entry)) != {nested.vmid}]
        context["provisioned_vms"] = [*others, {"name": name, "vmid": nested.vmid}]
    _write(path, context)


def forget(path: Path, nested: ContextVm, leaf: ContextVm) -> None:
    """Delete the entries that `save` wrote for the two VMs. Raises ContextError."""
    context = load(path)
    deleted = {vm.vmid for vm in (nested, leaf) if vm.vmid}
    names = {str(vm.name) for vm in (nested, leaf)}
    for key in list(context):
        named = any(key in (f"{name}_vm_id", f"{name}_ip") for name in names)
        if named or (key.endswith("_vm_id") and context[key] in deleted):
            del context[key]
    if deleted:
        for key in ("inner_ip", "node_ip", "leaf_ip"):
            context.pop(key, None)
        context["provisioned_vms"] = [
            entry for entry in _listed(context) if not _ids(_id_of(entry)) & deleted
        ]
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
