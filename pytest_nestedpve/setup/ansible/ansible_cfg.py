"""A project's ansible.cfg: applied except for options that would change the run's SSH.

In Ansible an environment variable overrides the file: the plugin overrides the excluded options in this way,
and appends the file's directories to its own. Ansible itself reads all other options of the file.
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

# Options of the file that never apply, with the reason; `host_key_checking = True` is no contradiction.
_EXCLUDED: dict[tuple[str, str], str] = {
    ("defaults", "host_key_checking"): "host keys are always checked",
    ("ssh_connection", "host_key_checking"): "host keys are always checked",
    ("paramiko_connection", "host_key_checking"): "host keys are always checked",
    ("paramiko_connection", "host_key_auto_add"): "host keys are always checked",
    ("ssh_connection", "ssh_args"): "the connection to the nested PVE is the run's own",
    ("ssh_connection", "ssh_common_args"): "the connection to the nested PVE is the run's own",
    ("ssh_connection", "ssh_extra_args"): "the connection to the nested PVE is the run's own",
    ("ssh_connection", "sftp_extra_args"): "the connection to the nested PVE is the run's own",
    ("ssh_connection", "scp_extra_args"): "the connection to the nested PVE is the run's own",
    ("ssh_connection", "control_path"): "sockets are in a private directory",
    ("ssh_connection", "control_path_dir"): "sockets are in a private directory",
    ("defaults", "transport"): "the connection to the nested PVE is the run's own",
    ("defaults", "private_key_file"): "only the run's key is offered",
    ("defaults", "log_path"): "the run's directory has the log, with secrets masked",
    ("defaults", "stdout_callback"): "the plugin reads its events",
    ("defaults", "inventory"): "the inventory is the run's own",
    ("inventory", "enable_plugins"): "the inventory is the run's own",
    ("defaults", "ask_pass"): "a playbook runs without a terminal",
    ("defaults", "ask_vault_pass"): "a playbook runs without a terminal",
    ("privilege_escalation", "become_ask_pass"): "a playbook runs without a terminal",
}
# Options of the file that replace a default of the plugin, with Ansible's environment variable.
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
# Variables with the same effect in group_vars or a play; as extra variables these override all others.
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

    `roles`, `collections`, `callbacks`: its directories. `replaced`: environment variables of the plugin,
    without ANSIBLE_, that its options replace. `overridden`: its options that do not apply, with the reason.
    """

    path: Path
    roles: tuple[Path, ...] = ()
    collections: tuple[Path, ...] = ()
    callbacks: tuple[Path, ...] = ()
    replaced: tuple[str, ...] = ()
    overridden: tuple[str, ...] = ()

    def remark(self) -> str | None:
        """A note for the session's summary; None if the whole file applies."""
        options = "; ".join(self.overridden)
        return f"options of {self.path} that do not apply: {options}" if options else None


class UnusableConfig(ValueError):
    """An ansible.cfg that exists and cannot be used."""


def find(rootdir: Path, environ: Mapping[str, str] | None = None) -> AnsibleConfig | None:
    """The file of ANSIBLE_CONFIG (a file, or a directory with one), else the one of the rootdir, or None.

    ~/.ansible.cfg and /etc/ansible are not read: a project behaves the same everywhere. As in Ansible, a file
    in a world-writable directory is ignored unless ANSIBLE_CONFIG names it. Raises UnusableConfig.
    """
    configured = (os.environ if environ is None else environ).get("ANSIBLE_CONFIG", "")
    if configured:
        path = Path(os.path.abspath(os.path.expanduser(configured)))
        path = path / NAME if path.is_dir() else path
        if not path.is_file():
            raise UnusableConfig(f"ANSIBLE_CONFIG names {path}; expected a file, found none; fix or unset it")
        return read(path)
    path = rootdir / NAME
    if not path.is_file() or rootdir.stat().st_mode & stat.S_IWOTH:
        return None
    return read(path)


def read(path: Path) -> AnsibleConfig:
    """The configuration in `path`. Raises UnusableConfig."""
    parser = configparser.ConfigParser(inline_comment_prefixes=(";",), interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"), source=str(path))
    except (OSError, ValueError, configparser.Error) as e:
        raise UnusableConfig(f"{path} cannot be read: {e}") from e

    def value(option: tuple[str, str]) -> str:
        return parser.get(*option, fallback="").strip()

    def directories(*names: str) -> tuple[Path, ...]:
        text = next(filter(None, (value(("defaults", name)) for name in names)), "")
        parts = (os.path.expandvars(os.path.expanduser(part.strip())) for part in text.split(os.pathsep))
        return tuple(Path(os.path.normpath(path.parent / part)) for part in parts if part)

    overridden = [
        f"{name} ({reason})"
        for (section, name), reason in _EXCLUDED.items()
        if (text := value((section, name)))
        and not (reason.startswith("host keys") and _is_harmless(name, text))
    ]
    return AnsibleConfig(
        path,
        roles=directories("roles_path"),
        collections=directories("collections_path", "collections_paths"),
        callbacks=directories("callback_plugins"),
        replaced=tuple(sorted({variable for option, variable in _DEFAULTS.items() if value(option)})),
        overridden=tuple(dict.fromkeys(overridden)),
    )


def _is_harmless(name: str, value: str) -> bool:
    return (value.lower() in _TRUE) == (name == "host_key_checking")
