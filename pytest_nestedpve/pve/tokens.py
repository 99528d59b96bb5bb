"""API tokens of a session: one that reads and expires after minutes, and one per pool that changes guests.

Sources: recordings of PVE 9.2 of pools, tokens and access control (facts 42, 48 to 66).
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import entries, mapping, whole
from pytest_nestedpve.pve.api import Verbs, call_limit, patiently
from pytest_nestedpve.pve.calls import ApiCall, Call, CallLog, record_nested
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import CommandTimeout, NotFound, PveError, SshError
from pytest_nestedpve.pve.https import HttpsClient, NoHttps, Trust, Unauthorized, read_trust
from pytest_nestedpve.pve.identity import Grant
from pytest_nestedpve.pve.pvesh import PveshApi

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.host import SshLike

USER = "root@pam"
SEE_PREFIX = "npve-see-"
SEE_SECONDS = 600
ACT_SECONDS = 24 * 3600
# Seconds until the next attempt to replace a token, after one that failed.
RETRY_PAUSE = 30.0
_CALL_LIMIT = 30.0
_PVESH_LIMIT = 60.0
_RUN_POOL = re.compile(r"(?:.*/)?(npve-[0-9a-f]{12})\Z")
_OURS = re.compile(r"npve-(?:see|[0-9a-f]{12})-[0-9a-f]{8}\Z")

# As root: the certificate that the proxy serves, then the authority of PVE's own certificates.
_READ_TRUST = (
    "cd /etc/pve && if [ -e local/pveproxy-ssl.pem ]; then cat local/pveproxy-ssl.pem; "
    "else cat local/pve-ssl.pem /etc/pve/pve-root-ca.pem; fi"
)


def trust_of(ssh: SshLike) -> Trust:
    """The trust for the certificate of that host's API, read by root. Raises NoHttps."""
    answer = ssh.run(_READ_TRUST, timeout=30)
    if not answer.ok:
        raise NoHttps(f"its certificate cannot be read: {' '.join(answer.stderr.split())[:200]}")
    return read_trust(answer.stdout)


def greet(ssh: SshLike, trust: Trust) -> None:
    """Connect to that host's API over TLS, without a token or a request. Raises NoHttps."""
    HttpsClient(ssh.open_channel, trust, "").greet(_CALL_LIMIT)


