"""Wrong parameters are refused with PVE's messages, right ones accepted.

Messages and codes with an id are recordings of Proxmox VE 9.2.11; all others are derived from them."""

from __future__ import annotations

import json

import pytest
from standin_support import Node, _node  # noqa: F401 (a fixture)

from pytest_nestedpve.lab.node.api import access, tree
from pytest_nestedpve.lab.node.api.errors import BadParameters

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
    with pytest.raises(BadParameters) as over_https:
        tree.call("PUT", config, {beyond: value}, access.ROOT)
    assert over_https.value.errors[beyond].startswith("property is not defined in schema")
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
def test_commands_without_a_method_check_the_vmid_too(node: Node, words: str, line: str) -> None:
    for given, error in (
        ("abc", "type check ('integer') failed - got 'abc'\n"),  # as [basic-105]
        ("5", "invalid format - value does not look like a valid VM ID\n\n"),  # as [create-005]
    ):
        answer = node.run("qm", *words.format(given).split())
        assert (answer.rc, answer.stdout) == (2, "")
        assert answer.stderr == f"{BAD}vmid: {error}qm {line}\n"


def test_the_limit_of_a_wait_is_a_number_of_seconds(vm: Node) -> None:
    answer = vm.run("qm", "wait", "100", "--timeout", "abc")
    assert (answer.rc, answer.stderr.splitlines()[1]) == (
        2,
        "timeout: type check ('integer') failed - got 'abc'",
    )


def test_a_rescan_is_restricted_to_the_named_vm(vm: Node) -> None:
    vm.ok("qm", "create", "101", "--kvm", "0")
    for vmid in ("100", "101"):
        vm.run("pvesm", "alloc", "local", vmid, f"vm-{vmid}-disk-0.raw", "4M")
    assert vm.ok("qm", "rescan", "--vmid", "101").splitlines()[1:] == [
        "VM 101 add unreferenced volume 'local:101/vm-101-disk-0.raw' as 'unused0' to config"
    ]
    assert "unused0" not in vm.ok("qm", "config", "100")


def test_an_optional_argument_is_not_required(vm: Node) -> None:
    """`qm disk move <vmid> <disk> [<storage>]` [basic-098]; the lab does not support moves."""
    assert vm.run("qm", "move_disk", "100", "scsi0").stderr == "move_disk: not supported by the lab\n"
    assert vm.run("qm", "move_disk", "100").stderr.startswith("400 not enough arguments\n")
    assert vm.run("qm", "status", "--vmid", "100").stderr.startswith("400 not enough arguments\n")


def test_full_help_is_not_supported(vm: Node) -> None:
    for words in (("qm", "help", "create"), ("pvecm", "help"), ("pvesh", "usage", "/version", "--verbose")):
        answer = vm.run(*words)
        assert answer.rc == 255
        assert answer.stderr.endswith(": not supported by the lab\n")


FORMAT = "invalid format - format error\n"
NOT_IN = "does not have a value in the enumeration"


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("boot", "bogus", f"{FORMAT}boot.legacy: value does not match the regex pattern\n"),
        (
            "boot",
            "order=scsi0;scsi31",
            f"{FORMAT}boot.order: invalid format - invalid boot device 'scsi31'\n\n",
        ),
        (
            "cpu",
            "bogus",
            "invalid format - Built-in cputype 'bogus' is not defined (missing 'custom-' prefix?)\n",
        ),
        ("cpu", "custom-mine", "invalid format - Custom cputype 'mine' not found\n"),
        ("cpu", "host,flags=bogus", f"{FORMAT}cpu.flags: value does not match the regex pattern\n"),
        ("nameserver", "1.1.1.1 a_b", "invalid format - value does not look like a valid address: a_b\n"),
        ("hotplug", "network,bogus", "invalid format - invalid hotplug feature 'bogus'\n"),
        ("watchdog", "model=bogus", f"{FORMAT}watchdog.model: value 'bogus' {NOT_IN} 'i6300esb, ib700'\n"),
        (
            "rng0",
            "source=/etc/passwd",
            f"{FORMAT}rng0.source: value '/etc/passwd' {NOT_IN} '/dev/urandom, /dev/random, /dev/hwrng'\n",
        ),
        ("startup", "order=x", "invalid format - unable to parse startup options\n"),
        ("affinity", "zz", "invalid format - unable to parse cpuset option\n"),
        ("memory", "", f"{FORMAT}memory.current: property is missing and it is not optional\n"),
        (
            "agent",
            "1,type=isa,type=isa",
            "invalid format - duplicate key in comma-separated list property: type\n",
        ),
    ],
)
def test_a_value_is_checked_by_the_format_named_in_the_table(
    vm: Node, option: str, value: str, words: str
) -> None:
    answer = vm.run("qm", "set", "100", f"--{option}", value)
    assert (answer.rc, answer.stderr) == (255, f"{BAD}{option}: {words}\n{SET}")
    assert f"{option}: {value}" not in vm.ok("qm", "config", "100")


