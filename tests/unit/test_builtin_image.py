"""The images of the nested VM and of the leaf: valid URLs, files and volumes, and their transfer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
from standin_host import IMAGE, StandinHost

from pytest_nestedpve.config import parsers
from pytest_nestedpve.config.settings import Settings, SettingsError
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve.errors import PveError, classify
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.setup import image_file
from pytest_nestedpve.setup import leaf_image as leaf_images

SUM = hashlib.sha256(b"the image").hexdigest()
URL = "https://images.example/debian-13.qcow2"
UPID = "UPID:outer:00000001:00000010:00000001:download:x:root@pam:"


def environment(image: str | None = "local:import/debian-13.raw") -> Environment:
    """A run whose nested VM boots that image."""
    return cast(Environment, SimpleNamespace(settings=Settings(), facts={"preflight": {"image": image}}))


class Storage:
    """A PVE host with one directory storage, as far as image transfers need it; `web`: content by URL."""

    def __init__(self, web: dict[str, bytes] | None = None) -> None:
        self.web = web or {}
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.uploads = 0
        self.exit_status = "OK"
        self.host = PveHost("outer", cast(Any, self), cast(Any, self), "outer")

    def get(self, path: str, /, **_params: Any) -> Any:
        if path == "/storage/local":
            return {"path": "/srv"}
        if path.endswith("/content"):
            return [{"volid": f"local:import/{name}", "size": len(data)} for name, data in self.files.items()]
        return {"status": "stopped", "exitstatus": self.exit_status} if path.endswith("/status") else []

    def post(self, path: str, /, **params: Any) -> str:
        assert path.endswith("/storage/local/download-url")
        name, checksum, self.exit_status = params["filename"], params["checksum"], "OK"
        existing = self.files.get(name)
        if existing is not None:
            if hashlib.new(params["checksum-algorithm"], existing).hexdigest() != checksum:
                self.exit_status = f"refusing to override existing file '/srv/import/{name}'"
            return UPID
        self.fetched.append(params["url"])
        data = self.web[params["url"]]
        actual = hashlib.new(params["checksum-algorithm"], data).hexdigest()
        if actual == checksum:
            self.files[name] = data
        else:
            self.exit_status = f"checksum mismatch: got '{actual}' != expect '{checksum}'"
        return UPID

    def run(self, command: Any, **_options: Any) -> CommandResult:
        return CommandResult(str(command), 0, b"", b"", 1.0)

    def put(self, data: BinaryIO, remote: str, mode: int = 0o600) -> None:
        assert mode == 0o644
        assert isinstance(data.size, int)  # type: ignore[attr-defined]
        pieces = []
        while piece := data.read(1 << 15):
            pieces.append(piece)
        self.files[remote.rpartition("/")[2]] = b"".join(pieces)
        self.uploads += 1


def transfer(storage: Storage, setting: str) -> tuple[str, str, list[str]]:
    """Transfer the image of a setting: its volume, the result, the progress messages."""
    messages: list[str] = []
    image = image_file.read(setting)
    result = image_file.provide(storage.host, "local", image, 60, messages.append)
    return image.volume("local"), result, messages


def test_without_a_setting_the_leaf_boots_the_image_of_the_nested_vm() -> None:
    assert leaf_images.source(environment()) == "local:import/debian-13.raw"


def test_a_clone_needs_an_image_for_its_leaf() -> None:
    with pytest.raises(PveError, match="nested_pve_leaf_image"):
        leaf_images.source(environment(image=None))


def test_with_a_template_the_leaf_boots_the_newest_debian_image_of_the_host(
    env: Environment, host: StandinHost
) -> None:
    env.facts["preflight"] = {"image": None, "template": 100, "node": "father"}
    others = [f"local:import/{name}.qcow2" for name in ("debian-12-generic-amd64", "alpine")]
    for volid in others:
        host.volume(volid, 1)
    assert leaf_images.source(env) == "local:import/debian-13-genericcloud-amd64.qcow2"
    for volid in (IMAGE, *others):
        host.remove_volume(volid)
    with pytest.raises(PveError, match="nor a Debian image on the outer host"):
        leaf_images.source(env)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("local:import/debian-13.raw", "debian-13.raw"),
        (URL + "?x=1#sha256:00", "debian-13.qcow2"),
        ("https://images.example/noble-server-cloudimg-amd64.img", "noble-server-cloudimg-amd64.qcow2"),
        ("../images/my image.qcow2", "my_image.qcow2"),
    ],
)
def test_the_file_name_has_a_suffix_that_pve_imports(text: str, name: str) -> None:
    assert image_file.file_name(text) == name


def test_a_file_that_pve_does_not_import_is_refused() -> None:
    with pytest.raises(PveError, match=r"\.qcow2, \.raw"):
        image_file.file_name("https://images.example/debian.iso")


@pytest.mark.parametrize("fragment", ["", "#", "#sha256:xyz", "#crc32:00", "#sha256:0123", f"#sha512:{SUM}"])
def test_a_url_without_a_whole_checksum_is_refused_when_the_setting_is_read(fragment: str) -> None:
    with pytest.raises(ValueError, match="expected a checksum"):
        parsers.image(parsers.Text(URL + fragment, Path("/")))


def test_a_checksum_is_accepted_in_its_published_form() -> None:
    for checksum in (f"sha256={SUM.upper()}", f"sha256:{SUM}"):
        assert parsers.image(parsers.Text(f"{URL}#{checksum}", Path("/"))) == f"{URL}#sha256:{SUM}"


def test_a_relative_file_is_resolved_from_the_directory_of_the_setting(tmp_path: Path) -> None:
    (tmp_path / "debian.qcow2").write_bytes(b"the image")
    image = parsers.image(parsers.Text("debian.qcow2", tmp_path))
    assert image == str(tmp_path / "debian.qcow2")
    with pytest.raises(ValueError, match=r"no file /nowhere/debian\.qcow2"):
        parsers.image(parsers.Text("debian.qcow2", Path("/nowhere")))


def test_the_profile_of_a_host_names_no_file_of_the_machine_that_runs_pytest(tmp_path: Path) -> None:
    file = tmp_path / "debian.qcow2"
    file.write_bytes(b"the image")
    with pytest.raises(SettingsError, match="a file would be one of the machine that runs pytest"):
        Settings().with_profile({"image": str(file)})
    assert Settings().with_profile({"image": f"{URL}#sha256:{SUM}"}).image == f"{URL}#sha256:{SUM}"


def test_the_host_downloads_an_image_once_and_checks_it_afterwards() -> None:
    storage = Storage({URL: b"the image"})
    volid, result, _ = transfer(storage, f"{URL}#sha256:{SUM}")
    assert volid == f"local:import/debian-13-{SUM[:16]}.qcow2"
    assert result.startswith("downloaded")
    _, result, _ = transfer(storage, f"{URL}#sha256:{SUM}")
    assert result.startswith("exists already")
    assert storage.fetched == [URL]


def test_two_images_of_one_name_are_two_volumes() -> None:
    other = "https://images.example/daily/debian-13.qcow2"
    storage = Storage({URL: b"the image", other: b"another"})
    first, _, _ = transfer(storage, f"{URL}#sha256:{SUM}")
    second, _, _ = transfer(storage, f"{other}#sha256:{hashlib.sha256(b'another').hexdigest()}")
    assert first != second
    assert sorted(storage.files.values()) == [b"another", b"the image"]


def test_a_download_with_another_checksum_is_not_used() -> None:
    storage = Storage({URL: b"changed on the way"})
    with pytest.raises(PveError, match=r"checksum mismatch.*correct the setting"):
        transfer(storage, f"{URL}#sha256:{SUM}")
    assert storage.files == {}


def test_a_damaged_file_in_the_cache_is_reported_with_the_command_that_removes_it() -> None:
    storage = Storage({URL: b"the image"})
    volid, _, _ = transfer(storage, f"{URL}#sha256:{SUM}")
    storage.files[volid.rpartition("/")[2]] = b"half"
    with pytest.raises(PveError, match=f"pvesm free {volid}"):
        transfer(storage, f"{URL}#sha256:{SUM}")


def test_a_local_file_is_uploaded_once_under_a_name_with_its_checksum(tmp_path: Path) -> None:
    file = tmp_path / "mine.raw"
    file.write_bytes(b"x" * 3_000_000)
    storage = Storage()
    volid, result, messages = transfer(storage, str(file))
    assert storage.files == {volid.rpartition("/")[2]: file.read_bytes()}
    assert result == f"copied from {file}, 3 MiB"
    assert len(messages) >= 20
    assert messages[-1].endswith("100 % of 3 MiB")
    assert transfer(storage, str(file))[1] == "exists already"
    file.write_bytes(b"y" * 3_000_000)
    transfer(storage, str(file))
    assert storage.uploads == 2


def test_an_incomplete_copy_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "mine.raw"
    file.write_bytes(b"the image")
    storage = Storage()
    volid, _, _ = transfer(storage, str(file))
    storage.files[volid.rpartition("/")[2]] = b"the"
    transfer(storage, str(file))
    assert storage.files[volid.rpartition("/")[2]] == b"the image"


def test_a_failed_download_is_reported_with_the_alternative() -> None:
    class Offline(Storage):
        def post(self, _path: str, /, **_params: Any) -> str:
            raise classify("download failed: exit code 4", 255, "create download-url")

    with pytest.raises(PveError, match="name a local file"):
        transfer(Offline(), f"{URL}#sha256:{SUM}")
