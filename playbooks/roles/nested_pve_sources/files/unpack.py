#!/usr/bin/python3
"""unpack.py ARCHIVE DIRECTORY STATE DIGEST: update DIRECTORY to the contents of ARCHIVE.

Files of the last archive that are not in this one are deleted before the new ones are written, because a former
link or file may be a directory now. Files from other sources are kept. STATE is the path, without suffix, of the
list of files and of the digest by which the next run recognises that nothing has changed.
"""

import os
import sys
import tarfile
import tempfile


def inside(name):
    clean = os.path.normpath(name)
    if os.path.isabs(clean) or clean == ".." or clean.startswith("../"):
        raise SystemExit(f"expected paths inside the archive's directory, found {name!r}")
    return clean


def obstacle(directory, name):
    """The link or file at a path where `name` needs a directory, or None."""
    at = directory
    for part in name.split("/")[:-1]:
        at = os.path.join(at, part)
        if os.path.islink(at) or (os.path.exists(at) and not os.path.isdir(at)):
            return at
    return None


def remove(directory, name):
    path = os.path.join(directory, name)
    # Files behind a link, and directories, are from other sources.
    if obstacle(directory, name) or (os.path.isdir(path) and not os.path.islink(path)):
        return
    if os.path.lexists(path):
        os.unlink(path)
    while (path := os.path.dirname(path)) != directory:
        try:
            os.rmdir(path)
        except OSError:
            return


def write(tar, member, directory, name):
    target = os.path.join(directory, name)
    if blocked := obstacle(directory, name):
        raise SystemExit(f"expected a directory or nothing at {blocked}, found a link or a file: remove it")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(target) and not os.path.islink(target):
        raise SystemExit(f"expected a file or nothing at {target}, found a directory: remove it")
    if member.issym():
        if os.path.lexists(target):
            os.unlink(target)
        os.symlink(member.linkname, target)
        return
    # Written beside the target, then moved over it: a running program keeps its old file.
    handle, temporary = tempfile.mkstemp(prefix=".npve-", dir=os.path.dirname(target))
    try:
        with os.fdopen(handle, "wb") as out, tar.extractfile(member) as data:
            while block := data.read(1 << 20):
                out.write(block)
            os.fchmod(out.fileno(), member.mode & 0o777)
        os.utime(temporary, (member.mtime, member.mtime))
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def write_text(path, text):
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


def main():
    archive, directory, state, digest = sys.argv[1:5]
    try:
        with open(state + ".files", encoding="utf-8", errors="surrogateescape") as file:
            before = set(file.read().split("\0")) - {""}
    except OSError:
        before = set()
    os.makedirs(directory, exist_ok=True)
    with tarfile.open(archive) as tar:
        members = {inside(member.name): member for member in tar if member.isreg() or member.issym()}
        # After an interruption the next run starts again, with any archive, and has the list of files written here.
        write_text(state + ".digest", "")
        write_text(state + ".files", "\0".join(sorted(before | set(members))))
        for name in sorted(before - set(members), reverse=True):
            remove(directory, inside(name))
        for name, member in members.items():
            write(tar, member, directory, name)
    write_text(state + ".files", "\0".join(sorted(members)))
    write_text(state + ".digest", digest)


main()
