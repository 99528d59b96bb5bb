"""pvesh: the API as a command. The exit code is 0 after a failed task too (facts 1)."""

from __future__ import annotations

import re
import sys
from typing import Any

from ..api import access, forward, schema, tree
from ..api.errors import BadParameters, PveFailure, Unsupported
from ..state import tasks
from . import frame, tables

VERBS = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}
LISTS = {
    "/nodes": "node",
    "/pools": "poolid",
    "/storage": "storage",
    "/nodes/{node}/qemu": "vmid",
    "/nodes/{node}/storage": "storage",
    "/access/users": "userid",
    "/access/roles": "roleid",
    "/access/domains": "realm",
}
USAGE = """ERROR: {}
USAGE: pvesh <COMMAND> [ARGS] [OPTIONS]

       pvesh create <api_path> [OPTIONS] [FORMAT_OPTIONS]
       pvesh delete <api_path> [OPTIONS] [FORMAT_OPTIONS]
       pvesh get <api_path> [OPTIONS] [FORMAT_OPTIONS]
       pvesh ls <api_path> [OPTIONS] [FORMAT_OPTIONS]
       pvesh set <api_path> [OPTIONS] [FORMAT_OPTIONS]
       pvesh usage <api_path> [OPTIONS]

       pvesh help [<extra-args>] [OPTIONS]
"""


def main() -> int:
    return frame.main_of(_main)


def _main(argv: list[str]) -> int:
    if not argv:
        sys.stderr.write(USAGE.format("no command specified"))
        return 255
    word, rest = argv[0], argv[1:]
    if word in WITHOUT_METHOD:
        return frame.run(WITHOUT_METHOD[word], f"pvesh {word}", rest)
    if word == "help":
        return _help(rest)
    if word not in VERBS:
        sys.stderr.write(USAGE.format(f"unknown command 'pvesh {word}'"))
        return 255
    return _call(word, rest)


def _line(word: str, method: schema.Method | None = None) -> str:
    parts = [f"pvesh {word} <api_path>"]
    if method is not None:
        for name in sorted(method.parameters):
            definition = method.parameters[name]
            if not definition.get("optional") and name not in method.uri_parameters and "[n]" not in name:
                parts.append(f"--{name} <{definition.get('type', 'string')}>")
    return " ".join([*parts, "[OPTIONS] [FORMAT_OPTIONS]"]) + "\n"


def _call(word: str, argv: list[str]) -> int:
    if not argv:
        raise frame.Usage(f"400 not enough arguments\n{_line(word)}", rc=2)
    address = "/" + argv[0].strip("/")
    verb = VERBS[word]
    resolved = schema.resolve(address)
    method = schema.method(verb, resolved[0]) if resolved else None
    if method is None or resolved is None:
        if schema.elsewhere(verb, address):
            raise Unsupported(f"{verb} {address}")
        raise PveFailure(f"No '{word}' handler defined for '{address}'", rc=1)
    line = _line(word, method)
    extra, fixed = {"noproxy": frame.BOOLEAN}, resolved[1]
    command = frame.Command(verb, method.path, args=("api_path",), formats=True, extra=extra, fixed=fixed)
    try:
        values = frame.parse(argv, command, _line(word, method))
        style = frame.style_of(values)
        values.pop("api_path")
        member = None if values.pop("noproxy", "0") == "1" else forward.other(address)
        if member is not None:
            result = forward.by_ssh(member, word, address, values)
        else:
            # As recorded: 2 below qemu and cluster, 255 for network, storages, downloads, tickets.
            rc = 2 if re.match(r"/(nodes/[^/]+/qemu|cluster)(/|$)", address) else 255
            result = tree.call(verb, address, values, access.ROOT, rc=rc)
    except BadParameters as e:
        sys.stdout.flush()
        sys.stderr.write(e.for_cli() + line)
        return e.rc
    if isinstance(result, tasks.Started):
        frame.print_outcome(result)
        result = result.upid
    sys.stdout.write(tables.render(result, style, method.returns))
    return 0


