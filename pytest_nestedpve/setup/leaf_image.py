"""The image of the leaf, onto the nested PVE: a volume of the outer host, a URL, or a local file."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Any, cast

from pytest_nestedpve.environment.facts import ImageFacts, PreflightFacts
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup import image_file, migration
from pytest_nestedpve.setup.checks.storage import contents, usable

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection

STORAGE = "local"


def source(env: Environment) -> str:
    """What the leaf boots: `leaf_image`, else the image of the nested VM itself; beside a template the
    Debian image that the outer host has. Raises PveError."""
    preflight = PreflightFacts.known(env.facts) or PreflightFacts()
    wanted = env.settings.leaf_image or preflight.image
    if not wanted and preflight.template:
        wanted = _of_the_host(migration.outer(env))
    if not wanted:
        raise PveError(
            "expected an image for the leaf, found none, nor a Debian image on the outer host: name one "
            "in nested_pve_leaf_image (a URL with #sha256:…, a volume of the outer host, or a local file)"
        )
    return str(wanted)


def _of_the_host(host: PveHost) -> str | None:
    volumes: list[str] = []
    for each in entries(host.api.get(f"/nodes/{host.node}/storage", content="import")):
        if usable(each) and "import" in contents(each):
            volumes += image_file.listed(host, str(each["storage"]))
    return next(iter(image_file.debian(volumes)), None)


def download_image(env: Environment, timeout: float) -> dict[str, Any]:
    """Bring it onto the nested PVE's storage. Facts: its volume id there."""
    wanted = image_file.read(source(env))
    inner = env.inner
    volid = _volume(wanted)
    if wanted.kind == "volume":
        how = _pipe(env, wanted, timeout)
        if volid not in image_file.listed(inner, STORAGE):
            raise PveError(f"expected {volid} on the nested PVE after it was brought there; it is not listed")
    else:
        how = image_file.bring(inner, STORAGE, wanted, timeout, env.progress)
    return {**ImageFacts(volid, wanted.text).values(), "did": f"{volid} {how}"}


def probe_image(env: Environment) -> dict[str, Any] | None:
    """Whether the volume is listed on the nested PVE."""
    try:
        wanted = image_file.read(source(env))
    except PveError:
        return None
    volid = _volume(wanted)
    if volid not in image_file.listed(env.inner, STORAGE):
        return None
    return {**ImageFacts(volid, wanted.text).values(), "did": f"{volid} is there"}


def _volume(image: image_file.Image) -> str:
    return f"{STORAGE}:import/{image.name}"


def _pipe(env: Environment, image: image_file.Image, timeout: float) -> str:
    """From the outer host, where downloads were made once, through this connection; nothing is kept here."""
    outer, inner, volume, name = migration.chosen(env), env.inner, image.text, image.name
    said = outer.run(["pvesm", "path", volume], timeout=60)
    path = said.stdout.strip()
    if not said.ok or not path.startswith("/"):
        raise PveError(
            f"expected the image {volume!r} on {outer.name} to have a path, found: "
            f"{(said.stderr or said.stdout).strip()[:300]}"
        )
    target = posixpath.join(image_file.folder(inner, STORAGE), name)
    partial = posixpath.join(posixpath.dirname(target), f".{name}.part")
    size = outer.run(["stat", "-c", "%s", path], timeout=30).check().stdout.strip()
    write = ["dd", f"of={partial}", "bs=1M", "status=none"]
    sink = cast("SshConnection", inner.ssh)
    cast("SshConnection", outer.ssh).pipe(["cat", path], sink, write, timeout)
    inner.run(
        ["sh", "-c", 'test "$(stat -c %s "$1")" = "$3" && chmod 0644 "$1" && mv -f "$1" "$2"', "sh",
         partial, target, size],
        timeout=60,
    ).check()  # fmt: skip
    return f"copied from {volume} on {outer.name}, {int(size) / 2**20:.0f} MiB"
