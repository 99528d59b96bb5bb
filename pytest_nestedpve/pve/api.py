"""The PVE API as four verbs; the transports behind it are chosen elsewhere."""

from __future__ import annotations

from typing import Any, Protocol


class Api(Protocol):
    """One API tree, whatever carries the calls.

    `path` begins with "/"; params are API parameters (bool becomes 1/0, None is left out).
    The result is the decoded `data`. A call that forks a task returns its UPID as a plain string
    and does not wait for it: use `tasks.wait_task`.
    Raises the errors of `pve.errors`.
    """

    def get(self, path: str, **params: Any) -> Any: ...

    def post(self, path: str, **params: Any) -> Any: ...

    def put(self, path: str, **params: Any) -> Any: ...

    def delete(self, path: str, **params: Any) -> Any: ...
