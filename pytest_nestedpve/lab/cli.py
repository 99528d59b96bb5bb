"""The command `nestedpve-lab`: install, start, stop, list, set, fault, power, exec."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

from . import fault_rules
from .names import DEFAULT_LAB, LabError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 success; 1 a LabError; 4 wrong usage, or the lab cannot run on this
    machine; for exec the status of the command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if words[:1] == ["exec"] and "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    parser = _parser()
    try:
        options = parser.parse_args(words)
    except SystemExit as e:
        return 0 if not e.code else 4
    if options.command == "exec" and not command:
        parser.print_usage(sys.stderr)
        print("nestedpve-lab: exec: expected `-- COMMAND` at the end", file=sys.stderr)
        return 4
    from .names import LabUnavailable, LabUsage

    try:
        return _run(options, command)
    except (LabUnavailable, LabUsage) as e:
        print(f"nestedpve-lab: {e}", file=sys.stderr)
        return 4
    except LabError as e:
        print(f"nestedpve-lab: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nestedpve-lab",
        description="The embedded lab: an outer PVE host on this machine to test against.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("install", help="install Debian packages, image and repository, unless they exist")
    start = commands.add_parser("start", help="start a lab; it runs until it is stopped")
    start.add_argument("name", nargs="?", default=DEFAULT_LAB)
    start.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="outer nodes; two are a cluster")
    start.add_argument("--json", action="store_true", help="print the lab as JSON")
    stop = commands.add_parser("stop", help="stop a lab and remove it, with all VMs in it")
    selection = stop.add_mutually_exclusive_group(required=True)
    selection.add_argument("name", nargs="?")
    selection.add_argument("--all", action="store_true", help="all labs of this user's cache")
    listing = commands.add_parser("list", help="running labs")
    listing.add_argument("--json", action="store_true")
    delays = commands.add_parser("set", help="set the delays of a running lab; without pairs, print them")
    delays.add_argument("name")
    delays.add_argument(
        "pairs", nargs="*", metavar="KEY=SECONDS", help="cli_delay_s, start_s, stop_s, destroy_s"
    )
    fault = commands.add_parser(
        "fault", help="let API calls and tasks of a running lab fail, hang or lose replies"
    )
    fault_rules.add_arguments(fault)
    power = commands.add_parser("power", help="switch the second node on, or off as by pulling the plug")
    power.add_argument("name")
    power.add_argument("node", help="father2")
    power.add_argument("state", choices=("on", "off"))
    enter = commands.add_parser("exec", help="run a command on a node of a lab", usage=_EXEC_USAGE)
    enter.add_argument("name")
    enter.add_argument(
        "--node",
        default="father",
        help="father (default), father2, nested, leaf, or VMs by id or name: 9900/101, father2/9900",
    )
    return parser


_EXEC_USAGE = "nestedpve-lab exec NAME [--node NODE] -- COMMAND [ARGUMENT...]"


def _run(options: argparse.Namespace, command: list[str]) -> int:
    from . import lifecycle

    if options.command == "install":
        from .install import install

        begin = time.monotonic()
        install(_report)
        _report(f"installed ({time.monotonic() - begin:.1f} s)")
    elif options.command == "start":
        lab = lifecycle.start(options.name, hand=True, report=_report, nodes=options.nodes)
        if options.json:
            print(lab.json())
        else:
            print(f"lab {lab.name} is running. Log in:  ssh -F {lab.ssh_config} {lab.host}")
            print(f"  in a test:  pytest --pve-host lab:{lab.name}")
            print(f"  stop it:    nestedpve-lab stop {lab.name}")
    elif options.command == "stop":
        return _stop(options)
    elif options.command == "list":
        lifecycle.sweep()
        labs = lifecycle.list_running()
        if options.json:
            print(json.dumps([asdict(lab) for lab in labs]))
        else:
            for lab in labs:
                nodes = ",".join(lab.pids)
                print(f"{lab.name:20} {lab.networks[0]:18} {lab.networks[1]:18} {nodes:13} {lab.state}")
            if not labs:
                print("no lab is running")
    elif options.command == "set":
        from . import speed

        for key, seconds in speed.change(options.name, speed.parse(options.pairs)).items():
            print(f"{key}={seconds:g}")
    elif options.command == "fault":
        rule = fault_rules.rule_of(options) if options.action == "add" else None
        for present in fault_rules.change(options.name, options.action, rule):
            print(json.dumps(present))
    elif options.command == "power":
        lifecycle.power(options.name, options.node, on=options.state == "on")
    else:
        return lifecycle.enter(options.name, options.node, command)
    return 0


def _stop(options: argparse.Namespace) -> int:
    from . import lifecycle

    removed = lifecycle.sweep()
    if options.all:
        for name in lifecycle.list_names():
            lifecycle.stop(name)
        return 0
    if not lifecycle.stop(options.name) and options.name not in removed:
        print(f"nestedpve-lab: no lab {options.name!r}; `nestedpve-lab list` lists labs", file=sys.stderr)
        return 1
    return 0


def _report(text: str) -> None:
    print(f"nestedpve-lab: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
