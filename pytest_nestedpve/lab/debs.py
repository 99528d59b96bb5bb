"""Building Debian packages from data."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import programs


@dataclass(frozen=True)
class DebSpec:
    """A package to build: `files` maps absolute paths to content and mode."""

    name: str
    version: str
    depends: str = ""
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    postinst: str = ""
    prerm: str = ""
    provides: str = ""
    description: str = ""


_SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
_FIELDS = ("depends", "provides", "conflicts", "replaces", "breaks", "recommends", "suggests")


def build_deb(spec: Any, folder: Path) -> Path:
    """Build the package in `folder` and return its path.

    `spec` is a DebSpec, or something like one: any further control field or maintainer script it has as an
    attribute is taken too; lists are joined by commas.
    """
    with tempfile.TemporaryDirectory(prefix="deb-", dir=folder) as scratch:
        tree = Path(scratch) / "tree"
        control = tree / "DEBIAN"
        control.mkdir(parents=True)
        tree.chmod(0o755)
        architecture = getattr(spec, "architecture", None) or "all"
        lines = [
            f"Package: {spec.name}",
            f"Version: {spec.version}",
            f"Architecture: {architecture}",
            "Maintainer: nested-pve lab <lab@nested-pve.test>",
        ]
        for name in _FIELDS:
            value = getattr(spec, name, None)
            if value:
                shown = value if isinstance(value, str) else ", ".join(value)
                lines.append(f"{name.capitalize()}: {shown}")
        description = getattr(spec, "description", "") or f"{spec.name}, as the lab plays it"
        lines.append(f"Description: {description}")
        (control / "control").write_text("\n".join(lines) + "\n")
        conffiles = getattr(spec, "conffiles", None)
        if conffiles:
            (control / "conffiles").write_text("".join(f"{path}\n" for path in conffiles))
        for name in _SCRIPTS:
            text = getattr(spec, name, None)
            if text:
                script = control / name
                script.write_text(text if text.startswith("#!") else f"#!/bin/sh\nset -e\n{text}\n")
                script.chmod(0o755)
        for path, (content, mode) in spec.files.items():
            file = tree / path.lstrip("/")
            file.parent.mkdir(parents=True, exist_ok=True)
            if content.startswith(b"-> ") and mode == 0o120777:
                file.symlink_to(content[3:].decode())
                continue
            file.write_bytes(content)
            file.chmod(mode)
        return pack(tree, folder / f"{spec.name}_{spec.version.split(':')[-1]}_{architecture}.deb")


def pack(tree: Path, target: Path) -> Path:
    """Build `target` from an unpacked package."""
    command: list[str | Path] = ["dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "-b", tree, target]
    programs.run(command, what=f"building the package {target.name}")
    return target


def unpack(deb: Path, tree: Path) -> None:
    """Unpack a package with its control files into `tree`."""
    shutil.rmtree(tree, ignore_errors=True)
    programs.run(["dpkg-deb", "-R", deb, tree], what=f"unpacking {deb.name}")
