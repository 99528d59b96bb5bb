"""`nestedpve-lab install`: everything a lab needs on this machine. The only place that runs apt here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from . import lifecycle, outer_node, programs, requirements
from .build import image, keys
from .names import LabError


def install(say: Callable[[str], None]) -> None:
    """Install missing programs, make image, repository and father's layers; nothing to do takes no time.

    LabUnavailable, LabError.
    """
    requirements.check({})
    needed = {**programs.TO_RUN, **({} if image.base_ready() else programs.TO_BUILD)}
    needed |= {} if father_ready() else programs.TO_BUILD
    lacking = programs.missing(needed)
    if lacking:
        _apt(sorted(set(lacking.values())), say)
        lacking = programs.missing(needed)
        if lacking:
            shown = ", ".join(lacking)
            raise LabError(f"apt has installed its packages, but programs are still missing: {shown}")
    requirements.check()
    with lifecycle.building():
        keys.make()
        image.build_base(keys.public("debian"), say)
        outer_node.build(say)
        if not lifecycle.names():
            for old in outer_node.stale():
                shutil.rmtree(old, ignore_errors=True)


def father_ready() -> bool:
    """Whether nothing has to be built for the next lab."""
    if not (image.base_ready() and keys.public("pve").exists()):
        return False
    from .build import repository

    specs = repository.standins()
    places = (
        repository.mirror_dir(),
        repository.pve_dir(specs),
        outer_node.system_dir(),
        outer_node.standin_dir(specs),
    )
    return all(place.exists() for place in places)


def _apt(packages: list[str], say: Callable[[str], None]) -> None:
    if shutil.which("apt-get", path=programs.search_path()) is None:
        raise requirements.unavailable(
            f"missing: {' '.join(packages)} (names of Debian packages), and there is no apt-get here",
            "Install what your distribution calls them",
        )
    say(f"Debian packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": programs.search_path()}
    command = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        # The lists are missing or old.
        update = ["apt-get", "update"]
        subprocess.run(update, capture_output=True, env=environment, check=False)
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        end = "\n".join(f"    {line}" for line in done.stderr.strip().splitlines()[-8:])
        raise LabError(f"apt-get could not install {' '.join(packages)}:\n{end}")
