"""unpack.py: the content of the last archive replaces that of the former one."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "playbooks/roles/nested_pve_sources/files/unpack.py"
LINK = "-> "


def unpack(root: Path, files: Mapping[str, str], digest: str) -> str:
    """Unpack an archive of these files; the error or "". A text that begins with LINK is a link."""
    with tarfile.open(root / "archive.tar.gz", "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            if text.startswith(LINK):
                info.type, info.linkname = tarfile.SYMTYPE, text.removeprefix(LINK)
            info.size = len(text) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(text.encode()))
    done = subprocess.run(
        [sys.executable, "-I", SCRIPT, root / "archive.tar.gz", root / "there", root / "state", digest],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (not done.stderr)
    return done.stderr.strip()


def content(root: Path) -> dict[str, str]:
    paths = [path for path in (root / "there").rglob("*") if path.is_symlink() or not path.is_dir()]
    return {
        str(path.relative_to(root / "there")): f"{LINK}{path.readlink()}"
        if path.is_symlink()
        else path.read_text()
        for path in paths
    }


KINDS: dict[str, dict[str, str]] = {
    "file": {"conf": "1"},
    "link": {"conf": f"{LINK}real"},
    "directory": {"conf/y/z": "2", "conf/x": "2"},
    "nothing": {},
}


def test_a_name_may_become_another_type_of_file(tmp_path: Path) -> None:
    rest = {"real/x": "1"}
    # every kind of file follows every other kind
    order = "file link file directory file nothing link directory link nothing directory nothing file"
    for number, kind in enumerate(order.split()):
        assert unpack(tmp_path, rest | KINDS[kind], str(number)) == ""
        assert content(tmp_path) == rest | KINDS[kind]
        assert (tmp_path / "state.digest").read_text() == str(number)


def test_foreign_files_are_kept_and_named_in_the_error_if_they_are_in_the_way(tmp_path: Path) -> None:
    assert unpack(tmp_path, {"conf/y": "1", "real/x": "1"}, "first") == ""
    directory = tmp_path / "there"
    (directory / "conf/made").write_text("here")
    (directory / "link").symlink_to("real")
    assert f"at {directory}/conf, found a directory: remove it" in unpack(tmp_path, {"conf": "2"}, "second")
    assert f"at {directory}/link, found a link or a file: remove it" in unpack(
        tmp_path, {"link/x": "3"}, "third"
    )
    assert content(tmp_path) == {"conf/made": "here", "link": f"{LINK}real"}
    assert (tmp_path / "state.digest").read_text() == "", "a failed unpack is repeated"


def test_files_behind_a_foreign_link_are_kept(tmp_path: Path) -> None:
    assert unpack(tmp_path, {"conf/y": "1", "x": "1"}, "first") == ""
    (tmp_path / "there/conf").rename(tmp_path / "elsewhere")
    (tmp_path / "there/conf").symlink_to(tmp_path / "elsewhere")
    assert unpack(tmp_path, {"x": "1"}, "second") == ""
    assert (tmp_path / "elsewhere/y").read_text() == "1"


def test_files_of_an_interrupted_unpack_are_removed_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "there/stands").mkdir(parents=True)
    assert unpack(tmp_path, {"a": "1", "stands": "1"}, "first") != ""
    assert unpack(tmp_path, {"a/b": "2"}, "second") == ""
    assert content(tmp_path) == {"a/b": "2"}


def test_an_archive_never_writes_outside_of_its_directory(tmp_path: Path) -> None:
    assert "expected paths inside" in unpack(tmp_path, {"../out": "1"}, "first")
    assert "found a link" in unpack(tmp_path, {"up": f"{LINK}..", "up/out": "1"}, "first")
    assert not (tmp_path / "out").exists()
