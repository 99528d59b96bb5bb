"""The pytest commands that messages advise: to repeat a run, to finish its teardown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_nestedpve.run.masking import MASK, Masker

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings


_USERINFO = re.compile(r"(https?://)[^/@\s]+@")  # may be a token without a user name


# The settings that a clean-up reads; others may be long, or secret.
_CLEANUP_KEYS = frozenset(
    f"nested_pve_{name}"
    for name in ("name_pattern", "vmid_range", "pool_parent", "run_dir", "force_stop", "timeout_scale")
)


def command_to_repeat(settings: Settings) -> str:
    """The command that repeats the session, with the same host and options `-o nested_pve_…`."""
    return _pytest(settings, "--pve-host" if settings.attach is None else "--nested-attach", settings.typed)


def command_to_destroy(settings: Settings, run_id: str | None) -> str:
    """The command that destroys the leftovers of a run; without an id, of all runs of the host."""
    # Also for an attached PVE: its leftovers are found with the PVE itself as host.
    typed = {name: value for name, value in settings.typed.items() if name in _CLEANUP_KEYS}
    words = [_pytest(settings, "--pve-host", typed), "--nested-destroy-only"]
    return " ".join([*words, "--nested-run", shlex.quote(run_id)] if run_id is not None else words)


def _pytest(settings: Settings, option: str, typed: Mapping[str, str]) -> str:
    words = ["pytest", *([] if settings.host is None else [option, settings.host])]
    for name, value in typed.items():
        words += ["-o", f"{name}={_shown(name, value)}"]
    return shlex.join(words)


def _shown(name: str, value: str) -> str:
    """The value for a message: variables of playbooks may be secrets under any name."""
    if name == "nested_pve_extra_vars":
        return MASK
    return Masker().mask(_USERINFO.sub(rf"\g<1>{MASK}@", value))
