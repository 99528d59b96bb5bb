"""An image as it is named in a setting, and bringing it onto a storage of a PVE host.

`nested_pve_image` and `nested_pve_leaf_image` say the same three things: a volume, a URL with its checksum,
a local file. What comes from a URL or a file is kept on the storage under a name with its checksum in it:
a cache, in which two images never meet under one name, and the same image is brought once.
"""

from __future__ import annotations

import functools
import hashlib
import io
import posixpath
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pytest_nestedpve.pve.answers import entries, text, whole
from pytest_nestedpve.pve.api import call_limit
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.tasks import wait_task
from pytest_nestedpve.setup.vendor_data import storage_path

if TYPE_CHECKING:
    from typing import BinaryIO

    from pytest_nestedpve.pve.host import PveHost

ENDINGS = (".qcow2", ".raw", ".vmdk", ".ova")
DIGITS = 16
"""Hexadecimal digits of the checksum that a file's name carries."""
_PIECE = 1 << 20
_DEBIAN = re.compile(r"debian-(?P<release>12|13)\b.*\.(?:qcow2|raw)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Image:
    """One image. `kind`: volume | url | file; `name`: that of its file on a storage.

    `algorithm` and `checksum` are a URL's; `text` is what the setting says.
    """

    kind: str
    text: str
    name: str
    url: str = ""
    algorithm: str = ""
    checksum: str = ""

    def volume(self, storage: str) -> str:
        """Its volume id on a storage that it is brought to; a volume is where it is."""
        return self.text if self.kind == "volume" else f"{storage}:import/{self.name}"


def read(setting: str) -> Image:
    """What a setting names, as `values.image` leaves it. Raises PveError.

    A local file is read for its checksum: about a second for 500 MB, once.
    """
    if re.match(r"https?://", setting):
        url, _, given = setting.partition("#")
        algorithm, _, checksum = given.partition(":")
        return Image("url", setting, _named(url, checksum), url, algorithm, checksum)
    if not setting.startswith("/"):
        return Image("volume", setting, file_name(setting))
    path = Path(setting)
    try:
        seen = path.stat()
        checksum = _sha256(path, seen.st_size, seen.st_mtime_ns)
    except OSError as e:
        raise PveError(f"expected an image in the file {path}; found: {e.strerror}") from e
    return Image("file", setting, _named(path.name, checksum), algorithm="sha256", checksum=checksum)


def file_name(given: str) -> str:
    """A file name that PVE imports, of a URL, a volume or a path. Raises PveError for another ending."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", re.split(r"[?#]", given)[0].rpartition("/")[2].rpartition(":")[2])
    if name.endswith(".img"):
        name = name.removesuffix(".img") + ".qcow2"  # Ubuntu's cloud images, which are qcow2 inside
    if not name.endswith(ENDINGS):
        raise PveError(
            f"expected an image whose name ends with {', '.join(ENDINGS)} (what PVE imports), found {given!r}"
        )
    return name


def debian(volumes: Iterable[str]) -> list[str]:
    """Those that are Debian cloud images by their names, best first: the newest release, of one release's
    images the generic ones, which have all drivers."""
    matches = {volid: m for volid in volumes if (m := _DEBIAN.search(volid.rpartition("/")[2]))}
    return sorted(matches, key=lambda v: (int(matches[v]["release"]), "generic" in v, v), reverse=True)


def _named(given: str, checksum: str) -> str:
    stem, dot, ending = file_name(given).rpartition(".")
    return f"{stem[:100]}-{checksum[:DIGITS].lower()}{dot}{ending}"


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def bring(host: PveHost, storage: str, image: Image, timeout: float, say: Callable[[str], None]) -> str:
    """Have a URL's or a file's image on the storage, and say how it came there. Raises PveError.

    The storage has content `import`. Sessions that do this at once do not disturb each other: each writes
    beside the name and renames at the end, and what the name stands for is always the same bytes.
    """
    volid = image.volume(storage)
    if image.kind == "url":
        how = _download(host, storage, image, timeout, say)
    elif image.kind == "file":
        how = _upload(host, storage, image, say)
    else:
        return "is there"
    if volid not in listed(host, storage):
        raise PveError(f"expected {volid} on {host.name} after it was brought there; it is not listed")
    return how


def listed(host: PveHost, storage: str) -> dict[str, int | None]:
    """The import volumes of a storage, with their sizes in bytes. Raises PveError."""
    path = f"/nodes/{host.node}/storage/{storage}/content"
    found = entries(host.api.get(path, content="import"), call=f"get {path}")
    return {volid: whole(each.get("size")) for each in found if (volid := text(each.get("volid")))}


def folder(host: PveHost, storage: str) -> str:
    """The directory of a storage that import volumes lie in; made if it is not there. Raises PveError."""
    directory = posixpath.join(storage_path(host, storage), "import")
    host.run(["mkdir", "-p", directory]).check()
    return directory


def _download(host: PveHost, storage: str, image: Image, timeout: float, say: Callable[[str], None]) -> str:
    """By the host itself. What is there is checked by PVE, not fetched again (facts of PVE 9.2, 70)."""
    there = image.volume(storage) in listed(host, storage)
    say(f"{'checking' if there else 'downloading'} {image.name} on {host.name}")
    try:
        with call_limit(timeout):
            answer = host.api.post(
                f"/nodes/{host.node}/storage/{storage}/download-url",
                content="import",
                filename=image.name,
                url=image.url,
                **{"checksum-algorithm": image.algorithm, "checksum": image.checksum},
            )
            wait_task(host.api, str(answer), timeout=timeout)
    except PveError as e:
        said = str(e)
        if "mismatch" in said:
            advice = "The checksum in the setting is another image's, or the image changed: mend the setting."
        elif "refusing to override" in said:
            advice = f"A damaged file has its name: `pvesm free {image.volume(storage)}` removes it."
        else:
            advice = (
                f"Has {host.name} a way to that site? Else put the image there by hand, or name a local file."
            )
        raise PveError(
            f"expected {host.name} to download {image.url} with {image.algorithm} {image.checksum}; "
            f"found: {said} {advice}"
        ) from e
    return f"{'there already' if there else f'downloaded from {image.url}'}, {image.algorithm} right"


def _upload(host: PveHost, storage: str, image: Image, say: Callable[[str], None]) -> str:
    """Over SSH; only if the storage lists no file of that name and size."""
    path = Path(image.text)
    size = path.stat().st_size
    if listed(host, storage).get(image.volume(storage)) == size:
        return "there already"
    target = posixpath.join(folder(host, storage), image.name)
    with path.open("rb") as opened:
        host.ssh.put(cast("BinaryIO", _Measured(opened, size, say, image.name)), target, mode=0o644)
    return f"copied from {path}, {size / 2**20:.0f} MiB"


class _Measured(io.RawIOBase):
    """A file whose size is known beforehand, and that tells how far it was read."""

    def __init__(self, opened: BinaryIO, size: int, say: Callable[[str], None], name: str) -> None:
        super().__init__()
        self.size = size
        self._opened, self._say, self._name = opened, say, name
        self._read, self._told = 0, -1

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        piece = self._opened.read(size)
        self._read += len(piece)
        percent = self._read * 100 // max(1, self.size)
        if percent // 5 != self._told // 5:
            self._told = percent
            self._say(f"uploading {self._name}, {percent} % of {self.size / 2**20:.0f} MiB")
        return piece
