"""One API for two transports: HTTPS with tokens where it can be, root's `pvesh` where it must.

Chosen for each call by what it does (`routes`); callers do not know.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from pytest_nestedpve.pve import identity
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.api import Verbs, current_call_limit
from pytest_nestedpve.pve.calls import NO_LOG, ApiCall, CallLog
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import NodeUnreachable, PermissionDenied, PveError, SshError
from pytest_nestedpve.pve.host import SshLike
from pytest_nestedpve.pve.https import HttpsClient, NoHttps, NotTaken, ReplyLost, Unauthorized, Untrusted
from pytest_nestedpve.pve.identity import Grant, Identity
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.pve.tokens import Tokens

# A call over HTTPS does not last as long as its task does: the task's id is the answer.
LIMIT = 60.0
# How long a host whose HTTPS failed is spoken to by pvesh before HTTPS is tried again, seconds.
AGAIN = 5.0
# Seconds between two tries of a request that nobody took, growing from this.
FIRST_PAUSE = 0.05
# A proxy that answered before and does not now is perhaps restarted: so long it is waited for, seconds. When
# that was in vain it is left alone for longer.
RESTART = 8.0
AGAIN_AFTER_RESTART = 30.0


class Line:
    """What the APIs of one host share: its tokens, and whether HTTPS works just now."""

    def __init__(self, ssh: SshLike, log: CallLog) -> None:
        self.pvesh = PveshApi(ssh)
        self.tokens = Tokens(ssh, log)
        self.log = log
        self._lock = threading.Lock()
        self._down = Deadline(0)
        self._worked = False
        self.off: set[str] = set()
        """Nodes of the cluster that were off when last asked for: not to be waited for again."""
        self.why_not = ""
        """Why HTTPS was not used the last time; empty as long as it was."""

    def record_in(self, log: CallLog) -> None:
        """Record calls, those for tokens among them, in `log` from now on."""
        self.log = self.tokens.log = log

    @property
    def up(self) -> bool:
        return self._down.expired

    def failed(self, error: NoHttps) -> None:
        """HTTPS does not work: `pvesh` for a while."""
        with self._lock:
            self._down = Deadline(AGAIN_AFTER_RESTART if self._worked else AGAIN)
            self._worked = False
            self.why_not = str(error)

    def works(self) -> None:
        self.why_not = ""
        self._worked = True

    def patience(self) -> Deadline:
        """How long a call waits for the proxy to be back."""
        return Deadline(RESTART if self._worked else 0)


class HostApi(Verbs):
    """The API of a host, seen by one token and acted on, within a pool, by another (design: ownership).

    Raises the errors of `pve.errors`. A call whose answer was lost is repeated only if it changes nothing;
    otherwise ReplyLost, an SshError, says that it is not known what became of it.
    """

    def __init__(
        self,
        ssh: SshLike,
        log: CallLog = NO_LOG,
        *,
        _line: Line | None = None,
        _pool: Callable[[], str] | None = None,
        _free: bool = False,
    ) -> None:
        self.line = Line(ssh, log) if _line is None else _line
        self._ssh = ssh
        self._pool = _pool
        self._free = _free

    def within(self, pool: Callable[[], str]) -> HostApi:
        """This API, acting on guests by a token that PVE lets touch nothing but the pool's."""
        return HostApi(self._ssh, _line=self.line, _pool=pool)

    def unfenced(self) -> HostApi:
        """This API, changing guests as root: for a VM that is not in the run's pool yet."""
        return HostApi(self._ssh, _line=self.line)

    def free(self) -> HostApi:
        """This API with root's rights for everything: for tests, whose own the nested PVE is."""
        return HostApi(self._ssh, _line=self.line, _free=True)

    def logged(self, log: CallLog) -> HostApi:
        """This API with its calls recorded in `log`: for one that was connected before the log existed."""
        self.line.record_in(log)
        return self

    @property
    def transport(self) -> str:
        """How this host is spoken to, in words."""
        if self.line.why_not:
            return f"pvesh over SSH (HTTPS is not used: {self.line.why_not})"
        return "HTTPS through SSH, with API tokens"

    def close(self) -> None:
        """Remove this session's tokens from the host."""
        self.line.tokens.close()

    # -- one call ------------------------------------------------------------------------------

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        call = ApiCall(self.line.log, self.transport, verb, path, sorted(params))
        return call.send(lambda: self._send(call, verb, path, params))

    def _send(self, call: ApiCall, verb: str, path: str, params: dict[str, Any]) -> Any:
        pool = self._pool() if self._pool is not None else None
        who = identity.identity(verb, path, params, pool=pool, free=self._free)
        if who is not Identity.ROOT and self.line.up:
            if _node_of(path) in self.line.off:
                self._refuse_if_off(call, verb, path)
            patience, pause = self.line.patience(), FIRST_PAUSE
            while True:
                try:
                    answer = self._by_https(call, verb, path, params, who, pool)
                except NoHttps as error:
                    if isinstance(error, NotTaken) and pause == FIRST_PAUSE:
                        self._refuse_if_off(call, verb, path, error)
                    # Nothing was done, so it can be tried again.
                    if not isinstance(error, NotTaken) or patience.remaining() <= pause:
                        self.line.failed(error)
                        break
                    threading.Event().wait(pause)
                    pause = min(pause * 2, 0.5)
                else:
                    self.line.works()
                    return answer
        call.transport = "pvesh"
        return getattr(self.line.pvesh, verb)(path, **params)

    def _refuse_if_off(self, call: ApiCall, method: str, path: str, error: NotTaken | None = None) -> None:
        """Raises NodeUnreachable when the call is for a node of the cluster that is off: nothing is wrong
        with the proxy then, and nothing to be waited for. The proxy itself answers that, without its daemon.
        """
        node = _node_of(path)
        if node is None:
            return
        try:
            listed = entries(self._by_https(call, "get", "/nodes", {}, Identity.SEE, None))
        except PveError:
            return
        state = next((str(each.get("status")) for each in listed if each.get("node") == node), "online")
        if state != "online":
            self.line.off.add(node)
            raise NodeUnreachable(f"the node {node} is {state}", call=f"{method} {path}") from error
        self.line.off.discard(node)

    def _by_https(
        self, call: ApiCall, method: str, path: str, params: dict[str, Any], who: Identity, pool: str | None
    ) -> Any:
        # Twice at most: what stood in the way the first time (a token that is gone, another certificate, a
        # connection that ended) is replaced once.
        for last in (False, True):
            client: HttpsClient | None = None
            try:
                client = self._client(method, path, params, who, pool)
                call.transport = f"https:{who.value}"
                return client.call(method.upper(), path, params, min(LIMIT, current_call_limit(LIMIT)))
            except Unauthorized:
                if last:
                    raise
                if client is not None:
                    self.line.tokens.renew(client)
            except Untrusted:
                if last:
                    raise
                self.line.tokens.distrust()
            except (ReplyLost, NodeUnreachable):
                if last or method != "get":
                    raise
            except PermissionDenied as error:
                more = _zone(error, params)
                if last or more is None or who is not Identity.ACT or pool is None:
                    raise
                self.line.tokens.acting(pool, [more])
        raise AssertionError("unreachable")

    def _client(
        self, method: str, path: str, params: dict[str, Any], who: Identity, pool: str | None
    ) -> HttpsClient:
        tokens = self.line.tokens
        if who is Identity.SEE or pool is None:
            return tokens.seeing()
        needed = identity.grants(path, params)
        source = identity.cloned(path) if method == "post" else None
        if source is not None:
            node, vmid = source
            config = tokens.seeing().call("GET", f"/nodes/{node}/qemu/{vmid}/config", {}, LIMIT)
            needed += identity.of_clone(config or {})
        try:
            return tokens.acting(pool, needed)
        except SshError as error:
            raise NoHttps(str(error)) from error


def _node_of(path: str) -> str | None:
    """The node that a call is for, if it is for one."""
    node = re.match(r"/nodes/([^/]+)/", path)
    return node[1] if node else None


def _zone(error: PveError, params: dict[str, Any]) -> Grant | None:
    """What is missing when a bridge that the call names lies in another zone than PVE's own."""
    match = re.search(r"\((/sdn/zones/[\w-]+/(?P<bridge>[\w.-]+)), SDN\.Use\)", str(error))
    if match is None:
        return None
    named = any(f"bridge={match['bridge']}" in str(value).split(",") for value in params.values())
    return Grant(match[1], "PVESDNUser") if named else None
