"""What the commands share: options checked against the API's table, usage lines, errors, exit codes."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import schema, tree, validation
from ..api.access import ROOT
from ..api.errors import BadParameters, NoReply, PveFailure, Unsupported
from ..state import cluster_fs, paths, store, tasks
from . import tables

BOOLEAN = {"type": "boolean", "optional": 1}
TEXT = {"type": "string", "optional": 1}
FORMAT_OPTIONS: dict[str, dict[str, Any]] = {
    "output-format": {"type": "string", "optional": 1, "enum": list(tables.FORMATS)},
    "human-readable": BOOLEAN,
    "noborder": BOOLEAN,
    "noheader": BOOLEAN,
    "quiet": BOOLEAN,
}

# Measured on an idle PVE 9.2: `pvesh` and `qm` take 0.8 to 1.0 s, `pveum` 0.4 s.
_HEAVY = ("pvesh", "qm")
_LIGHT = 0.4


class Usage(PveFailure):
    """A command line that cannot be read; `text` has all its lines."""

    def for_cli(self) -> str:
        return self.text


@dataclass(frozen=True)
class Command:
    """A sub-command: an API method with arguments in fixed places, some values fixed, and a printer; or
    what has no method: a `body` whose parameters are all in `extra`."""

    verb: str
    path: str
    args: tuple[str, ...] = ()
    fixed: Mapping[str, str] | None = None
    show: Callable[[Any, dict[str, Any]], None] | None = None
    extra: Mapping[str, Mapping[str, Any]] | None = None  # options beside the method's
    formats: bool = False
    mirror: bool = True  # the exit code is the task's
    rest: str | None = None  # takes all further words under this name
    rc: int | None = None  # of a bad parameter, where it is not the program's
    body: Callable[[dict[str, Any]], int] | None = None
    section: int = 0  # of the overview: the program's own commands stand apart


def refused(name: str) -> Command:
    """A command of the real thing that the lab has not, whatever follows it."""

    def body(_: dict[str, Any]) -> int:
        raise Unsupported(name)

    return Command("", "", rest="extra-args", body=body)


def options_of(command: Command) -> dict[str, Mapping[str, Any]]:
    """What may be given as an option. Arguments too: what stands in their place wins [config-008]."""
    method = schema.method(command.verb, command.path)
    own: dict[str, Mapping[str, Any]] = dict(method.parameters) if method else {}
    own |= dict(command.extra or {})
    if command.formats:
        own |= FORMAT_OPTIONS
    taken = {*(command.fixed or {}), "node", *([command.rest] if command.rest else [])}
    return {name: definition for name, definition in own.items() if name not in taken}


def usage(name: str, command: Command) -> str:
    known = options_of(command)
    words = [name]
    words += [f"[<{arg}>]" if known.get(arg, {}).get("optional") else f"<{arg}>" for arg in command.args]
    if command.rest:
        words.append("[<extra-args>]")
    known = {option: definition for option, definition in known.items() if option not in command.args}
    for option in sorted(known):
        if not known[option].get("optional") and "[n]" not in option:
            words.append(f"--{option} <{known[option].get('type', 'string')}>")
    optional = [o for o in known if o not in FORMAT_OPTIONS]
    if not command.args and not command.rest:
        words.append("")
    if optional:
        words.append("[OPTIONS]")
    if command.formats:
        words.append("[FORMAT_OPTIONS]")
    return " ".join(words) + "\n"


def _needed(command: Command) -> int:
    """How many arguments there must be: those before the last ones that are optional."""
    known, count = options_of(command), len(command.args)
    while count and known.get(command.args[count - 1], {}).get("optional"):
        count -= 1
    return count


def parse(argv: Sequence[str], command: Command, line: str) -> dict[str, Any]:
    """The values of a command line, by name."""
    known = options_of(command)
    values: dict[str, Any] = {}
    words: list[str] = []
    unknown: list[str] = []
    index = 0
    while index < len(argv):
        word = argv[index]
        index += 1
        if word == "--":
            words += argv[index:]
            break
        match = re.fullmatch(r"--?([A-Za-z][\w\-]*)(?:=(.*))?", word, re.S)
        if match is None or (command.rest and (len(words) > len(command.args) or not command.args)):
            words.append(word)
            continue
        name, value = match[1], match[2]
        full, definition = _lookup(known, name)
        if full is None:
            fitting = [other for other in _names(known) if other.lower().startswith(name.lower())]
            unknown.append(
                f"Option {name} is ambiguous ({', '.join(fitting)})\n"
                if fitting
                else f"Unknown option: {name}\n"
            )
            continue
        if value is None:
            following = argv[index] if index < len(argv) else None
            if definition.get("type") == "boolean":
                value = "1"
                if following is not None and not following.startswith("-"):
                    value, index = following, index + 1
            elif following is None:
                unknown.append(f"Option {name} requires an argument\n")
                continue
            else:
                value, index = following, index + 1
        if definition.get("type") == "array":
            values.setdefault(full, []).append(value)
        elif full in values and str(definition.get("format", "")).endswith("-list"):
            values[full] += "," + value
        else:
            values[full] = value
    if unknown:
        raise Usage("".join(unknown) + f"400 unable to parse option\n{line}", rc=2)
    if len(words) < _needed(command):
        raise Usage(f"400 not enough arguments\n{line}", rc=2)
    values |= dict(zip(command.args, words, strict=False))
    left = words[len(command.args) :]
    if command.rest:
        if left:
            values[command.rest] = left
    elif left:
        raise Usage(f"400 too many arguments\n{line}", rc=255)
    return values


def _lookup(known: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str | None, Mapping[str, Any]]:
    """An option by its name, by another case, or by a beginning that only it has."""
    if name in known:
        return name, known[name]
    if (family := validation.family(name)) and family in known:
        return name, known[family]
    for test in (str.__eq__, str.startswith):
        fitting = [other for other in _names(known) if test(other.lower(), name.lower())]
        if len(fitting) == 1:
            return fitting[0], known[validation.family(fitting[0]) or fitting[0]]
    return None, {}


def _names(known: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of all options, families member by member."""
    return sorted(
        name.replace("[n]", str(number)) if "[n]" in name else name
        for name in known
        for number in range(validation.LAST.get(name.removesuffix("[n]"), 0) + 1 if "[n]" in name else 1)
    )


