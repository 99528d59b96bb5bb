"""The public names of the package: importable by themselves, documented, and without a cost until used."""

from __future__ import annotations

import inspect
import re
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


def test_the_public_names_are_documented_and_no_other() -> None:
    page = (ROOT / "docs" / "using-it.md").read_text(encoding="utf-8")
    table = page.partition("## Public names\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)", table, re.MULTILINE)
    assert sorted(documented) == sorted([*pytest_nestedpve.__all__, "steps"])


def test_the_documented_parameters_of_public_names_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "using-it.md").read_text(encoding="utf-8")
    table = page.partition("## Public names\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)\(([^`]*)\)`", table, re.MULTILINE)
    assert len(documented) >= 6
    for name, parameters in documented:
        actual = inspect.signature(getattr(pytest_nestedpve, name)).parameters
        named = re.findall(r"(\w+)(?:=…)?", parameters)
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        required = {
            key
            for key, parameter in actual.items()
            if parameter.default is parameter.empty and parameter.kind not in variadic
        }
        assert set(named) <= set(actual), f"{name}({parameters})"
        assert required <= set(named), f"{name}({parameters})"


def test_the_pages_and_examples_import_public_names_only() -> None:
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.py"), ROOT / "README.md"]:
        for line in re.findall(r"^from pytest_nestedpve.*", path.read_text(encoding="utf-8"), re.MULTILINE):
            source, _, names = line.partition(" import ")
            assert source == "from pytest_nestedpve", f"{path.name}: {line}"
            for name in re.findall(r"\w+", names.partition("#")[0]):
                assert name in {*pytest_nestedpve.__all__, "steps"}, f"{path.name}: {line}"
