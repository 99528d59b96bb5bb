"""unpack.py: a directory holds what the last archive holds, whatever the one before held there."""

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
    """What goes wrong, or an empty text. A text that begins with LINK makes a link."""
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


def found(root: Path) -> dict[str, str]:
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


def test_a_name_may_become_something_else(tmp_path: Path) -> None:
    rest = {"real/x": "1"}
    # each kind after each other one
    order = "file link file directory file nothing link directory link nothing directory nothing file"
    for number, kind in enumerate(order.split()):
        assert unpack(tmp_path, rest | KINDS[kind], str(number)) == ""
        assert found(tmp_path) == rest | KINDS[kind]
        assert (tmp_path / "state.digest").read_text() == str(number)


def test_what_was_made_there_stays_and_is_named_where_it_is_in_the_way(tmp_path: Path) -> None:
    assert unpack(tmp_path, {"conf/y": "1", "real/x": "1"}, "first") == ""
    there = tmp_path / "there"
    (there / "conf/made").write_text("here")
    (there / "link").symlink_to("real")
    assert f"at {there}/conf, found a directory: remove it" in unpack(tmp_path, {"conf": "2"}, "second")
    assert f"at {there}/link, found a link or a file: remove it" in unpack(tmp_path, {"link/x": "3"}, "third")
    assert found(tmp_path) == {"conf/made": "here", "link": f"{LINK}real"}
    assert (tmp_path / "state.digest").read_text() == "", "what failed is done again"


def test_nothing_behind_a_link_that_came_from_elsewhere_is_removed(tmp_path: Path) -> None:
    assert unpack(tmp_path, {"conf/y": "1", "x": "1"}, "first") == ""
    (tmp_path / "there/conf").rename(tmp_path / "elsewhere")
    (tmp_path / "there/conf").symlink_to(tmp_path / "elsewhere")
    assert unpack(tmp_path, {"x": "1"}, "second") == ""
    assert (tmp_path / "elsewhere/y").read_text() == "1"


def test_what_a_run_wrote_that_was_cut_off_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "there/stands").mkdir(parents=True)
    assert unpack(tmp_path, {"a": "1", "stands": "1"}, "first") != ""
    assert unpack(tmp_path, {"a/b": "2"}, "second") == ""
    assert found(tmp_path) == {"a/b": "2"}


def test_an_archive_never_writes_outside_of_its_directory(tmp_path: Path) -> None:
    assert "expected paths inside" in unpack(tmp_path, {"../out": "1"}, "first")
    assert "found a link" in unpack(tmp_path, {"up": f"{LINK}..", "up/out": "1"}, "first")
    assert not (tmp_path / "out").exists()
