# ruff: noqa: ARG001 (every handler has the same signature)
"""/access: users, tokens, roles, ACLs, permissions."""

from __future__ import annotations

import re
import uuid
from typing import Any

from ..api import access
from ..api.access import Caller
from ..api.errors import BadParameters, NotAllowed, PveFailure
from ..api.tree import api
from ..state import clock, cluster_fs, guests
from ..state.store import store

ROOT_USER = {"enable": 1}


def users() -> dict[str, dict[str, Any]]:
    accounts = store().all("user")
    accounts.setdefault("root@pam", dict(ROOT_USER))
    return dict(sorted(accounts.items()))


def _user(userid: str) -> dict[str, Any]:
    account = users().get(userid)
    if account is None:
        raise PveFailure(f"no such user ('{userid}')")
    return account


def stale_tokens() -> list[str]:
    """Deleted tokens that ACLs still name: every command warns of them (facts 61)."""
    rows = store().rows("SELECT DISTINCT who FROM acl WHERE kind='token' ORDER BY who")
    return [row[0] for row in rows if store().get("token", row[0]) is None]


def prune() -> None:
    """Delete the ACLs of deleted tokens, as every write of user.cfg does."""
    for who in stale_tokens():
        store().run("DELETE FROM acl WHERE kind='token' AND who=?", who)


def render() -> None:
    """Write user.cfg, which is for readers only."""
    e, db = guests.encode, store()
    if db.get("user", "root@pam") is None:
        db.put("user", "root@pam", {**ROOT_USER, "expire": 0})  # as in the first user.cfg that PVE writes
    lines = [
        f"user:{name}:{body.get('enable', 1)}:{body.get('expire', 0)}:{e(body.get('firstname', ''))}:"
        f"{e(body.get('lastname', ''))}:{e(body.get('email', ''))}:{e(body.get('comment', ''))}::"
        for name, body in users().items()
    ]
    lines += [
        f"token:{name}:{body['expire']}:{body['privsep']}:{e(body.get('comment', ''))}:"
        for name, body in db.all("token").items()
    ]
    lines.append("")
    for name, body in db.all("group").items():
        members = [user for user, about in users().items() if name in about.get("groups", [])]
        lines.append(f"group:{name}:{','.join(members)}:{e(body.get('comment', ''))}:")
    lines.append("")
    for pool, body in db.all("pool").items():
        members_text = ",".join(map(str, db.members(pool)))
        lines.append(f"pool:{pool}:{e(body.get('comment', ''))}:{members_text}:{','.join(body['storages'])}:")
    lines.append("")
    lines += [f"role:{name}:{','.join(sorted(body['privs']))}:" for name, body in db.all("role").items()]
    lines.append("")
    grouped: dict[tuple[int, str, str], list[str]] = {}
    for path, kind, who, role, propagate in db.rows(
        "SELECT path, kind, who, role, propagate FROM acl ORDER BY 1,3,4"
    ):
        name = f"@{who}" if kind == "group" else who
        grouped.setdefault((propagate, path, name), []).append(role)
    lines += [f"acl:{p}:{path}:{who}:{','.join(roles)}:" for (p, path, who), roles in grouped.items()]
    cluster_fs.show("user.cfg", "\n".join(lines) + "\n")


# -- users


@api("GET", "/access/users")
def user_list(caller: Caller, params: dict[str, Any]) -> Any:
    rows = []
    for name, body in users().items():
        if (
            not caller.is_root
            and name != caller.user
            and not access.has(caller, "/access/groups", ["User.Modify", "Sys.Audit"], any_of=True)
        ):
            continue
        row = {"userid": name, "realm-type": name.rpartition("@")[2], "enable": int(body.get("enable", 1))}
        if name in store().all("user"):
            row["expire"] = int(body.get("expire", 0))
        row |= {k: body[k] for k in ("comment", "email", "firstname", "lastname") if k in body}
        if params.get("full") == "1":
            row["groups"] = ",".join(body.get("groups", []))
            tokens = [t for t in store().all("token") if t.startswith(name + "!")]
            row["tokens"] = [_token_row(t) for t in tokens]
        if "enabled" in params and str(row["enable"]) != params["enabled"]:
            continue
        rows.append(row)
    return rows


