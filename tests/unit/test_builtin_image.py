"""What the nested VM and the leaf boot: what a URL, a file or a name has to be, and how it gets there."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
from memory_host import MemoryHost
from standin_environment import environments

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


def environment(leaf_image: str | None = None, own: str | None = "local:import/debian-13.raw") -> Environment:
    made = SimpleNamespace(settings=Settings(leaf_image=leaf_image), facts={"preflight": {"image": own}})
    return cast(Environment, made)


class Storage:
    """A PVE host with one directory storage, as far as bringing an image goes; `web` is what URLs serve."""

    def __init__(self, web: dict[str, bytes] | None = None) -> None:
        self.web = web or {}
        self.files: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.uploads = 0
        self.exit = "OK"
        self.host = PveHost("outer", cast(Any, self), cast(Any, self), "outer")

    def get(self, path: str, /, **_params: Any) -> Any:
        if path == "/storage/local":
            return {"path": "/srv"}
        if path.endswith("/content"):
            return [{"volid": f"local:import/{name}", "size": len(data)} for name, data in self.files.items()]
        return {"status": "stopped", "exitstatus": self.exit} if path.endswith("/status") else []

    def post(self, path: str, /, **params: Any) -> str:
        assert path.endswith("/storage/local/download-url")
        name, wanted, self.exit = params["filename"], params["checksum"], "OK"
        there = self.files.get(name)
        if there is not None:
            if hashlib.new(params["checksum-algorithm"], there).hexdigest() != wanted:
                self.exit = f"refusing to override existing file '/srv/import/{name}'"
            return UPID
        self.fetched.append(params["url"])
        data = self.web[params["url"]]
        found = hashlib.new(params["checksum-algorithm"], data).hexdigest()
        if found == wanted:
            self.files[name] = data
        else:
            self.exit = f"checksum mismatch: got '{found}' != expect '{wanted}'"
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


def bring(storage: Storage, setting: str) -> tuple[str, str, list[str]]:
    """Volume, how it came there, and what was said meanwhile."""
    said: list[str] = []
    wanted = image_file.read(setting)
    how = image_file.provide(storage.host, "local", wanted, 60, said.append)
    return wanted.volume("local"), how, said


def test_without_a_setting_the_leaf_boots_what_the_nested_vm_boots() -> None:
    assert leaf_images.source(environment()) == "local:import/debian-13.raw"


def test_a_clone_needs_an_image_for_its_leaf() -> None:
    with pytest.raises(PveError, match="nested_pve_leaf_image"):
        leaf_images.source(environment(own=None))


def test_beside_a_template_the_leaf_boots_the_newest_debian_that_the_host_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    memory = MemoryHost(tmp_path / "host.json")
    with environments(memory, tmp_path) as make:
        env = make()
        env.facts["preflight"] = {"image": None, "template": 100, "node": "father"}
        with memory.open() as model:
            for name in ("debian-12-generic-amd64", "alpine"):
                model.state["volumes"][f"local:import/{name}.qcow2"] = {"content": "import", "vmid": None}
        assert leaf_images.source(env) == "local:import/debian-13-genericcloud-amd64.qcow2"
        with memory.open() as model:
            model.state["volumes"].clear()
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
def test_the_name_of_the_file_is_one_that_pve_imports(text: str, name: str) -> None:
    assert image_file.file_name(text) == name


def test_a_file_that_pve_does_not_import_is_refused() -> None:
    with pytest.raises(PveError, match=r"\.qcow2, \.raw"):
        image_file.file_name("https://images.example/debian.iso")


@pytest.mark.parametrize("given", ["", "#", "#sha256:xyz", "#crc32:00", "#sha256:0123", f"#sha512:{SUM}"])
def test_a_url_without_a_whole_checksum_is_refused_when_the_setting_is_read(given: str) -> None:
    with pytest.raises(ValueError, match="expected a checksum"):
        parsers.image(parsers.Text(URL + given, Path("/")))


def test_a_checksum_is_taken_as_it_is_published() -> None:
    for given in (f"sha256={SUM.upper()}", f"sha256:{SUM}"):
        assert parsers.image(parsers.Text(f"{URL}#{given}", Path("/"))) == f"{URL}#sha256:{SUM}"


def test_a_file_is_looked_for_where_the_setting_stands(tmp_path: Path) -> None:
    (tmp_path / "debian.qcow2").write_bytes(b"the image")
    found = parsers.image(parsers.Text("debian.qcow2", tmp_path))
    assert found == str(tmp_path / "debian.qcow2")
    with pytest.raises(ValueError, match=r"no file /nowhere/debian\.qcow2"):
        parsers.image(parsers.Text("debian.qcow2", Path("/nowhere")))


def test_the_profile_of_a_host_names_no_file_of_whoever_runs_pytest(tmp_path: Path) -> None:
    file = tmp_path / "debian.qcow2"
    file.write_bytes(b"the image")
    with pytest.raises(SettingsError, match="a file would be one of the machine that runs pytest"):
        Settings().with_profile({"image": str(file)})
    assert Settings().with_profile({"image": f"{URL}#sha256:{SUM}"}).image == f"{URL}#sha256:{SUM}"


def test_the_host_downloads_once_and_checks_afterwards() -> None:
    storage = Storage({URL: b"the image"})
    volid, how, _ = bring(storage, f"{URL}#sha256:{SUM}")
    assert volid == f"local:import/debian-13-{SUM[:16]}.qcow2"
    assert how.startswith("downloaded")
    _, how, _ = bring(storage, f"{URL}#sha256:{SUM}")
    assert how.startswith("exists already")
    assert storage.fetched == [URL]


def test_two_images_of_one_name_do_not_meet_on_the_storage() -> None:
    other = "https://images.example/daily/debian-13.qcow2"
    storage = Storage({URL: b"the image", other: b"another"})
    first, _, _ = bring(storage, f"{URL}#sha256:{SUM}")
    second, _, _ = bring(storage, f"{other}#sha256:{hashlib.sha256(b'another').hexdigest()}")
    assert first != second
    assert sorted(storage.files.values()) == [b"another", b"the image"]


def test_another_file_than_the_checksum_names_is_not_used() -> None:
    storage = Storage({URL: b"changed on the way"})
    with pytest.raises(PveError, match=r"checksum mismatch.*correct the setting"):
        bring(storage, f"{URL}#sha256:{SUM}")
    assert storage.files == {}


def test_a_damaged_file_in_the_cache_is_told_with_the_command_that_removes_it() -> None:
    storage = Storage({URL: b"the image"})
    volid, _, _ = bring(storage, f"{URL}#sha256:{SUM}")
    storage.files[volid.rpartition("/")[2]] = b"half"
    with pytest.raises(PveError, match=f"pvesm free {volid}"):
        bring(storage, f"{URL}#sha256:{SUM}")


def test_a_local_file_is_uploaded_once_under_a_name_of_its_content(tmp_path: Path) -> None:
    file = tmp_path / "mine.raw"
    file.write_bytes(b"x" * 3_000_000)
    storage = Storage()
    volid, how, said = bring(storage, str(file))
    assert storage.files == {volid.rpartition("/")[2]: file.read_bytes()}
    assert how == f"copied from {file}, 3 MiB"
    assert len(said) >= 20
    assert said[-1].endswith("100 % of 3 MiB")
    assert bring(storage, str(file))[1] == "exists already"
    file.write_bytes(b"y" * 3_000_000)
    bring(storage, str(file))
    assert storage.uploads == 2


def test_a_file_that_was_not_copied_whole_is_copied_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.raw"
    file.write_bytes(b"the image")
    storage = Storage()
    volid, _, _ = bring(storage, str(file))
    storage.files[volid.rpartition("/")[2]] = b"the"
    bring(storage, str(file))
    assert storage.files[volid.rpartition("/")[2]] == b"the image"


def test_a_download_that_fails_says_what_else_there_is() -> None:
    class Offline(Storage):
        def post(self, _path: str, /, **_params: Any) -> str:
            raise classify("download failed: exit code 4", 255, "create download-url")

    with pytest.raises(PveError, match="name a local file"):
        bring(Offline(), f"{URL}#sha256:{SUM}")
