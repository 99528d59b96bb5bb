"""What can go wrong when talking to a PVE host, as types; and how PVE's own words map to them."""

from __future__ import annotations


class PveError(Exception):
    """Base of all errors of this package that are about a host or a guest."""


class SshError(PveError):
    """The SSH connection itself failed (not the command)."""


class HostUnreachable(SshError):
    """No TCP connection or no SSH banner within the connect limit."""


class HostKeyMismatch(SshError):
    """The host key is unknown or is not the known one."""


class LoginRefused(SshError):
    """The host answered, but accepted none of the keys offered."""


class CommandTimeout(PveError):
    """A command or task did not end within its limit."""


class ApiError(PveError):
    """The PVE API refused or failed a call; `text` is PVE's own words.

    PVE's exit codes carry no meaning (facts 3), so subclasses are chosen by text.
    """

    def __init__(self, text: str, *, call: str = "", rc: int | None = None) -> None:
        super().__init__(f"{call}: {text.strip()}" if call else text.strip())
        self.text = text.strip()
        self.call = call
        self.rc = rc


class NotFound(ApiError):
    """The guest, pool, volume, user or path does not exist."""


class AlreadyExists(ApiError):
    """The id or name is taken."""


class Locked(ApiError):
    """A lock property or a lock file of the guest is held."""


class Protected(ApiError):
    """The guest's protection flag is set."""


class Running(ApiError):
    """The guest runs and must not for this call."""


class NotRunning(ApiError):
    """The guest does not run and must for this call."""


class PermissionDenied(ApiError):
    """The user or token lacks a privilege, or authentication failed."""


class BadParameter(ApiError):
    """A parameter failed verification."""


class NoQuorum(ApiError):
    """The cluster has no quorum: /etc/pve is read-only."""


class AgentUnavailable(ApiError):
    """The guest agent is not configured, not running or did not answer."""


class UnreadableAnswer(ApiError):
    """The answer is not what the API documents."""


class TaskFailed(ApiError):
    """A task ended with an exit status other than OK or WARNINGS; `log` holds its last lines."""

    def __init__(self, upid: str, exitstatus: str, log: tuple[str, ...] = ()) -> None:
        tail = "".join(f"\n    {line}" for line in log[-12:])
        super().__init__(f"task {upid} ended: {exitstatus}{tail}")
        self.upid = upid
        self.exitstatus = exitstatus
        self.log = log
