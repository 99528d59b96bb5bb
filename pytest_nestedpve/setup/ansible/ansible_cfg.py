"""A project's ansible.cfg: found as Ansible finds it, honoured but for what would undo our SSH.

Ansible takes an environment variable over the file, and so do we: what must not come from a file is given as
one; what the file says of directories that we have, too, is put together. All else Ansible reads itself.
"""

from __future__ import annotations

import configparser
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

NAME = "ansible.cfg"
_TRUE = ("1", "true", "t", "yes", "y", "on")

# What is ours whatever a file says, and why that is; `host_key_checking = True` is no contradiction.
_OURS: dict[tuple[str, str], str] = {
    ("defaults", "host_key_checking"): "host keys are always checked",
    ("ssh_connection", "host_key_checking"): "host keys are always checked",
    ("paramiko_connection", "host_key_checking"): "host keys are always checked",
    ("paramiko_connection", "host_key_auto_add"): "host keys are always checked",
    ("ssh_connection", "ssh_args"): "the way to the nested PVE is the run's own",
    ("ssh_connection", "ssh_common_args"): "the way to the nested PVE is the run's own",
    ("ssh_connection", "ssh_extra_args"): "the way to the nested PVE is the run's own",
    ("ssh_connection", "sftp_extra_args"): "the way to the nested PVE is the run's own",
    ("ssh_connection", "scp_extra_args"): "the way to the nested PVE is the run's own",
    ("ssh_connection", "control_path"): "sockets lie in a private directory",
    ("ssh_connection", "control_path_dir"): "sockets lie in a private directory",
    ("defaults", "transport"): "the way to the nested PVE is the run's own",
    ("defaults", "private_key_file"): "only the run's key is offered",
    ("defaults", "log_path"): "the run's directory has the log, with secrets masked",
    ("defaults", "stdout_callback"): "events are read from it",
    ("defaults", "inventory"): "the inventory is the run's own",
    ("inventory", "enable_plugins"): "the inventory is the run's own",
    ("defaults", "ask_pass"): "nobody is there to be asked",
    ("defaults", "ask_vault_pass"): "nobody is there to be asked",
    ("privilege_escalation", "become_ask_pass"): "nobody is there to be asked",
}
# The file's say over what we would set otherwise.
_DEFAULTS: dict[tuple[str, str], str] = {
    ("defaults", "timeout"): "TIMEOUT",
    ("defaults", "interpreter_python"): "PYTHON_INTERPRETER",
    ("defaults", "retry_files_enabled"): "RETRY_FILES_ENABLED",
    ("defaults", "localhost_warning"): "LOCALHOST_WARNING",
    ("inventory", "inventory_unparsed_warning"): "INVENTORY_UNPARSED_WARNING",
    ("connection", "pipelining"): "PIPELINING",
    ("defaults", "pipelining"): "PIPELINING",
    ("ssh_connection", "pipelining"): "PIPELINING",
    ("connection", "retries"): "SSH_RETRIES",
    ("ssh_connection", "retries"): "SSH_RETRIES",
    ("ssh_connection", "timeout"): "TIMEOUT",
}
# Variables that would do the same from group_vars or a play; as extra variables these outrank all others.
GUARDS = {
    "ansible_host_key_checking": True,
    "ansible_ssh_host_key_checking": True,
    "ansible_paramiko_host_key_checking": True,
    "ansible_ssh_common_args": "",
    "ansible_ssh_extra_args": "",
    "ansible_sftp_extra_args": "",
    "ansible_scp_extra_args": "",
}


@dataclass(frozen=True)
class AnsibleConfig:
    """An ansible.cfg of a project.

    `roles`, `collections`, `callbacks`: directories it names. `theirs`: variables of ours, without ANSIBLE_,
    that it decides. `overridden`: keys of it that do not apply, with the reason.
    """

    path: Path
    roles: tuple[Path, ...] = ()
    collections: tuple[Path, ...] = ()
    callbacks: tuple[Path, ...] = ()
    theirs: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    def remark(self) -> str | None:
        """What whoever looks at the session's end should know; None when all of the file applies."""
        return f"of {self.path} does not apply: {'; '.join(self.overridden)}" if self.overridden else None


class UnusableConfig(ValueError):
    """An ansible.cfg that is there and cannot be used."""


def find(rootdir: Path, environ: Mapping[str, str] | None = None) -> AnsibleConfig | None:
    """What ANSIBLE_CONFIG names (a file, or a directory with one), else the one of the rootdir; or None.

    The user's own and the machine's do not count: the same project does the same everywhere. As with Ansible,
    one in a directory that everybody may write to is not looked at unless it is named. Raises UnusableConfig.
    """
    named = (os.environ if environ is None else environ).get("ANSIBLE_CONFIG", "")
    if named:
        path = Path(os.path.abspath(os.path.expanduser(named)))
        path = path / NAME if path.is_dir() else path
        if not path.is_file():
            raise UnusableConfig(f"ANSIBLE_CONFIG names {path}; expected a file there, found none")
        return read(path)
    path = rootdir / NAME
    if not path.is_file() or rootdir.stat().st_mode & stat.S_IWOTH:
        return None
    return read(path)


def read(path: Path) -> AnsibleConfig:
    """Raises UnusableConfig."""
    parser = configparser.ConfigParser(inline_comment_prefixes=(";",), interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, ValueError, configparser.Error) as e:
        raise UnusableConfig(f"{path} cannot be read: {e}") from e

    def said(place: tuple[str, str]) -> str:
        return parser.get(*place, fallback="").strip()

    def directories(*names: str) -> tuple[Path, ...]:
        text = next((found for name in names if (found := said(("defaults", name)))), "")
        places = (os.path.expandvars(os.path.expanduser(part.strip())) for part in text.split(os.pathsep))
        return tuple(Path(os.path.normpath(path.parent / place)) for place in places if place)

    overridden = [
        f"{name} ({reason})"
        for (section, name), reason in _OURS.items()
        if (found := said((section, name)))
        and not (reason.startswith("host keys") and _harmless(name, found))
    ]
    return AnsibleConfig(
        path,
        roles=directories("roles_path"),
        collections=directories("collections_path", "collections_paths"),
        callbacks=directories("callback_plugins"),
        theirs=tuple(sorted({variable for place, variable in _DEFAULTS.items() if said(place)})),
        overridden=tuple(dict.fromkeys(overridden)),
    )


def _harmless(name: str, value: str) -> bool:
    return (value.lower() in _TRUE) == (name == "host_key_checking")
