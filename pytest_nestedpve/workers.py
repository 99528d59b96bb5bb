"""How many environments the workers of an xdist session can need at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

#: What the controller tells its workers: how tests are dealt out (a worker's own options do not say).
DIST = "nestedpve_dist"


def at_once(config: pytest.Config, chosen: Iterable[pytest.Item]) -> int:
    """At most one for each worker, and no more than there are groups of `chosen` tests that go apart."""
    given: dict[str, Any] = getattr(config, "workerinput", {})
    count = int(given.get("workercount", 1))
    dist = given.get(DIST, "load")
    if dist == "each":
        return count
    return max(1, min(count, len({_group(item.nodeid, dist) for item in chosen})))


def _group(nodeid: str, dist: str) -> str:
    if dist == "loadscope":
        return nodeid.rpartition("::")[0]
    if dist == "loadfile":
        return nodeid.partition("::")[0]
    if dist == "loadgroup":
        return nodeid.rpartition("@")[2]
    return nodeid
