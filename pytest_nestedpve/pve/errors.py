"""Errors of a PVE host and its guests, as types, and their choice by PVE's messages."""

from __future__ import annotations

import re
import unicodedata


class PveError(Exception):
    """Base of the errors of this package that concern a host, a guest or their files."""


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


class ProfileError(PveError):
    """The host profile, /etc/nested-pve.ini on the outer host, cannot be used."""


class ApiError(PveError):
    """The PVE API refused or failed a call; `text` is PVE's message.

    PVE's exit statuses have no meaning (they are errno at `die`): the text chooses the subclass.
    """

    def __init__(self, text: str, *, call: str = "", rc: int | None = None) -> None:
        super().__init__(f"{call}: {text.strip()}" if call else text.strip())
        self.text = text.strip()
        self.call = call
        self.rc = rc


class NotFound(ApiError):
    """The guest, pool, volume, user or path does not exist."""


class GuestNotFound(NotFound):
    """The guest itself has no configuration on the node of the call (not: an object it refers to)."""


class AlreadyExists(ApiError):
    """The id or name is in use."""


class Locked(ApiError):
    """A lock property or a lock file of the guest is held."""


class LockTimeout(Locked):
    """The guest's lock file or a cluster lock was held for longer than PVE waits: retry."""


class Protected(ApiError):
    """The guest's protection flag is set."""


class Running(ApiError):
    """The guest is running, and this call needs a stopped one."""


class NotRunning(ApiError):
    """The guest is not running, and this call needs a running one."""


class InUse(ApiError):
    """Another object depends on this one: a pool has members, a base has linked clones, HA manages it."""


class StorageFull(ApiError):
    """The storage, or the host's own disk, has too little free space for the request."""


class Changed(ApiError):
    """The configuration has changed: its digest is not that of the call."""


class PermissionDenied(ApiError):
    """The user or token lacks a privilege, or authentication failed."""


class BadParameter(ApiError):
    """A parameter failed verification."""


class WrongState(ApiError):
    """The call does not apply to the guest's state, which remains: template, paused, with snapshots."""


class StartFailed(ApiError):
    """The host could not start the guest's QEMU (no KVM, or QEMU exited at once)."""


class GuestTimeout(ApiError):
    """The guest, or its QEMU, did not act within the time limit; it may do so later."""


class Interrupted(ApiError):
    """The task's process ended before its work: the object may be partly created or removed."""


class Unsupported(ApiError):
    """The storage is disabled, or does not support the content or the operation."""


class DownloadFailed(ApiError):
    """The host could not download the file."""


class WrongContent(DownloadFailed):
    """The downloaded file is not the expected one (checksum, format); PVE has removed it."""


class NoQuorum(ApiError):
    """The cluster has no quorum: /etc/pve is read-only."""


class AgentUnavailable(ApiError):
    """The guest agent is not configured, not running or did not answer."""


class AgentFailed(ApiError):
    """The guest agent answered with an error: no such file, no such command."""


class NodeUnreachable(ApiError):
    """A node could not connect to another node of its cluster, or has no address of it."""


class ClusterFilesystemDown(ApiError):
    """pmxcfs is not running on the host: no PVE command works."""


class WorkerFailed(ApiError):
    """The host could not start the task's process; the object of the call may exist nevertheless."""


class HostFault(ApiError):
    """PVE itself failed: an error in its code, with file and line."""


class NoPve(ApiError):
    """The host has no `pvesh`: it is not a PVE host."""


class UnreadableAnswer(ApiError):
    """The answer does not have the documented form."""


class TaskFailed(ApiError):
    """A task ended with an exit status other than OK or WARNINGS; `log` holds its last lines.

    `__cause__` is the exit status as one of the types above.
    """

    def __init__(self, upid: str, exitstatus: str, log: tuple[str, ...] = ()) -> None:
        tail = "".join(f"\n    {plain(line)[:_LINE]}" for line in log[-12:])
        super().__init__(f"task {upid} ended: {plain(exitstatus)[:_TEXT_LIMIT]}{tail}")
        self.upid = upid
        self.exitstatus = exitstatus
        self.log = log

    @property
    def reason(self) -> ApiError:
        """The exit status as a typed error."""
        return classify(self.exitstatus, None, f"task {self.upid}")


