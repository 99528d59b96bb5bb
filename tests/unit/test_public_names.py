"""The public names of the package: importable by themselves, documented, and without a cost until used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pytest_nestedpve

ROOT = Path(__file__).parents[2]


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", pytest_nestedpve.__all__)
def test_every_public_name_is_importable_without_pytest(name: str) -> None:
    code = (
        f"import sys; from pytest_nestedpve import {name}; "
        f"print({name}.__name__, *(set(sys.modules) & {{'pytest', '_pytest', 'paramiko', 'ansible_runner'}}))"
    )
    assert in_a_fresh_process(code) == name


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Fase'"):
        pytest_nestedpve.__getattr__("Fase")
    with pytest.raises(ImportError):
        exec("from pytest_nestedpve import Fase")


def test_importing_the_package_loads_none_of_its_modules() -> None:
    code = "import sys, pytest_nestedpve; print(*(m for m in sys.modules if m[:17] == 'pytest_nestedpve.'))"
    assert in_a_fresh_process(code) == ""


def test_a_star_import_gives_the_public_names_and_no_steps() -> None:
    code = (
        "from pytest_nestedpve import *; import pytest_nestedpve; "
        "print(sorted(set(pytest_nestedpve.__all__) - set(dir())), 'steps' in dir())"
    )
    assert in_a_fresh_process(code) == "[] False"


def test_steps_is_the_sentinel_module() -> None:
    from pytest_nestedpve import steps

    assert steps is sys.modules["pytest_nestedpve.steps"]
