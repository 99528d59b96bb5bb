"""Pack each source on the client into one tar file.

Of a git working tree: the tracked files with their current contents, and untracked files that git does not
ignore. Of another directory: all files. Of a git URL: the tree of its ref. `CACHES` (`.git`, state, caches)
are always left out; files of submodules are included.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pytest_nestedpve.config.parsers import Source, without_password
from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.deadline import scaled
from pytest_nestedpve.pve.errors import CommandTimeout, PveError

# Version control, state and caches: always left out, even if tracked.
CACHES = frozenset({
    ".git", ".hg", ".svn", ".nested-pve", ".venv", "venv", "__pycache__", ".pytest_cache", ".mypy_cache",
    ".ruff_cache", ".hypothesis", ".tox", ".nox", ".cache", "node_modules", ".terraform", ".direnv",
})  # fmt: skip
LARGEST_FILE = 512 * 1024 * 1024


class SourceError(PveError):
    """A source cannot be packed; the message has what was expected and found, and what to do."""


@dataclass(frozen=True)
class Packed:
    """A source as a tar file. `digest` covers names, modes and contents, not times."""

    name: str
    archive: Path
    digest: str
    files: tuple[str, ...]
    size: int  # bytes, unpacked
    origin: str  # for messages: the path, or the URL without password, and the commit


def pack(source: Source, target: Path, *, without: Iterable[Path] = (), timeout: float = 300.0) -> Packed:
    """Write the tar of `source`, except the files `without`, into the directory `target`, mode 0600.

    Modes in it: 0755 for files that the owner may execute, else 0644. Symbolic links are preserved; one that
    points out of the source is an error. `timeout` (seconds) limits each git command. Raises SourceError,
    CommandTimeout.
    """
    target.mkdir(mode=0o700, parents=True, exist_ok=True)
    if source.is_git:
        with tempfile.TemporaryDirectory(prefix="npve-source-") as scratch:
            root, commit = _clone(source, Path(scratch), timeout)
            origin = (
                f"{without_password(source.location)} at {source.ref or 'its default branch'} ({commit[:12]})"
            )
            return _write(source.name, root, _listed(root, timeout), target, origin)
    root = Path(source.location)
    if not root.is_dir():
        raise SourceError(f"source {source.name}: expected a directory at {root}, found none")
    files = _listed(root, timeout) if in_work_tree(root, timeout) else _walked(root)
    # The link itself and its target: each of them would disclose the content.
    excluded = {entry for path in without for entry in (path.parent.resolve() / path.name, path.resolve())}
    real = root.resolve()
    return _write(
        source.name, root, [name for name in files if real / name not in excluded], target, str(root)
    )


def in_work_tree(root: Path, timeout: float = 30.0) -> bool:
    """Whether `root` is inside a git working tree that does not ignore it. Raises SourceError."""
    try:
        done = _run(["git", "-C", str(root), "rev-parse", "--is-inside-work-tree"], timeout)
    except FileNotFoundError:
        return False
    if done.returncode != 0 or done.stdout.strip() != b"true":
        if (root / ".git").exists():
            # Git refuses repositories of other owners: packing all files would include ignored secrets.
            raise SourceError(
                f"{root} has a .git, but git does not accept it as a working tree: "
                f"{done.stderr.decode(errors='replace').strip()}"
            )
        return False
    # A configured directory that its repository ignores (such as a build result) is packed whole.
    return _run(["git", "-C", str(root), "check-ignore", "-q", "."], timeout).returncode != 0


def _environment() -> dict[str, str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for name in ("GIT_SSH_COMMAND", "GIT_SSH", "GIT_ASKPASS"):
        if name in os.environ:
            variables[name] = os.environ[name]
    return variables | {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C.UTF-8"}


def _run(command: list[str], timeout: float) -> subprocess.CompletedProcess[bytes]:
    limit = scaled(timeout)
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            env=_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        # `from None`: the original has the command line, whose URL may contain a password.
        raise CommandTimeout(f"git did not end within {e.timeout:g} s") from None


def _git(source: Source, root: Path, *arguments: str, timeout: float) -> bytes:
    try:
        done = _run(["git", "-C", str(root), *arguments], timeout)
    except FileNotFoundError as e:
        raise SourceError(f"source {source.name}: a git URL needs git: apt-get install git") from e
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").replace(
            source.location, without_password(source.location)
        )
        raise SourceError(
            f"source {source.name}: git {arguments[0]} of {without_password(source.location)}"
            f"{' at ' + source.ref if source.ref else ''} failed: {message.strip()[-1000:]}"
        )
    return done.stdout


def _clone(source: Source, scratch: Path, timeout: float) -> tuple[Path, str]:
    """A working tree of the ref: a branch, a tag or a commit."""
    root = scratch / "tree"
    root.mkdir()
    _git(source, root, "init", "-q", timeout=timeout)
    ref = source.ref or "HEAD"
    try:
        _git(source, root, "fetch", "-q", "--depth=1", "--", source.location, ref, timeout=timeout)
        commit = "FETCH_HEAD"
    except SourceError:
        # A short commit id cannot be fetched by name: the whole history is fetched.
        _git(source, root, "fetch", "-q", "--tags", "--", source.location, "+refs/heads/*:refs/remotes/o/*",
             timeout=timeout)  # fmt: skip
        commit = ref
    _git(source, root, "-c", "advice.detachedHead=false", "checkout", "-q", commit, timeout=timeout)
    return root, _git(source, root, "rev-parse", "HEAD", timeout=timeout).decode().strip()


def _listed(root: Path, timeout: float) -> list[str]:
    """Tracked files, untracked files that are not ignored, and files of submodules that are checked out."""
    answer = _ls_files(root, ["--cached", "--others", "--exclude-standard"], timeout)
    # --recurse-submodules lists tracked files only, those of the submodules included.
    answer += _ls_files(root, ["--cached", "--recurse-submodules"], timeout)
    names = {os.fsdecode(name) for name in answer.split(b"\0") if name}
    # Deleted files may still be in the index. A submodule itself is a directory.
    return [name for name in names if (path := root / name).is_symlink() or path.is_file()]


def _ls_files(root: Path, options: list[str], timeout: float) -> bytes:
    done = _run(["git", "-C", str(root), "ls-files", "-z", *options], timeout)
    if done.returncode != 0:
        message = done.stderr.decode(errors="replace").strip()[-1000:]
        raise SourceError(f"git ls-files in {root} failed: {message}")
    return done.stdout


def _walked(root: Path) -> list[str]:
    names: list[str] = []
    for directory, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in CACHES)
        links = [name for name in below if (Path(directory) / name).is_symlink()]
        names += [os.path.relpath(os.path.join(directory, name), root) for name in [*files, *links]]
    return names


def _write(name: str, root: Path, files: Iterable[str], target: Path, origin: str) -> Packed:
    paths = sorted(path for path in set(files) if not CACHES.intersection(PurePosixPath(path).parts))
    archive = target / f"{name}.tar.gz"
    digest, size = hashlib.sha256(), 0
    added: list[str] = []
    with (
        local_file.replacement(archive) as out,
        tarfile.open(fileobj=out, mode="w:gz", compresslevel=3) as tar,
    ):
        for path in paths:
            entry = _entry(name, root, path)
            if entry is None:
                continue
            info, data = entry
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
            fields = (path, oct(info.mode), info.linkname, hashlib.sha256(data).hexdigest())
            digest.update("\0".join(fields).encode("utf-8", "surrogateescape") + b"\n")
            size += len(data)
            added.append(path)
    if not added:
        raise SourceError(f"source {name}: expected files at {origin}, found none that belong to it")
    return Packed(name, archive, digest.hexdigest(), tuple(added), size, origin)


def _entry(name: str, root: Path, relative: str) -> tuple[tarfile.TarInfo, bytes] | None:
    """The tar header and content of one file; None for a socket, pipe or device."""
    path = root / relative
    try:
        status = path.lstat()
        info = tarfile.TarInfo(relative)
        info.mtime, info.uname, info.gname = int(status.st_mtime), "root", "root"
        if stat.S_ISLNK(status.st_mode):
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, os.readlink(path), 0o777
            inside = os.path.normpath(os.path.join(os.path.dirname(relative), info.linkname))
            if os.path.isabs(info.linkname) or inside == ".." or inside.startswith("../"):
                raise SourceError(
                    f"source {name}: expected links inside the source, found {relative} -> {info.linkname}; "
                    "make it relative, or exclude it by .gitignore"
                )
            return info, b""
        if not stat.S_ISREG(status.st_mode):
            return None
        if status.st_size > LARGEST_FILE:
            raise SourceError(
                f"source {name}: expected files up to {LARGEST_FILE >> 20} MiB, found {relative} with "
                f"{status.st_size >> 20} MiB; exclude it by .gitignore"
            )
        data = path.read_bytes()
    except OSError as e:
        raise SourceError(f"source {name}: cannot read {path}: {e.strerror}") from e
    info.size, info.mode = len(data), 0o755 if status.st_mode & stat.S_IXUSR else 0o644
    return info, data