# In this order; the first match decides. The messages are those of recordings of PVE 9.2.11, and PVE's usual
# ones for unrecorded cases (ZFS, LVM, shares, containers).
# `^` is the start of a line, where names of guests and volumes, which users choose, are rare.
_TABLE: tuple[tuple[type[ApiError], str], ...] = (
    # The message of `env` is in the language of root's login.
    (
        NoPve,
        r"pvesh: (?:command )?not found|pvesh\W{0,2}: No such file or directory|"
        r"^env: \W?pvesh\W?: (?!.*[Pp]ermission)",
    ),
    (ClusterFilesystemDown, r"^ipcc_send_rec\[\d+\] failed: |^Unable to load access control list: "),
    (
        NodeUnreachable,
        r"^proxy handler failed: (?:ssh: |Host key verification failed|Connection (?:closed|reset|timed)|"
        r"kex_exchange_identification: |\S+: Permission denied \()|"
        r"^ssh: (?:connect to host|Could not resolve hostname) |hostname lookup '[^']*' failed|"
        r"Can't connect to (?:destination address|\S+:8006\b)",
    ),
    (
        NoQuorum,
        r"no quorum[?!]|'/etc/pve/[^'\n]*'[^'\n]*(?:Permission denied|Read-only file system)",
    ),
    (
        Interrupted,
        r"\A(?:unexpected status|received interrupt|interrupted by signal|broken pipe|"
        r"unable to read tail \(got \d+ bytes\))\.?\s*\Z|"
        r"command '[^\n]*' failed: (?:received interrupt|interrupted by signal)\.?\s*\Z",
    ),
    (NotFound, r"^403 Permission check failed \(pool '[^']*' does not exist\)"),
    (
        PermissionDenied,
        r"Permission check failed|^(?:401 )?[Aa]uthentication fail|^401 |^(?:permission denied - )?invalid "
        r"(?:PVE|API|token)|No ticket|^403 |[Oo]nly root (?:can|may)|root-only command|^please run as root",
    ),
    (
        GuestNotFound,
        r"Configuration file '[^']*/(?:qemu-server|lxc)/\d+\.conf' does not exist|"
        r"^unable to find configuration file for (?:VM|CT) \d+ on node",
    ),
    (AlreadyExists, r"^400 Parameter verification failed[\s\S]*^[\w-]+: .*already exists\.?$"),
    (
        NotFound,
        r"^400 Parameter verification failed[\s\S]*^[\w-]+: (?:[Nn]o such |.*does not exist\.?$)",
    ),
    (Unsupported, r"^400 Parameter verification failed[\s\S]*^[\w-]+: storage \S+ (?:does not support|is) "),
    (NotFound, r"^501 Method '[A-Z]+ /[^'\n]*' not implemented"),
    (UnreadableAnswer, r"Result verification failed"),
    (
        BadParameter,
        r"Parameter verification failed|^Unknown option: |unable to parse option|^400 |^501 |"
        r"^no options specified|^unable to use snapshot name|^(?:ERROR: )?(?:unknown|no) command |"
        r"pool name must start with a letter|key validation error|^illegal name '|"
        r"^parameter '[\w-]+' (?:is )?not allowed|^unable to parse (?:[\w-]+ )*volume |"
        r"^can't change value of fixed parameter|^missing value for required option|^unexpected property '|"
        r"^MAX \d+ vcpus allowed",
    ),
    (
        StorageFull,
        r"No space left on device|Disk quota exceeded|: out of space$|free space in thin pool \S+ reached|"
        r"[Ii]nsufficient (?:free )?space",
    ),
    (
        Unsupported,
        r"storage '?[\w.-]+'? (?:does not support |is disabled|"
        r"is not (?:online|active)|is not configured for content-type|is not available on node)|"
        r"snapshot feature is not available|feature is not supported|shrinking disks is not supported|"
        r"^unable to activate storage |^unsupported format '|\(VM uses local storage\)",
    ),
    (
        LockTimeout,
        r"can't (?:lock file|ac?quire lock) '[^']*' - got timeout|"
        r"cfs[- ]lock(?: '[^']*'(?: error)?|ed '[^']*' operation): got lock (?:request )?timeout",
    ),
    (Locked, r"(?:VM|CT|guest) is locked(?: \(|$)|(?:VM|CT) \d+ is locked"),
    (Protected, r"protection mode enabled"),
    (
        AgentUnavailable,
        r"No QEMU guest agent configured|QEMU guest agent is not running|^QMP (?:guest )?agent|"
        r"qmp command 'guest-[\w-]+' failed - (?:got timeout|unable to connect|client closed connection)",
    ),
    (AgentFailed, r"^Agent error: "),
    (
        Running,
        r"(?:VM|CT) \d+ already running|(?:VM|CT) \d+ is running\b|can't migrate running (?:VM|container)|"
        r"- container is running|^you can't .* if (?:the )?VM is running",
    ),
    (NotRunning, r"(?:VM|CT) \d+ (?:is )?not running"),
    (
        GuestTimeout,
        r"(?:quit/powerdown|wait) failed - got timeout|"
        r"qmp command '[\w-]+' failed - (?:got timeout|unable to connect)|^Timeout while waiting for port ",
    ),
    (AgentFailed, r"qmp command 'guest-[\w-]+' failed - "),
    (
        WrongState,
        r"^VM is paused|you can't (?:start|convert|reset|suspend|migrate) a (?:vm|template)|"
        r"because (?:VM|CT) contains snapshots|^you can't .*\btemplate\b|unable to use incomplete snapshot|"
        r"is not most recent snapshot",
    ),
    (StartFailed, r"^start failed: |QEMU exited with code|^KVM virtualisation configured, but not available"),
    (
        WrongContent,
        r"checksum mismatch: got |failed to verify file|invalid filename or wrong extension",
    ),
    (DownloadFailed, r"^download failed: |^invalid server response"),
    (
        InUse,
        r"pool '[^']*' is not empty|is still in use by linked clone|used in HA resources|"
        r"belongs already to pool|^There is a replication job '|volume is still in use \(",
    ),
    (
        Changed,
        r"^checksum mismatch \(file change by other user|: checksum mismatch \(file change|"
        r"^detected modified configuration",
    ),
    (
        AlreadyExists,
        r"already exists\b|config file already exists|already (?:used|defined)\.?$|"
        r"^refusing to override existing file",
    ),
    (WorkerFailed, r"got no worker upid|start worker failed"),
    (
        NotFound,
        r"does not exist\b|^unable to find configuration file|^no such |^500 no such |"
        r"^No '\w+' handler defined for|"
        r"non-existent or non-regular file|no such (?:user|token|cluster node)|"
        r"^can't (?:find file|open) '[^'\n]*'(?: - No such file or directory)?\.?$|"
        r"is not a known host of the cluster|VM \d+ is not a pool member|^EFI base image '[^'\n]*' not found|"
        r"Failed to find logical volume",
    ),
    (HostFault, r" at /usr/share/perl5/\S+ line \d+"),
)
_COMPILED = tuple((kind, re.compile(pattern, re.MULTILINE)) for kind, pattern in _TABLE)

