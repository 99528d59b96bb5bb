"""What a command is given wrongly is refused in PVE's words, and what it is given rightly is taken.

Words and codes are those of recordings of Proxmox VE 9.2.11 where an id says so, else they follow them."""

from __future__ import annotations

import pytest
from standin_support import Node, _node  # noqa: F401 (a fixture)

BAD = "400 Parameter verification failed.\n"
SET = "qm set <vmid> [OPTIONS]\n"


@pytest.fixture(name="vm")
def _vm(node: Node) -> Node:
    node.ok("qm", "create", "100", "--kvm", "0")
    return node


@pytest.mark.parametrize("last", ["ide3", "sata5", "scsi30", "virtio15", "net31", "serial3", "unused255"])
def test_a_family_of_options_ends_where_it_does_on_pve(vm: Node, last: str) -> None:
    name = last.rstrip("0123456789")
    beyond = f"{name}{int(last.removeprefix(name)) + 1}"
    value = {"net": "virtio,bridge=vmbr0", "serial": "socket", "unused": "local:100/x.raw"}.get(name, "none")
    for unknown in (beyond, f"{name}01"):
        answer = vm.run("qm", "set", "100", f"--{unknown}", value)
        assert (answer.rc, answer.stderr) == (
            2,
            f"Unknown option: {unknown}\n400 unable to parse option\n{SET}",
        )
    config = "/nodes/father/qemu/100/config"
    assert vm.run("pvesh", "create", config, f"--{beyond}", value).stderr.startswith("Unknown option:")
    answer = vm.run("qm", "set", "100", "--delete", beyond)
    assert answer.stderr == f"{BAD}delete: unknown option '{beyond}'\n{SET}"  # as [config-006]
    assert vm.run("qm", "set", "100", f"--{last}", value).rc == 0
    assert f"{last}: " in vm.ok("qm", "config", "100")
    assert beyond not in vm.ok("qm", "config", "100")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("unlock {}", "unlock <vmid>"),
        ("wait {}", "wait <vmid> [OPTIONS]"),
        ("importdisk {} /x local", "disk import <vmid> <source> <storage> [OPTIONS]"),
        ("monitor {}", "monitor <vmid>"),
        ("rescan --vmid {}", "disk rescan  [OPTIONS]"),
        ("cleanup {} 0 0", "cleanup <vmid> <clean-shutdown> <guest-requested>"),
        ("guest exec {} ls", "guest exec <vmid> [<extra-args>] [OPTIONS]"),
        ("guest passwd {} root", "guest passwd <vmid> <username> [OPTIONS]"),
        ("showcmd {}", "showcmd <vmid> [OPTIONS]"),
    ],
)
def test_commands_that_are_no_methods_judge_the_vmid_too(node: Node, words: str, line: str) -> None:
    for given, error in (
        ("abc", "type check ('integer') failed - got 'abc'\n"),  # as [basic-105]
        ("5", "invalid format - value does not look like a valid VM ID\n\n"),  # as [create-005]
    ):
        answer = node.run("qm", *words.format(given).split())
        assert (answer.rc, answer.stdout) == (2, "")
        assert answer.stderr == f"{BAD}vmid: {error}qm {line}\n"


def test_a_wait_is_given_a_number_of_seconds(vm: Node) -> None:
    answer = vm.run("qm", "wait", "100", "--timeout", "abc")
    assert (answer.rc, answer.stderr.splitlines()[1]) == (
        2,
        "timeout: type check ('integer') failed - got 'abc'",
    )


def test_a_rescan_is_of_the_vm_that_was_named(vm: Node) -> None:
    vm.ok("qm", "create", "101", "--kvm", "0")
    for vmid in ("100", "101"):
        vm.run("pvesm", "alloc", "local", vmid, f"vm-{vmid}-disk-0.raw", "4M")
    assert vm.ok("qm", "rescan", "--vmid", "101").splitlines()[1:] == [
        "VM 101 add unreferenced volume 'local:101/vm-101-disk-0.raw' as 'unused0' to config"
    ]
    assert "unused0" not in vm.ok("qm", "config", "100")


def test_an_argument_that_may_be_missing_is_not_asked_for(vm: Node) -> None:
    """`qm disk move <vmid> <disk> [<storage>]` [basic-098]; moving is what the lab has not."""
    assert vm.run("qm", "move_disk", "100", "scsi0").stderr == "move_disk: not supported by the lab\n"
    assert vm.run("qm", "move_disk", "100").stderr.startswith("400 not enough arguments\n")
    assert vm.run("qm", "status", "--vmid", "100").stderr.startswith("400 not enough arguments\n")


def test_help_in_full_is_not_made_up(vm: Node) -> None:
    for words in (("qm", "help", "create"), ("pvecm", "help"), ("pvesh", "usage", "/version", "--verbose")):
        answer = vm.run(*words)
        assert answer.rc == 255
        assert answer.stderr.endswith(": not supported by the lab\n")
