"""Building Debian packages from data."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .. import programs
from ..node.packages import DebSpec


def build_deb(spec: DebSpec, folder: Path) -> Path:
    """Build the package in `folder` and return its path. LabError when dpkg-deb fails."""
    with tempfile.TemporaryDirectory(prefix="deb-", dir=folder) as scratch:
        tree = Path(scratch) / "tree"
        control = tree / "DEBIAN"
        control.mkdir(parents=True)
        tree.chmod(0o755)
        fields = {
            "Package": spec.name,
            "Version": spec.version,
            "Architecture": spec.architecture,
            "Maintainer": "nested-pve lab <lab@nested-pve.test>",
            "Depends": spec.depends,
            "Provides": spec.provides,
            "Description": spec.description,
        }
        lines = [f"{name}: {value}\n" for name, value in fields.items() if value]
        (control / "control").write_text("".join(lines))
        if spec.conffiles:
            (control / "conffiles").write_text("".join(f"{path}\n" for path in spec.conffiles))
        for name, text in (("postinst", spec.postinst), ("prerm", spec.prerm)):
            if text:
                script = control / name
                script.write_text(text)
                script.chmod(0o755)
        for path, (content, mode) in spec.files.items():
            file = tree / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            file.chmod(mode)
        return pack(tree, folder / f"{spec.name}_{spec.version.split(':')[-1]}_{spec.architecture}.deb")


def pack(tree: Path, target: Path) -> Path:
    """Build the package `target` from the unpacked `tree`."""
    command: list[str | Path] = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", tree, target]
    programs.run(command, what=f"building the package {target.name}")
    return target


def unpack(deb: Path, tree: Path) -> None:
    """Unpack a package with its control files into `tree`."""
    shutil.rmtree(tree, ignore_errors=True)
    programs.run(["dpkg-deb", "-R", deb, tree], what=f"unpacking {deb.name}")
