#!/usr/bin/python3
"""unpack.py ARCHIVE DIRECTORY STATE DIGEST: make DIRECTORY hold what ARCHIVE holds.

Files of the last archive that are not in this one go, before this one's come: what was a link or a file may be
a directory now. Files that came from elsewhere stay. STATE is the path, without ending, of the list of files and
the digest that tells the next run that nothing is to do.
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


def in_the_way(directory, name):
    """The link or file that stands where `name` needs a directory, or None."""
    at = directory
    for part in name.split("/")[:-1]:
        at = os.path.join(at, part)
        if os.path.islink(at) or (os.path.exists(at) and not os.path.isdir(at)):
            return at
    return None


def remove(directory, name):
    path = os.path.join(directory, name)
    # What lies behind a link, or is a directory now, came from elsewhere.
    if in_the_way(directory, name) or (os.path.isdir(path) and not os.path.islink(path)):
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
    if found := in_the_way(directory, name):
        raise SystemExit(f"expected a directory or nothing at {found}, found a link or a file: remove it")
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


def note(path, text):
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
        members = {inside(each.name): each for each in tar if each.isreg() or each.issym()}
        # A run that is cut off is done again, whichever archive comes next, and knows what this one wrote.
        note(state + ".digest", "")
        note(state + ".files", "\0".join(sorted(before | set(members))))
        for name in sorted(before - set(members), reverse=True):
            remove(directory, inside(name))
        for name, member in members.items():
            write(tar, member, directory, name)
    note(state + ".files", "\0".join(sorted(members)))
    note(state + ".digest", digest)


main()