def _checked(known: Mapping[str, Mapping[str, Any]], values: dict[str, Any], rc: int = 2) -> dict[str, Any]:
    """Values that are no method's, verified as those are."""
    definitions = {name: dict(definition) for name, definition in known.items()}
    return schema.check(schema.Method("", "", definitions, None, {}), values, rc=rc)


def style_of(values: dict[str, Any]) -> tables.Style:
    """Take the FORMAT_OPTIONS out of the values."""
    given = {name: values.pop(name) for name in FORMAT_OPTIONS if name in values}
    given = _checked(FORMAT_OPTIONS, given)

    def flag(name: str, default: str) -> bool:
        return str(given.get(name, default)) == "1"

    return tables.Style(
        output=given.get("output-format", "text"),
        border=not flag("noborder", "0"),
        header=not flag("noheader", "0"),
        human=flag("human-readable", "1"),
        quiet=flag("quiet", "0"),
        unicode=tables.unicode_locale(),
    )


def outcome(started: tasks.Started) -> int:
    """Say how a task ended on stderr; 255 if it failed."""
    sys.stdout.flush()
    if started.warnings:
        print(f"Task finished with {started.warnings} warning(s)!", file=sys.stderr)
    if started.error:
        print(started.error, file=sys.stderr)
        return 255
    return 0


