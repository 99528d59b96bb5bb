"""Images as settings name them, and their transfer to a storage of a PVE host.

`nested_pve_image` and `nested_pve_leaf_image` have three forms: a volume, a URL with its checksum, a local
file. An image of a URL or a file is stored under a name that contains its checksum: a cache in which
different images have different names, and each image is transferred once.
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
"""Hexadecimal digits of the checksum in the name of a file."""
_PIECE = 1 << 20
_DEBIAN = re.compile(r"debian-(?P<release>12|13)\b.*\.(?:qcow2|raw)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Image:
    """One image. `kind`: volume | url | file; `name`: that of its file on a storage.

    `algorithm` and `checksum` of a URL or a file; `text` is the value of the setting.
    """

    kind: str
    text: str
    name: str
    url: str = ""
    algorithm: str = ""
    checksum: str = ""

    def volume(self, storage: str) -> str:
        """The volume id of the image on `storage`; a volume is used where it is."""
        return self.text if self.kind == "volume" else f"{storage}:import/{self.name}"


def read(setting: str) -> Image:
    """The image of a setting that `config.parsers.image` has checked. Raises PveError.

    A local file is read for its checksum: about a second for 500 MB, once.
    """
    if re.match(r"https?://", setting):
        url, _, fragment = setting.partition("#")
        algorithm, _, checksum = fragment.partition(":")
        return Image("url", setting, _cache_name(url, checksum), url, algorithm, checksum)
    if not setting.startswith("/"):
        return Image("volume", setting, file_name(setting))
    path = Path(setting)
    try:
        status = path.stat()
        checksum = _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as e:
        raise PveError(f"expected an image in the file {path}, found: {e.strerror}") from e
    return Image("file", setting, _cache_name(path.name, checksum), algorithm="sha256", checksum=checksum)


def file_name(location: str) -> str:
    """The file name of a URL, a volume or a path, as PVE imports it. Raises PveError for another ending."""
    name = re.split(r"[?#]", location)[0].rpartition("/")[2].rpartition(":")[2]
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    if name.endswith(".img"):
        name = name.removesuffix(".img") + ".qcow2"  # Ubuntu's cloud images, whose format is qcow2
    if not name.endswith(ENDINGS):
        raise PveError(
            f"expected an image whose name ends with {', '.join(ENDINGS)}, as PVE imports them, "
            f"found {location!r}"
        )
    return name


def debian_images(volumes: Iterable[str]) -> list[str]:
    """Debian cloud images among `volumes`, by their names: newest release first, and of one release the
    generic ones first, which have all drivers."""
    matches = {volid: m for volid in volumes if (m := _DEBIAN.search(volid.rpartition("/")[2]))}
    return sorted(matches, key=lambda v: (int(matches[v]["release"]), "generic" in v, v), reverse=True)


def _cache_name(location: str, checksum: str) -> str:
    stem, dot, ending = file_name(location).rpartition(".")
    return f"{stem[:100]}-{checksum[:DIGITS].lower()}{dot}{ending}"


@functools.lru_cache(maxsize=8)
def _sha256(path: Path, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def provide(
    host: PveHost, storage: str, image: Image, timeout: float, progress: Callable[[str], None]
) -> str:
    """Transfer the image of a URL or a file to the storage; returns how, for the report. Raises PveError.

    The storage needs the content type `import`. Several sessions may do this at once: each writes a
    temporary file and renames it at the end, and files of one name have the same content.
    """
    volid = image.volume(storage)
    if image.kind == "url":
        method = _download(host, storage, image, timeout, progress)
    elif image.kind == "file":
        method = _upload(host, storage, image, progress)
    else:
        return "exists"
    if volid not in list_images(host, storage):
        raise PveError(f"expected {volid} on {host.name} after its transfer, found no such volume")
    return method


def list_images(host: PveHost, storage: str) -> dict[str, int | None]:
    """The import volumes of a storage, with their sizes in bytes. Raises PveError."""
    path = f"/nodes/{host.node}/storage/{storage}/content"
    volumes = entries(host.api.get(path, content="import"), call=f"get {path}")
    return {volid: whole(entry.get("size")) for entry in volumes if (volid := text(entry.get("volid")))}


def import_directory(host: PveHost, storage: str) -> str:
    """The directory of a storage for import volumes; created if it does not exist. Raises PveError."""
    directory = posixpath.join(storage_path(host, storage), "import")
    host.run(["mkdir", "-p", directory]).check()
    return directory


def _download(
    host: PveHost, storage: str, image: Image, timeout: float, progress: Callable[[str], None]
) -> str:
    """Download by the host itself; PVE only checks an existing file (facts of PVE 9.2, 70)."""
    exists = image.volume(storage) in list_images(host, storage)
    progress(f"{'checking' if exists else 'downloading'} {image.name} on {host.name}")
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
        message = str(e)
        if "mismatch" in message:
            advice = "The checksum is of another image, or the image changed: correct the setting."
        elif "refusing to override" in message:
            advice = f"A damaged file has this name: `pvesm free {image.volume(storage)}` removes it."
        else:
            advice = (
                f"If {host.name} cannot reach that site, store the image there by hand, or name a local file."
            )
        raise PveError(
            f"expected {host.name} to download {image.url} with {image.algorithm} {image.checksum}; "
            f"found: {message} {advice}"
        ) from e
    return f"{'exists already' if exists else f'downloaded from {image.url}'}, {image.algorithm} correct"


def _upload(host: PveHost, storage: str, image: Image, progress: Callable[[str], None]) -> str:
    """Upload over SSH, unless the storage lists a file of that name and size."""
    path = Path(image.text)
    size = path.stat().st_size
    if list_images(host, storage).get(image.volume(storage)) == size:
        return "exists already"
    target = posixpath.join(import_directory(host, storage), image.name)
    with path.open("rb") as opened:
        host.ssh.put(
            cast("BinaryIO", _ProgressReader(opened, size, progress, image.name)), target, mode=0o644
        )
    return f"copied from {path}, {size / 2**20:.0f} MiB"


class _ProgressReader(io.RawIOBase):
    """A file of known size that reports how much of it was read."""

    def __init__(self, opened: BinaryIO, size: int, progress: Callable[[str], None], name: str) -> None:
        super().__init__()
        self.size = size
        self._opened, self._progress, self._name = opened, progress, name
        self._read, self._reported = 0, -1

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        piece = self._opened.read(size)
        self._read += len(piece)
        percent = self._read * 100 // max(1, self.size)
        if percent // 5 != self._reported // 5:
            self._reported = percent
            self._progress(f"uploading {self._name}, {percent} % of {self.size / 2**20:.0f} MiB")
        return piece