class Tokens:
    """The tokens that one session has on one host, and the clients that use them. Thread-safe.

    Calls for tokens are recorded in `log`, which also masks the values of the tokens.
    """

    def __init__(self, ssh: SshLike, log: CallLog) -> None:
        self.log = log
        self._ssh = ssh
        self._lock = threading.RLock()
        self._trust: Trust | None = None
        self._see: HttpsClient | None = None
        self._see_name = ""
        self._see_until = Deadline(0)
        self._retry_after = Deadline(0)
        self._keeps_see = False
        """While set, the reading token is not replaced."""
        self._pool_tokens: dict[str, _PoolToken] = {}
        self._created: set[str] = set()
        """The tokens that this session requested, without those whose deletion is certain."""

    # -- the two identities --------------------------------------------------------------------

    def see_client(self) -> HttpsClient:
        """The client that reads everything; its token is replaced before it expires. Raises NoHttps."""
        with self._lock:
            if self._see is None:
                self._new_see_by_ssh()
            elif self._see_ages() and not self._keeps_see:
                self._replace_see()
            assert self._see is not None
            return self._see

    def _see_ages(self) -> bool:
        return self._see_until.elapsed() > SEE_SECONDS * 0.8 and self._retry_after.expired

    def act_client(self, pool: str, needed: Iterable[Grant]) -> HttpsClient:
        """The client that changes guests of `pool`, with the grants `needed`. Raises NoHttps, PveError."""
        with self._lock:
            pool_token = self._pool_tokens.get(pool)
            if pool_token is None:
                pool_token = self._new_pool_token(pool)
            for grant in needed:
                if grant not in pool_token.granted:
                    self.grant(pool_token.name, grant)
                    pool_token.granted.add(grant)
            return pool_token.client

    def renew(self, used: HttpsClient) -> None:
        """Discard the token of `used`, which PVE refused; the next call creates another one. Raises PveError.

        Raises NotFound for a pool that was deleted: its deletion ended this run.
        """
        with self._lock:
            if self._see is used:
                self._see = None
            for pool, pool_token in list(self._pool_tokens.items()):
                if pool_token.client is used:
                    if not entries(self.send("GET", "/pools", poolid=pool), call="get /pools"):
                        raise NotFound(f"pool '{pool}' does not exist", call="get /pools")
                    del self._pool_tokens[pool]
                    self._remove(pool_token.name)  # with its ACLs: PVE warns of entries without a token

    def distrust(self) -> None:
        """Read the certificate again, for all clients: it was not the expected one. Raises NoHttps."""
        with self._lock:
            self._trust = None
            trust = self._read_trust()
            for client in (self._see, *(pool_token.client for pool_token in self._pool_tokens.values())):
                if client is not None:
                    client.replace_trust(trust)

    def close(self) -> None:
        """Delete the tokens of this session with their ACLs, best effort; the others expire."""
        with self._lock:
            self._keeps_see = True
            try:
                # The reading token sends these calls, so it is deleted last.
                names = sorted(self._created, key=lambda name: (name == self._see_name, name))
                if names:
                    self._remove_all(names)
            except PveError:
                pass
            finally:
                for client in (self._see, *(pool_token.client for pool_token in self._pool_tokens.values())):
                    if client is not None:
                        client.close()
                self._see = None
                self._pool_tokens.clear()
                self._created.clear()
                self._keeps_see = False

    def _remove_all(self, names: list[str]) -> None:
        if self._see is not None:
            try:
                return remove_with_grants(_Direct(self.send), names)
            except (NoHttps, SshError, CommandTimeout, Unauthorized):
                pass  # as root then: no token may be left over because HTTPS no longer works
        return remove_with_grants(_Direct(self._send_as_root), names)

    # -- creating tokens -----------------------------------------------------------------------

    def _new_see_by_ssh(self) -> None:
        trust = self._read_trust()
        # Without HTTPS a token would be of no use.
        greet(self._ssh, trust)
        name = SEE_PREFIX + secrets.token_hex(4)
        self._created.add(name)
        # One start of pveum; everything else goes over HTTPS with this token (facts 63).
        script = (
            f"pveum user token add {USER} {name} --privsep 0 --expire $(( $(date +%s) + {SEE_SECONDS} )) "
            "--output-format json"
        )
        argv = ["env", "LC_ALL=C.UTF-8", "sh", "-c", script]
        answer = self._ssh.run(argv, timeout=60, secret=True, logged=False)
        shown = f"pveum user token add {USER} {name}"
        record_nested(self.log, Call("ssh", shown, answer.rc, round(answer.ms, 1)))
        if not answer.ok:
            self._created.discard(name)
            raise NoHttps(f"no token can be created on the host: {' '.join(answer.stderr.split())[:200]}")
        try:
            value = mapping(json.loads(answer.stdout.strip().rpartition("\n")[2])).get("value")
        except (ValueError, PveError) as error:
            raise NoHttps("pveum created a token, but its answer cannot be read") from error
        self._set_see(trust, name, value)
        self._remove_expired(name)

    def _remove_expired(self, name: str) -> None:
        """Delete reading tokens that have expired: their sessions were killed."""
        try:
            listed = entries(self.send("GET", f"/access/users/{USER}/token"))
            until = {str(token.get("tokenid")): whole(token.get("expire")) or 0 for token in listed}
            now = until.get(name, 0) - SEE_SECONDS  # by the host's clock
            for other, expires in until.items():
                if _OURS.match(other) and other.startswith(SEE_PREFIX) and 0 < expires < now:
                    self._remove(other)
        except PveError:
            return  # expired tokens are harmless

    def _replace_see(self) -> None:
        """Create the next reading token with the current one.

        The reason of a failure (no quorum, a lock, no HTTPS) may be temporary: until it expires the current
        token remains in use. Raises as `_new_see_by_ssh` after that.
        """
        old, old_name = self._see, self._see_name
        name = SEE_PREFIX + secrets.token_hex(4)
        self._keeps_see = True  # calls below use the old one
        try:
            value = self._new_token(name, SEE_SECONDS, separate=False)
            self._set_see(self._read_trust(), name, value)
            self._remove(old_name)
        except Unauthorized:
            self._new_see_by_ssh()
        except PveError:
            self._retry_after = Deadline(RETRY_PAUSE)
            return
        finally:
            self._keeps_see = False
        if old is not None:
            old.close()

    def _set_see(self, trust: Trust, name: str, value: Any) -> None:
        self._see = self._client(trust, name, value)
        self._see_name = name
        self._see_until = Deadline(SEE_SECONDS)

    def _new_pool_token(self, pool: str) -> _PoolToken:
        match = _RUN_POOL.match(pool)
        if match is None:
            raise NoHttps(f"expected the pool of a run, found {pool!r}")
        name = f"{match[1]}-{secrets.token_hex(4)}"
        value = self._new_token(name, ACT_SECONDS, separate=True)
        pool_token = _PoolToken(name, self._client(self._read_trust(), name, value))
        self.grant(name, Grant(f"/pool/{pool}", "PVEVMAdmin,PVEPoolAdmin"))
        self._pool_tokens[pool] = pool_token
        return pool_token

    def _new_token(self, name: str, seconds: int, *, separate: bool) -> Any:
        now = self._ssh.run(["date", "+%s"], timeout=20).check().stdout.strip()
        if not now.isdigit():
            raise NoHttps(f"expected epoch seconds from `date` on the host, found {now[:40]!r}")
        path = f"/access/users/{USER}/token/{name}"
        self._created.add(name)
        answer = mapping(self.send("POST", path, privsep=separate, expire=int(now) + seconds))
        return answer.get("value")

    def grant(self, name: str, grant: Grant) -> None:
        """Give a token its roles on a path. Raises PveError."""
        self.send("PUT", "/access/acl", path=grant.path, roles=grant.roles, tokens=f"{USER}!{name}")

    def send(self, method: str, path: str, /, **params: Any) -> Any:
        """A call with the reading token, for tokens and ACLs only. Raises as `HttpsClient.call`."""
        client = self.see_client()

        def call() -> Any:
            try:
                return patiently(lambda: client.call(method, path, params, _CALL_LIMIT))
            except Unauthorized:
                if self._keeps_see:
                    raise
                self.renew(client)
                return self.see_client().call(method, path, params, _CALL_LIMIT)

        return self._recorded("https:see", method, path, params, call)

    def _send_as_root(self, method: str, path: str, /, **params: Any) -> Any:
        def call() -> Any:
            with call_limit(_PVESH_LIMIT):
                return getattr(PveshApi(self._ssh), method.lower())(path, **params)

        return self._recorded("pvesh", method, path, params, call)

    def _recorded(
        self, transport: str, method: str, path: str, params: dict[str, Any], send: Callable[[], Any]
    ) -> Any:
        details = (params["path"], params["roles"]) if "roles" in params else ()
        return ApiCall(self.log, transport, method.lower(), path, details).send(send)

    def _remove(self, name: str) -> None:
        try:
            remove_with_grants(_Direct(self.send), [name])
        except PveError:
            return  # `close` retries it; a token of another session is left for the next session
        self._created.discard(name)

    def _client(self, trust: Trust, name: str, value: Any) -> HttpsClient:
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F-]{36}", value):
            raise NoHttps("expected the value of a new token, found something else")
        self.log.hide(value)
        return HttpsClient(self._ssh.open_channel, trust, f"{USER}!{name}={value}")

    def _read_trust(self) -> Trust:
        if self._trust is None:
            self._trust = trust_of(self._ssh)
        return self._trust


