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
