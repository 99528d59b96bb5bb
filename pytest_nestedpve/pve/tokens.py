"""API tokens of a session: one that sees, with minutes to live, and one for each pool that is acted in.

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
SEES = "npve-see-"
SEE_SECONDS = 600
ACT_SECONDS = 24 * 3600
# Until a token that could not be replaced is tried to be replaced again, seconds.
LATER = 30.0
_CALL = 30.0
_BY_PVESH = 60.0
_RUN_POOL = re.compile(r"(?:.*/)?(npve-[0-9a-f]{12})\Z")
_OURS = re.compile(r"npve-(?:see|[0-9a-f]{12})-[0-9a-f]{8}\Z")

# As root: what the proxy serves, then the authority of PVE's own certificates.
_READ_TRUST = (
    "cd /etc/pve && if [ -e local/pveproxy-ssl.pem ]; then cat local/pveproxy-ssl.pem; "
    "else cat local/pve-ssl.pem /etc/pve/pve-root-ca.pem; fi"
)


def trust_of(ssh: SshLike) -> Trust:
    """What the certificate of that host's API is checked against, read by root. Raises NoHttps."""
    answer = ssh.run(_READ_TRUST, timeout=30)
    if not answer.ok:
        raise NoHttps(f"its certificate cannot be read: {' '.join(answer.stderr.split())[:200]}")
    return read_trust(answer.stdout)


def greet(ssh: SshLike, trust: Trust) -> None:
    """Connect to that host's API and end the connection: neither a token nor a request. Raises NoHttps."""
    HttpsClient(ssh.open_channel, trust, "").greet(_CALL)


