"""The next session destroys runs whose lease has expired, and no other ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from standin_host import StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.lease import Lease
from pytest_nestedpve.teardown import expired_runs

POOL = f"npve-{'a' * 12}"


@pytest.fixture
def lease(host: StandinHost) -> Lease:
    """The expired lease of another owner's run, in its pool."""
    now = int(host.now())
    lease = Lease("bob@elsewhere", "c" * 16, "d" * 16, "live", now - 7200, now - 3600, now + 80_000)
    host.set_pool(POOL, lease.to_text())
    return lease


@pytest.mark.usefixtures("lease")
def test_an_expired_run_is_destroyed(env: Environment, host: StandinHost) -> None:
    expired_runs.sweep(env)
    assert POOL not in host.pools()


@pytest.mark.parametrize("comment", ["renewed", "unreadable"])
def test_a_run_whose_lease_changes_after_the_search_is_kept(
    env: Environment, host: StandinHost, lease: Lease, comment: str
) -> None:
    """Its session was suspended, and renews the lease between the search and the plan."""
    text = replace(lease, expires=int(host.now()) + 3600).to_text() if comment == "renewed" else "by hand"
    change = lambda: host.set_pool(POOL, text)  # noqa: E731 (called at the second listing)
    host.before("GET", "/pools", lambda: host.before("GET", "/pools", change))
    expired_runs.sweep(env)
    assert host.pools()[POOL][0] == text
    assert any("kept" in remark for remark in env.remarks)
