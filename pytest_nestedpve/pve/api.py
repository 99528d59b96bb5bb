"""The PVE API as four verbs; the transports behind it are chosen elsewhere."""

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
"""Seconds for a change that only a lock is in the way of; PVE itself waits for ten each time."""
_call_limit: ContextVar[float | None] = ContextVar("nested_pve_call_limit", default=None)


class Api(Protocol):
    """One API tree, whatever carries the calls.

    `path` begins with "/"; params are API parameters (bool becomes 1/0, None is left out, a list is
    repeated). `path` is positional only because the API has parameters of that name.
    The result is the decoded `data`. A call that forks a task returns its UPID as a plain string,
    whether or not the task failed: `tasks.wait_task` knows.
    Raises the errors of `pve.errors`.
    """

    def get(self, path: str, /, **params: Any) -> Any: ...

    def post(self, path: str, /, **params: Any) -> Any: ...

    def put(self, path: str, /, **params: Any) -> Any: ...

    def delete(self, path: str, /, **params: Any) -> Any: ...


class Verbs:
    """An Api that treats the four verbs alike: all are `_call`, with the name of the verb in lower case."""

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
    """Within this block one API call of this thread may take `seconds` (nominal).

    Needed where a call lasts as long as its task: `pvesh` returns only when the task it forked ended.
    """
    token = _call_limit.set(seconds)
    try:
        yield
    finally:
        _call_limit.reset(token)


def patiently(call: Callable[[], T]) -> T:
    """Make a call that changes something, and again while PVE gives up waiting for a lock, at once or in the
    call's task: it has changed nothing then (facts 26, 68). Not for a delete of a guest: who waits may hit
    another one.
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
    """The limit in force for one API call, nominal seconds."""
    limit = _call_limit.get()
    return default if limit is None else limit