def _help(argv: list[str]) -> int:
    """Print the help without a command, a description of every command [basic-092]."""
    if argv:
        raise Unsupported("pvesh help of a command")
    described = {word: f"Call API {verb} on <api_path>." for word, verb in VERBS.items()}
    described |= {"ls": "List child objects on <api_path>."}
    where = "  <api_path> <string>\n\t     API path.\n"
    verbose = "  --verbose  <boolean>\n\t     Verbose output format.\n"
    blocks = {
        word: f"USAGE: {_line(word)}\n  {text}\n\n{where}\n"
        "  --noproxy  <boolean>\n\t     Disable automatic proxying.\n"
        for word, text in described.items()
    }
    blocks["help"] = (
        "USAGE: pvesh help [<extra-args>] [OPTIONS]\n\n  Get help about specified command.\n\n"
        f"  <extra-args> <array>\n\t     Shows help for a specific command\n\n{verbose}"
    )
    blocks["usage"] = (
        f"USAGE: {frame.usage('pvesh usage', WITHOUT_METHOD['usage'])}\n"
        f"  print API usage information for <api_path>.\n\n{where}\n"
        "  --command  <create | delete | get | set>\n\t     API command.\n\n"
        f"  --returns  <boolean>\n\t     Including schema for returned data.\n\n{verbose}"
    )
    sys.stdout.write("\n".join(blocks[word] for word in sorted(blocks)) + "\n\n")
    return 0


def _ls(values: dict[str, Any]) -> int:
    if values["output-format"] != "text":
        raise Unsupported(f"pvesh ls as {values['output-format']}")
    address = "/" + values["api_path"].strip("/")
    resolved = schema.resolve(address)
    names = schema.children("/" if address == "/" else _template(address, resolved))
    listed = schema.listed(_template(address, resolved))
    if not names and resolved is None:
        if schema.elsewhere("GET", address):
            raise Unsupported(f"pvesh ls {address}")
        raise PveFailure(f"no such resource '{address}'", rc=2)
    base = "" if address == "/" else _template(address, resolved)
    rows = {name: _capabilities(f"{base}/{name}") for name in names} | listed
    if resolved and "GET" in schema.paths().get(resolved[0], ()):
        rows |= {name: _capabilities(path) for name, path in _listed(address, resolved[0])}
    for name in sorted(rows):
        sys.stdout.write(f"{rows[name]}        {name}\n")
    return 0


def _template(address: str, resolved: tuple[str, dict[str, str]] | None) -> str:
    return resolved[0] if resolved else address


def _listed(address: str, template: str) -> list[tuple[str, str]]:
    """The entries of the list at the address, with their paths: guests, nodes, pools, …"""
    key = LISTS.get(template)
    if key is None:
        return []
    member = forward.other(address)
    if member is None:
        rows = tree.call("GET", address, {}, access.ROOT)
    else:
        rows = forward.by_ssh(member, "get", address, {})
    return [(str(row[key]), f"{template}/{{{key}}}") for row in rows]


def _capabilities(path: str) -> str:
    verbs = schema.paths().get(path, ())
    below = any(other.startswith(path + "/") for other in schema.paths())
    letters = [
        ("D", below),
        ("r", "GET" in verbs),
        ("w", "PUT" in verbs),
        ("c", "POST" in verbs),
        ("d", "DELETE" in verbs),
    ]
    return "".join(letter if is_set else "-" for letter, is_set in letters[:4]) + (
        "d" if "DELETE" in verbs else "-"
    )


def _usage(values: dict[str, Any]) -> int:
    address = "/" + values["api_path"].strip("/")
    resolved = schema.resolve(address)
    if resolved is None:
        if schema.elsewhere("GET", address):
            raise Unsupported(f"pvesh usage {address}")
        raise PveFailure(f"no such resource '{address}'", rc=2)
    if "1" in (values.get("verbose"), values.get("returns")):
        raise Unsupported("pvesh usage in full")
    chosen = values.get("command")
    for word, verb in VERBS.items():
        method = schema.method(verb, resolved[0])
        if method is None or chosen not in (None, word):
            continue
        needed = [
            f" --{name} <{d.get('type', 'string')}>"
            for name, d in sorted(method.parameters.items())
            if not d.get("optional") and name not in method.uri_parameters and "[n]" not in name
        ]
        optional = [n for n, d in method.parameters.items() if d.get("optional")]
        middle = "".join(needed) or " "
        print(f"USAGE: pvesh {word} {address}{middle}{' [OPTIONS]' if optional else ''}")
    return 0


_PATH = {"type": "string"}
_COMMAND = {"type": "string", "optional": 1, "enum": sorted(VERBS)}
WITHOUT_METHOD = {
    "ls": frame.Command(
        "", "", ("api_path",), extra={"api_path": _PATH, "noproxy": frame.BOOLEAN}, formats=True, body=_ls
    ),
    "usage": frame.Command(
        "",
        "",
        ("api_path",),
        extra={"api_path": _PATH, "command": _COMMAND, "returns": frame.BOOLEAN, "verbose": frame.BOOLEAN},
        body=_usage,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
