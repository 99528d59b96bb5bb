"""Fault rules: calls, tasks and volumes that fail, are delayed or lose their reply, `times` times.

/var/lib/pve-cluster/faults.json has the rules of all nodes of a cluster; it exists only while it has rules.
A rule is an object:

    {"on": {"method": "DELETE", "path": "/nodes/*/qemu/*"}, "do": "fail", "text": "got timeout", "times": 2}

`on` names a call of the API (`method`, `path`: `*` is within a part of the path, `**` across parts), a task
(`task`, its type) or the removal of a volume (`volume`, its id); `vmid` restricts it to one VM. `do` is

    fail   end with the error `text`
    delay  take `seconds` longer
    hang   do nothing and never answer
    drop   do the work, and send no reply
    lock   hold the VM's lock file for `seconds`

A volume is left over: with a warning by `fail`, without one by `drop`.

`nestedpve-lab fault` executes python3 -m nestedpve_node.api.faults add|list|clear on a node.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..machine.alive import holding
from ..state import paths
from .errors import NoReply, PveFailure

ACTIONS = ("fail", "delay", "hang", "drop", "lock")
_VMID = re.compile(r"/qemu/(\d+)(?:/|\Z)")


@dataclass(frozen=True)
class Rule:
    """A fault and the calls it applies to. `seconds` of delay and lock; `times` remaining."""

    do: str
    method: str | None = None
    path: str | None = None
    task: str | None = None
    volume: str | None = None
    vmid: int | None = None
    text: str = ""
    seconds: float = 0.0
    times: int = 1

    @property
    def of_call(self) -> bool:
        return self.task is None and self.volume is None

    def fits_call(self, verb: str, address: str, vmid: int | None) -> bool:
        return (
            self.of_call
            and self.method in (None, verb)
            and (self.path is None or _pattern(self.path).fullmatch(address) is not None)
            and self.vmid in (None, vmid)
        )

    def fits_task(self, kind: str, vmid: int | None) -> bool:
        fits = self.task is not None and _pattern(self.task).fullmatch(kind) is not None
        return fits and self.volume is None and self.vmid in (None, vmid)

    def fits_volume(self, volid: str, kind: str | None) -> bool:
        fits = self.volume is not None and _pattern(self.volume).fullmatch(volid) is not None
        return fits and self.task in (None, kind)


def parse(rule: Mapping[str, Any]) -> Rule:
    """The rule of an object. Raises ValueError with the expected and the actual value."""
    on = rule.get("on", {})
    if not isinstance(on, Mapping):
        raise ValueError(f"on: expected an object, found {on!r}")
    for part, known in ((rule, {"on", "do", "text", "seconds", "times"}), (on, _PLACES)):
        if unknown := sorted(set(part) - known):
            raise ValueError(f"expected {', '.join(sorted(known))}, found {', '.join(unknown)}")
    members: dict[str, Any] = {name: str(value) for name, value in on.items() if value is not None}
    try:
        if "vmid" in members:
            members["vmid"] = int(members["vmid"])
        members |= {"seconds": float(rule.get("seconds", 0)), "times": int(rule.get("times", 1))}
        parsed = Rule(str(rule.get("do")), text=str(rule.get("text", "")), **members)
    except (TypeError, ValueError) as e:
        raise ValueError(f"vmid, seconds and times: expected numbers, found {json.dumps(dict(rule))}") from e
    _check(parsed)
    return parsed


_PLACES = {"method", "path", "task", "volume", "vmid"}


def _check(rule: Rule) -> None:
    if rule.do not in ACTIONS:
        raise ValueError(f"do: expected one of {', '.join(ACTIONS)}, found {rule.do!r}")
    if all(getattr(rule, name) is None for name in _PLACES):
        raise ValueError("on: expected a method, path, task, volume or vmid, found none")
    if not rule.of_call and (rule.method is not None or rule.path is not None):
        raise ValueError("on: expected a call, a task or a volume, found several of them")
    if rule.do == "fail" and not rule.text:
        raise ValueError("text: expected the message of the failure, found none")
    if rule.do in ("delay", "lock") and rule.seconds <= 0:
        raise ValueError(f"seconds: expected more than 0 for {rule.do}, found {rule.seconds:g}")
    if rule.volume is not None and rule.do not in ("fail", "drop"):
        raise ValueError(f"do: expected fail or drop for a volume, found {rule.do}")
    if rule.times < 1:
        raise ValueError(f"times: expected 1 or more, found {rule.times}")


def as_object(rule: Rule) -> dict[str, Any]:
    """The object of a rule, without members that have no value."""
    members = {name: value for name, value in asdict(rule).items() if value not in (None, "", 0.0)}
    on = {name: members.pop(name) for name in list(members) if name in _PLACES}
    return {"on": on, **members}


def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", text)
    return re.compile("".join({"*": "[^/]*", "**": ".*"}.get(part, re.escape(part)) for part in parts), re.S)


# -- the rules of this node


def file() -> Path:
    return paths.cluster_dir() / "faults.json"


def rules() -> list[Rule]:
    """The remaining rules, in the order in which they were added."""
    try:
        text = file().read_text()
    except FileNotFoundError:
        return []
    return [parse(rule) for rule in json.loads(text)]


def add(rule: Rule) -> None:
    with holding(file().with_suffix(".lock")):
        _write([*rules(), rule])


def clear() -> None:
    with holding(file().with_suffix(".lock")):
        _write([])


def _write(rules: list[Rule]) -> None:
    target = file()
    if not rules:
        target.unlink(missing_ok=True)
        return
    temporary = target.with_suffix(".new")
    temporary.write_text(json.dumps([as_object(rule) for rule in rules]))
    temporary.replace(target)


def _use(fits: Any) -> Rule | None:
    """The first matching rule, with one time less; None without a match."""
    if not any(map(fits, rules())):
        return None
    with holding(file().with_suffix(".lock")):
        current = rules()
        number = next((n for n, rule in enumerate(current) if fits(rule)), None)
        if number is None:
            return None
        rule = current[number]
        remaining = [replace(rule, times=rule.times - 1)] if rule.times > 1 else []
        _write([*current[:number], *remaining, *current[number + 1 :]])
    return rule


def vmid_of(address: str, values: Mapping[str, Any]) -> int | None:
    """The id of the call's VM; None without one."""
    named = _VMID.search(address)
    vmid = str(named[1] if named else values.get("vmid"))
    return int(vmid) if vmid.isdigit() else None


