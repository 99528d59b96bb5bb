"""Access control: users, tokens with privilege separation and expiry, roles, ACLs, pools."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..state import clock
from ..state.store import Store, store
from .errors import NotAllowed, PveFailure


@dataclass(frozen=True)
class Caller:
    """The caller of a method: a user, or a user's token. `sync`: a command on the node, which waits for its
    tasks and prints; else a request over HTTPS."""

    user: str = "root@pam"
    token: str | None = None
    sync: bool = True

    @property
    def id(self) -> str:
        return f"{self.user}!{self.token}" if self.token else self.user

    @property
    def is_root(self) -> bool:
        """A token of root, even without privilege separation, is not root (facts 44)."""
        return self.id == "root@pam"


ROOT = Caller()


@functools.cache
def builtin_roles() -> dict[str, str]:
    loaded = json.loads((Path(__file__).parent / "roles.json").read_text())
    return dict(loaded["roles"])


def privileges() -> list[str]:
    return sorted(set(filter(None, ",".join(builtin_roles().values()).split(","))))


def role_privileges(role: str) -> set[str] | None:
    """The privileges of a role, None if there is no such role."""
    if role in builtin_roles():
        return set(filter(None, builtin_roles()[role].split(",")))
    custom = store().get("role", role)
    return set(custom["privs"]) if custom is not None else None


def secret_hash(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()


def authenticate(header: str) -> Caller | None:
    """The caller of an `Authorization: PVEAPIToken=USER!NAME=VALUE` header; None if it is not valid."""
    match = re.fullmatch(r"PVEAPIToken=([^!\s]+)!([^=\s]+)=(\S+)", header.strip())
    if match is None:
        return None
    user, name, value = match.groups()
    stored = store().get("token", f"{user}!{name}")
    owner = store().get("user", user)
    if stored is None or stored["hash"] != secret_hash(value):
        return None
    for entry in (stored, owner or {}):
        if 0 < int(entry.get("expire", 0)) <= clock.now():
            return None
    return Caller(user, name, sync=False)


def _roles(db: Store, who: str, path: str) -> set[str]:
    """The roles of a user or token on `path`: those of the deepest ACL apply."""
    groups = set() if "!" in who else set((db.get("user", who) or {}).get("groups", []))
    kind = "token" if "!" in who else "user"
    roles: set[str] = set()
    parts = [part for part in path.split("/") if part]
    steps = ["/"] + ["/" + "/".join(parts[: n + 1]) for n in range(len(parts))]
    for step in steps:
        rows = db.rows("SELECT kind, who, role, propagate FROM acl WHERE path=?", step)
        last = step == steps[-1]
        direct = {r for k, w, r, p in rows if k == kind and w == who and (p or last)}
        by_group = {r for k, w, r, p in rows if k == "group" and w in groups and (p or last)}
        if direct or by_group:
            roles = direct or by_group
    return {"NoAccess"} if "NoAccess" in roles else roles


def _granted(db: Store, who: str, path: str) -> set[str]:
    if who == "root@pam":
        return set(privileges())
    roles = _roles(db, who, path)
    if match := re.fullmatch(r"/vms/(\d+)", path):
        pool = db.pool_of(int(match[1]))
        if pool is not None:
            roles |= _roles(db, who, f"/pool/{pool}")
    if match := re.fullmatch(r"/storage/([^/]+)", path):
        for pool, body in db.all("pool").items():
            if match[1] in body.get("storages", []):
                roles |= _roles(db, who, f"/pool/{pool}")
    if "NoAccess" in roles:
        return set()
    granted: set[str] = set()
    for role in roles:
        granted |= role_privileges(role) or set()
    return granted


def permissions(caller: Caller, path: str) -> set[str]:
    """The caller's privileges on an ACL path."""
    db = store()
    if caller.token is None:
        return _granted(db, caller.user, path)
    token = db.get("token", caller.id) or {}
    user = _granted(db, caller.user, path)
    if not int(token.get("privsep", 1)):
        return user
    return user & _granted(db, caller.id, path)


def has(caller: Caller, path: str, privs: Sequence[str], *, any_of: bool = False) -> bool:
    granted = permissions(caller, path)
    return bool(granted & set(privs)) if any_of else granted >= set(privs)


