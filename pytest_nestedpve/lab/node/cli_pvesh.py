"""pvesh: the API at the prompt. A task's failure leaves the exit code 0 (facts 1)."""

from __future__ import annotations

import sys

from . import access, cli, format, forward, schema, tasks, tree
from .errors import BadParameters, PveFailure

VERBS = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}
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
    return cli.door(_main)


def _main(argv: list[str]) -> int:
    if not argv:
        sys.stderr.write(USAGE.format("no command specified"))
        return 255
    word, rest = argv[0], argv[1:]
    if word == "ls":
        return _ls(rest)
    if word == "usage":
        return _usage(rest)
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
        raise cli.Usage(f"400 not enough arguments\n{_line(word)}", rc=2)
    address = "/" + argv[0].strip("/")
    verb = VERBS[word]
    found = schema.resolve(address)
    method = schema.method(verb, found[0]) if found else None
    if method is None or found is None:
        raise PveFailure(f"No '{word}' handler defined for '{address}'", rc=1)
    line = _line(word, method)
    command = cli.Command(
        verb, method.path, args=("api_path",), formats=True, extra={"noproxy": cli.BOOLEAN}, fixed=found[1]
    )
    try:
        values = cli.parse(argv, command, _line(word, method))
        style = cli.style_of(values)
        values.pop("api_path")
        member = None if values.pop("noproxy", "0") == "1" else forward.other(address)
        if member is not None:
            result = forward.by_ssh(member, word, address, values)
        else:
            result = tree.call(verb, address, values, access.ROOT)
    except BadParameters as e:
        sys.stdout.flush()
        sys.stderr.write(e.for_cli() + line)
        return e.rc
    if isinstance(result, tasks.Started):
        cli.outcome(result)
        result = result.upid
    sys.stdout.write(format.render(result, style, method.returns))
    return 0


def _ls(argv: list[str]) -> int:
    if not argv:
        raise cli.Usage(f"400 not enough arguments\n{_line('ls')}", rc=2)
    address = "/" + argv[0].strip("/")
    found = schema.resolve(address)
    names = schema.children("/" if address == "/" else _template(address, found))
    if not names and found is None:
        raise PveFailure(f"no such resource '{address}'", rc=2)
    base = "" if address == "/" else _template(address, found)
    rows = [(name, f"{base}/{name}") for name in names]
    if found and "GET" in schema.paths().get(found[0], ()):
        rows += _listed(address, found[0])
    for name, path in sorted(set(rows)):
        sys.stdout.write(f"{_capabilities(path)}        {name}\n")
    return 0


def _template(address: str, found: tuple[str, dict[str, str]] | None) -> str:
    return found[0] if found else address


def _listed(address: str, template: str) -> list[tuple[str, str]]:
    """Guests, nodes, pools: what a list below the path holds."""
    key = {"/nodes": "node", "/pools": "poolid", "/storage": "storage", "/nodes/{node}/qemu": "vmid"}.get(
        template
    )
    if key is None:
        return []
    member = forward.other(address)
    if member is None:
        rows = tree.call("GET", address, {}, access.ROOT)
    else:
        rows = forward.by_ssh(member, "get", address, {})
    variable = {"poolid": "{poolid}", "node": "{node}", "storage": "{storage}", "vmid": "{vmid}"}[key]
    return [(str(row[key]), f"{template}/{variable}") for row in rows]


def _capabilities(path: str) -> str:
    verbs = schema.paths().get(path, ())
    below = any(other.startswith(path + "/") for other in schema.paths())
    marks = [
        ("D", below),
        ("r", "GET" in verbs),
        ("w", "PUT" in verbs),
        ("c", "POST" in verbs),
        ("d", "DELETE" in verbs),
    ]
    return "".join(letter if there else "-" for letter, there in marks[:4]) + (
        "d" if "DELETE" in verbs else "-"
    )


def _usage(argv: list[str]) -> int:
    if not argv:
        raise cli.Usage("400 not enough arguments\npvesh usage <api_path> [OPTIONS]\n", rc=2)
    address = "/" + argv[0].strip("/")
    found = schema.resolve(address)
    if found is None:
        raise PveFailure(f"no such resource '{address}'", rc=2)
    wanted = argv[argv.index("--command") + 1] if "--command" in argv[:-1] else None
    for word, verb in VERBS.items():
        method = schema.method(verb, found[0])
        if method is None or wanted not in (None, word):
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


if __name__ == "__main__":
    sys.exit(main())
