"""The frame of all commands: options checked by the API's table, usage lines, errors, exit codes."""

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
    """A command line that cannot be parsed; `text` is the whole error with the usage line."""

    def for_cli(self) -> str:
        return self.text


@dataclass(frozen=True)
class Command:
    """A sub-command: an API method with positional arguments, fixed values and a printer; or, without a
    method, a `body` whose parameters are all in `extra`."""

    verb: str
    path: str
    args: tuple[str, ...] = ()
    fixed: Mapping[str, str] | None = None
    show: Callable[[Any, dict[str, Any]], None] | None = None
    extra: Mapping[str, Mapping[str, Any]] | None = None  # options beside the method's
    formats: bool = False
    mirror: bool = True  # the exit code is the task's
    rest: str | None = None  # the parameter for all further words
    rc: int | None = None  # for a wrong parameter, if not the program's
    body: Callable[[dict[str, Any]], int] | None = None
    section: int = 0  # of the overview: commands without a method are a separate block


def unsupported(name: str) -> Command:
    """A command of PVE that the lab does not have, with any arguments."""

    def body(_: dict[str, Any]) -> int:
        raise Unsupported(name)

    return Command("", "", rest="extra-args", body=body)


def options_of(command: Command) -> dict[str, Mapping[str, Any]]:
    """The options, arguments included; positional arguments take precedence [config-008]."""
    method = schema.method(command.verb, command.path)
    options: dict[str, Mapping[str, Any]] = dict(method.parameters) if method else {}
    options |= dict(command.extra or {})
    if command.formats:
        options |= FORMAT_OPTIONS
    reserved = {*(command.fixed or {}), "node", *([command.rest] if command.rest else [])}
    return {name: definition for name, definition in options.items() if name not in reserved}


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


def _count_required(command: Command) -> int:
    """The number of required arguments: all before the last optional ones."""
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
        option, definition = _lookup(known, name)
        if option is None:
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
            values.setdefault(option, []).append(value)
        elif option in values and str(definition.get("format", "")).endswith("-list"):
            values[option] += "," + value
        else:
            values[option] = value
    if unknown:
        raise Usage("".join(unknown) + f"400 unable to parse option\n{line}", rc=2)
    if len(words) < _count_required(command):
        raise Usage(f"400 not enough arguments\n{line}", rc=2)
    values |= dict(zip(command.args, words, strict=False))
    extra_words = words[len(command.args) :]
    if command.rest:
        if extra_words:
            values[command.rest] = extra_words
    elif extra_words:
        raise Usage(f"400 too many arguments\n{line}", rc=255)
    return values


def _lookup(known: Mapping[str, Mapping[str, Any]], name: str) -> tuple[str | None, Mapping[str, Any]]:
    """An option by its name in any case, or by an unambiguous prefix."""
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
    """The names of all options, with every member of a family (`net0`, `net1`, …)."""
    return sorted(
        name.replace("[n]", str(number)) if "[n]" in name else name
        for name in known
        for number in range(validation.LAST.get(name.removesuffix("[n]"), 0) + 1 if "[n]" in name else 1)
    )


def _verify(known: Mapping[str, Mapping[str, Any]], values: dict[str, Any], rc: int = 2) -> dict[str, Any]:
    """Values of parameters outside a method, verified as a method's."""
    definitions = {name: dict(definition) for name, definition in known.items()}
    return schema.check(schema.Method("", "", definitions, None, {}), values, rc=rc)


def style_of(values: dict[str, Any]) -> tables.Style:
    """The style by the FORMAT_OPTIONS, which are removed from the values."""
    chosen = {name: values.pop(name) for name in FORMAT_OPTIONS if name in values}
    chosen = _verify(FORMAT_OPTIONS, chosen)

    def flag(name: str, default: str) -> bool:
        return str(chosen.get(name, default)) == "1"

    return tables.Style(
        output=chosen.get("output-format", "text"),
        border=not flag("noborder", "0"),
        header=not flag("noheader", "0"),
        human=flag("human-readable", "1"),
        quiet=flag("quiet", "0"),
        unicode=tables.unicode_locale(),
    )


