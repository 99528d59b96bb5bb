"""The lease: the comment of a run's pool, with the time until which the run may exist."""

from __future__ import annotations

import json
from dataclasses import dataclass

from pytest_nestedpve.ownership.marker import parse_object
from pytest_nestedpve.pve.errors import PveError

STATES = ("live", "kept")
_LATEST = 1 << 40  # epoch seconds that no clock shows: larger numbers are no times


class LeaseLost(PveError):
    """The run's pool is gone, or its lease is another session's: nothing more may be created."""


@dataclass(frozen=True)
class Lease:
    """The comment of a run's pool. Times: epoch seconds of the outer host's clock."""

    owner: str
    client: str
    session: str
    state: str
    created: int
    expires: int
    hard: int

    def to_text(self) -> str:
        """One line of JSON."""
        data = {
            "v": 1,
            "owner": self.owner,
            "client": self.client,
            "session": self.session,
            "state": self.state,
            "created": self.created,
            "expires": self.expires,
            "hard": self.hard,
        }
        return json.dumps(data, separators=(",", ":"))

    def expired(self, now: float) -> bool:
        """Whether it has expired at `now`, epoch seconds of the outer host's clock."""
        return now > min(self.expires, self.hard)


def parse_lease(comment: object) -> Lease | None:
    """The lease in a pool's comment; None unless it is exactly one as we write it."""
    data = parse_object(comment) if isinstance(comment, str) else None
    names = {"owner", "client", "session", "state", "created", "expires", "hard"}
    if data is None or set(data) != {"v", *names} or type(data["v"]) is not int or data["v"] != 1:
        return None
    for key in ("owner", "client", "session", "state"):
        if not isinstance(data[key], str) or not 0 < len(data[key]) <= 200:
            return None
    for key in ("created", "expires", "hard"):
        if type(data[key]) is not int or not 0 < data[key] < _LATEST:
            return None
    if data["state"] not in STATES or data["expires"] < data["created"] or data["hard"] < data["created"]:
        return None
    return Lease(**{key: data[key] for key in names})
