#!/usr/bin/python3
"""unpack.py ARCHIVE DIRECTORY STATE DIGEST: make DIRECTORY hold what ARCHIVE holds.

Files of the last archive that are not in this one go; files that came from elsewhere stay. STATE is the
path, without ending, of the list of files and the digest that tells the next run that nothing is to do.
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


def write(tar, member, target):
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(target) and not os.path.islink(target):
        raise SystemExit(f"expected a file or nothing at {target}, found a directory: remove it")
    if member.issym():
        if os.path.lexists(target):
            os.unlink(target)
        os.symlink(member.linkname, target)
        return
    # Beside the target, then over it: a program that runs keeps its old file.
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


def main():
    archive, directory, state, digest = sys.argv[1:5]
    try:
        with open(state + ".files", encoding="utf-8", errors="surrogateescape") as file:
            before = set(file.read().split("\0")) - {""}
    except OSError:
        before = set()
    os.makedirs(directory, exist_ok=True)
    names = set()
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isreg() or member.issym():
                name = inside(member.name)
                names.add(name)
                write(tar, member, os.path.join(directory, name))
    for name in sorted(before - names, reverse=True):
        path = os.path.join(directory, inside(name))
        if os.path.lexists(path):
            os.unlink(path)
        above = os.path.dirname(path)
        while above != directory and not os.listdir(above):
            os.rmdir(above)
            above = os.path.dirname(above)
    with open(state + ".files", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write("\0".join(sorted(names)))
    # Last: a run that was cut off is done again.
    with open(state + ".digest", "w", encoding="ascii") as file:
        file.write(digest)


main()