def print_outcome(started: tasks.Started) -> int:
    """Print a task's warnings and error on stderr; the exit code, 255 if the task failed."""
    sys.stdout.flush()
    if started.warnings:
        print(f"Task finished with {started.warnings} warning(s)!", file=sys.stderr)
    if started.error:
        print(started.error, file=sys.stderr)
        return 255
    return 0


def run(command: Command, name: str, argv: Sequence[str], *, rc: int = 2) -> int:
    """Run a sub-command with its arguments; the exit code."""
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
            return command.body(_verify(known, values, rc) | {"output-format": style.output})
        extra = command.extra or {}
        extra_values = _verify(extra, {key: values.pop(key) for key in list(values) if key in extra}, rc)
        address = command.path
        if "{node}" in address:
            values["node"] = paths.node()
        for part in re.findall(r"{(\w+)}", address):
            address = address.replace("{" + part + "}", str(values.pop(part)))
        result = _call(command, address, values, rc)
    except BadParameters as e:
        sys.stdout.flush()
        sys.stderr.write(e.for_cli() + line)
        return e.rc
    if isinstance(result, tasks.Started):
        code = print_outcome(result)
        return code if command.mirror else 0
    if command.show is not None:
        command.show(result, values | extra_values)
    elif command.formats:
        method = schema.method(command.verb, command.path)
        sys.stdout.write(tables.render(result, style, method.returns if method else None))
    return 0


def _call(command: Command, address: str, values: dict[str, Any], rc: int) -> Any:
    method = schema.method(command.verb, command.path)
    if method is not None:
        # Arguments in the address are parameters too: check them in PVE's order.
        in_path = re.findall(r"{(\w+)}", command.path)
        pieces = dict(zip(command.path.split("/"), address.split("/"), strict=False))
        schema.check(method, {**values, **{p: pieces.get("{" + p + "}", "") for p in in_path}}, rc=rc)
    return tree.call(command.verb, address, values, ROOT, rc=rc)


def main_of(body: Callable[[list[str]], int], *, needs_cluster: bool = True) -> int:
    """Run a command: configured delay, check of pmxcfs, errors on stderr; the exit code."""
    program = Path(sys.argv[0]).name
    _log_start(program, sys.argv[1:])
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
        os.kill(os.getpid(), signal.SIGKILL)  # like a closed connection: no answer, no exit code
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 255
    finally:
        store.release()


def _log_start(program: str, words: Sequence[str]) -> None:
    """Log the start: the program and at most two words before the first option."""
    arguments = list(itertools.takewhile(lambda word: not word.startswith("-"), words[:2]))
    with contextlib.suppress(OSError), paths.command_log().open("a") as log:
        log.write(" ".join([f"{time.time():.3f}", program, *arguments]).replace("\n", " ") + "\n")


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
    message = (
        "no command specified"
        if not argv
        else f"unknown command '{program} {' '.join(_command_words(commands, argv))}'"
    )
    sys.stderr.write(f"ERROR: {message}\n{overview(program, commands)}")
    return 255


def _command_words(commands: Mapping[str, Command], argv: list[str]) -> list[str]:
    groups = {name.split()[0] for name in commands if " " in name}
    return argv[:2] if argv[0] in groups else argv[:1]


def overview(program: str, commands: Mapping[str, Command]) -> str:
    text, previous = f"USAGE: {program} <COMMAND> [ARGS] [OPTIONS]\n", None
    for name, command in commands.items():
        block = name.split()[0] if " " in name else command.section
        text += ("\n" if block != previous else "") + "       " + usage(f"{program} {name}", command)
        previous = block
    return f"{text}\n       {program} help [<extra-args>] [OPTIONS]\n"
