"""The set-up: the packaged phases, the checks before them, the playbooks they run.

In which order phases run, and when one is probed instead, is decided in `environment`.
"""

from __future__ import annotations

from pytest_nestedpve.setup.attached_phases import attached_phases
from pytest_nestedpve.setup.phases import default_phases

__all__ = ["attached_phases", "default_phases"]
