"""A malformed marker, lease, configuration or pool never proves that a VM or a pool is the run's own."""

from __future__ import annotations

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standin_host import StandinHost

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


def is_ours(config: object = None, status: object = None, vmid: int = VMID, run: str = RUN) -> bool:
    """Whether the proof accepts the VM; configuration and status are by default those of our own VM."""
    config = CONFIG if config is None else config
    return judge(SETTINGS, vmid, run, config, STATUS if status is None else status).ok


def test_our_vm_is_ours() -> None:
    assert is_ours()
    assert is_ours({**CONFIG, "description": f"for people\n{OURS.to_text()}\nmore"})
    assert is_ours({**CONFIG, "smbios1": f"uuid={UUID.upper()},base64=1"})


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
    assert not is_ours(config)


@pytest.mark.parametrize(
    "status",
    [{}, {"status": "stopped"}, {**STATUS, "ha": None}, {**STATUS, "ha": {"managed": 1}},
     {**STATUS, "ha": {}}, {**STATUS, "template": 1}],
    ids=str,
)  # fmt: skip
def test_a_vm_that_ha_manages_or_may_manage_is_not_ours(status: dict[str, Any]) -> None:
    assert not is_ours(status=status)


@pytest.mark.parametrize("vmid", [100, 99899, 100000])
def test_a_vm_whose_id_is_out_of_range_is_not_ours_even_with_its_marker(vmid: int) -> None:
    assert not is_ours({**CONFIG, "description": Marker(RUN, vmid, UUID).to_text()}, vmid=vmid)


@given(config=json_values, status=json_values)
def test_an_arbitrary_configuration_is_not_ours(config: object, status: object) -> None:
    assert not is_ours(config if config is not None else [], status if status is not None else [])


@given(st.sampled_from(["description", "name", "smbios1"]), json_values)
def test_another_name_description_or_uuid_is_not_ours(key: str, value: object) -> None:
    assert not is_ours({**CONFIG, key: value})


@given(st.text(max_size=200), st.text(max_size=200))
def test_text_around_a_marker_never_changes_it(before: str, after: str) -> None:
    marker = parse_marker(f"{before}\n{OURS.to_text()}\n{after}")
    assert marker in (None, OURS)
    assert parse_marker(before) is None or before.strip().startswith("nestedpve:")


@given(st.integers(0, len(OURS.to_text()) - 1), st.characters(codec="utf-8"))
def test_a_marker_with_one_character_changed_never_proves_a_vm(at: int, character: str) -> None:
    text = OURS.to_text()
    marker = parse_marker(text[:at] + character + text[at + 1 :])
    if marker is not None and marker != OURS:
        # Another run, another VM or another uuid, and then the proof refuses it.
        assert not is_ours({**CONFIG, "description": marker.to_text()}) or marker.role != OURS.role


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
def test_a_lease_with_another_value_is_none_or_has_valid_times_and_state(key: str, value: object) -> None:
    data = {**json.loads(LEASE.to_text()), key: value}
    lease = parse_lease(json.dumps(data))
    if lease is None:
        return
    assert all(type(moment) is int for moment in (lease.created, lease.expires, lease.hard))
    assert lease.created <= lease.expires
    assert lease.state in ("live", "kept")


@pytest.mark.parametrize("key", ["owner", "hard", "v"])
def test_a_lease_without_one_of_its_keys_is_none(key: str) -> None:
    data = json.loads(LEASE.to_text())
    del data[key]
    assert parse_lease(json.dumps(data)) is None


def test_a_lease_expires_at_its_end_or_at_the_hard_limit() -> None:
    assert not LEASE.expired(LEASE.expires)
    assert LEASE.expired(LEASE.expires + 1)
    assert dataclasses.replace(LEASE, expires=LEASE.hard + 99).expired(LEASE.hard + 1)


@given(st.text(alphabet=string.ascii_lowercase + string.digits + "-/._", max_size=40))
def test_only_names_of_our_form_are_pools_of_runs(name: str) -> None:
    run = run_of_pool(name)
    assert run is None or name.rpartition("/")[2] == f"npve-{run}"
    assert run_of_pool(f"npve-{RUN}") == run_of_pool(f"team/npve-{RUN}") == RUN
    # Below every parent that the settings allow: else no clean-up would see that run's leftovers.
    assert run_of_pool(f"1st_team/npve-{RUN}") == run_of_pool(f"-a/.b/npve-{RUN}") == RUN
    assert run_of_pool(f"npve-{RUN}x") is run_of_pool(f"xnpve-{RUN}") is run_of_pool(f"npve-{RUN}\n") is None


# -- the pool on a host --------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(dataclasses.replace(SETTINGS, run_dir=tmp_path / "runs"), tmp_path)


def test_a_pool_whose_reply_was_lost_is_ours_by_its_session(run: Run, host: StandinHost) -> None:
    host.fault("POST", "/pools", do="drop")
    api = host.connect().api
    lease = create_pool(api, run, SETTINGS, 1_800_000_000)
    assert lease.session == run.session
    pool = read_pool(api, pool_name(SETTINGS, run))
    assert pool is not None
    assert parse_lease(pool.comment) == lease


def test_a_pool_of_that_name_that_is_not_ours_is_left_alone(run: Run, host: StandinHost) -> None:
    api = host.connect().api
    api.post("/pools", poolid=pool_name(SETTINGS, run), comment="somebody's")
    with pytest.raises(AlreadyExists):
        create_pool(api, run, SETTINGS, 1_800_000_000)
    with pytest.raises(LeaseLost, match="unreadable"):
        renew(api, run, SETTINGS, 1_800_000_000)
    pool = read_pool(api, pool_name(SETTINGS, run))
    assert pool is not None
    assert pool.comment == "somebody's"


def test_a_parent_pool_that_does_not_exist_is_named(run: Run, host: StandinHost) -> None:
    settings = dataclasses.replace(SETTINGS, pool_parent="teams")
    with pytest.raises(NotFound, match="pool_parent names the pool 'teams': create it"):
        create_pool(host.connect().api, run, settings, 1_800_000_000)


def test_a_lease_never_outlives_its_hard_limit(run: Run, host: StandinHost) -> None:
    api = host.connect().api
    first = create_pool(api, run, SETTINGS, 1_800_000_000)
    assert renew(api, run, SETTINGS, first.hard - 10).expires == first.hard
    with pytest.raises(LeaseLost, match="hard limit"):
        renew(api, run, SETTINGS, first.hard + 1)


def test_a_lease_of_another_session_is_lost(run: Run, host: StandinHost) -> None:
    api = host.connect().api
    create_pool(api, run, SETTINGS, 1_800_000_000)
    with pytest.raises(LeaseLost, match="nothing more is created"):
        renew(api, dataclasses.replace(run, session="another"), SETTINGS, 1_800_000_100)


def test_a_pool_that_is_not_empty_is_not_deleted(run: Run, host: StandinHost) -> None:
    api = host.connect().api
    create_pool(api, run, SETTINGS, 1_800_000_000)
    api.post("/nodes/father/qemu", vmid=500, name="somebodys", pool=pool_name(SETTINGS, run))
    with pytest.raises(PveError, match="is not empty"):
        api.delete("/pools", poolid=pool_name(SETTINGS, run))