def on_call(verb: str, address: str, values: Mapping[str, Any]) -> Rule | None:
    """The rule for a call of the API, used once."""
    return _use(lambda rule: rule.fits_call(verb, address, vmid_of(address, values)))


def on_task(kind: str, ident: str) -> Rule | None:
    """The rule for a task, used once."""
    return _use(lambda rule: rule.fits_task(kind, int(ident) if ident.isdigit() else None))


def on_volume(volid: str, kind: str | None) -> Rule | None:
    """The rule for the removal of a volume, by a task of this type; used once."""
    return _use(lambda rule: rule.fits_volume(volid, kind))


class FaultInjected(PveFailure):
    """A failure with the text of a rule, which may begin with an HTTP status."""

    def __init__(self, text: str) -> None:
        match = re.match(r"([45]\d\d) (.+)", text, re.S)
        super().__init__(match[2] if match else text, status=int(match[1]) if match else 500)
        self.rule_text = text

    def for_cli(self) -> str:
        return self.rule_text + "\n"


def before(rule: Rule, vmid: int | None) -> None:
    """Apply a rule before the work. Raises FaultInjected; NoReply for `hang` on a node in this process."""
    if rule.do == "fail":
        raise FaultInjected(rule.text)
    if rule.do == "delay":
        threading.Event().wait(rule.seconds)
    elif rule.do == "hang":
        if paths.in_process():
            raise NoReply("no reply, by a fault rule")
        threading.Event().wait()
    elif rule.do == "lock" and (number := rule.vmid or vmid) is not None:
        from ..state import locks

        locks.hold(number, rule.seconds)


def after(rule: Rule) -> None:
    """Apply a rule after the work. Raises NoReply for `drop`."""
    if rule.do == "drop":
        raise NoReply("the reply is lost, by a fault rule")


def main(arguments: list[str]) -> int:
    word, *rest = arguments
    if word == "add":
        add(parse(json.loads(rest[0])))
    elif word == "clear":
        clear()
    print(json.dumps([as_object(rule) for rule in rules()]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