def check(caller: Caller, path: str, privs: Sequence[str], *, any_of: bool = False) -> None:
    """Raise NotAllowed, with PVE's message, unless the caller has these privileges on the path."""
    if caller.is_root:
        return
    granted = permissions(caller, path)
    if any_of:
        if not granted & set(privs):
            raise NotAllowed(f"{path}, {'|'.join(privs)}")
        return
    for priv in privs:
        if priv not in granted:
            raise NotAllowed(f"{path}, {priv}")


def check_guest(
    caller: Caller, vmid: int, pool: str | None, privs: Sequence[str], *, any_of: bool = False
) -> None:
    """`check` for a guest, or for the pool in which it is about to be created."""
    if pool and (caller.is_root or has(caller, f"/pool/{pool}", privs, any_of=any_of)):
        return
    check(caller, f"/vms/{vmid}", privs, any_of=any_of)


def check_schema(rule: Mapping[str, Any] | None, caller: Caller, params: Mapping[str, Any]) -> None:
    """Check the permission rule of a method in the API's table. NotAllowed if it is not met."""
    if caller.is_root:
        return
    if rule is None:
        raise NotAllowed("user != root@pam")
    if "user" in rule and "check" not in rule:
        return
    if rule.get("user") == "all":
        return
    _check_rule(rule["check"], caller, params)


def _check_rule(rule: Sequence[Any], caller: Caller, params: Mapping[str, Any]) -> None:
    kind = rule[0]
    if kind == "and":
        for part in rule[1:]:
            _check_rule(part, caller, params)
    elif kind == "or":
        for part in rule[1:]:
            try:
                return _check_rule(part, caller, params)
            except NotAllowed:
                continue
        raise NotAllowed()
    elif kind == "perm":
        options = dict(zip(rule[3::2], rule[4::2], strict=False))
        needed = options.get("require_param")
        if needed and needed not in params:
            raise NotAllowed()
        check(caller, _fill(rule[1], params), rule[2], any_of=bool(options.get("any")))
    elif kind == "perm-modify":
        path = _fill(rule[1], params)
        required = ["Permissions.Modify"]
        if path.startswith("/vms/"):
            required.append("VM.Allocate")
        elif path.startswith("/pool/"):
            required.append("Pool.Allocate")
        elif path.startswith("/storage/"):
            required.append("Datastore.Allocate")
        check(caller, path, required, any_of=True)
    elif kind == "userid-param":
        if rule[1] == "self" and params.get("userid") == caller.user:
            # A token with privilege separation may not read its user [ownA-123].
            if caller.token and int((store().get("token", caller.id) or {}).get("privsep", 1)):
                raise NotAllowed()
            return None
        if rule[1] == "self":
            raise NotAllowed()
        realm = str(params.get("userid", "")).rpartition("@")[2]
        check(caller, f"/access/realm/{realm}", [rule[1]])
    elif kind == "userid-group":
        if not has(caller, "/access/groups", rule[1], any_of=True):
            raise NotAllowed()
    else:
        raise PveFailure(f"permission rule '{kind}': not supported by the lab")
    return None


def _fill(template: str, params: Mapping[str, Any]) -> str:
    return re.sub(r"{(\w+)}", lambda m: str(params.get(m[1], m[0])), template)


def known_paths() -> Iterable[str]:
    """The ACL paths in the answer of `GET /access/permissions`."""
    fixed = {
        "/",
        "/access",
        "/access/groups",
        "/access/realm",
        "/mapping",
        "/nodes",
        "/pool",
        "/sdn",
        "/storage",
        "/vms",
    }
    return sorted(fixed | {row[0] for row in store().rows("SELECT DISTINCT path FROM acl")})


_NAME = r"/[A-Za-z0-9._\-]+"
_PATHS = re.compile(
    rf"/|/vms(/[1-9]\d{{2,}})?|/pool(/{_NAME[1:]}){{0,3}}|/(nodes|storage)({_NAME})?|/mapping({_NAME}){{0,2}}"
    rf"|/access|/access/(groups|realm)({_NAME})?|/sdn|/sdn{_NAME}({_NAME}){{0,3}}"
)


def valid_path(path: str) -> bool:
    """Whether an ACL can be set on the path: PVE refuses paths outside its trees."""
    return bool(_PATHS.fullmatch(path))
