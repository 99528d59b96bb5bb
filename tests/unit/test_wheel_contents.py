"""Contents of the wheel: all files read at run time, no other files, and complete metadata."""

from __future__ import annotations

import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import wheels

PACKAGE = wheels.ROOT / "pytest_nestedpve"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def _files(folder: Path) -> set[Path]:
    return {
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith((".", "__pycache__")) for part in path.parts[len(folder.parts) :])
    }


def test_every_file_of_the_package_is_in_it(names: set[str]) -> None:
    missing = {path.relative_to(wheels.ROOT).as_posix() for path in _files(PACKAGE)} - names
    assert not missing


def test_the_playbooks_with_their_roles_are_in_the_package(names: set[str]) -> None:
    folder = wheels.ROOT / "playbooks"
    copies = {f"pytest_nestedpve/playbooks/{path.relative_to(folder).as_posix()}" for path in _files(folder)}
    assert len(copies) > 20
    assert not copies - names


@pytest.mark.parametrize(
    "name",
    [
        "py.typed",
        "lab/build/layer.sh",
        "lab/node/machine/machine-init.sh",
        "lab/node/api/schema.json",
        "lab/node/api/roles.json",
        "report/templates/page.html.j2",
        "playbooks/pve-install.yml",
        "playbooks/nested-pve-leaf.yml",
        "playbooks/roles/nested_pve_network/files/takeover.sh",
    ],
)
def test_files_that_are_no_python_are_in_it_too(names: set[str], name: str) -> None:
    assert f"pytest_nestedpve/{name}" in names


def test_nothing_else_is_in_it(names: set[str]) -> None:
    for name in names:
        top, _, rest = name.partition("/")
        assert top == "pytest_nestedpve" or top.endswith(".dist-info"), name
        assert "__pycache__" not in name
        assert not any(part.startswith(".") for part in rest.split("/")), name


def test_the_metadata_is_complete(metadata: Message, names: set[str]) -> None:
    assert metadata["Name"] == "pytest-nestedpve"
    assert metadata["License-Expression"] == "MIT"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert metadata["Requires-Python"] == ">=3.11"
    classifiers = metadata.get_all("Classifier") or []
    assert "Framework :: Pytest" in classifiers
    assert "Typing :: Typed" in classifiers
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).startswith("# pytest-nestedpve")
    needs = [need for need in metadata.get_all("Requires-Dist") or [] if "extra ==" not in need]
    assert needs
    assert all(">=" in need for need in needs), needs


def test_the_plugin_and_the_command_are_entry_points(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if entry.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "[pytest11]\npytest_nestedpve.plugin = pytest_nestedpve.plugin" in text
    assert "nestedpve-lab = pytest_nestedpve.lab.cli:main" in text
