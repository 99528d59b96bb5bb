"""Building the project's wheel and installing it, without a network, for tests of an installation."""

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
    """Build the project's wheel into `folder` by the installed build backend; return its path."""
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("pytest_nestedpve-*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment and return that environment's `python`.

    The wheel's dependencies are those of the present environment: its site-packages directory is on the path,
    but its .pth files are not read, so that the project itself is not imported from the repository.
    """
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    site = site_packages(folder)
    # "zz": sorted after everything in the new environment.
    (site / "zz-shared.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return python


def site_packages(folder: Path) -> Path:
    """The site-packages directory of an environment."""
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))
