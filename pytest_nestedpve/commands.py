"""The commands that messages tell a person to type."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nestedpve.settings import Settings


def again(settings: Settings) -> str:
    """pytest with the same host."""
    return _pytest(settings, "--pve-host" if settings.attach is None else "--nested-attach")


def finishing(settings: Settings, run_id: str | None) -> str:
    """What finishes the teardown of a run, or of all runs of the host."""
    # Also where the nested PVE is attached: what was made inside of it is found from it as a host.
    words = [_pytest(settings, "--pve-host"), "--nested-destroy-only"]
    return " ".join([*words, "--nested-run", shlex.quote(run_id)] if run_id is not None else words)


def _pytest(settings: Settings, option: str) -> str:
    return shlex.join(["pytest", *([] if settings.host is None else [option, settings.host])])
