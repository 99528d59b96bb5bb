"""Programs that the lab needs on the machine, and how they are run."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from .names import LabError

# Program → Debian package. Programs of father and the nodes are in the image.
TO_RUN = {
    "ip": "iproute2",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "pivot_root": "util-linux",
    "mount": "mount",
    "cp": "coreutils",
}
TO_BUILD = {
    "mmdebstrap": "mmdebstrap",
    "mksquashfs": "squashfs-tools",
    "apt-ftparchive": "apt-utils",
    "dpkg-deb": "dpkg",
    "gpg": "gpg",
    "gpg-agent": "gpg-agent",
    "gpgconf": "gpgconf",
}


def missing(programs: Mapping[str, str]) -> dict[str, str]:
    """Those of `programs` that are not on PATH (or in the sbin directories), with their packages."""
    path = search_path()
    return {name: package for name, package in programs.items() if shutil.which(name, path=path) is None}


def search_path() -> str:
    """PATH with the directories of system programs, which a user's PATH may lack."""
    import os

    known = os.environ.get("PATH", "").split(":")
    return ":".join([*known, *(d for d in ("/usr/sbin", "/sbin", "/usr/bin", "/bin") if d not in known)])


def run(
    command: Sequence[object],
    *,
    what: str,
    stdin: bytes | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> bytes:
    """Run a program to its end and return its standard output.

    With `log` both streams are appended to that file, and the result is empty. LabError with `what` (the
    action, as "building the image") and the end of the program's output if it fails.
    """
    import os

    argv = [str(part) for part in command]
    environment = {**os.environ, "PATH": search_path(), "LC_ALL": "C.UTF-8", **(env or {})}
    if log is None:
        done = subprocess.run(argv, input=stdin, capture_output=True, cwd=cwd, env=environment, check=False)
        output = (done.stderr or done.stdout).decode(errors="replace")
    else:
        with open(log, "ab") as file:
            begin = file.tell()
            done = subprocess.run(
                argv, input=stdin or b"", stdout=file, stderr=file, cwd=cwd, env=environment, check=False
            )
        output = log.read_bytes()[begin:].decode(errors="replace") if done.returncode else ""
    if done.returncode != 0:
        end = "\n".join(f"    {line}" for line in output.strip().splitlines()[-12:])
        where = f"\n  full output: {log}" if log else ""
        raise LabError(f"{what} failed: {argv[0]} ended with status {done.returncode}\n{end}{where}")
    return done.stdout or b""