class _PoolToken:
    """A pool's token and its grants beside the pool."""

    def __init__(self, name: str, client: HttpsClient) -> None:
        self.name = name
        self.client = client
        self.granted: set[Grant] = set()


class _Direct(Verbs):
    """A function that sends calls, as the Api that the functions below need."""

    def __init__(self, send: Callable[..., Any]) -> None:
        self._send = send

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        return self._send(verb.upper(), path, **params)


# -- leftovers of a run ----------------------------------------------------------------------------


def run_tokens(api: Api, run_id: str) -> list[str]:
    """The names of a run's tokens on the host. Raises PveError."""
    listed = entries(api.get(f"/access/users/{USER}/token"), call=f"get /access/users/{USER}/token")
    names = [str(token.get("tokenid")) for token in listed]
    return sorted(name for name in names if _OURS.match(name) and name.startswith(f"npve-{run_id}-"))


def remove_grants(api: Api, names: Iterable[str]) -> None:
    """Delete the ACLs of these tokens. Raises PveError.

    To be called before the deletion of the pool and of the tokens: PVE keeps their ACLs otherwise, and every
    command warns of them (facts 61).
    """
    ours = {f"{USER}!{name}" for name in names}
    roles_of: dict[tuple[str, str], list[str]] = {}
    for acl in entries(api.get("/access/acl"), call="get /access/acl"):
        if acl.get("ugid") in ours:
            roles_of.setdefault((str(acl["path"]), str(acl["ugid"])), []).append(str(acl["roleid"]))
    for (path, token), roles in roles_of.items():
        api.put("/access/acl", path=path, roles=",".join(sorted(roles)), tokens=token, delete=1)


def remove_tokens(api: Api, names: Iterable[str]) -> None:
    """Delete these tokens; one that does not exist is no error. Raises PveError."""
    for name in names:
        try:
            api.delete(f"/access/users/{USER}/token/{name}")
        except NotFound:
            continue


def remove_with_grants(api: Api, names: Iterable[str]) -> None:
    """Delete those of these tokens that exist, their ACLs first. Raises PveError."""
    listed = {str(token.get("tokenid")) for token in entries(api.get(f"/access/users/{USER}/token"))}
    existing = [name for name in names if name in listed]
    of_pools = [name for name in existing if not name.startswith(SEE_PREFIX)]
    if of_pools:
        remove_grants(api, of_pools)
    remove_tokens(api, existing)
