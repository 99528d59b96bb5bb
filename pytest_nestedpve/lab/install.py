"""`nestedpve-lab install`: everything a lab needs on this machine. Only this module runs apt."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from . import lifecycle, outer_node, programs, requirements
from .build import image, keys
from .names import LabError


def install(report: Callable[[str], None]) -> None:
    """Install missing programs; build image, repository and father's layers unless they exist.

    LabUnavailable, LabError.
    """
    requirements.check({})
    needed = {**programs.TO_RUN, **({} if image.base_ready() else programs.TO_BUILD)}
    needed |= {} if is_built() else programs.TO_BUILD
    lacking = programs.missing(needed)
    if lacking:
        _apt(sorted(set(lacking.values())), report)
        lacking = programs.missing(needed)
        if lacking:
            names = ", ".join(lacking)
            raise LabError(f"apt has installed its packages, but programs are still missing: {names}")
    requirements.check()
    with lifecycle.building():
        keys.create()
        image.build_base(keys.public("debian"), report)
        outer_node.build(report)
        if not lifecycle.list_names():
            for path in outer_node.stale_dirs():
                shutil.rmtree(path, ignore_errors=True)


def is_built() -> bool:
    """Whether image, repositories, keys and layers exist as the present recipes need them."""
    if not (image.base_ready() and keys.public("pve").exists()):
        return False
    from .build import repository

    specs = repository.standins()
    paths = (
        repository.mirror_dir(),
        repository.pve_dir(specs),
        outer_node.system_dir(),
        outer_node.standin_dir(specs),
    )
    return all(path.exists() for path in paths)


def _apt(packages: list[str], report: Callable[[str], None]) -> None:
    if shutil.which("apt-get", path=programs.search_path()) is None:
        raise requirements.unavailable(
            f"missing: {' '.join(packages)} (names of Debian packages), and apt-get was not found",
            "Install the corresponding packages of your distribution",
        )
    report(f"Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": programs.search_path()}
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        # The package lists may be missing or old.
        update = ["apt-get", "update"]
        subprocess.run(update, capture_output=True, env=environment, check=False)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        end = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-8:])
        raise LabError(f"apt-get could not install {' '.join(packages)}:\n{end}")