class Tokens:
    """The tokens that one session holds on one host, and the clients that use them. Thread-safe.

    `tell(transport, cmd, rc, ms)` hears of each call that is made here; `hide(secret)` of each token's value.
    """

    def __init__(self, ssh: SshLike, log: CallLog) -> None:
        self.log = log
        self._ssh = ssh
        self._lock = threading.RLock()
        self._trust: Trust | None = None
        self._see: HttpsClient | None = None
        self._see_name = ""
        self._see_until = Deadline(0)
        self._again = Deadline(0)
        self._fixed = False
        """While set, the token that sees is not replaced."""
        self._act: dict[str, _Acting] = {}
        self._made: set[str] = set()
        """The tokens that this session made, or asked for, and that were not seen to be removed."""

    # -- the two identities --------------------------------------------------------------------

    def seeing(self) -> HttpsClient:
        """The client that sees everything; its token is replaced before it expires. Raises NoHttps."""
        with self._lock:
            if self._see is None:
                self._see_by_ssh()
            elif self._see_until.elapsed() > SEE_SECONDS * 0.8 and self._again.expired and not self._fixed:
                self._see_again()
            assert self._see is not None
            return self._see

    def acting(self, pool: str, needed: Iterable[Grant]) -> HttpsClient:
        """The client of `pool`, its token granted what is `needed`. Raises NoHttps, PveError."""
        with self._lock:
            acting = self._act.get(pool)
            if acting is None:
                acting = self._new_acting(pool)
            for grant in needed:
                if grant not in acting.granted:
                    self.grant(acting.name, grant)
                    acting.granted.add(grant)
            return acting.client

    def renew(self, used: HttpsClient) -> None:
        """`used` was refused: forget its token, so that the next call makes another. Raises PveError.

        Not for a pool that is gone: whoever removed it has ended this run.
        """
        with self._lock:
            if self._see is used:
                self._see = None
            for pool, acting in list(self._act.items()):
                if acting.client is used:
                    if not entries(self.send("GET", "/pools", poolid=pool), call="get /pools"):
                        raise NotFound(f"pool '{pool}' does not exist", call="get /pools")
                    del self._act[pool]
                    self._remove(acting.name)  # with its ACLs: lines without a token are complained of

    def distrust(self) -> None:
        """The certificate was not the expected one: it is read anew, for all clients. Raises NoHttps."""
        with self._lock:
            self._trust = None
            trust = self._read_trust()
            for client in (self._see, *(acting.client for acting in self._act.values())):
                if client is not None:
                    client.trust_anew(trust)

    def close(self) -> None:
        """Remove the tokens of this session with their ACLs, best effort; whatever is left expires."""
        with self._lock:
            self._fixed = True
            try:
                # What is sent last goes by the one that is removed last.
                names = sorted(self._made, key=lambda name: (name == self._see_name, name))
                if names:
                    self._remove_all(names)
            except PveError:
                pass
            finally:
                for client in (self._see, *(acting.client for acting in self._act.values())):
                    if client is not None:
                        client.close()
                self._see = None
                self._act.clear()
                self._made.clear()
                self._fixed = False

    def _remove_all(self, names: list[str]) -> None:
        if self._see is not None:
            try:
                return remove_with_grants(_Direct(self.send), names)
            except (NoHttps, SshError, CommandTimeout, Unauthorized):
                pass  # as root then: nothing may stay because HTTPS does not work any more
        return remove_with_grants(_Direct(self._send_as_root), names)

    # -- making them ---------------------------------------------------------------------------

    def _see_by_ssh(self) -> None:
        trust = self._read_trust()
        # A token is made only where one can be used.
        greet(self._ssh, trust)
        name = SEES + secrets.token_hex(4)
        self._made.add(name)
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
            self._made.discard(name)
            raise NoHttps(f"no token can be made there: {' '.join(answer.stderr.split())[:200]}")
        try:
            value = mapping(json.loads(answer.stdout.strip().rpartition("\n")[2])).get("value")
        except (ValueError, PveError) as error:
            raise NoHttps("pveum made a token, but its answer cannot be read") from error
        self._set_see(trust, name, value)
        self._sweep(name)

    def _sweep(self, name: str) -> None:
        """Remove tokens of this kind that have expired: their sessions were killed."""
        try:
            listed = entries(self.send("GET", f"/access/users/{USER}/token"))
            until = {str(each.get("tokenid")): whole(each.get("expire")) or 0 for each in listed}
            now = until.get(name, 0) - SEE_SECONDS  # by the host's clock
            for each, expires in until.items():
                if _OURS.match(each) and each.startswith(SEES) and 0 < expires < now:
                    self._remove(each)
        except PveError:
            return  # they cannot be used any more

    def _see_again(self) -> None:
        """Have the token that sees make the next one. What stands in the way (no quorum, a lock, no HTTPS)
        may pass: until then this one serves for the rest of its life. Raises as `_see_by_ssh` after that.
        """
        old, old_name = self._see, self._see_name
        name = SEES + secrets.token_hex(4)
        self._fixed = True  # what is asked meanwhile goes by the old one
        try:
            value = self._new_token(name, SEE_SECONDS, separate=False)
            self._set_see(self._read_trust(), name, value)
            self._remove(old_name)
        except Unauthorized:
            self._see_by_ssh()
        except PveError:
            self._again = Deadline(LATER)
            return
        finally:
            self._fixed = False
        if old is not None:
            old.close()

    def _set_see(self, trust: Trust, name: str, value: Any) -> None:
        self._see = self._client(trust, name, value)
        self._see_name = name
        self._see_until = Deadline(SEE_SECONDS)

    def _new_acting(self, pool: str) -> _Acting:
        match = _RUN_POOL.match(pool)
        if match is None:
            raise NoHttps(f"{pool!r} is no pool of a run")
        name = f"{match[1]}-{secrets.token_hex(4)}"
        value = self._new_token(name, ACT_SECONDS, separate=True)
        acting = _Acting(name, self._client(self._read_trust(), name, value))
        self.grant(name, Grant(f"/pool/{pool}", "PVEVMAdmin,PVEPoolAdmin"))
        self._act[pool] = acting
        return acting

    def _new_token(self, name: str, seconds: int, *, separate: bool) -> Any:
        now = self._ssh.run(["date", "+%s"], timeout=20).check().stdout.strip()
        if not now.isdigit():
            raise NoHttps(f"expected epoch seconds from `date` there, found {now[:40]!r}")
        path = f"/access/users/{USER}/token/{name}"
        self._made.add(name)
        answer = mapping(self.send("POST", path, privsep=separate, expire=int(now) + seconds))
        return answer.get("value")

    def grant(self, name: str, grant: Grant) -> None:
        """Give a token its roles on a path. Raises PveError."""
        self.send("PUT", "/access/acl", path=grant.path, roles=grant.roles, tokens=f"{USER}!{name}")

    def send(self, method: str, path: str, /, **params: Any) -> Any:
        """A call by the token that sees: tokens and ACLs only. Raises what `HttpsClient.call` does."""
        client = self.seeing()

        def call() -> Any:
            try:
                return patiently(lambda: client.call(method, path, params, _CALL))
            except Unauthorized:
                if self._fixed:
                    raise
                self.renew(client)
                return self.seeing().call(method, path, params, _CALL)

        return self._recorded("https:see", method, path, params, call)

    def _send_as_root(self, method: str, path: str, /, **params: Any) -> Any:
        def call() -> Any:
            with call_limit(_BY_PVESH):
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
            return  # at the end, then; if it was another session's, it is the next one's
        self._made.discard(name)

    def _client(self, trust: Trust, name: str, value: Any) -> HttpsClient:
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-fA-F-]{36}", value):
            raise NoHttps("expected the value of a new token, found something else")
        self.log.hide(value)
        return HttpsClient(self._ssh.open_channel, trust, f"{USER}!{name}={value}")

    def _read_trust(self) -> Trust:
        if self._trust is None:
            self._trust = trust_of(self._ssh)
        return self._trust


