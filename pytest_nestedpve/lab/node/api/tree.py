"""The API tree: calls of a handler by address and verb, after checks of permissions and parameters.

`pvesh`, `qm`, `pveum`, `pvesm` and port 8006 use `call`.
"""

from __future__ import annotations

import functools
import importlib
import socket
from collections.abc import Callable, Mapping
from typing import Any

from ..state import members, paths, tasks
from . import access, faults, schema
from .access import Caller
from .errors import NotImplementedHere, PveFailure, Unsupported

Handler = Callable[[Caller, dict[str, Any]], Any]
HANDLERS: dict[tuple[str, str], Handler] = {}
MODULES = (
    "cluster",
    "nodes",
    "qemu",
    "config",
    "power",
    "agent",
    "snapshot",
    "clone",
    "migrate",
    "storage",
    "transfers",
    "pools",
    "users",
)


def api(verb: str, path: str) -> Callable[[Handler], Handler]:
    """Register a handler for a method of the table."""

    def register(handler: Handler) -> Handler:
        HANDLERS[verb, path] = handler
        return handler

    return register


@functools.cache
def _load() -> None:
    for name in MODULES:
        importlib.import_module(f"..handlers.{name}", __package__)


def find(verb: str, address: str) -> tuple[schema.Method, dict[str, str]]:
    """The method at an address, with the values in the address; NotImplementedHere if there is none."""
    resolved = schema.resolve(address)
    method = schema.method(verb, resolved[0]) if resolved else None
    if resolved is None or method is None:
        if schema.elsewhere(verb, address):
            raise Unsupported(f"{verb} {address}")
        raise NotImplementedHere(verb, "/" + address.strip("/"))
    return method, resolved[1]


def call(verb: str, address: str, params: Mapping[str, Any], caller: Caller, *, rc: int = 2) -> Any:
    """Call the API. A `tasks.Started` as result stands for the UPID. Errors are PveFailure, and NoReply."""
    rule = faults.on_call(verb, address, params)
    if rule is not None:
        faults.before(rule, faults.vmid_of(address, params))
    result = _call(verb, address, params, caller, rc)
    if rule is not None:
        faults.after(rule)
    return result


def _call(verb: str, address: str, params: Mapping[str, Any], caller: Caller, rc: int) -> Any:
    _load()
    method, uri = find(verb, address)
    values = {**params, **uri}
    access.check_schema(method.permissions, caller, values)
    if caller.token and "skiplock" in values:
        from .errors import BadParameters

        raise BadParameters({"skiplock": "Only root may use this option."})
    values = schema.check(method, values, rc=rc)
    if "node" in uri:
        values["node"] = _local_name(uri["node"])
    handler = HANDLERS.get((verb, method.path))
    if handler is None:
        if verb == "GET" and (names := {*schema.children(address), *schema.listed(method.path)}):
            key = next(iter(method.returns.get("p") or ("name",)))
            return [{key: name} for name in sorted(names)]
        raise Unsupported(f"{verb} {method.path}")
    return handler(caller, values)


def _local_name(name: str) -> str:
    """This node's name for itself or localhost; PveFailure for a name that is no node of the cluster."""
    if name in ("localhost", paths.node()):
        return paths.node()
    if members.find(name) is not None:
        raise Unsupported(f"a command for node '{name}' on node '{paths.node()}'")
    try:
        socket.getaddrinfo(name, 22)
    except OSError as e:
        text = e.strerror or str(e)
        raise PveFailure(
            f"hostname lookup '{name}' failed - failed to get address info for: {name}: {text}",
            rc=11,
            status=595,
        ) from e
    raise Unsupported(f"proxying to node '{name}'")


def task(caller: Caller, kind: str, ident: str | int, work: Callable[[], Any]) -> tasks.Started:
    """Start a task for this caller."""
    return tasks.start(kind, str(ident), caller.id, work, sync=caller.sync)
