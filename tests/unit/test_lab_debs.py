"""The stand-ins as packages: dpkg reads the fields and files of their specifications."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pytest_nestedpve.lab.build import keys, repository
from pytest_nestedpve.lab.build.debs import build_deb, unpack
from pytest_nestedpve.lab.build.image import DUMMIES
from pytest_nestedpve.lab.node.packages import VERSIONS, DebSpec


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an invalid key."""
    monkeypatch.setenv("NESTED_PVE_CACHE", str(tmp_path))
    keys.public("pve").parent.mkdir()
    keys.public("pve").write_bytes(b"\x99\x01public")
    return tmp_path


def specs() -> dict[str, DebSpec]:
    return {spec.name: spec for spec in repository.standins()}


@pytest.mark.usefixtures("cache")
def test_the_keyring_package_contains_the_key_of_the_repository() -> None:
    files = specs()["proxmox-archive-keyring"].files
    assert files["/usr/share/keyrings/proxmox-archive-keyring.gpg"][0] == keys.public("pve").read_bytes()


@pytest.mark.usefixtures("cache")
def test_a_built_package_has_the_fields_and_files_of_its_specification(tmp_path: Path) -> None:
    spec = specs()["pve-manager"]
    tree = tmp_path / "tree"
    deb = build_deb(spec, tmp_path)
    unpack(deb, tree)
    control = subprocess.run(["dpkg-deb", "-f", deb], capture_output=True, text=True, check=True).stdout
    fields = dict(line.split(": ", 1) for line in control.splitlines() if not line.startswith(" "))
    assert fields["Package"] == "pve-manager"
    assert fields["Version"] == VERSIONS["pve-manager"]
    assert fields["Architecture"] == "all"
    assert fields["Depends"] == spec.depends
    assert fields["Description"] == spec.description
    assert (tree / "DEBIAN/postinst").read_text() == spec.postinst
    assert (tree / "DEBIAN/prerm").read_text() == spec.prerm
    assert (tree / "DEBIAN/conffiles").read_text().split() == list(spec.conffiles)
    for path, (content, mode) in spec.files.items():
        file = tree / path.lstrip("/")
        assert (file.read_bytes(), file.stat().st_mode & 0o7777) == (content, mode), path


@pytest.mark.parametrize("spec", DUMMIES, ids=lambda spec: str(spec.name))
def test_a_package_without_files_can_be_built(tmp_path: Path, spec: DebSpec) -> None:
    assert build_deb(spec, tmp_path).name == f"{spec.name}_{spec.version}_all.deb"
