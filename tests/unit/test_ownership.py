"""Nothing that is malformed widens what is destroyed: markers, leases, configurations, pools."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_host import MemoryHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.ownership.lease import Lease, LeaseLost, parse_lease
from pytest_nestedpve.ownership.marker import Marker, parse_marker
from pytest_nestedpve.ownership.pool import create_pool, pool_name, read_pool, renew, run_of_pool
from pytest_nestedpve.ownership.proof import judge
from pytest_nestedpve.pve.errors import AlreadyExists, NotFound, PveError
from pytest_nestedpve.run.identity import Run

RUN = "3fa9c2d41b07"
UUID = "6e1f0a52-1c1f-4f5e-9a37-0c2b5d8e4a11"
VMID = 99917
OURS = Marker(RUN, VMID, UUID)
SETTINGS = Settings()
CONFIG: dict[str, Any] = {
    "name": f"nested-pve-{RUN}",
    "description": OURS.to_text(),
    "smbios1": f"uuid={UUID}",
    "digest": "d" * 40,
}
STATUS: dict[str, Any] = {"status": "stopped", "qmpstatus": "stopped", "ha": {"managed": 0}}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def judged(config: object = None, status: object = None, vmid: int = VMID, run: str = RUN) -> bool:
    given_config = CONFIG if config is None else config
    return judge(SETTINGS, vmid, run, given_config, STATUS if status is None else status).ok


def test_our_vm_is_ours() -> None:
    assert judged()
    assert judged({**CONFIG, "description": f"for people\n{OURS.to_text()}\nmore"})
    assert judged({**CONFIG, "smbios1": f"uuid={UUID.upper()},base64=1"})


@pytest.mark.parametrize(
    "change",
    [
        {"name": "database"},
        {"name": None},
        {"name": 7},
        {"name": "NESTED-PVE-X"},
        {"description": None},
        {"description": OURS.to_text() + "\n" + OURS.to_text()},
        {"description": OURS.to_text() + "\n" + Marker("ab" * 6, VMID, UUID).to_text()},
        {"description": Marker("ab" * 6, VMID, UUID).to_text()},
        {"description": Marker(RUN, VMID + 1, UUID).to_text()},
        {"description": "nestedpve: {}"},
        {"description": OURS.to_text().replace('"v":1', '"v":2')},
        {"description": OURS.to_text().replace('"v":1', '"v":true')},
        {"description": OURS.to_text().replace(str(VMID), f'"{VMID}"')},
        {"description": OURS.to_text().replace(str(VMID), f"{VMID}.0")},
        {"description": OURS.to_text()[:-1] + ',"run":"' + RUN + '"}'},
        {"description": OURS.to_text()[:-1] + ',"more":1}'},
        {"description": OURS.to_text().replace('nested"', 'root"')},
        {"smbios1": None},
        {"smbios1": "uuid=00000000-0000-4000-8000-000000000000"},
        {"smbios1": f"uuid={UUID[:-1]}"},
        {"template": 1},
        {"template": "yes"},
        {"protection": 1},
        {"protection": "1"},
        {"protection": [0]},
    ],
    ids=str,
)
def test_a_configuration_that_differs_in_one_thing_is_not_ours(change: dict[str, Any]) -> None:
    config = {key: value for key, value in {**CONFIG, **change}.items() if value is not None}
    assert not judged(config)


@pytest.mark.parametrize(
    "status",
    [{}, {"status": "stopped"}, {**STATUS, "ha": None}, {**STATUS, "ha": {"managed": 1}},
     {**STATUS, "ha": {}}, {**STATUS, "template": 1}],
    ids=str,
)  # fmt: skip
def test_a_vm_of_ha_or_one_whose_status_does_not_say_is_not_touched(status: dict[str, Any]) -> None:
    assert not judged(status=status)


@pytest.mark.parametrize("vmid", [100, 99899, 100000])
def test_an_id_out_of_range_is_not_ours_whatever_it_says(vmid: int) -> None:
    assert not judged({**CONFIG, "description": Marker(RUN, vmid, UUID).to_text()}, vmid=vmid)


@given(config=json_values, status=json_values)
def test_no_configuration_at_all_is_ours_by_chance(config: object, status: object) -> None:
    assert not judged(config if config is not None else [], status if status is not None else [])


@given(st.sampled_from(sorted(CONFIG)[1:]), json_values)
def test_no_other_value_under_a_key_of_ours_is_accepted(key: str, value: object) -> None:
    if key in ("description", "name", "smbios1"):
        assert not judged({**CONFIG, key: value})


@given(st.text(max_size=200), st.text(max_size=200))
def test_a_marker_is_read_back_or_not_at_all(before: str, after: str) -> None:
    found = parse_marker(f"{before}\n{OURS.to_text()}\n{after}")
    assert found in (None, OURS)
    assert parse_marker(before) is None or before.strip().startswith("nestedpve:")


@given(st.integers(0, len(OURS.to_text()) - 1), st.characters(codec="utf-8"))
def test_a_marker_with_one_character_changed_never_names_what_it_did_not(at: int, other: str) -> None:
    text = OURS.to_text()
    found = parse_marker(text[:at] + other + text[at + 1 :])
    if found is not None and found != OURS:
        # Another run, another VM or another uuid, and then the proof refuses it.
        assert not judged({**CONFIG, "description": found.to_text()}) or found.role != OURS.role


LEASE = Lease("alice@laptop", "c" * 16, "s" * 16, "live", 1_800_000_000, 1_800_001_800, 1_800_086_400)


def test_a_lease_is_read_back_as_written() -> None:
    assert parse_lease(LEASE.to_text()) == LEASE
    assert "\n" not in LEASE.to_text()


@given(json_values)
def test_a_comment_that_is_no_lease_is_none(value: object) -> None:
    assert parse_lease(json.dumps(value)) is None
    assert parse_lease(value) is None


@given(
    st.sampled_from(["v", "owner", "client", "session", "state", "created", "expires", "hard"]), json_values
)
def test_a_lease_with_a_value_of_another_kind_never_lapses_earlier(key: str, value: object) -> None:
    data = {**json.loads(LEASE.to_text()), key: value}
    found = parse_lease(json.dumps(data))
    if found is None:
        return
    assert all(type(moment) is int for moment in (found.created, found.expires, found.hard))
    assert found.created <= found.expires
    assert found.state in ("live", "kept")


@pytest.mark.parametrize("drop", ["owner", "hard", "v"])
def test_a_lease_without_a_part_is_none(drop: str) -> None:
    data = json.loads(LEASE.to_text())
    del data[drop]
    assert parse_lease(json.dumps(data)) is None


def test_a_lease_lapses_at_its_end_or_at_the_hard_limit() -> None:
    assert not LEASE.expired(LEASE.expires)
    assert LEASE.expired(LEASE.expires + 1)
    assert dataclasses.replace(LEASE, expires=LEASE.hard + 99).expired(LEASE.hard + 1)


@given(st.text(alphabet=string.ascii_lowercase + string.digits + "-/._", max_size=40))
def test_only_names_of_our_form_are_pools_of_runs(name: str) -> None:
    run = run_of_pool(name)
    assert run is None or name.rpartition("/")[2] == f"npve-{run}"
    assert run_of_pool(f"npve-{RUN}") == run_of_pool(f"team/npve-{RUN}") == RUN
    # Whatever parent the settings allow: else nobody would find what such a run left.
    assert run_of_pool(f"1st_team/npve-{RUN}") == run_of_pool(f"-a/.b/npve-{RUN}") == RUN
    assert run_of_pool(f"npve-{RUN}x") is run_of_pool(f"xnpve-{RUN}") is run_of_pool(f"npve-{RUN}\n") is None


# -- the pool on a host --------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(dataclasses.replace(SETTINGS, run_dir=tmp_path / "runs"), tmp_path)


def test_a_pool_whose_reply_was_lost_is_ours_by_its_session(run: Run, memory: MemoryHost) -> None:
    memory.fault("POST", "/pools", do="lose")
    api = memory.connect().api
    lease = create_pool(api, run, SETTINGS, 1_800_000_000)
    assert lease.session == run.session
    pool = read_pool(api, pool_name(SETTINGS, run))
    assert pool is not None
    assert parse_lease(pool.comment) == lease


def test_a_pool_of_that_name_that_is_not_ours_is_left_alone(run: Run, memory: MemoryHost) -> None:
    api = memory.connect().api
    api.post("/pools", poolid=pool_name(SETTINGS, run), comment="somebody's")
    with pytest.raises(AlreadyExists):
        create_pool(api, run, SETTINGS, 1_800_000_000)
    with pytest.raises(LeaseLost, match="unreadable"):
        renew(api, run, SETTINGS, 1_800_000_000)
    pool = read_pool(api, pool_name(SETTINGS, run))
    assert pool is not None
    assert pool.comment == "somebody's"


def test_a_parent_pool_that_does_not_exist_is_named(run: Run, memory: MemoryHost) -> None:
    settings = dataclasses.replace(SETTINGS, pool_parent="teams")
    with pytest.raises(NotFound, match="pool_parent names the pool 'teams': create it"):
        create_pool(memory.connect().api, run, settings, 1_800_000_000)


def test_a_lease_never_outlives_its_hard_limit(run: Run, memory: MemoryHost) -> None:
    api = memory.connect().api
    first = create_pool(api, run, SETTINGS, 1_800_000_000)
    assert renew(api, run, SETTINGS, first.hard - 10).expires == first.hard
    with pytest.raises(LeaseLost, match="hard limit"):
        renew(api, run, SETTINGS, first.hard + 1)


def test_a_lease_that_another_session_took_is_lost(run: Run, memory: MemoryHost) -> None:
    api = memory.connect().api
    create_pool(api, run, SETTINGS, 1_800_000_000)
    with pytest.raises(LeaseLost, match="nothing more is created"):
        renew(api, dataclasses.replace(run, session="another"), SETTINGS, 1_800_000_100)


def test_a_pool_that_is_not_empty_is_not_deleted(run: Run, memory: MemoryHost) -> None:
    api = memory.connect().api
    create_pool(api, run, SETTINGS, 1_800_000_000)
    api.post("/nodes/father/qemu", vmid=500, name="somebodys", pool=pool_name(SETTINGS, run))
    with pytest.raises(PveError, match="is not empty"):
        api.delete("/pools", poolid=pool_name(SETTINGS, run))
