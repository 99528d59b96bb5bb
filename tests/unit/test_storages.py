"""Features of a storage are read from the host's answers, never from its name; a VM's answer comes first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standin_environment import Make, environments
from standin_host import GIB, StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.pool import create_pool
from pytest_nestedpve.pve import qemu, storage
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup import snapshots
from pytest_nestedpve.setup.clone import clone_marked
from pytest_nestedpve.setup.preflight import PreflightError, preflight

DATA = json.loads((Path(__file__).parents[1] / "data" / "storages.json").read_text(encoding="utf-8"))
KINDS = {kind["name"]: kind for kind in DATA["kinds"]}


@pytest.fixture
def environment(tmp_path: Path, host: StandinHost) -> Iterator[Make]:
    with environments(host, tmp_path) as make:
        yield make


def define_storage(host: StandinHost, kind: dict[str, Any], name: str, avail: int) -> None:
    """A storage of a kind, with `avail` bytes free: its entries are those of the data file."""
    config = {key: value for key, value in kind["config"].items() if key not in ("storage", "type", "digest")}
    host.storage(name, kind["config"]["type"], **config)
    entry = {**kind["entry"], "storage": name, "avail": avail}
    host.change_answers(
        "GET", "/nodes/father/storage",
        lambda rows: [entry if row["storage"] == name else row for row in rows],
    )  # fmt: skip


@pytest.mark.parametrize("kind", DATA["kinds"], ids=lambda kind: kind["name"])
def test_format_snapshots_and_space_are_read_from_the_answers(kind: dict[str, Any]) -> None:
    assert storage.disk_format(kind["entry"]) == kind["format"]
    assert storage.has_snapshots(kind["entry"]) is kind["snapshots"]
    assert storage.takes_room_at_once(kind["entry"], kind["config"]) is kind["at_once"]
    assert storage.shared(kind["entry"]) is kind["shared"]
    assert storage.usable(kind["entry"])


@pytest.mark.parametrize("kind", DATA["kinds"], ids=lambda kind: kind["name"])
def test_the_name_of_a_storage_has_no_effect(kind: dict[str, Any]) -> None:
    for name in ("local-zfs", "local-lvm", "qcow2", "nfs"):
        named = {**kind["entry"], "storage": name}
        assert storage.disk_format(named) == kind["format"]
        assert storage.has_snapshots(named) is kind["snapshots"]


@pytest.mark.parametrize("kind", DATA["pve8"], ids=lambda kind: kind["name"])
def test_the_older_form_of_the_answer_is_read(kind: dict[str, Any]) -> None:
    assert storage.disk_format(kind["entry"]) == kind["format"]


@pytest.mark.parametrize(
    "odd",
    [
        {"formats": None},
        {"formats": 3},
        {"formats": {"supported": None}},
        {"formats": {"supported": "qcow2"}},
        {"format": []},
        {"format": [None]},
        {"format": ["qcow2"]},
    ],
    ids=str,
)
def test_an_invalid_answer_means_raw_volumes(odd: dict[str, Any]) -> None:
    assert storage.disk_format({"type": "lvmthin", **odd}) is None


@pytest.mark.parametrize(
    ("enabled", "active", "able"),
    [(1, 1, True), (1, 0, False), (0, 1, False), ("1", "1", True), (None, 1, False)],
)
def test_a_storage_is_used_only_if_it_is_enabled_and_active(
    enabled: object, active: object, able: bool
) -> None:
    assert storage.usable({"enabled": enabled, "active": active}) is able


@pytest.mark.parametrize("kind", DATA["kinds"], ids=lambda kind: kind["name"])
def test_preflight_requires_the_space_that_a_disk_allocates(
    environment: Make, host: StandinHost, kind: dict[str, Any]
) -> None:
    define_storage(host, kind, "requested", 60 * GIB)
    env = environment(storage="requested", disk=64)
    if not kind["at_once"]:
        facts = preflight(env)
        assert (facts["storage"], facts["format"]) == ("requested", kind["format"])
        return
    with pytest.raises(PreflightError, match=r"64 GiB free on .*takes its space at once"):
        preflight(env)


def template(env: Environment, host: StandinHost, *, linked: bool | None) -> int:
    """A template with one disk; `linked`: whether its storage reports linked clones, None for no answer."""
    api = env.outer.api
    create_pool(api, env.run, env.settings, 1_800_000_000)
    api.post("/nodes/father/qemu", vmid=500, name="golden", scsi0="local:8,format=qcow2")
    api.post("/nodes/father/qemu/500/template")
    if linked is None:
        host.fault("GET", "/nodes/father/qemu/500/feature", text="No 'GET' handler defined for this", times=9)
    else:
        host.report(feature={"500": {"clone": {"hasFeature": int(linked)}}})
    host.forget_calls()
    return 500


def clones(host: StandinHost) -> list[str]:
    return [call for call in host.calls() if call.startswith("POST") and "/clone" in call]


def test_a_template_is_cloned_linked_if_its_storage_can(environment: Make, host: StandinHost) -> None:
    env = environment()
    created = clone_marked(
        env.outer, env.run, env.settings, template(env, host, linked=True), storage="local"
    )
    assert "base-500" in host.configuration(created.vmid)
    assert clones(host) == ["POST /nodes/father/qemu/500/clone description name newid pool"]


def test_a_template_whose_storage_has_no_linked_clones_is_copied_at_once(
    environment: Make, host: StandinHost
) -> None:
    env = environment()
    vmid = template(env, host, linked=False)
    created = clone_marked(env.outer, env.run, env.settings, vmid, storage="local", format="qcow2")
    assert "base-500" not in host.configuration(created.vmid)
    assert clones(host) == [
        "POST /nodes/father/qemu/500/clone description format full name newid pool storage"
    ]


def test_a_refused_linked_clone_becomes_a_copy(environment: Make, host: StandinHost) -> None:
    env = environment()
    vmid = template(env, host, linked=None)
    # Recorded: snapshot-033.
    host.fault(
        "POST", "/nodes/father/qemu/500/clone",
        text="Linked clone feature is not supported for 'vg:base-500-disk-0' (scsi0)",
    )  # fmt: skip
    created = clone_marked(env.outer, env.run, env.settings, vmid, storage="local")
    assert "base-500" not in host.configuration(created.vmid)


def nested(env: Environment, disk: str = "local:8,format=qcow2") -> int:
    """Create the nested VM with that disk; its id."""
    create_pool(env.outer.api, env.run, env.settings, 1_800_000_000)
    created = create_marked(env.outer, env.run, env.settings)
    qemu.configure(env.outer.api, created.node, created.vmid, scsi0=disk)
    env.facts["provision"] = {
        "vmid": created.vmid,
        "node": created.node,
        "name": created.name,
        "uuid": created.uuid,
    }
    return created.vmid


def test_no_snapshot_is_tried_if_the_vm_has_none(environment: Make, host: StandinHost) -> None:
    env = environment()
    vmid = nested(env)
    host.report(feature={str(vmid): {"snapshot": {"hasFeature": 0}}})
    host.forget_calls()
    assert snapshots.take(env, "npve_wait_ip", "after wait_ip") is False
    assert not [call for call in host.calls() if call.startswith("POST")]


def test_a_rollback_to_an_older_snapshot_deletes_the_runs_younger_ones(
    environment: Make, host: StandinHost
) -> None:
    env = environment()
    host.storage("tank", "zfspool", "images")
    nested(env, "tank:8")
    for name in ("npve_first", "npve_second", "npve_third"):
        assert snapshots.take(env, name, name)
        host.advance(5)
    snapshots.roll_back(env, "npve_first")
    assert snapshots.list_snapshots(env) == ["npve_first"]


def test_a_younger_foreign_snapshot_remains_and_prevents_the_rollback(
    environment: Make, host: StandinHost
) -> None:
    env = environment()
    host.storage("tank", "zfspool", "images")
    vmid = nested(env, "tank:8")
    snapshots.take(env, "npve_first", "ours")
    host.advance(5)
    env.outer.api.post(f"/nodes/father/qemu/{vmid}/snapshot", snapname="by_hand")
    with pytest.raises(PveError, match="is not most recent snapshot"):
        snapshots.roll_back(env, "npve_first")
    assert set(host.guest(vmid).snapshots) == {"npve_first", "by_hand"}
