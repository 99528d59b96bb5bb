"""This machine: the programs that playbooks and logins need. Asks no host."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings

_MODULES = {"ansible": "ansible-core", "ansible_runner": "ansible-runner", "paramiko": "paramiko"}


def programs(settings: Settings) -> Iterator[Finding]:
    """Python's libraries, and OpenSSH's client, by which Ansible logs in."""
    lacking = [package for name, package in _MODULES.items() if importlib.util.find_spec(name) is None]
    if lacking:
        yield Finding(
            "this machine", ", ".join(_MODULES.values()), f"without {', '.join(lacking)}",
            "Install them into the same environment.",
            fix=(shlex.join([sys.executable, "-m", "pip", "install", *lacking]),), here=True,
        )  # fmt: skip
    needed = {"ssh": "openssh-client"}
    if settings.sources:
        needed["git"] = "git"
    absent = {name: package for name, package in needed.items() if shutil.which(name) is None}
    if absent:
        yield Finding(
            "this machine", f"the programs {', '.join(needed)}", f"without {', '.join(absent)}",
            "Install them (names of Debian packages).",
            fix=(shlex.join(["apt-get", "install", *sorted(absent.values())]),), here=True,
        )  # fmt: skip
    if not lacking and not absent:
        yield fine("this machine", ", ".join([*_MODULES.values(), *needed]))
