"""pveum: users, tokens, roles, ACLs and pools as a command."""

from __future__ import annotations

import sys
from typing import Any

from . import frame, tables
from .frame import Command

USER, TOKEN = "/access/users/{userid}", "/access/users/{userid}/token/{tokenid}"


def main() -> int:
    return frame.main_of(lambda argv: frame.dispatch("pveum", COMMANDS, argv, rc=255, aliases=ALIASES))


def _permissions(permissions: dict[str, dict[str, int]], values: dict[str, Any]) -> None:
    output = values.get("output-format", "text")
    style = tables.Style(output, unicode=tables.unicode_locale())
    if output != "text":
        sys.stdout.write(tables.render(permissions, style))
        return
    rows = [
        [path, "\n".join(f"{priv} (*)" for priv in sorted(privs))]
        for path, privs in sorted(permissions.items())
    ]
    sys.stdout.write(tables.draw(["ACL path", "Permissions"], rows, style))
    if rows:
        print("Permissions marked with '(*)' have the 'propagate' flag set.")


_OUTPUT = {"output-format": frame.FORMAT_OPTIONS["output-format"]}
_ACL = Command("PUT", "/access/acl", ("path",), fixed={"delete": "0"})


def _token_permissions(values: dict[str, Any]) -> int:
    from ..api import access, tree

    call = {"userid": f"{values['userid']}!{values['tokenid']}"}
    if "path" in values:
        call["path"] = values["path"]
    _permissions(tree.call("GET", "/access/permissions", call, access.ROOT), values)
    return 0


_USER = {"userid": {"type": "string"}, "tokenid": {"type": "string", "pattern": r"[A-Za-z][A-Za-z0-9.\-_]+"}}
COMMANDS: dict[str, Command] = {
    "acl delete": Command("PUT", "/access/acl", ("path",), fixed={"delete": "1"}),
    "acl list": Command("GET", "/access/acl", formats=True),
    "acl modify": _ACL,
    "group add": Command("POST", "/access/groups", ("groupid",)),
    "group delete": Command("DELETE", "/access/groups/{groupid}", ("groupid",)),
    "group list": Command("GET", "/access/groups", formats=True),
    "group modify": Command("PUT", "/access/groups/{groupid}", ("groupid",)),
    "passwd": frame.unsupported("pveum passwd"),
    "pool add": Command("POST", "/pools", ("poolid",)),
    "pool delete": Command("DELETE", "/pools", ("poolid",)),
    "pool list": Command("GET", "/pools", formats=True),
    "pool modify": Command("PUT", "/pools", ("poolid",)),
    "realm add": Command("POST", "/access/domains", ("realm",)),
    "realm delete": Command("DELETE", "/access/domains/{realm}", ("realm",)),
    "realm list": Command("GET", "/access/domains", formats=True),
    "realm modify": Command("PUT", "/access/domains/{realm}", ("realm",)),
    "realm sync": Command("POST", "/access/domains/{realm}/sync", ("realm",)),
    "role add": Command("POST", "/access/roles", ("roleid",)),
    "role delete": Command("DELETE", "/access/roles/{roleid}", ("roleid",)),
    "role list": Command("GET", "/access/roles", formats=True),
    "role modify": Command("PUT", "/access/roles/{roleid}", ("roleid",)),
    "ticket": frame.unsupported("pveum ticket"),
    "user tfa list": frame.unsupported("pveum user tfa list"),
    "user tfa delete": frame.unsupported("pveum user tfa delete"),
    "user tfa unlock": Command("PUT", USER + "/unlock-tfa", ("userid",)),
    "user token add": Command("POST", TOKEN, ("userid", "tokenid"), formats=True),
    "user token delete": Command("DELETE", TOKEN, ("userid", "tokenid"), formats=True),
    "user token list": Command("GET", USER + "/token", ("userid",), formats=True),
    "user token modify": Command("PUT", TOKEN, ("userid", "tokenid"), formats=True),
    "user token permissions": Command(
        "",
        "",
        ("userid", "tokenid"),
        extra={**_USER, "path": frame.TEXT},
        formats=True,
        body=_token_permissions,
    ),
    "user token remove": Command("DELETE", TOKEN, ("userid", "tokenid"), formats=True),
    "user add": Command("POST", "/access/users", ("userid",)),
    "user delete": Command("DELETE", USER, ("userid",)),
    "user list": Command("GET", "/access/users", formats=True),
    "user modify": Command("PUT", USER, ("userid",)),
    "user permissions": Command("GET", "/access/permissions", ("userid",), show=_permissions, extra=_OUTPUT),
}
ALIASES = {
    "aclmod": "acl modify",
    "acldel": "acl delete",
    "useradd": "user add",
    "usermod": "user modify",
    "userdel": "user delete",
    "groupadd": "group add",
    "groupmod": "group modify",
    "groupdel": "group delete",
    "roleadd": "role add",
    "rolemod": "role modify",
    "roledel": "role delete",
}

if __name__ == "__main__":
    sys.exit(main())
