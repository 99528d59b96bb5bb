"""The lab's package repository: a small Debian mirror and the PVE repository, each signed by its own key.

Its directories are those of father's web server, one per host name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from .. import programs
from ..names import MIRROR_HOST, PVE_HOST, PVE_KEY_FILE, SUITE, LabError, cache_dir
from ..node.packages import DebSpec, standin_packages
from . import keys
from .debs import build_deb, pack, unpack
from .image import base_dir, base_key

_RECIPE = 1
# Suites of the mirror without packages.
_EMPTY = ("trixie-updates", "trixie-backports", "trixie-security")
_PVE_COMPONENT = "pve-no-subscription"
_IFUPDOWN2_SUFFIX = "+pmx1"


def standins() -> list[DebSpec]:
    """The stand-in packages, as data."""
    key = keys.public("pve")
    return standin_packages(key.read_bytes() if key.exists() else b"")


def standins_key(specs: Sequence[DebSpec]) -> str:
    """A hash of the stand-in packages."""
    recipe = hashlib.sha256()
    for spec in specs:
        fields = {name: value for name, value in vars(spec).items() if name != "files"}
        recipe.update(json.dumps(fields, sort_keys=True, default=str).encode())
        for path, (content, mode) in sorted(spec.files.items()):
            recipe.update(f"{path}\0{mode}\0{len(content)}\0".encode() + content)
    return recipe.hexdigest()[:16]


def mirror_key() -> str:
    """A hash of the recipes of the mirror and of the rebuilt ifupdown2."""
    archive = keys.public("debian").read_bytes() if keys.public("debian").exists() else b""
    return hashlib.sha256(f"{_RECIPE} {base_key()} ".encode() + archive).hexdigest()[:16]


def mirror_dir() -> Path:
    """The directory that MIRROR_HOST serves; beside it, in `pmx/`, the rebuilt packages."""
    return cache_dir() / "repo" / f"mirror-{mirror_key()}"


def pve_dir(specs: Sequence[DebSpec]) -> Path:
    """The directory that PVE_HOST serves."""
    archive = keys.public("pve").read_bytes() if keys.public("pve").exists() else b""
    key = hashlib.sha256(f"{mirror_key()} {standins_key(specs)} ".encode() + archive).hexdigest()[:16]
    return cache_dir() / "repo" / f"pve-{key}"


def build_mirror(report: Callable[[str], None]) -> Path:
    """Build the Debian part unless it exists; return its directory."""
    target = mirror_dir()
    if target.exists():
        return target
    report("repository: the Debian part")
    with _scratch(target) as scratch:
        work = Path(scratch)
        top = work / "new"
        site = top / MIRROR_HOST / "debian"
        pool = site / "pool"
        pool.mkdir(parents=True)
        for deb in (base_dir() / "debs").glob("*.deb"):
            # apt keeps an epoch in the name of a downloaded file; a pool does not.
            name = deb.name.split("%3a", 1)
            os.link(deb, pool / (f"{name[0].split('_')[0]}_{name[1]}" if len(name) == 2 else deb.name))
        releases = [_suite(site, SUITE, "Debian", ["main"], "pool")]
        releases += [_suite(site, suite, "Debian", ["main"], None) for suite in _EMPTY]
        keys.sign("debian", releases)
        pmx = top / "pmx"
        pmx.mkdir()
        _rebuild_ifupdown2(pool, pmx, work)
        top.rename(target)
    return target


def build_pve(specs: Sequence[DebSpec], report: Callable[[str], None]) -> Path:
    """Build the PVE part with the stand-in packages unless it exists; return its directory."""
    target = pve_dir(specs)
    if target.exists():
        return target
    report("repository: the PVE part")
    with _scratch(target) as scratch:
        work = Path(scratch)
        top = work / "new"
        site = top / PVE_HOST / "debian"
        pool = site / "pve" / "pool"
        pool.mkdir(parents=True)
        for deb in (mirror_dir() / "pmx").glob("*.deb"):
            os.link(deb, pool / deb.name)
        for spec in specs:
            build_deb(spec, pool)
        release = _suite(site / "pve", SUITE, "Proxmox", [_PVE_COMPONENT], "pool")
        keys.sign("pve", [release])
        shutil.copyfile(keys.public("pve"), site / PVE_KEY_FILE)
        top.rename(target)
    return target


def pve_key_sha256() -> str:
    """The checksum of the PVE repository's key file, in hexadecimal."""
    return hashlib.sha256(keys.public("pve").read_bytes()).hexdigest()


def _scratch(target: Path) -> tempfile.TemporaryDirectory[str]:
    target.parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="build-", dir=target.parent)


def _suite(site: Path, suite: str, origin: str, components: list[str], pool: str | None) -> Path:
    """Write the indices of one suite; return its Release file, unsigned."""
    dist = site / "dists" / suite
    for component in components:
        folder = dist / component / "binary-amd64"
        folder.mkdir(parents=True)
        listing = b""
        if pool is not None:
            what = f"indexing suite {suite}"
            listing = programs.run(["apt-ftparchive", "packages", pool], what=what, cwd=site)
        (folder / "Packages").write_bytes(listing)
        programs.run(["gzip", "-9nk", folder / "Packages"], what=f"indexing suite {suite}")
    options = {
        "Origin": origin,
        "Label": origin,
        "Suite": suite,
        "Codename": suite,
        "Architectures": "amd64 all",
        "Components": " ".join(components),
    }
    arguments = [f"-oAPT::FTPArchive::Release::{name}={value}" for name, value in options.items()]
    text = programs.run(["apt-ftparchive", *arguments, "release", dist], what=f"describing suite {suite}")
    release = dist / "Release"
    release.write_bytes(text)
    return release


def _rebuild_ifupdown2(pool: Path, target: Path, work: Path) -> None:
    """Rebuild Debian's ifupdown2 with two changes that Proxmox' has: a reload does not remove guests' ports
    from a bridge, and it works where iproute2 has its tables below /usr."""
    debs = sorted(pool.glob("ifupdown2_*.deb"))
    if len(debs) != 1:
        raise LabError(f"expected one package ifupdown2 in the mirror, found {[deb.name for deb in debs]}")
    tree = work / "ifupdown2"
    unpack(debs[0], tree)
    addon = tree / "usr/share/ifupdown2/addons/bridge.py"
    text = addon.read_text()
    call = "ifaceobj.get_attr_value_first('bridge-ports-condone-regex')"
    if f"{call}\n" not in text:
        raise LabError(
            f"ifupdown2 has changed: expected `{call}` at the end of a line in {addon.name}, found none"
        )
    addon.write_text(text.replace(f"{call}\n", f"{call} or r'^(tap|veth|fwpr|fwln)[0-9]+'\n"))
    (tree / "etc/iproute2/rt_tables.d").mkdir(parents=True, exist_ok=True)
    control = tree / "DEBIAN" / "control"
    lines = control.read_text().splitlines()
    version = next(line.split()[1] for line in lines if line.startswith("Version:"))
    fresh = f"{version}{_IFUPDOWN2_SUFFIX}"
    lines = [f"Version: {fresh}" if line.startswith("Version:") else line for line in lines]
    control.write_text("\n".join(lines) + "\n")
    (tree / "DEBIAN" / "md5sums").unlink(missing_ok=True)
    pack(tree, target / f"ifupdown2_{fresh}_all.deb")
