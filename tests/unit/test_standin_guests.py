"""Guests on a stand-in node: locks, protection, pools, snapshots, clones, the slow broadcast."""

from __future__ import annotations

import base64
import fcntl
import json
from typing import Any

from standin_support import Answer, Node, _node  # noqa: F401 (a fixture)

from pytest_nestedpve.lab.node.machine import cloudinit, disks
from pytest_nestedpve.lab.node.state import guests, locks

IMAGE = b"hsqs" + b"\0" * 4092


def config(node: Node, vmid: int) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(
        node.ok("pvesh", "get", f"/nodes/father/qemu/{vmid}/config", "--output-format", "json")
    )
    return options


def resources(node: Node) -> dict[int, dict[str, Any]]:
    rows = json.loads(
        node.ok("pvesh", "get", "/cluster/resources", "--type", "vm", "--output-format", "json")
    )
    return {row["vmid"]: row for row in rows}


def with_image(node: Node, vmid: int) -> None:
    node.file("/var/lib/vz/import/debian.raw").write_bytes(IMAGE)
    node.ok("pvesm", "set", "local", "--content", "images,import,snippets,iso")
    node.ok("qm", "create", str(vmid), "--name", "guest", "--kvm", "0", "--net0", "virtio,bridge=vmbr0")
    node.run("qm", "set", str(vmid), "--scsi0", "local:0,import-from=local:import/debian.raw,format=qcow2")


def test_a_vm_boots_its_imported_image(node: Node) -> None:
    with_image(node, 120)
    assert disks.bootable(node.file("/var/lib/vz/images/120/vm-120-disk-0.qcow2"))
    node.ok("qm", "set", "120", "--boot", "order=scsi0")
    node.ok("qm", "start", "120")
    spec = node.file("/machines/120.spec").read_text()
    assert "images/120/vm-120-disk-0.qcow2" in spec
    assert config(node, 120)["net0"].split(",")[0].removeprefix("virtio=") in spec


def test_the_task_that_frees_a_volume_is_named_after_the_storage_and_its_owner(node: Node) -> None:
    with_image(node, 123)
    path = "/nodes/father/storage/local/content/local:"
    for volume, name in (("import/debian.raw", "local"), ("123/vm-123-disk-0.qcow2", "123@local")):
        assert f":imgdel:{name}:root@pam:" in node.ok("pvesh", "delete", f"{path}{volume}")


def test_a_volume_removed_during_a_listing_has_no_row(node: Node) -> None:
    for vmid in (121, 122):
        with_image(node, vmid)
    node.file("/var/lib/vz/images/121/.vm-121-disk-0.qcow2.d/meta.json").unlink()
    listed = node.ok("pvesh", "get", "/nodes/father/storage/local/content", "--output-format", "json")
    assert [row["vmid"] for row in json.loads(listed) if row["content"] == "images"] == [122]


def test_a_new_vm_has_no_name_in_cluster_resources_until_the_next_broadcast(node: Node) -> None:
    node.tick()
    node.ok("qm", "create", "163", "--name", "fresh", "--kvm", "0", "--tags", "b;a")
    assert resources(node)[163] == {
        "id": "qemu/163",
        "node": "father",
        "status": "unknown",
        "tags": "a;b",
        "type": "qemu",
        "vmid": 163,
    }
    node.tick()
    assert resources(node)[163]["name"] == "fresh"
    node.ok("qm", "destroy", "163")
    assert 163 not in resources(node)
    node.ok("qm", "create", "163", "--name", "second", "--kvm", "0")
    assert resources(node)[163]["name"] == "fresh"
    assert config(node, 163)["name"] == "second"


