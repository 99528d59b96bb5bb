"""The PVE API as four verbs, without a transport."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import LockTimeout, TaskFailed

T = TypeVar("T")

LOCK_LIMIT = 45.0
"""Seconds in which a change is retried while PVE waits for a lock; PVE itself gives up after ten."""
_call_limit: ContextVar[float | None] = ContextVar("nested_pve_call_limit", default=None)


class Api(Protocol):
    """One API tree, independent of the transport.

    `path` begins with "/"; params are API parameters (bool becomes 1/0, None is left out, a list is
    repeated). `path` is positional only because the API has parameters of that name.
    The result is the decoded `data`. A call that forks a task returns its UPID as a plain string,
    whether or not the task fails: see `tasks.wait_task`.
    Raises the errors of `pve.errors`.
    """

    def get(self, path: str, /, **params: Any) -> Any: ...

    def post(self, path: str, /, **params: Any) -> Any: ...

    def put(self, path: str, /, **params: Any) -> Any: ...

    def delete(self, path: str, /, **params: Any) -> Any: ...


class Verbs:
    """An Api whose four verbs are all `_call`, with the name of the verb in lower case."""

    def get(self, path: str, /, **params: Any) -> Any:
        return self._call("get", path, params)

    def post(self, path: str, /, **params: Any) -> Any:
        return self._call("post", path, params)

    def put(self, path: str, /, **params: Any) -> Any:
        return self._call("put", path, params)

    def delete(self, path: str, /, **params: Any) -> Any:
        return self._call("delete", path, params)

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        raise NotImplementedError


@contextmanager
def call_limit(seconds: float) -> Iterator[None]:
    """Within this block each API call of this thread may take `seconds` (nominal).

    For calls that last as long as their task: `pvesh` returns only when the task that it forked has ended.
    """
    token = _call_limit.set(seconds)
    try:
        yield
    finally:
        _call_limit.reset(token)


def patiently(call: Callable[[], T]) -> T:
    """The result of a call that changes something, retried while PVE cannot get a lock.

    PVE reports that at once or in the call's task, and has changed nothing then (facts 26, 68). Not for
    deleting a guest: by the time of the retry its id may belong to another guest.
    """
    deadline = Deadline(LOCK_LIMIT)
    while True:
        try:
            return call()
        except (LockTimeout, TaskFailed) as error:
            locked = isinstance(error, LockTimeout) or isinstance(error.__cause__, LockTimeout)
            if deadline.expired or not locked:
                raise
            threading.Event().wait(0.1)


def current_call_limit(default: float) -> float:
    """The limit for one API call that is in force, in nominal seconds."""
    limit = _call_limit.get()
    return default if limit is None else limit
