"""One API over two transports: HTTPS with API tokens where possible, root's `pvesh` where necessary.

The transport is selected per call (`identity`); callers do not depend on it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.api import Verbs, current_call_limit
from pytest_nestedpve.pve.calls import NO_LOG, ApiCall, CallLog
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import NodeUnreachable, PermissionDenied, PveError, SshError
from pytest_nestedpve.pve.host import SshLike
from pytest_nestedpve.pve.https import HttpsClient, NoHttps, NotDelivered, ReplyLost, Unauthorized, Untrusted
from pytest_nestedpve.pve.identity import Grant, Identity, clone_grants, clone_source, grants, identity_of
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.pve.tokens import Tokens

# Seconds for a call over HTTPS. It does not last as long as its task: the answer is the task's id.
LIMIT = 60.0
# Seconds for which pvesh replaces HTTPS after a failure of HTTPS.
HTTPS_BACKOFF = 5.0
# First pause, in seconds, before a request that did not reach the API is retried; it doubles each time.
FIRST_PAUSE = 0.05
# Seconds in which a proxy that answered before may restart, and the longer back-off if it does not.
PROXY_RESTART = 8.0
BACKOFF_AFTER_RESTART = 30.0


class SharedState:
    """What all `HostApi` of one host share: its tokens, and whether HTTPS works now."""

    def __init__(self, ssh: SshLike, log: CallLog) -> None:
        self.pvesh = PveshApi(ssh)
        self.tokens = Tokens(ssh, log)
        self.log = log
        self._lock = threading.Lock()
        self._backoff = Deadline(0)
        self._worked = False
        self.offline: set[str] = set()
        """Nodes of the cluster that were offline at the last check: no call waits for them again."""
        self.https_failure = ""
        """Why HTTPS failed the last time; empty if it worked."""

    def record_in(self, log: CallLog) -> None:
        """Record calls, those for tokens among them, in `log` from now on."""
        self.log = self.tokens.log = log

    @property
    def tries_https(self) -> bool:
        return self._backoff.expired

    def https_failed(self, error: NoHttps) -> None:
        """Use `pvesh` for some seconds."""
        with self._lock:
            self._backoff = Deadline(BACKOFF_AFTER_RESTART if self._worked else HTTPS_BACKOFF)
            self._worked = False
            self.https_failure = str(error)

    def https_worked(self) -> None:
        self.https_failure = ""
        self._worked = True

    def restart_limit(self) -> Deadline:
        """How long a call waits for a restart of the proxy."""
        return Deadline(PROXY_RESTART if self._worked else 0)


class HostApi(Verbs):
    """The API of a host: one token reads, another one changes guests of one pool.

    Raises the errors of `pve.errors`. A call whose answer was lost is repeated only if it changes nothing;
    otherwise it raises ReplyLost, an SshError: its outcome is unknown.
    """

    def __init__(
        self,
        ssh: SshLike,
        log: CallLog = NO_LOG,
        *,
        _shared: SharedState | None = None,
        _pool: Callable[[], str] | None = None,
        _free: bool = False,
    ) -> None:
        self.shared = SharedState(ssh, log) if _shared is None else _shared
        self._ssh = ssh
        self._pool = _pool
        self._free = _free

    def within(self, pool: Callable[[], str]) -> HostApi:
        """This API, changing guests with a token that PVE restricts to the pool."""
        return HostApi(self._ssh, _shared=self.shared, _pool=pool)

    def unfenced(self) -> HostApi:
        """This API, changing guests as root: for a VM that is not in the run's pool yet."""
        return HostApi(self._ssh, _shared=self.shared)

    def free(self) -> HostApi:
        """This API with root's rights for everything: for tests, which own the nested PVE."""
        return HostApi(self._ssh, _shared=self.shared, _free=True)

    def logged(self, log: CallLog) -> HostApi:
        """This API with its calls recorded in `log`: for one that was connected before the log existed."""
        self.shared.record_in(log)
        return self

    @property
    def transport(self) -> str:
        """How this host is reached, in words."""
        if self.shared.https_failure:
            return f"pvesh over SSH (HTTPS is not used: {self.shared.https_failure})"
        return "HTTPS through SSH, with API tokens"

    def close(self) -> None:
        """Delete this session's tokens on the host."""
        self.shared.tokens.close()

    # -- one call ------------------------------------------------------------------------------

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        call = ApiCall(self.shared.log, self.transport, verb, path, sorted(params))
        return call.send(lambda: self._send(call, verb, path, params))

    def _send(self, call: ApiCall, verb: str, path: str, params: dict[str, Any]) -> Any:
        pool = self._pool() if self._pool is not None else None
        identity = identity_of(verb, path, params, pool=pool, free=self._free)
        if identity is not Identity.ROOT and self.shared.tries_https:
            if _node_of(path) in self.shared.offline:
                self._refuse_if_offline(call, verb, path)
            restart, pause = self.shared.restart_limit(), FIRST_PAUSE
            while True:
                try:
                    answer = self._by_https(call, verb, path, params, identity, pool)
                except NoHttps as error:
                    if isinstance(error, NotDelivered) and pause == FIRST_PAUSE:
                        self._refuse_if_offline(call, verb, path, error)
                    # The call had no effect, so it can be retried.
                    if not isinstance(error, NotDelivered) or restart.remaining() <= pause:
                        self.shared.https_failed(error)
                        break
                    threading.Event().wait(pause)
                    pause = min(pause * 2, 0.5)
                else:
                    self.shared.https_worked()
                    return answer
        call.transport = "pvesh"
        return getattr(self.shared.pvesh, verb)(path, **params)

    def _refuse_if_offline(
        self, call: ApiCall, method: str, path: str, error: NotDelivered | None = None
    ) -> None:
        """Raises NodeUnreachable when the call is for a node of the cluster that is offline.

        The proxy works then, and a retry cannot help. The proxy answers that by itself, without its daemon.
        """
        node = _node_of(path)
        if node is None:
            return
        try:
            listed = entries(self._by_https(call, "get", "/nodes", {}, Identity.SEE, None))
        except PveError:
            return
        state = next((str(entry.get("status")) for entry in listed if entry.get("node") == node), "online")
        if state != "online":
            self.shared.offline.add(node)
            raise NodeUnreachable(f"the node {node} is {state}", call=f"{method} {path}") from error
        self.shared.offline.discard(node)

    def _by_https(
        self,
        call: ApiCall,
        method: str,
        path: str,
        params: dict[str, Any],
        identity: Identity,
        pool: str | None,
    ) -> Any:
        # At most twice: a deleted token, another certificate and a lost connection are replaced once.
        for last in (False, True):
            client: HttpsClient | None = None
            try:
                client = self._client(method, path, params, identity, pool)
                call.transport = f"https:{identity.value}"
                return client.call(method.upper(), path, params, min(LIMIT, current_call_limit(LIMIT)))
            except Unauthorized:
                if last:
                    raise
                if client is not None:
                    self.shared.tokens.renew(client)
            except Untrusted:
                if last:
                    raise
                self.shared.tokens.distrust()
            except (ReplyLost, NodeUnreachable):
                if last or method != "get":
                    raise
            except PermissionDenied as error:
                missing = _missing_zone(error, params)
                if last or missing is None or identity is not Identity.ACT or pool is None:
                    raise
                self.shared.tokens.act_client(pool, [missing])
        raise AssertionError("unreachable")

    def _client(
        self, method: str, path: str, params: dict[str, Any], identity: Identity, pool: str | None
    ) -> HttpsClient:
        tokens = self.shared.tokens
        if identity is Identity.SEE or pool is None:
            return tokens.see_client()
        needed = grants(path, params)
        source = clone_source(path) if method == "post" else None
        if source is not None:
            node, vmid = source
            config = tokens.see_client().call("GET", f"/nodes/{node}/qemu/{vmid}/config", {}, LIMIT)
            needed += clone_grants(config or {})
        try:
            return tokens.act_client(pool, needed)
        except SshError as error:
            raise NoHttps(str(error)) from error


def _node_of(path: str) -> str | None:
    """The node that a call addresses, if any."""
    node = re.match(r"/nodes/([^/]+)/", path)
    return node[1] if node else None


def _missing_zone(error: PveError, params: dict[str, Any]) -> Grant | None:
    """The missing grant, when a bridge that the call names is in another SDN zone than PVE's default one."""
    match = re.search(r"\((/sdn/zones/[\w-]+/(?P<bridge>[\w.-]+)), SDN\.Use\)", str(error))
    if match is None:
        return None
    named = any(f"bridge={match['bridge']}" in str(value).split(",") for value in params.values())
    return Grant(match[1], "PVESDNUser") if named else None