def test_marker_and_uuid_are_stored_unchanged(node: Node) -> None:
    marker = 'nestedpve: {"v":1,"run":"0123456789ab","vmid":201}'
    uuid = "11111111-2222-3333-4444-555555555555"
    node.ok("pvesh", "create", "/pools", "--poolid", "npve-1", "--comment", '{"v":1}')
    node.ok(
        *("pvesh", "create", "/nodes/father/qemu", "--vmid", "201", "--pool", "npve-1"),
        *("--description", marker, "--smbios1", f"uuid={uuid}", "--kvm", "0"),
    )
    options = config(node, 201)
    assert options["description"] == marker
    assert options["smbios1"] == f"uuid={uuid}"
    listed = json.loads(node.ok("pvesh", "get", "/pools", "--poolid", "npve-1", "--output-format", "json"))
    assert [member["vmid"] for member in listed[0]["members"]] == [201]
    assert listed[0]["comment"] == '{"v":1}'
    refused = node.run("pvesh", "delete", "/pools", "--poolid", "npve-1")
    assert refused.stderr == "delete pool failed: pool 'npve-1' is not empty (contains VM 201)\n"
    node.ok("qm", "destroy", "201")
    node.ok("pvesh", "delete", "/pools", "--poolid", "npve-1")


def test_pvesh_exits_with_0_after_a_failed_task_whose_exit_status_is_the_error(node: Node) -> None:
    answer = node.run("pvesh", "create", "/nodes/father/qemu/999/status/start")
    assert answer.rc == 0
    words = "Configuration file 'nodes/father/qemu-server/999.conf' does not exist"
    assert answer.stderr == words + "\n"
    path = f"/nodes/father/tasks/{answer.stdout.strip()}"
    status = json.loads(node.ok("pvesh", "get", path + "/status", "--output-format", "json"))
    assert (status["status"], status["exitstatus"]) == ("stopped", words)
    log = json.loads(node.ok("pvesh", "get", path + "/log", "--output-format", "json"))
    assert [line["t"] for line in log] == ["", f"TASK ERROR: {words}"]


def test_locks_protection_and_a_running_machine_prevent_a_destroy(node: Node) -> None:
    node.ok("qm", "create", "108", "--kvm", "0")
    node.run("qm", "set", "108", "--lock", "backup")
    for words in (
        ["start", "108"],
        ["destroy", "108"],
        ["set", "108", "--memory", "64"],
        ["snapshot", "108", "aa"],
    ):
        assert node.run("qm", *words).stderr == "VM is locked (backup)\n"
    assert node.run("qm", "stop", "108").rc == 0
    node.ok("qm", "unlock", "108")
    node.run("qm", "set", "108", "--protection", "1")
    refused = node.run("pvesh", "delete", "/nodes/father/qemu/108", "--skiplock", "1")
    assert (refused.rc, refused.stderr) == (255, "can't remove VM 108 - protection mode enabled\n")
    node.run("qm", "set", "108", "--delete", "protection")
    node.ok("qm", "start", "108")
    running = node.run("qm", "destroy", "108")
    assert (running.rc, running.stderr) == (25, "VM 108 is running - destroy failed\n")