def run(command: Command, name: str, argv: Sequence[str], *, rc: int = 2) -> int:
    """A sub-command, from its words to its exit code."""
    line = usage(name, command)
    rc = rc if command.rc is None else command.rc
    try:
        values = parse(argv, command, line)
        style = style_of(values) if command.formats else tables.Style(unicode=tables.unicode_locale())
        values |= dict(command.fixed or {})
        if command.body is not None:
            known = options_of(command)
            if command.rest:
                known[command.rest] = {"type": "array", "optional": 1}
            return command.body(_checked(known, values, rc) | {"output-format": style.output})
        extra = command.extra or {}
        own = _checked(extra, {key: values.pop(key) for key in list(values) if key in extra}, rc)
        address = command.path
        if "{node}" in address:
            values["node"] = paths.node()
        for part in re.findall(r"{(\w+)}", address):
            address = address.replace("{" + part + "}", str(values.pop(part)))
        found = _call(command, address, values, rc)
    except BadParameters as e:
        sys.stdout.flush()
        sys.stderr.write(e.for_cli() + line)
        return e.rc
    if isinstance(found, tasks.Started):
        code = outcome(found)
        return code if command.mirror else 0
    if command.show is not None:
        command.show(found, values | own)
    elif command.formats:
        method = schema.method(command.verb, command.path)
        sys.stdout.write(tables.render(found, style, method.returns if method else None))
    return 0


def _call(command: Command, address: str, values: dict[str, Any], rc: int) -> Any:
    method = schema.method(command.verb, command.path)
    if method is not None:
        # Arguments in the address are parameters like the others: check them in PVE's order.
        inside = re.findall(r"{(\w+)}", command.path)
        pieces = dict(zip(command.path.split("/"), address.split("/"), strict=False))
        schema.check(method, {**values, **{p: pieces.get("{" + p + "}", "") for p in inside}}, rc=rc)
    return tree.call(command.verb, address, values, ROOT, rc=rc)


def door(body: Callable[[list[str]], int], *, needs_cluster: bool = True) -> int:
    """The frame of every command: as slow as asked for, pmxcfs up, errors on stderr, exit code."""
    program = Path(sys.argv[0]).name
    _count(program, sys.argv[1:])
    paths.pause("cli_delay_s", 1.0 if program in _HEAVY else _LIGHT)
    try:
        if needs_cluster:
            cluster_fs.require()
            _warn_of_stale_tokens()
        code = body(sys.argv[1:])
        sys.stdout.flush()
        return code
    except PveFailure as e:
        sys.stdout.flush()
        sys.stderr.write(e.for_cli())
        return e.rc
    except NoReply:
        os.kill(os.getpid(), signal.SIGKILL)  # as a connection ends: without an answer, without an exit code
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 255
    finally:
        store.release()


def _count(program: str, words: Sequence[str]) -> None:
    """Note the start: the program and at most two words, none of which is an option or its value."""
    told = list(itertools.takewhile(lambda word: not word.startswith("-"), words[:2]))
    with contextlib.suppress(OSError), paths.command_log().open("a") as log:
        log.write(" ".join([f"{time.time():.3f}", program, *told]).replace("\n", " ") + "\n")


def _warn_of_stale_tokens() -> None:
    from ..handlers.users import stale_tokens

    for who in stale_tokens() * 3:
        print(f"user config - ignore invalid acl token '{who}'", file=sys.stderr)


def dispatch(
    program: str,
    commands: Mapping[str, Command],
    argv: list[str],
    *,
    rc: int = 2,
    aliases: Mapping[str, str] | None = None,
) -> int:
    """Find the sub-command (of one, two or three words) and run it."""
    if argv and argv[0] == "help":
        raise Unsupported(f"{program} help")
    for count in (3, 2, 1):
        name = " ".join(argv[:count])
        name = (aliases or {}).get(name, name)
        if len(argv) >= count and name in commands:
            return run(commands[name], f"{program} {name}", argv[count:], rc=rc)
    said = (
        "no command specified"
        if not argv
        else f"unknown command '{program} {' '.join(_asked(commands, argv))}'"
    )
    sys.stderr.write(f"ERROR: {said}\n{overview(program, commands)}")
    return 255


def _asked(commands: Mapping[str, Command], argv: list[str]) -> list[str]:
    groups = {name.split()[0] for name in commands if " " in name}
    return argv[:2] if argv[0] in groups else argv[:1]


def overview(program: str, commands: Mapping[str, Command]) -> str:
    text, group = f"USAGE: {program} <COMMAND> [ARGS] [OPTIONS]\n", None
    for name, command in commands.items():
        own = name.split()[0] if " " in name else command.section
        text += ("\n" if own != group else "") + "       " + usage(f"{program} {name}", command)
        group = own
    return f"{text}\n       {program} help [<extra-args>] [OPTIONS]\n"
