"""The fourteen phases that come with the package."""

from __future__ import annotations

from pytest_nestedpve.setup.phases import default_phases

__all__ = ["default_phases"]
