"""Sources are packed with their own files: no ignored files, caches, secrets or foreign links."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from pytest_nestedpve.config.parsers import Source
from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.setup.ansible import play_variables
from pytest_nestedpve.setup.ansible.sources import Packed, SourceError, pack

GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main"]


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run([*GIT, "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(root: Path, name: str, text: str = "x\n") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def text_of(packed: Packed, name: str) -> str:
    with tarfile.open(packed.archive) as tar:
        file = tar.extractfile(name)
        assert file is not None
        return file.read().decode()


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    root.mkdir()
    git(root, "init", "-q")
    write(root, ".gitignore", "*.secret\nbuilt/\n")
    write(root, "tracked.txt", "first\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_tracked_files_are_packed_with_their_current_contents(repo: Path, tmp_path: Path) -> None:
    write(repo, "tracked.txt", "edited\n")
    packed = pack(Source("site", str(repo)), tmp_path / "out")
    assert text_of(packed, "tracked.txt") == "edited\n"


def test_untracked_files_are_packed_and_ignored_ones_are_not(repo: Path, tmp_path: Path) -> None:
    write(repo, "new.txt")
    write(repo, "api.secret")
    write(repo, "built/output")
    packed = pack(Source("site", str(repo)), tmp_path / "out")
    assert packed.files == (".gitignore", "new.txt", "tracked.txt")


def test_a_deleted_tracked_file_is_left_out(repo: Path, tmp_path: Path) -> None:
    (repo / "tracked.txt").unlink()
    assert pack(Source("site", str(repo)), tmp_path / "out").files == (".gitignore",)


@pytest.mark.parametrize(
    "name", [".git/config", ".nested-pve/runs/x", ".venv/bin/python", "a/__pycache__/b.pyc", ".tox/log"]
)
def test_git_state_and_caches_are_never_packed(repo: Path, tmp_path: Path, name: str) -> None:
    write(repo, name)
    packed = pack(Source("site", str(repo)), tmp_path / "out")
    assert packed.files == (".gitignore", "tracked.txt")


def test_a_tracked_cache_is_not_packed(repo: Path, tmp_path: Path) -> None:
    write(repo, "__pycache__/x.pyc")
    git(repo, "add", "-f", ".")
    assert pack(Source("site", str(repo)), tmp_path / "out").files == (".gitignore", "tracked.txt")


def test_paths_of_a_directory_inside_a_repository_are_relative_to_it(repo: Path, tmp_path: Path) -> None:
    write(repo, "below/one.txt")
    packed = pack(Source("site", str(repo / "below")), tmp_path / "out")
    assert packed.files == ("one.txt",)


def test_an_ignored_directory_that_is_configured_is_packed_whole(repo: Path, tmp_path: Path) -> None:
    write(repo, "built/result.bin")
    assert pack(Source("site", str(repo / "built")), tmp_path / "out").files == ("result.bin",)


def test_a_directory_without_git_is_packed_except_caches(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    for name in ("a.txt", "b/c.txt", ".venv/x", "b/node_modules/y", ".hidden"):
        write(root, name)
    assert pack(Source("site", str(root)), tmp_path / "out").files == (".hidden", "a.txt", "b/c.txt")


def test_a_broken_repository_is_refused_rather_than_packed_whole(tmp_path: Path) -> None:
    root = tmp_path / "broken"
    write(root, "api.secret")
    write(root, ".git", "gitdir: /nonexistent\n")
    with pytest.raises(SourceError, match=r"does not accept it as a working tree"):
        pack(Source("site", str(root)), tmp_path / "out")


def test_excluded_files_inside_the_source_are_in_no_archive(repo: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    write(plain, "site.yml")
    for root, others in ((repo, (".gitignore", "tracked.txt")), (plain, ("site.yml",))):
        write(root, "in/real.yml", "hunter2\n")
        write(root, "token", "hunter2\n")
        (root / "secrets.yml").symlink_to("in/real.yml")
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(root)
        without = [root / "secrets.yml", tmp_path / "link/token"]
        assert pack(Source("site", str(root)), tmp_path / "out", without=without).files == others


def test_a_secret_inside_a_source_is_copied_separately_and_not_to_the_leaf(tmp_path: Path) -> None:
    secret = write(tmp_path, "plain/secrets.yml")
    write(tmp_path, "plain/site.yml")
    settings = Settings(sources=(Source("site", str(secret.parent)),), secrets=(secret,))
    packed = play_variables.pack_sources(settings, cast(Run, SimpleNamespace(dir=tmp_path / "run")))
    assert [source.files for source in packed] == [("site.yml",)]
    assert play_variables.leaf(settings, packed)["nested_pve_secret_files"] == []
    (secret_file,) = play_variables.source_variables(settings, packed)["nested_pve_secret_files"]
    assert secret_file == {"src": str(secret), "dest": "/opt/sources/site/secrets.yml"}


def test_modes_keep_only_whether_a_file_is_executable(repo: Path, tmp_path: Path) -> None:
    write(repo, "run.sh").chmod(0o700)
    write(repo, "data").chmod(0o666)
    packed = pack(Source("site", str(repo)), tmp_path / "out")
    with tarfile.open(packed.archive) as tar:
        assert tar.getmember("run.sh").mode == 0o755
        assert tar.getmember("data").mode == 0o644
        assert {member.uname for member in tar} == {"root"}


def test_a_link_inside_the_source_is_packed_as_a_link(repo: Path, tmp_path: Path) -> None:
    (repo / "link").symlink_to("tracked.txt")
    packed = pack(Source("site", str(repo)), tmp_path / "out")
    with tarfile.open(packed.archive) as tar:
        assert tar.getmember("link").linkname == "tracked.txt"


@pytest.mark.parametrize("target", ["/etc/shadow", "../outside"])
def test_a_link_out_of_the_source_is_refused(repo: Path, tmp_path: Path, target: str) -> None:
    (repo / "link").symlink_to(target)
    with pytest.raises(SourceError, match="links inside the source"):
        pack(Source("site", str(repo)), tmp_path / "out")


def test_the_archive_is_readable_by_its_owner_only(repo: Path, tmp_path: Path) -> None:
    packed = pack(Source("site", str(repo)), tmp_path / "out")
    assert stat.S_IMODE(packed.archive.stat().st_mode) == 0o600


def test_the_digest_changes_with_contents_and_modes_but_not_with_times(repo: Path, tmp_path: Path) -> None:
    source = Source("site", str(repo))
    first = pack(source, tmp_path / "out").digest
    os.utime(repo / "tracked.txt", (1, 1))
    assert pack(source, tmp_path / "out").digest == first
    (repo / "tracked.txt").chmod(0o755)
    changed_mode = pack(source, tmp_path / "out").digest
    write(repo, "tracked.txt", "other\n")
    assert len({first, changed_mode, pack(source, tmp_path / "out").digest}) == 3


def test_an_empty_source_is_an_error(tmp_path: Path) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    with pytest.raises(SourceError, match="found none"):
        pack(Source("site", str(root)), tmp_path / "out")


def test_of_a_git_url_the_tree_of_its_ref_is_packed(repo: Path, tmp_path: Path) -> None:
    git(repo, "tag", "v1")
    write(repo, "tracked.txt", "second\n")
    git(repo, "commit", "-q", "-a", "-m", "second")
    url = f"file://{repo}"
    assert text_of(pack(Source("a", url, "v1"), tmp_path / "out"), "tracked.txt") == "first\n"
    assert text_of(pack(Source("b", url), tmp_path / "out"), "tracked.txt") == "second\n"
    commit = git(repo, "rev-parse", "v1")
    for ref in (commit, commit[:10]):
        assert text_of(pack(Source("c", url, ref), tmp_path / "out"), "tracked.txt") == "first\n"


def test_the_message_has_the_unknown_ref_and_no_password(tmp_path: Path, repo: Path) -> None:
    with pytest.raises(SourceError, match="nosuch"):
        pack(Source("site", f"file://{repo}", "nosuch"), tmp_path / "out")
    with pytest.raises(SourceError) as caught:
        pack(Source("site", "http://me:hunter2@127.0.0.1:9/x.git", "v1"), tmp_path / "out")
    assert "hunter2" not in str(caught.value)


def test_git_variables_of_the_environment_have_no_effect(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "index"))
    assert pack(Source("site", str(repo)), tmp_path / "out").files == (".gitignore", "tracked.txt")
