"""Build the project's wheel and install it, without a network, for tests of what a user gets."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parent.parent


def _run(*command: str | Path, cwd: Path = ROOT) -> None:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"


def build_wheel(folder: Path) -> Path:
    """The wheel of the project, built into `folder` by the build backend that is installed beside it."""
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("pytest_nestedpve-*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Path:
    """Its `python` in a new environment, which lends what the wheel depends on from the present one.

    The project itself does not come along: of the present site-packages only what lies in it is seen, not
    what its .pth files point to.
    """
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    site = site_packages(folder)
    # "zz": after all that is in the environment itself.
    (site / "zz-lent.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return python


def site_packages(folder: Path) -> Path:
    """Where an environment keeps its packages."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
