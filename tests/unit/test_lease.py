"""The lease of a live run is renewed; a run that lost its lease creates nothing more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from standin_host import StandinHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.lease_keeper import LeaseKeeper
from pytest_nestedpve.ownership.lease import LeaseLost, parse_lease
from pytest_nestedpve.ownership.pool import create_pool, pool_name, read_pool, renew
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.identity import Run


@pytest.fixture
def keeper(tmp_path: Path, host: StandinHost) -> Iterator[LeaseKeeper]:
    settings = replace(Settings(run_dir=tmp_path / "runs"), lease=1.2)
    run = Run.create(settings, tmp_path)
    audit = AuditLog(run.directory.audit, run.id)
    keeper = LeaseKeeper(host.connect(), run, settings, audit)
    yield keeper
    keeper.stop()
    audit.close()


def test_the_lease_is_renewed_until_the_keeper_stops(host: StandinHost, keeper: LeaseKeeper) -> None:
    api, run, settings = host.connect().api, keeper._run, keeper._settings
    first = create_pool(api, run, settings, run.created - 100)
    keeper.start()

    def renewed() -> bool:
        pool = read_pool(api, pool_name(settings, run))
        lease = parse_lease(pool.comment) if pool else None
        return lease is not None and lease.expires > first.expires

    wait_until(renewed, deadline=Deadline(10), what="a renewal")
    keeper.check()


def test_a_renewal_waits_for_a_lock(host: StandinHost, keeper: LeaseKeeper) -> None:
    api, run, settings = host.connect().api, keeper._run, keeper._settings
    create_pool(api, run, settings, run.created - 100)
    host.fault("PUT", "/pools", text="cfs-lock 'file-user_cfg' error: got lock request timeout", times=2)
    assert renew(api, run, settings, run.created, state="kept").state == "kept"


def test_a_lost_lease_is_noticed(keeper: LeaseKeeper) -> None:
    keeper.start()  # there is no pool
    wait_until(lambda: keeper.lost, deadline=Deadline(10), what="the loss to be noticed")
    with pytest.raises(LeaseLost, match="nothing more is created"):
        keeper.check()


def test_the_lease_survives_failed_renewals(host: StandinHost, keeper: LeaseKeeper) -> None:
    api, run, settings = host.connect().api, keeper._run, keeper._settings
    first = create_pool(api, run, settings, run.created - 100)
    host.fault("GET", "/pools", text="got timeout", times=2)
    keeper.start()

    def renewed() -> bool:
        comment, _ = host.pools()[pool_name(settings, run)]
        lease = parse_lease(comment)
        return lease is not None and lease.expires > first.expires

    wait_until(renewed, deadline=Deadline(10), what="a renewal after failures")
    assert keeper.lost is None
