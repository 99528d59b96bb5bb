"""The image of the leaf, onto the nested PVE: a volume of the outer host, a URL, or a local file."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_nestedpve.builtin.guest import task
from pytest_nestedpve.builtin.vendor import storage_path
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.api import call_limit
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost

if TYPE_CHECKING:
    from pytest_nestedpve.environment import Environment
    from pytest_nestedpve.pve.ssh import SshConnection

STORAGE = "local"
_ENDINGS = (".qcow2", ".raw", ".vmdk", ".ova")
_VOLUME = re.compile(r"[A-Za-z][\w.-]*:\S+\Z")
_CHECKSUM = re.compile(r"(?P<algorithm>md5|sha1|sha224|sha256|sha384|sha512):(?P<value>[0-9a-fA-F]+)\Z")


def source(env: Environment) -> str:
    """What the leaf boots: `leaf_image`, else the image of the nested VM itself. Raises PveError."""
    wanted = env.settings.leaf_image or env.facts.get("preflight", {}).get("image")
    if not wanted:
        raise PveError(
            "expected an image for the leaf, found none: the nested VM is a clone of a template, so name one "
            "in nested_pve_leaf_image (a URL with #sha256:…, a volume of the outer host, or a local file)"
        )
    return str(wanted)


def file_name(text: str) -> str:
    """The name that the image gets on the nested PVE. Raises PveError for an ending PVE does not import."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", re.split(r"[?#]", text)[0].rpartition("/")[2].rpartition(":")[2])
    if name.endswith(".img"):
        name = name.removesuffix(".img") + ".qcow2"  # Ubuntu's cloud images, which are qcow2 inside
    if not name.endswith(_ENDINGS):
        raise PveError(
            f"expected an image whose name ends with {', '.join(_ENDINGS)} (what PVE imports), found {text!r}"
        )
    return name


def download_image(env: Environment, timeout: float) -> dict[str, Any]:
    """Bring it onto the nested PVE's storage. Facts: its volume id there."""
    wanted = source(env)
    name = file_name(wanted)
    inner = env.inner
    volid = f"{STORAGE}:import/{name}"
    if re.match(r"https?://", wanted):
        how = _download(inner, wanted, name, timeout)
    elif _VOLUME.match(wanted) and not Path(wanted).exists():
        how = _pipe(env, wanted, name, timeout)
    else:
        local = env.rootdir / wanted
        if not local.is_file():
            raise PveError(f"expected a URL, a volume or a file as nested_pve_leaf_image; {local} is no file")
        inner.ssh.put(local, posixpath.join(_directory(inner), name), mode=0o644)
        how = f"copied from {local}"
    if volid not in volumes(inner):
        raise PveError(f"expected {volid} on the nested PVE after it was brought there; it is not listed")
    return {"volid": volid, "source": wanted, "did": f"{volid} {how}"}


def probe_image(env: Environment) -> dict[str, Any] | None:
    """Whether the volume is listed on the nested PVE."""
    try:
        wanted = source(env)
        volid = f"{STORAGE}:import/{file_name(wanted)}"
    except PveError:
        return None
    if volid not in volumes(env.inner):
        return None
    return {"volid": volid, "source": wanted, "did": f"{volid} is there"}


def volumes(host: PveHost) -> list[str]:
    """The import volumes of the storage."""
    found = host.api.get(f"/nodes/{host.node}/storage/{STORAGE}/content", content="import")
    return [str(each.get("volid")) for each in entries(found)]


def _directory(host: PveHost) -> str:
    directory = posixpath.join(storage_path(host, STORAGE), "import")
    host.run(["mkdir", "-p", directory]).check()
    return directory


def _download(host: PveHost, wanted: str, name: str, timeout: float) -> str:
    url, _, given = wanted.partition("#")
    checksum = _CHECKSUM.match(given.replace("=", ":", 1)) if given else None
    if checksum is None:
        raise PveError(
            f"expected a checksum behind the URL of nested_pve_leaf_image, as in {url}#sha256:0123…; found "
            f"{given or 'none'!r}"
        )
    with call_limit(timeout):
        answer = host.api.post(
            f"/nodes/{host.node}/storage/{STORAGE}/download-url",
            content="import",
            filename=name,
            url=url,
            **{"checksum-algorithm": checksum["algorithm"], "checksum": checksum["value"]},
        )
        task(host, answer, timeout)
    return f"downloaded from {url}, {checksum['algorithm']} right"


def _pipe(env: Environment, volume: str, name: str, timeout: float) -> str:
    """From the outer host, where downloads were made once, through this connection; nothing is kept here."""
    outer, inner = env.outer, env.inner
    said = outer.run(["pvesm", "path", volume], timeout=60)
    path = said.stdout.strip()
    if not said.ok or not path.startswith("/"):
        raise PveError(
            f"expected the image {volume!r} on {outer.name} to have a path, found: "
            f"{(said.stderr or said.stdout).strip()[:300]}"
        )
    target = posixpath.join(_directory(inner), name)
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
