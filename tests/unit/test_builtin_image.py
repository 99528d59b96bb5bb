"""What the leaf boots, and what a URL or a name has to be for it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_nestedpve.builtin import image
from pytest_nestedpve.environment import Environment
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.settings import Settings

URL = "https://images.example/debian-13.qcow2"


def environment(leaf_image: str | None = None, own: str | None = "local:import/debian-13.raw") -> Environment:
    facts = {"preflight": {"image": own}}
    inner = PveHost("nested", cast(Any, None), cast(Any, Silent()), "nested")
    made = SimpleNamespace(
        settings=Settings(leaf_image=leaf_image), facts=facts, inner=inner, rootdir=Path("/nonexistent")
    )
    return cast(Environment, made)


class Silent:
    """An API that may not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"{name} was called")


def test_without_a_setting_the_leaf_boots_what_the_nested_vm_boots() -> None:
    assert image.source(environment()) == "local:import/debian-13.raw"


def test_a_clone_needs_an_image_for_its_leaf() -> None:
    with pytest.raises(PveError, match="nested_pve_leaf_image"):
        image.source(environment(own=None))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("local:import/debian-13.raw", "debian-13.raw"),
        (URL + "?x=1#sha256:00", "debian-13.qcow2"),
        ("https://images.example/noble-server-cloudimg-amd64.img", "noble-server-cloudimg-amd64.qcow2"),
        ("../images/my image.qcow2", "my_image.qcow2"),
    ],
)
def test_the_name_of_the_file_is_one_that_pve_imports(text: str, name: str) -> None:
    assert image.file_name(text) == name


def test_a_file_that_pve_does_not_import_is_refused() -> None:
    with pytest.raises(PveError, match=r"\.qcow2, \.raw"):
        image.file_name("https://images.example/debian.iso")


@pytest.mark.parametrize("given", ["", "#", "#sha256:xyz", "#crc32:00"])
def test_a_url_without_a_checksum_is_refused_before_anything_is_fetched(given: str) -> None:
    with pytest.raises(PveError, match="expected a checksum"):
        image.download_image(environment(URL + given), 10)


def test_a_file_that_is_not_there_is_told() -> None:
    with pytest.raises(PveError, match="is no file"):
        image.download_image(environment("nowhere.qcow2"), 10)
