"""Check of the programs on this machine that playbooks and logins need. Needs no host."""

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
    """Check for Python packages, the OpenSSH client (for Ansible), and git if sources are configured."""
    missing_packages = [
        package for name, package in _MODULES.items() if importlib.util.find_spec(name) is None
    ]
    if missing_packages:
        yield Finding(
            "this machine", ", ".join(_MODULES.values()), f"without {', '.join(missing_packages)}",
            "Install them into the same Python environment.",
            fix=(shlex.join([sys.executable, "-m", "pip", "install", *missing_packages]),), local_fix=True,
        )  # fmt: skip
    needed = {"ssh": "openssh-client"}
    if settings.sources:
        needed["git"] = "git"
    missing_programs = {name: package for name, package in needed.items() if shutil.which(name) is None}
    if missing_programs:
        yield Finding(
            "this machine", f"the programs {', '.join(needed)}", f"without {', '.join(missing_programs)}",
            "Install them (names of Debian packages).",
            fix=(shlex.join(["apt-get", "install", *sorted(missing_programs.values())]),), local_fix=True,
        )  # fmt: skip
    if not missing_packages and not missing_programs:
        yield fine("this machine", ", ".join([*_MODULES.values(), *needed]))
