"""The table of the API (schema.json): methods, their parameters and permissions.

`check` verifies parameters as PVE does: types, formats, enumerations, limits, unknown and missing ones.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import validation
from .errors import BadParameters

Definition = dict[str, Any]

# Methods of PVE that the table does not list: their parameters and permissions.
NODE: Definition = {"type": "string", "format": "pve-node"}
EXTRA: dict[str, dict[str, dict[str, Any]]] = {
    "/nodes/{node}/version": {"GET": {"p": {"node": NODE}, "perm": {"user": "all"}}},
    "/nodes/{node}/status": {
        "GET": {"p": {"node": NODE}, "perm": {"check": ["perm", "/nodes/{node}", ["Sys.Audit"]]}}
    },
    "/nodes/{node}/time": {"GET": {"p": {"node": NODE}, "perm": {"user": "all"}}},
    "/nodes/{node}/dns": {
        "GET": {"p": {"node": NODE}, "perm": {"check": ["perm", "/nodes/{node}", ["Sys.Audit"]]}}
    },
    "/nodes/{node}/query-url-metadata": {
        "GET": {
            "p": {
                "node": NODE,
                "url": {"type": "string", "pattern": "https?://.*"},
                "verify-certificates": {"type": "boolean", "optional": 1, "default": 1},
            },
            # As of download-url, which calls it first.
            "perm": {
                "check": [
                    "or",
                    ["perm", "/", ["Sys.Audit", "Sys.Modify"]],
                    ["perm", "/nodes/{node}", ["Sys.AccessNetwork"]],
                ]
            },
        }
    },
    "/nodes/{node}/services": {
        "GET": {"p": {"node": NODE}, "perm": {"check": ["perm", "/nodes/{node}", ["Sys.Audit"]]}}
    },
}


@dataclass(frozen=True)
class Method:
    """One method of one path. `parameters` by name, `name[n]` standing for name0, name1, …"""

    verb: str
    path: str
    parameters: Mapping[str, Definition]
    permissions: Mapping[str, Any] | None
    returns: Mapping[str, Any]
    open: bool = False  # accepts parameters that it does not name

    @property
    def uri_parameters(self) -> tuple[str, ...]:
        return tuple(re.findall(r"{(\w+)}", self.path))

    def definition(self, name: str) -> Definition | None:
        return self.parameters.get(name) or self.parameters.get(validation.family(name) or "")


@functools.cache
def _table() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(__file__).parent / "schema.json").read_text())
    return loaded


@functools.cache
def paths() -> dict[str, tuple[str, ...]]:
    """All paths of the table, each with its verbs."""
    verbs_by_path = {path: tuple(verbs) for path, verbs in _table()["methods"].items()}
    return verbs_by_path | {path: tuple(verbs) for path, verbs in EXTRA.items()}


@functools.cache
def method(verb: str, path: str) -> Method | None:
    if extra := EXTRA.get(path, {}).get(verb):
        return Method(verb, path, extra["p"], extra["perm"], {"type": "any"})
    entry = _table()["methods"].get(path, {}).get(verb)
    if entry is None:
        return None
    definitions = _table()["definitions"]
    return Method(
        verb,
        path,
        {name: definitions[index] for name, index in entry["p"].items()},
        entry["perm"],
        definitions[entry["ret"]] or {"type": "null"},
        bool(entry.get("more")),
    )


@functools.cache
def _templates() -> tuple[tuple[str, re.Pattern[str]], ...]:
    def pattern(path: str) -> re.Pattern[str]:
        parts = []
        for part in path.split("/"):
            if part == "{volume}":
                parts.append(r"(?P<volume>.+)")  # volume ids have slashes
            elif part.startswith("{"):
                parts.append(rf"(?P<{part[1:-1]}>[^/]+)")
            else:
                parts.append(re.escape(part))
        return re.compile("/".join(parts))

    # Fixed parts take precedence over variable ones.
    order = sorted(paths(), key=lambda path: (path.count("{"), path))
    return tuple((path, pattern(path)) for path in order)


def resolve(path: str) -> tuple[str, dict[str, str]] | None:
    """The template that matches an address, with the values of its variables; None without one."""
    path = "/" + path.strip("/")
    if path in paths():
        return path, {}
    for template, pattern in _templates():
        if "{" in template and (match := pattern.fullmatch(path)):
            return template, match.groupdict()
    return None


# Children of a node by `pvesh ls` [basic-073], and children of a cluster that the table does not list.
LISTED = {
    "/nodes/{node}": """
        -r-c-:aplinfo Dr---:apt Dr---:capabilities Dr---:ceph Dr---:certificates -rw--:config Dr---:disks
        -rw--:dns Dr---:firewall Dr---:hardware -r-c-:hosts -r---:journal Dr-c-:lxc ---c-:migrateall
        -r---:netstat Drwcd:network Dr-c-:qemu -r---:query-oci-repo-tags -r---:query-url-metadata
        Dr---:replication -r---:report -r---:rrd -r---:rrddata Dr---:scan Dr---:sdn Dr---:services
        ---c-:spiceshell ---c-:startall -r-c-:status ---c-:stopall Dr---:storage -rwcd:subscription
        ---c-:suspendall -r---:syslog Dr---:tasks ---c-:termproxy -rw--:time -r---:version ---c-:vncshell
        ---c-:vzdump ---c-:wakeonlan
    """,
    "/cluster": """
        Dr---:acme Dr---:ceph Dr---:firewall Dr---:mapping Dr---:metrics Dr---:notifications Drw--:sdn
    """,
    "/nodes/{node}/qemu/{vmid}": "Dr---:firewall",  # [basic-136]
}
LETTERS = {"GET": "r", "PUT": "w", "POST": "c", "DELETE": "d"}


@functools.cache
def listed(path: str) -> dict[str, str]:
    """The marks of `pvesh ls` by name below a path, for children that the table does not list."""
    marked = (entry.partition(":") for entry in LISTED.get(path, "").split())
    return {name: marks for marks, _, name in marked}


def elsewhere(verb: str, address: str) -> bool:
    """Whether PVE has a method that the table does not list: unsupported, but not unknown."""
    if not address.strip("/"):
        return verb == "GET"
    if re.fullmatch(r"/?nodes/[^/]+/execute/?", address):  # [extra-020], not listed by `pvesh ls`
        return verb == "POST"
    for parent in LISTED:
        pattern = re.sub(r"{\w+}", "[^/]+", parent) + r"/([^/]+)(/.+)?"
        match = re.fullmatch(pattern, "/" + address.strip("/"))
        marks = listed(parent).get(match[1], "") if match else ""
        if match is None or not marks:
            continue
        if match[2] is None:
            return LETTERS[verb] in marks
        below = f"{parent}/{match[1]}/"
        if marks.startswith("D") and not any(path.startswith(below) for path in paths()):
            return True
    return False


def children(path: str) -> list[str]:
    """The fixed names directly below an address, for `pvesh ls`."""
    prefix = path.rstrip("/") + "/"
    names = {rest[len(prefix) :].split("/")[0] for rest in paths() if rest.startswith(prefix)}
    return sorted(name for name in names if not name.startswith("{"))


def check(method: Method, values: Mapping[str, Any], *, rc: int = 2) -> dict[str, Any]:
    """The verified parameters of a call; BadParameters names every wrong one. Values are unchanged, except
    booleans, which become "1" or "0"."""
    errors: dict[str, str] = {}
    verified: dict[str, Any] = {}
    for name, value in values.items():
        definition = method.definition(name)
        if definition is None:
            if method.open:
                verified[name] = value
            else:
                errors[name] = (
                    "property is not defined in schema and the schema does not allow additional properties"
                )
            continue
        value = _plain(value)
        error = validation.value(definition, value, name)
        if error:
            errors[name] = error
        verified[name] = validation.as_boolean(value) if definition.get("type") == "boolean" else value
        required = definition.get("requires")
        if required and required not in values:
            errors[required] = f"missing property required by '{name}'"
    for name, definition in method.parameters.items():
        if not definition.get("optional") and "[n]" not in name and name not in values:
            errors[name] = "property is missing and it is not optional"
    if errors:
        raise BadParameters(errors, rc=rc)
    return verified


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str) else str(value)