@pytest.mark.parametrize(
    ("option", "value"), [("hostpci0", "bogus"), ("cdrom", "bogus"), ("cpu", "host,flags=+bogus")]
)
def test_an_unknown_format_accepts_no_value(vm: Node, option: str, value: str) -> None:
    answer = vm.run("qm", "set", "100", f"--{option}", value)
    assert answer.rc == 255
    assert answer.stderr.endswith(": not supported by the lab\n")
    assert option not in vm.ok("qm", "config", "100")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("boot", "order=scsi0;ide2;net0"),
        ("boot", "cdn"),
        ("cpu", "host"),  # [extra-010]
        ("cpu", "x86-64-v2-AES,flags=+aes;-pcid,hidden=1"),
        ("nameserver", "1.1.1.1"),  # [config-013]
        ("nameserver", "1.1.1.1 fd00::1,dns.example.test"),
        ("hotplug", "0"),
        ("hotplug", "network,disk,usb,cloudinit"),
        ("watchdog", "i6300esb,action=reset"),
        ("rng0", "/dev/urandom,max_bytes=1024,period=1000"),
        ("affinity", "0,5,8-11"),
        ("startup", "3,up=10,down=20"),
    ],
)
def test_a_value_in_its_format_is_accepted(vm: Node, option: str, value: str) -> None:
    assert vm.run("qm", "set", "100", f"--{option}", value).rc == 0
    assert f"{option}: {value}\n" in vm.ok("qm", "config", "100")


def test_other_formats_are_checked_too(node: Node) -> None:
    answer = node.run("pvesh", "get", "/nodes/father/tasks", "--statusfilter", "bogus")
    assert answer.stderr.startswith(f"{BAD}statusfilter: invalid format - invalid status 'bogus'\n")
    assert node.run("pvesh", "get", "/nodes/father/tasks", "--statusfilter", "ok,error").rc == 0
    schedule = ("pvesh", "create", "/cluster/backup", "--storage", "local", "--vmid", "100", "--schedule")
    assert node.run(*schedule, "daily").rc == 0  # [ownA-269]
    assert node.run(*schedule, "sat 02:30").rc == 0
    assert node.run(*schedule, "now and then").stderr.endswith(": not supported by the lab\n")
    assert node.run("pvesm", "set", "local", "--prune-backups", "keep-last=3,keep-daily=7").rc == 0
    assert "prune-backups.keep" in node.run("pvesm", "set", "local", "--prune-backups", "keep=3").stderr


def test_an_unsupported_command_of_pve_is_not_reported_as_unknown(node: Node) -> None:
    for words in (
        "pvesh get /nodes/father/subscription",
        "pvesh get /nodes/father/apt/versions",
        "pvesh create /nodes/father/status --command reboot",
        "pvesh create /nodes/father/execute --commands []",
        "pvesh get /nodes/father/qemu/100/firewall/options",
        "pvesh get /",
        "pvesh ls /nodes/father/apt",
        "pvesh usage /cluster/sdn",
        "pveum group add testers",
        "pveum passwd root@pam",
        "pveum user tfa delete root@pam --id x",
        "pvesm scan nfs host --options x",
        "qm enroll-efi-keys 100",
    ):
        if words.startswith("qm "):
            node.ok("qm", "create", "100", "--kvm", "0")
        answer = node.run(*words.split())
        assert (answer.rc, answer.stdout) == (255, ""), words
        assert answer.stderr.endswith(": not supported by the lab\n"), words
    for words in ("pvesh get /nodes/father/nosuch", "pvesh delete /nodes/father/status"):
        assert node.run(*words.split()).rc == 1


