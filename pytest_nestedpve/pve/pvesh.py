"""The API by `pvesh` on the host, over SSH: slow (each call starts Perl), but with all rights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pytest_nestedpve.pve.answers import read_answer
from pytest_nestedpve.pve.api import Verbs, current_call_limit
from pytest_nestedpve.pve.errors import ApiError, BadParameter, SshError, classify, is_noise
from pytest_nestedpve.pve.host import SshLike

# Parameters whose values are kept out of messages and logs.
SECRET_PARAMETERS = frozenset({"cipassword", "password", "value", "token", "ticket", "tfa-challenge"})

# The verbs that have another name in pvesh.
_PVESH = {"post": "create", "put": "set"}

READ_LIMIT = 60.0
# pvesh returns when the task that it forked has ended, so a call that changes something may take long.
WRITE_LIMIT = 900.0


class PveshApi(Verbs):
    """The four verbs by `pvesh get|create|set|delete PATH --k v --output-format json`.

    Limits per call: `read_limit` for get, `write_limit` for the others, seconds (nominal), unless
    `api.call_limit` sets another one. The locale is C.UTF-8: PVE's messages untranslated, parameters UTF-8.
    A secret value is in the argv of `pvesh` on the host, because pvesh reads it from nowhere else; it is not
    in messages and logs on this machine. The calls are not logged: that is for the caller.
    """

    def __init__(
        self, ssh: SshLike, *, read_limit: float = READ_LIMIT, write_limit: float = WRITE_LIMIT
    ) -> None:
        self._ssh = ssh
        self._read_limit = read_limit
        self._write_limit = write_limit

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        limit = self._read_limit if verb == "get" else self._write_limit
        verb = _PVESH.get(verb, verb)
        call = f"{verb} {path}"
        if not path.startswith("/") or "\0" in path:
            raise BadParameter(f"expected an API path that begins with a slash, found {path!r}", call=call)
        words = [word for name, value in params.items() for word in _words(name, value)]
        secret = any(params.get(name) is not None for name in SECRET_PARAMETERS) or (
            # The answer holds the value of the new token.
            verb == "create" and ("/token/" in path or path == "/access/ticket")
        )
        # env, not an assignment: root may have any login shell.
        argv = ["env", "LC_ALL=C.UTF-8", "pvesh", verb, path, *words, "--output-format", "json"]
        # The caller logs the API call, not its command.
        result = self._ssh.run(argv, timeout=current_call_limit(limit), secret=secret, logged=False)
        if result.rc == 0:
            return read_answer(result.stdout, call=call, secret=secret)
        if result.rc == -1:
            raise SshError(f"{call}: pvesh was ended by a signal: {result.stderr.strip()[:300]}")
        # QEMU's reason, and some of pvesh's, are on standard output.
        reason = result.stderr if not is_noise(result.stderr) or is_noise(result.stdout) else result.stdout
        error = classify(reason, result.rc, call)
        raise _without_secrets(error, params) if secret else error


def _words(name: str, value: Any) -> Iterable[str]:
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        return [word for item in value for word in _words(name, item)]
    text = str(int(value)) if isinstance(value, bool) else str(value)
    if "\0" in text or not name or name.startswith("-"):
        raise BadParameter(
            f"expected a parameter that fits a command line (no NUL, no leading -), found {name!r}"
        )
    return [f"--{name}", text]


def _without_secrets(error: ApiError, params: dict[str, Any]) -> ApiError:
    text = error.text
    for name in SECRET_PARAMETERS:
        if params.get(name):
            text = text.replace(str(params[name]), "***")
    return type(error)(text, call=error.call, rc=error.rc)
