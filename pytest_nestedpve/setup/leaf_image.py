"""The image of the leaf on the nested PVE: from a volume of the outer host, a URL, or a local file."""

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
    """The image that the leaf boots: `leaf_image`, else that of the nested VM; with a template, the newest
    Debian image of the outer host. Raises PveError."""
    preflight = PreflightFacts.known(env.facts) or PreflightFacts()
    image = env.settings.leaf_image or preflight.image
    if not image and preflight.template:
        image = _newest_debian(migration.host_of_vm(env))
    if not image:
        raise PveError(
            "expected an image for the leaf, found none, nor a Debian image on the outer host: set "
            "nested_pve_leaf_image (a URL with #sha256:…, a volume of the outer host, or a local file)"
        )
    return str(image)


def _newest_debian(host: PveHost) -> str | None:
    volumes: list[str] = []
    for storage in entries(host.api.get(f"/nodes/{host.node}/storage", content="import")):
        if usable(storage) and "import" in contents(storage):
            volumes += image_file.list_images(host, str(storage["storage"]))
    return next(iter(image_file.debian_images(volumes)), None)


def download_image(env: Environment, timeout: float) -> dict[str, Any]:
    """Provide the image on the nested PVE's storage; facts with its volume id. Raises PveError."""
    image = image_file.read(source(env))
    inner = env.inner
    volid = _volume(image)
    if image.kind == "volume":
        method = _pipe(env, image, timeout)
        if volid not in image_file.list_images(inner, STORAGE):
            raise PveError(f"expected {volid} on the nested PVE after its transfer, found no such volume")
    else:
        method = image_file.provide(inner, STORAGE, image, timeout, env.progress)
    return {**ImageFacts(volid, image.text).values(), "did": f"{volid} {method}"}


def probe_image(env: Environment) -> dict[str, Any] | None:
    """Proved when the nested PVE lists the volume."""
    try:
        image = image_file.read(source(env))
    except PveError:
        return None
    volid = _volume(image)
    if volid not in image_file.list_images(env.inner, STORAGE):
        return None
    return {**ImageFacts(volid, image.text).values(), "did": f"{volid} exists"}


def _volume(image: image_file.Image) -> str:
    return f"{STORAGE}:import/{image.name}"


def _pipe(env: Environment, image: image_file.Image, timeout: float) -> str:
    """Copy the volume from the outer host through this machine's connections; returns how, for the report."""
    outer, inner, volume, name = migration.selected_host(env), env.inner, image.text, image.name
    answer = outer.run(["pvesm", "path", volume], timeout=60)
    path = answer.stdout.strip()
    if not answer.ok or not path.startswith("/"):
        raise PveError(
            f"expected the image {volume!r} on {outer.name} to have a path, found: "
            f"{(answer.stderr or answer.stdout).strip()[:300]}"
        )
    target = posixpath.join(image_file.import_directory(inner, STORAGE), name)
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