def test_entries_of_a_list_are_listed(node: Node) -> None:
    assert node.ok("pvesh", "ls", "/nodes/father/storage") == "Dr---        local\n"
    assert "-rw-d        PVEVMAdmin\n" in node.ok("pvesh", "ls", "/access/roles")


def test_only_known_options_are_reverted(vm: Node) -> None:
    answer = vm.run("qm", "set", "100", "--revert", "nosuchkey")
    assert (answer.rc, answer.stderr) == (255, f"{BAD}revert: unknown option 'nosuchkey'\n{SET}")


def test_acls_are_restricted_to_the_trees_of_pve(node: Node) -> None:
    rights = ("--roles", "PVEAdmin", "--users", "root@pam")
    for path in ("/bogus/x", "/vms/99", "/pool/a/b/c/d", "/storage/local/x"):
        answer = node.run("pveum", "acl", "modify", path, *rights)
        assert answer.rc == 255
        assert answer.stderr.startswith(f"{BAD}path: invalid ACL path '{path}'\n")
    for path in ("/", "/vms/100", "/pool/a/b/c", "/nodes", "/sdn/zones/localnetwork/vmbr0", "/access"):
        assert node.run("pveum", "acl", "modify", path, *rights).rc == 0


def test_a_common_prefix_of_several_options_is_ambiguous(vm: Node) -> None:
    answer = vm.run("qm", "set", "100", "--na", "x")
    assert answer.stderr == f"Option na is ambiguous (name, nameserver)\n400 unable to parse option\n{SET}"
    assert vm.run("qm", "set", "100", "--serial", "socket").stderr.startswith("Option serial is ambiguous (")
    assert vm.ok("qm", "set", "100", "--mem", "64") == "update VM 100: -memory 64\n"


def test_a_stopped_machine_or_one_without_a_serial_line_is_reported(vm: Node) -> None:
    assert vm.run("qm", "sendkey", "100", "ret").stderr == "VM 100 not running\n"  # [power-027]
    assert vm.run("qm", "terminal", "100").stderr == "unable to find a serial interface\n"  # [power-072]


def test_options_outside_a_method_are_checked_too(vm: Node) -> None:
    boolean = "type check ('boolean') failed - got 'maybe'\n"
    assert vm.run("qm", "status", "100", "--verbose", "maybe").stderr.startswith(f"{BAD}verbose: {boolean}")
    assert vm.run("pvesh", "get", "/version", "--noborder", "maybe").stderr.startswith(
        f"{BAD}noborder: {boolean}"
    )
    plain = vm.ok("pvesh", "get", "/version", "--noborder")
    assert vm.ok("pvesh", "get", "/version", "--noborder", "yes") == plain


def test_no_user_is_added_to_a_missing_group(node: Node) -> None:
    answer = node.run("pveum", "user", "add", "a@pve", "--groups", "nosuch")
    assert (answer.rc, answer.stderr) == (255, "create user failed: no such group 'nosuch'\n")
    assert "a@pve" not in node.ok("pveum", "user", "list")


def test_a_volume_without_a_storage_is_incomplete(node: Node) -> None:
    answer = node.run("pvesm", "free", "vm-100-disk-0.raw")
    assert answer.stderr.startswith(f"{BAD}volume: no storage specified - incomplete volume ID\n")


def test_an_index_names_its_children_in_the_column_of_the_table(node: Node) -> None:
    def listed(path: str) -> list[dict[str, str]]:
        rows: list[dict[str, str]] = json.loads(node.ok("pvesh", "get", path, "--output-format", "json"))
        return rows

    assert {"id": "resources"} in listed("/cluster/ha")
    assert {"subdir": "users"} in listed("/access")
    assert {"name": "firewall"} in listed("/cluster")
    assert {"name": "subscription"} in listed("/nodes/father")