@api("GET", "/access/users/{userid}")
def user_read(caller: Caller, params: dict[str, Any]) -> Any:
    body = _user(params["userid"])
    return {"enable": 1, "expire": 0, "groups": [], **body, "tokens": None}


def _groups(action: str, text: str) -> list[str]:
    for group in _items(text):
        if store().get("group", group) is None:
            raise PveFailure(f"{action} user failed: no such group '{group}'")
    return _items(text)


@api("POST", "/access/users")
def user_add(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["userid"]
    with store().change() as db:
        if name in users():
            raise PveFailure(f"create user failed: user '{name}' already exists", rc=2)
        if name.rpartition("@")[2] not in ("pam", "pve"):
            raise PveFailure(f"create user failed: domain '{name.rpartition('@')[2]}' does not exist")
        body = {k: v for k, v in params.items() if k not in ("userid", "password", "groups")}
        body["groups"] = _groups("create", params.get("groups", ""))
        db.put("user", name, {"enable": 1, "expire": 0, "email": "", **body})
        prune()
    render()


@api("PUT", "/access/users/{userid}")
def user_update(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["userid"]
    body = _user(name)
    body |= {
        k: v
        for k, v in params.items()
        if k in ("comment", "email", "enable", "expire", "firstname", "lastname")
    }
    if "groups" in params:
        body["groups"] = _groups("update", params["groups"])
    store().put("user", name, body)
    render()


@api("DELETE", "/access/users/{userid}")
def user_delete(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["userid"]
    with store().change() as db:
        db.drop("user", name)
        db.run("DELETE FROM acl WHERE who=? OR who LIKE ?", name, name + "!%")
        db.run("DELETE FROM document WHERE kind='token' AND id LIKE ?", name + "!%")
    render()


@api("GET", "/access/domains")
def realms(caller: Caller, params: dict[str, Any]) -> Any:
    return [
        {"comment": "Linux PAM standard authentication", "realm": "pam", "type": "pam"},
        {"comment": "Proxmox VE authentication server", "realm": "pve", "type": "pve"},
    ]


@api("POST", "/access/ticket")
def ticket(caller: Caller, params: dict[str, Any]) -> Any:
    """Refuse every password: the lab has API tokens only."""
    raise PveFailure("401 authentication failure" if caller.sync else "authentication failure", status=401)


@api("GET", "/access/groups")
def group_list(caller: Caller, params: dict[str, Any]) -> Any:
    rows = []
    for name, body in store().all("group").items():
        members = [user for user, about in users().items() if name in about.get("groups", [])]
        rows.append(
            {"groupid": name, "users": ",".join(members), **({"comment": body["comment"]} if body else {})}
        )
    return rows


# -- tokens


def _token_row(full: str) -> dict[str, Any]:
    body = store().get("token", full) or {}
    row = {"tokenid": full.partition("!")[2], "expire": int(body["expire"]), "privsep": int(body["privsep"])}
    return row | ({"comment": body["comment"]} if body.get("comment") else {})


def _token(params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    _user(params["userid"])
    full = f"{params['userid']}!{params['tokenid']}"
    body = store().get("token", full)
    if body is None:
        raise PveFailure(f"no such token '{params['tokenid']}' for user '{params['userid']}'")
    return full, body


@api("GET", "/access/users/{userid}/token")
def token_list(caller: Caller, params: dict[str, Any]) -> Any:
    _user(params["userid"])
    return [_token_row(full) for full in store().all("token") if full.startswith(params["userid"] + "!")]


@api("GET", "/access/users/{userid}/token/{tokenid}")
def token_read(caller: Caller, params: dict[str, Any]) -> Any:
    full, _ = _token(params)
    row = _token_row(full)
    row.pop("tokenid")
    return row


@api("POST", "/access/users/{userid}/token/{tokenid}")
def token_add(caller: Caller, params: dict[str, Any]) -> Any:
    """Create a token; its value is in this answer only, the node stores the hash."""
    _user(params["userid"])
    full, value = f"{params['userid']}!{params['tokenid']}", str(uuid.uuid4())
    with store().change() as db:
        if db.get("token", full) is not None:
            raise BadParameters({"tokenid": "Token already exists."}, rc=255)
        prune()
        info: dict[str, Any] = {k: params[k] for k in ("comment", "expire") if params.get(k)}
        if "expire" in params:
            info["expire"] = params["expire"]
        info["privsep"] = params.get("privsep", 1)
        body = {
            "comment": params.get("comment", ""),
            "expire": int(params.get("expire", 0)),
            "privsep": int(params.get("privsep", 1)),
            "hash": access.secret_hash(value),
            "made": clock.now(),
        }
        db.put("token", full, body)
    render()
    return {"full-tokenid": full, "info": info, "value": value}


@api("PUT", "/access/users/{userid}/token/{tokenid}")
def token_update(caller: Caller, params: dict[str, Any]) -> Any:
    with store().change() as db:
        full, body = _token(params)
        for key in ("expire", "privsep"):
            if key in params:
                body[key] = int(params[key])
        if "comment" in params:
            body["comment"] = params["comment"]
        answer = {}
        if params.get("regenerate") == "1":
            answer["value"] = str(uuid.uuid4())
            body["hash"] = access.secret_hash(answer["value"])
        db.put("token", full, body)
    render()
    row = _token_row(full)
    row.pop("tokenid")
    return row | answer


@api("DELETE", "/access/users/{userid}/token/{tokenid}")
def token_delete(caller: Caller, params: dict[str, Any]) -> Any:
    """Delete a token; its ACLs remain until the next write of user.cfg (facts 61)."""
    with store().change() as db:
        full, _ = _token(params)
        prune()
        db.drop("token", full)
    render()


# -- roles and ACLs


@api("GET", "/access/roles")
def role_list(caller: Caller, params: dict[str, Any]) -> Any:
    rows = [{"privs": p, "roleid": name, "special": 1} for name, p in access.builtin_roles().items()]
    return rows + [
        {"privs": ",".join(sorted(body["privs"])), "roleid": name, "special": 0}
        for name, body in store().all("role").items()
    ]


@api("GET", "/access/roles/{roleid}")
def role_read(caller: Caller, params: dict[str, Any]) -> Any:
    privs = access.role_privileges(params["roleid"])
    if privs is None:
        raise PveFailure(f"role '{params['roleid']}' does not exist")
    return dict.fromkeys(sorted(privs), 1)


def _privs(text: str) -> list[str]:
    privs = [priv for priv in re.split(r"[,;\s]+", text) if priv]
    for priv in privs:
        if priv not in access.privileges():
            raise PveFailure(f"create role failed: invalid privilege '{priv}'")
    return privs


@api("POST", "/access/roles")
def role_add(caller: Caller, params: dict[str, Any]) -> Any:
    name = params["roleid"]
    if access.role_privileges(name) is not None:
        raise PveFailure(f"create role failed: role '{name}' already exists")
    if name.startswith("PVE"):
        raise BadParameters(
            {"roleid": "cannot use role ID starting with the (case-insensitive) 'PVE' namespace"}
        )
    store().put("role", name, {"privs": _privs(params.get("privs", ""))})
    render()


@api("PUT", "/access/roles/{roleid}")
def role_update(caller: Caller, params: dict[str, Any]) -> Any:
    body = store().get("role", params["roleid"])
    if body is None:
        raise PveFailure(f"update role failed: role '{params['roleid']}' does not exist")
    old = body["privs"] if params.get("append") == "1" else []
    store().put("role", params["roleid"], {"privs": sorted({*old, *_privs(params.get("privs", ""))})})
    render()


@api("DELETE", "/access/roles/{roleid}")
def role_delete(caller: Caller, params: dict[str, Any]) -> Any:
    with store().change() as db:
        if not db.drop("role", params["roleid"]):
            raise PveFailure(f"delete role failed: role '{params['roleid']}' does not exist")
        db.run("DELETE FROM acl WHERE role=?", params["roleid"])
    render()


@api("GET", "/access/acl")
def acl_list(caller: Caller, params: dict[str, Any]) -> Any:
    rows = []
    for path, kind, who, role, propagate in store().rows(
        "SELECT path, kind, who, role, propagate FROM acl ORDER BY 1,3,4"
    ):
        if not caller.is_root and not access.has(caller, path, ["Permissions.Modify"]):
            continue
        if kind == "token" and store().get("token", who) is None:
            continue
        rows.append({"path": path, "propagate": propagate, "roleid": role, "type": kind, "ugid": who})
    return rows


@api("PUT", "/access/acl")
def acl_update(caller: Caller, params: dict[str, Any]) -> Any:
    path, delete = params["path"], params.get("delete") == "1"
    if not delete and not access.valid_path(path):
        raise BadParameters({"path": f"invalid ACL path '{path}'"}, rc=255)
    lists = {kind: _items(params.get(kind + "s", "")) for kind in ("user", "group", "token")}
    if not any(lists.values()):
        raise BadParameters(dict.fromkeys(("users",), "either 'users', 'groups' or 'tokens' is required"))
    with store().change() as db:
        for role in _items(params["roles"]):
            if access.role_privileges(role) is None:
                raise PveFailure(f"update ACL failed: role '{role}' does not exist")
            if not caller.is_root and not access.permissions(caller, path) >= (
                access.role_privileges(role) or set()
            ):
                raise NotAllowed(f"{path}, {role}")
            for kind, names in lists.items():
                for who in names:
                    _check_exists(kind, who)
                    if delete:
                        db.run(
                            "DELETE FROM acl WHERE path=? AND kind=? AND who=? AND role=?",
                            path,
                            kind,
                            who,
                            role,
                        )
                    else:
                        propagate = int(params.get("propagate", 1))
                        db.run(
                            "INSERT OR REPLACE INTO acl VALUES (?, ?, ?, ?, ?)",
                            path,
                            kind,
                            who,
                            role,
                            propagate,
                        )
        prune()
    render()


def _check_exists(kind: str, who: str) -> None:
    if kind == "user" and who not in users():
        raise PveFailure(f"update ACL failed: user '{who}' does not exist")
    if kind == "group" and store().get("group", who) is None:
        raise PveFailure(f"update ACL failed: group '{who}' does not exist")
    if kind == "token" and store().get("token", who) is None:
        user, _, name = who.partition("!")
        raise PveFailure(f"update ACL failed: no such token '{name}' for user '{user}'")


def _items(text: str) -> list[str]:
    return [item for item in re.split(r"[,;\s]+", text) if item]


@api("GET", "/access/permissions")
def permission_list(caller: Caller, params: dict[str, Any]) -> Any:
    who = caller
    if "userid" in params and params["userid"] != caller.id:
        if not caller.is_root:
            access.check(caller, "/access", ["Sys.Audit"])
        user, _, token = params["userid"].partition("!")
        _user(user)
        who = Caller(user, token or None)
    if "path" in params:
        privs = access.permissions(who, params["path"])
        return {params["path"]: dict.fromkeys(sorted(privs), 1)} if privs else {}
    permissions = {path: access.permissions(who, path) for path in access.known_paths()}
    return {path: dict.fromkeys(sorted(privs), 1) for path, privs in permissions.items() if privs}
