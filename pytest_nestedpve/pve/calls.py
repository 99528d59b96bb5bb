"""The record of calls: one entry per API call and per command on a host, in a log that is handed in."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from pytest_nestedpve.pve.api import Api, Verbs
from pytest_nestedpve.pve.errors import ApiError

_UPID = "UPID:"
_CREATES = re.compile(r"/(?:pools|qemu|clone)\Z")


@dataclass(frozen=True)
class Call:
    """A call that ended, without the values of its parameters: they may be secrets, and some are long.

    `transport` is "https:see", "https:act", "pvesh" or "ssh"; for an Api that has none of these, its own
    name for itself. `rc` is 0 after success, otherwise the exit or HTTP status, 255 if there is none, -1 for
    a command that was not completed; `ms` wall-clock milliseconds. `cut_off`: the call creates a guest or a
    pool and ended without an answer, so the host may still be working on it.
    """

    transport: str
    cmd: str
    rc: int
    ms: float
    error: str | None = None
    cut_off: bool = False


class CallLog(Protocol):
    """Where the calls to one host are recorded. Thread-safe."""

    def record(self, call: Call, /) -> None:
        """Add one entry."""

    def record_task(self, upid: str, cmd: str, /) -> None:
        """Add a task that an API call started; `cmd` is the verb and the path of that call."""

    def hide(self, secret: str, /) -> None:
        """Mask this text in all later entries."""


class NoLog:
    """A `CallLog` that discards everything."""

    def record(self, _call: Call, /) -> None:
        return None

    def record_task(self, _upid: str, _cmd: str, /) -> None:
        return None

    def hide(self, _secret: str, /) -> None:
        return None


NO_LOG: CallLog = NoLog()


class ApiCall:
    """An API call that is to be recorded in `log`, as `VERB PATH DETAILS…`.

    `transport` may be changed as long as the call lasts. Calls of one thread nest: what is recorded while
    a call lasts has entries, and milliseconds, of its own, which the entry of the outer call leaves out.
    """

    def __init__(self, log: CallLog, transport: str, verb: str, path: str, details: Iterable[str]) -> None:
        self.transport = transport
        self._log = log
        self._verb = verb
        self._path = path
        self._details = tuple(details)
        self._nested_ms = 0.0

    def send(self, send: Callable[[], Any]) -> Any:
        """The result of `send`, which makes the call; recorded however it ends, then the task it started."""
        outer, started = _current.get(), time.monotonic()
        token = _current.set(self)
        error: BaseException | None = None
        try:
            answer = send()
        except BaseException as e:
            error = e
            raise
        finally:
            _current.reset(token)
            ms = (time.monotonic() - started) * 1000
            if outer is not None:
                outer._nested_ms += ms
            self._log.record(self._ended(error, max(0.0, round(ms - self._nested_ms, 1))))
        if isinstance(answer, str) and answer.startswith(_UPID):
            self._log.record_task(answer, f"{self._verb} {self._path}")
        return answer

    def _ended(self, error: BaseException | None, ms: float) -> Call:
        cmd = " ".join([self._verb, self._path, *self._details])
        if error is None:
            return Call(self.transport, cmd, 0, ms)
        refused = isinstance(error, ApiError)
        rc = error.rc if isinstance(error, ApiError) and error.rc is not None else 255
        creates = self._verb == "post" and _CREATES.search(self._path) is not None
        text = str(error) or type(error).__name__
        return Call(self.transport, cmd, rc, ms, error=text, cut_off=creates and not refused)


# The innermost API call that this thread is making.
_current: ContextVar[ApiCall | None] = ContextVar("nested_pve_api_call", default=None)


def record_nested(log: CallLog, call: Call) -> None:
    """Record a command that the API call in progress needs; the entry of that call leaves out its time."""
    if (current := _current.get()) is not None:
        current._nested_ms += call.ms
    log.record(call)


class LoggedApi(Verbs):
    """An Api that knows no `CallLog`, with its calls recorded in one."""

    def __init__(self, api: Api, log: CallLog) -> None:
        self.wrapped = api
        self._log = log

    @property
    def transport(self) -> str:
        """How the host is reached, in words."""
        return str(getattr(self.wrapped, "transport", "api"))

    def within(self, pool: Callable[[], str]) -> LoggedApi:
        """As `HostApi.within`, if the Api has it."""
        return self._view("within", pool)

    def unfenced(self) -> LoggedApi:
        """As `HostApi.unfenced`, if the Api has it."""
        return self._view("unfenced")

    def free(self) -> LoggedApi:
        """As `HostApi.free`, if the Api has it."""
        return self._view("free")

    def _view(self, name: str, *args: Any) -> LoggedApi:
        view = getattr(self.wrapped, name, None)
        return self if view is None else LoggedApi(view(*args), self._log)

    def close(self) -> None:
        close = getattr(self.wrapped, "close", None)
        if close is not None:
            close()

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        call = ApiCall(self._log, self.transport, verb, path, sorted(params))
        return call.send(lambda: getattr(self.wrapped, verb)(path, **params))