# Messages beside the real reason, also of commands that succeed.
_NOISE = re.compile(
    r"^(?:user config - ignore invalid |perl: warning: |\s*(?:WARN(?:ING)?|Warning): |"
    r"\s+(?:LANGUAGE|LC_\w+|LANG) = |"
    r"\s+are supported and installed|trying to acquire (?:cfs )?lock|\s*OK$|Wide character in |UPID:|"
    r"Use of uninitialized value |Task finished with \d+ warning|\s+\S.* called at \S+ line \d+|"
    r"(?:USAGE: |\s+)(?:pvesh|qm|pveum|pvesm|pvecm) |"
    r"(?:pvesh|qm|pveum|pvesm|pvecm) .*(?:<\w+>|\[OPTIONS\]))"
)
# Three calls to pmxcfs fail, with a message each; the line after them has the failure that follows.
_BESIDE = re.compile(r"^ipcc_send_rec\[\d+\] failed: ")
# Prefixes of the reason: the program, or the call.
_PREFIX = re.compile(
    r"^(?:proxy handler failed: |TASK ERROR: |ERROR: |unable to (?:create|restore) (?:VM|CT) \d+ - |"
    r"error during cfs-locked '[^'\n]*' operation: |"
    r"(?:create|delete|update|modify|set|add|remove|clone|generating|modifying|removing|ACL)(?: \w+)? "
    r"failed: )+",
    re.MULTILINE,
)
# All characters without a visible form, except newline, tab and space: controls, odd spaces, changes of the
# direction of writing.
_CONTROLS = dict.fromkeys(
    n
    for n in (*range(0x3001), 0xFEFF)
    if (unicodedata.category(chr(n)) in ("Cc", "Cf") or chr(n).isspace()) and chr(n) not in "\n\t "
)
_TEXT_LIMIT = 4000
_READ_LIMIT = 200_000
_LINE = 1000


def is_noise(text: str) -> bool:
    """Whether `text` holds no reason of a failure: it is empty, or has only warnings as beside results."""
    return not any(line.strip() and not _NOISE.match(line) for line in plain(text[:_READ_LIMIT]).split("\n"))


def plain(text: str) -> str:
    """`text` without terminal sequences and control characters other than newline and tab."""
    if "\x1b" in text:
        text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[@-Z\\-_]", "", text)
    return text.replace("\r\n", "\n").translate(_CONTROLS)


def classify(text: str, rc: int | None = None, call: str = "") -> ApiError:
    """The typed error for PVE's message; not raised here. `rc` is stored, and decides nothing.

    Never fails: an unknown message becomes a plain ApiError.
    """
    if len(text) > _READ_LIMIT:
        text = text[: _READ_LIMIT // 2] + "\n" + text[-_READ_LIMIT // 2 :]
    readable = plain(text)
    # Without repetitions: the task and the command that waited for it print the same lines.
    lines = dict.fromkeys(line.rstrip() for line in readable.split("\n") if line.strip())
    reasons = [line for line in lines if not _NOISE.match(line)]
    reasons = [line for line in reasons if not _BESIDE.match(line)] or reasons[:1]
    message = "\n".join(reasons or lines) or f"failed without a message (exit status {rc})"
    if len(message) > _TEXT_LIMIT:
        message = message[: _TEXT_LIMIT // 2] + "\n[…]\n" + message[-_TEXT_LIMIT // 2 :]
    reason = _PREFIX.sub("", message)
    for kind, pattern in _COMPILED:
        if pattern.search(message) or (reason != message and pattern.search(reason)):
            return kind(message, call=call, rc=rc)
    return ApiError(message, call=call, rc=rc)