def test_a_task_waits_for_a_held_lock_file_and_fails_at_the_limit(node: Node, monkeypatch: Any) -> None:
    node.ok("qm", "create", "153", "--kvm", "0")
    monkeypatch.setattr(locks, "WAIT", 0.2)
    monkeypatch.setitem(locks.guest.__wrapped__.__kwdefaults__, "timeout", 0.2)  # type: ignore[attr-defined]
    with open(node.file("/var/lock/qemu-server/lock-153.conf"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        answer = node.run("qm", "start", "153")
        assert node.run("qm", "status", "153").stdout == "status: stopped\n"
    assert answer.rc == 255
    assert answer.stdout == "trying to acquire lock...\n"
    assert answer.stderr == "can't lock file '/var/lock/qemu-server/lock-153.conf' - got timeout\n"


def test_a_file_written_before_a_snapshot_exists_after_the_rollback(node: Node) -> None:
    with_image(node, 106)
    volume = node.file("/var/lib/vz/images/106/vm-106-disk-0.qcow2")
    upper = disks.state_dir(volume) / "upper"
    (upper / "kept").write_text("yes")
    node.run("qm", "set", "106", "--description", "now", "--tags", "before")
    assert node.ok("qm", "snapshot", "106", "one").startswith("snapshotting 'drive-scsi0' (local:106/vm-106")
    (upper / "kept").unlink()
    (upper / "new").write_text("no")
    node.run("qm", "set", "106", "--tags", "after", "--description", "later", "--protection", "1")
    assert config(node, 106)["parent"] == "one"
    node.ok("qm", "rollback", "106", "one")
    assert sorted(path.name for path in upper.iterdir()) == ["kept"]
    options = config(node, 106)
    assert (options["tags"], options["description"], "protection" in options) == ("before", "later", False)
    rows = json.loads(node.ok("pvesh", "get", "/nodes/father/qemu/106/snapshot", "--output-format", "json"))
    assert [row["name"] for row in rows] == ["one", "current"]
    node.ok("qm", "delsnapshot", "106", "one")
    assert "parent" not in config(node, 106)


def test_raw_disks_have_no_snapshots(node: Node) -> None:
    node.run("qm", "create", "102", "--kvm", "0", "--scsi0", "local:1")
    assert node.run("qm", "snapshot", "102", "aa").stderr == "snapshot feature is not available\n"


def test_the_features_of_a_vm_depend_on_its_disks(node: Node) -> None:
    def feature_of(vmid: int, feature: str) -> Any:
        path = f"/nodes/father/qemu/{vmid}/feature"
        answer = node.ok("pvesh", "get", path, "--feature", feature, "--output-format", "json")
        return json.loads(answer)

    node.ok("qm", "create", "102", "--scsi0", "local:1,format=raw")
    node.ok("qm", "create", "106", "--scsi0", "local:1,format=qcow2")
    assert feature_of(106, "snapshot") == {"hasFeature": 1, "nodes": ["father"]}  # as recorded: extra-023
    assert feature_of(102, "clone") == {"hasFeature": 0, "nodes": ["father"]}  # as recorded: extra-025
    assert feature_of(102, "snapshot")["hasFeature"] == 0
    node.ok("qm", "template", "102")
    assert feature_of(102, "clone")["hasFeature"] == 1


def test_clones_get_new_ids_and_a_base_in_use_is_not_destroyed(node: Node) -> None:
    with_image(node, 109)
    node.run("qm", "set", "109", "--tags", "t", "--description", "d")
    node.ok("qm", "template", "109")
    base = config(node, 109)
    assert base["scsi0"].startswith("local:109/base-109-disk-0.qcow2,")
    node.ok("qm", "clone", "109", "201", "--name", "linked")
    linked = config(node, 201)
    assert linked["scsi0"].startswith("local:109/base-109-disk-0.qcow2/201/vm-201-disk-0.qcow2,")
    assert (linked["tags"], linked["description"]) == ("t", "d")
    for key in ("smbios1", "vmgenid", "net0"):
        assert linked[key] != base[key]
    assert disks.bootable(node.file("/var/lib/vz/images/201/vm-201-disk-0.qcow2"))
    refused = node.run("qm", "destroy", "109")
    words = "base volume 'local:109/base-109-disk-0.qcow2' is still in use by linked cloned\n"
    assert (refused.rc, refused.stderr) == (255, words)
    assert node.run("qm", "start", "109").stderr == "you can't start a vm if it's a template\n"
    node.ok("qm", "clone", "109", "202", "--full")
    node.ok("qm", "destroy", "201")
    node.ok("qm", "destroy", "109")
    assert disks.bootable(node.file("/var/lib/vz/images/202/vm-202-disk-0.qcow2"))


def test_a_destroy_without_options_keeps_unreferenced_disks(node: Node) -> None:
    node.ok("qm", "create", "101", "--kvm", "0")
    node.ok("pvesm", "alloc", "local", "101", "vm-101-disk-5.raw", "1M")
    node.ok("qm", "destroy", "101")
    assert "vm-101-disk-5" in node.ok("pvesm", "list", "local", "--vmid", "101")
    node.ok("qm", "create", "101", "--kvm", "0")
    node.ok("qm", "destroy", "101", "--destroy-unreferenced-disks", "1")
    assert node.ok("pvesm", "list", "local", "--vmid", "101") == ""


def test_changes_of_a_running_vm_are_pending_until_it_stops(node: Node) -> None:
    node.ok("qm", "create", "120", "--kvm", "0", "--memory", "768")
    node.ok("qm", "start", "120")
    node.run("qm", "set", "120", "--memory", "1024", "--name", "renamed")
    assert "cur memory: 768\nnew memory: 1024\n" in node.ok("qm", "pending", "120")
    assert config(node, 120)["memory"] == "1024"
    current = node.ok("qm", "config", "120", "--current")
    assert "memory: 768\n" in current
    assert "name: renamed\n" in current
    node.ok("qm", "stop", "120")
    assert "new" not in node.ok("qm", "pending", "120")


def test_a_stale_digest_is_refused(node: Node) -> None:
    node.ok("qm", "create", "101", "--kvm", "0")
    digest = config(node, 101)["digest"]
    node.ok("pvesh", "set", "/nodes/father/qemu/101/config", "--description", "x", "--digest", digest)
    refused = node.run(
        "pvesh", "set", "/nodes/father/qemu/101/config", "--description", "y", "--digest", digest
    )
    assert (refused.rc, refused.stderr) == (255, "checksum mismatch (file change by other user?)\n")


def test_answers_of_the_agent_have_the_form_of_the_api(node: Node) -> None:
    node.ok("qm", "create", "120", "--kvm", "0", "--agent", "1")
    assert node.run("qm", "agent", "120", "ping").stderr == "VM 120 is not running\n"
    node.ok("qm", "start", "120")
    assert node.run("qm", "agent", "120", "ping").stderr == "QEMU guest agent is not running\n"

    def qemu_ga(execute: str, _: dict[str, Any]) -> Any:
        if execute == "guest-file-read":
            return {"buf-b64": base64.b64encode(b"ssh-ed25519 AAAA\n").decode(), "count": 17, "eof": True}
        if execute == "guest-exec-status":
            out = base64.b64encode(b"out\n").decode()
            return {"exited": True, "exitcode": 7, "out-data": out}
        return {"guest-ping": {}, "guest-file-open": 1000, "guest-exec": {"pid": 7}}.get(execute, {})

    node.machines.agents[120] = qemu_ga
    assert node.ok("qm", "agent", "120", "ping") == ""
    path = "/nodes/father/qemu/120/agent/file-read"
    read = node.ok("pvesh", "get", path, "--file", "/etc/ssh/key.pub", "--output-format", "json")
    assert json.loads(read) == {"bytes-read": 17, "content": "ssh-ed25519 AAAA\n"}
    done = json.loads(node.ok("qm", "guest", "exec", "120", "--", "sh", "-c", "exit 7"))
    assert done == {"exitcode": 7, "exited": 1, "out-data": "out\n", "out-truncated": 0}


def test_the_monitor_reports_the_state_and_refuses_other_commands(node: Node) -> None:
    node.ok("qm", "create", "103", "--memory", "64")
    path = "/nodes/father/qemu/103/monitor"
    stopped = node.run("pvesh", "create", path, "--command", "info status")
    assert (stopped.rc, stopped.stderr) == (255, "VM 103 not running\n")
    node.ok("qm", "start", "103")
    assert node.ok("pvesh", "create", path, "--command", "info status") == "VM status: running\r\n\n"
    assert node.run("qm", "monitor", "103", stdin="info status\ninfo version\nquit\n") == Answer(
        0,
        "Entering QEMU Monitor for VM 103 - type 'help' for help\n"
        "VM status: running\r\n10.0.13pve-qemu-kvm_10.0.2-4\r\n",
        "qm> info status\nqm> info version\nqm> quit\n",
    )
    refused = node.run("pvesh", "create", path, "--command", "system_reset")
    assert "not supported by the lab" in refused.stderr


def test_cloud_init_files_are_written_as_by_pve(node: Node) -> None:
    node.ok("qm", "create", "120", "--name", "renamed.example.test", "--kvm", "0", "--ciuser", "root")
    node.run("qm", "set", "120", "--ide2", "local:cloudinit", "--ipconfig0", "ip=10.77.7.107/24,gw=10.77.7.1")
    node.run("qm", "set", "120", "--net0", "virtio=BC:24:11:2A:8E:DD,bridge=vmbr0")
    assert node.ok("qm", "cloudinit", "dump", "120", "user") == (
        "#cloud-config\nhostname: renamed\nmanage_etc_hosts: true\nfqdn: renamed.example.test\nuser: root\n"
        "disable_root: False\nchpasswd:\n  expire: False\npackage_upgrade: true\n\n"
    )
    assert node.ok("qm", "cloudinit", "dump", "120", "network") == (
        "version: 1\nconfig:\n    - type: physical\n      name: eth0\n"
        "      mac_address: 'bc:24:11:2a:8e:dd'\n      subnets:\n      - type: static\n"
        "        address: '10.77.7.107'\n        netmask: '255.255.255.0'\n        gateway: '10.77.7.1'\n"
        "    - type: nameserver\n      address:\n      - '10.255.255.53'\n\n"
    )
    node.run("qm", "set", "120", "--ciupgrade", "0", "--cicustom", "vendor=local:snippets/v.yaml")
    assert node.run("qm", "start", "120").stderr == "volume 'local:snippets/v.yaml' does not exist\n"
    node.file("/var/lib/vz/snippets/v.yaml").write_text("#cloud-config\npackages: [qemu-guest-agent]\n")
    assert node.ok("qm", "start", "120") == "generating cloud-init ISO\n"
    seed = cloudinit.seed(guests.load(120))
    assert seed["vendor-data"] == "#cloud-config\npackages: [qemu-guest-agent]\n"
    assert "package_upgrade" not in seed["user-data"]


def test_an_unsupported_command_is_refused_by_its_name(node: Node) -> None:
    node.ok("qm", "create", "101", "--kvm", "0")
    for words in (
        ["qm", "showcmd", "101"],
        ["pvesh", "get", "/nodes/father/qemu/101/rrddata", "--timeframe", "hour"],
        ["pvesh", "get", "/cluster/log"],
        ["pvecm", "create", "c"],
        ["qm", "set", "101", "--efidisk0", "local:1"],
    ):
        answer = node.run(*words)
        assert answer.rc != 0
        assert "not supported by the lab" in answer.stderr


def test_everything_but_pveversion_fails_while_the_cluster_file_system_is_down(node: Node) -> None:
    node.file("/run/pve-cluster.pid").unlink()
    answer = node.run("qm", "list")
    assert answer.rc == 111
    assert answer.stderr.endswith("Unable to load access control list: Connection refused\n")
    assert node.run("pveversion").rc == 0


def test_the_configuration_file_has_the_path_and_form_of_pve(node: Node) -> None:
    node.ok("qm", "create", "101", "--kvm", "0", "--name", "n", "--description", "two\nlines: x")
    kept = node.file("/var/lib/pve-cluster/fs/nodes/father/qemu-server/101.conf").read_text()
    assert kept.startswith("#two\n#lines%3A x\nboot:  \nkvm: 0\nmeta: creation-qemu=")
    node.ok("pveum", "pool", "add", "lab", "--comment", "a:b")
    node.ok("qm", "destroy", "101")
    assert not node.file("/var/lib/pve-cluster/fs/nodes/father/qemu-server/101.conf").exists()
    assert "pool:lab:a%3Ab:::" in node.file("/var/lib/pve-cluster/fs/user.cfg").read_text()


def test_a_container_occupies_its_id_and_is_no_vm(node: Node) -> None:
    place = node.file("/var/lib/pve-cluster/fs/nodes/father/lxc")
    place.mkdir(parents=True)
    (place / "200.conf").write_text("arch: amd64\nhostname: ct1\n")
    assert resources(node)[200]["type"] == "lxc"
    refused = node.run("qm", "create", "200")
    assert refused.stderr == "unable to create VM 200 - CT 200 already exists on node 'father'\n"
    assert node.run("qm", "status", "200").rc == 2