class _Acting:
    """A pool's token and what it was granted beside its pool."""

    def __init__(self, name: str, client: HttpsClient) -> None:
        self.name = name
        self.client = client
        self.granted: set[Grant] = set()


class _Direct(Verbs):
    """What sends calls of its own, as the Api that the functions below want."""

    def __init__(self, send: Callable[..., Any]) -> None:
        self._send = send

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        return self._send(verb.upper(), path, **params)


# -- what a run leaves behind ----------------------------------------------------------------------


def run_tokens(api: Api, run_id: str) -> list[str]:
    """The names of a run's tokens on the host. Raises PveError."""
    listed = entries(api.get(f"/access/users/{USER}/token"), call=f"get /access/users/{USER}/token")
    names = [str(each.get("tokenid")) for each in listed]
    return sorted(name for name in names if _OURS.match(name) and name.startswith(f"npve-{run_id}-"))


def remove_grants(api: Api, names: Iterable[str]) -> None:
    """Take the ACLs of these tokens away: before the pool, and before the tokens themselves, or lines would
    stay behind that every command complains of (facts 61). Raises PveError.
    """
    mine = {f"{USER}!{name}" for name in names}
    by_place: dict[tuple[str, str], list[str]] = {}
    for each in entries(api.get("/access/acl"), call="get /access/acl"):
        if each.get("ugid") in mine:
            by_place.setdefault((str(each["path"]), str(each["ugid"])), []).append(str(each["roleid"]))
    for (path, who), roles in by_place.items():
        api.put("/access/acl", path=path, roles=",".join(sorted(roles)), tokens=who, delete=1)


def remove_tokens(api: Api, names: Iterable[str]) -> None:
    """Remove these tokens; those that are gone are no error. Raises PveError."""
    for name in names:
        try:
            api.delete(f"/access/users/{USER}/token/{name}")
        except NotFound:
            continue


def remove_with_grants(api: Api, names: Iterable[str]) -> None:
    """Remove those of these tokens that there are, their ACLs first. Raises PveError."""
    listed = {str(each.get("tokenid")) for each in entries(api.get(f"/access/users/{USER}/token"))}
    there = [name for name in names if name in listed]
    acting = [name for name in there if not name.startswith(SEES)]
    if acting:
        remove_grants(api, acting)
    remove_tokens(api, there)
