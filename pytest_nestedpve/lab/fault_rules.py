"""Fault rules of a running lab: `nestedpve-lab fault NAME add|list|clear`."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

from .names import FATHER, NODE_LIBRARY, LabError, LabUsage
from .node.api import faults
from .node_commands import output_on

_MODULE = f"PYTHONPATH={NODE_LIBRARY} python3 -m nestedpve_node.api.faults"
PLACES = ("method", "path", "task", "volume", "vmid")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `nestedpve-lab fault`."""
    parser.add_argument("name")
    parser.add_argument("action", choices=("add", "list", "clear"))
    parser.add_argument("rule", nargs="?", metavar="JSON", help="the rule as an object, in place of options")
    parser.add_argument("--method", choices=("GET", "POST", "PUT", "DELETE"), help="of an API call")
    parser.add_argument("--path", help="of an API call; * is within a part of the path, ** across parts")
    parser.add_argument("--task", help="type of a task: qmstart, qmdestroy, imgdel, *")
    parser.add_argument("--volume", help="id of a volume that cannot be removed: local:100/*")
    parser.add_argument("--vmid", type=int, help="only of this VM")
    parser.add_argument("--do", choices=faults.ACTIONS, help="the effect on a matching call or task")
    parser.add_argument("--text", help="the message of a failure")
    parser.add_argument("--seconds", type=float, help="duration of a delay, or of a held lock")
    parser.add_argument("--times", type=int, help="number of uses; default: 1")


def rule_of(options: argparse.Namespace) -> dict[str, Any]:
    """The rule of the command line. LabUsage for an invalid rule."""
    on = {name: getattr(options, name) for name in PLACES if getattr(options, name) is not None}
    effect = {name: getattr(options, name) for name in ("do", "text", "seconds", "times")}
    rule: Any = {
        **({"on": on} if on else {}),
        **{name: value for name, value in effect.items() if value is not None},
    }
    if options.rule is not None:
        if rule:
            raise LabUsage("fault: expected a rule as JSON or by options, found both")
        try:
            rule = json.loads(options.rule)
        except ValueError as e:
            raise LabUsage(f"fault: expected an object as JSON, found {options.rule!r}: {e}") from e
    try:
        return faults.as_object(faults.parse(rule))
    except (ValueError, AttributeError) as e:
        raise LabUsage(f"fault: {e}") from e


def change(lab: str, action: str, rule: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Add a rule, clear or list all rules; return the present rules. LabError if the lab does not run."""
    words = [action] if rule is None else [action, json.dumps(rule)]
    text = output_on(FATHER, lab, f"{_MODULE} {shlex.join(words)}")
    try:
        rules: list[dict[str, Any]] = json.loads(text)
    except ValueError as e:
        raise LabError(f"{FATHER} of lab {lab}: expected fault rules, found {text[:200]!r}") from e
    return rules
