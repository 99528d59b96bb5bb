"""What the nested VM boots: an image that is imported, or a template that is cloned."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import entries, flag, text, whole
from pytest_nestedpve.pve.storage import nodes_of, vm_can
from pytest_nestedpve.setup import image_file
from pytest_nestedpve.setup.checks import fixes
from pytest_nestedpve.setup.checks.finding import Finding, fine
from pytest_nestedpve.setup.checks.storage import contents, usable

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen

_SITE = "cloud.debian.org"
_NAME = "debian-13-genericcloud-amd64.qcow2"


def fetch(node: str, storage: str) -> str:
    """The command that has the host fetch Debian's cloud image."""
    return shlex.join(
        [
            "pvesh", "create", f"/nodes/{node}/storage/{storage}/download-url", "--content", "import",
            "--filename", _NAME, "--url", f"https://{_SITE}/images/cloud/trixie/latest/{_NAME}",
        ]
    )  # fmt: skip


def _fetched(seen: Seen, wanted: str = "") -> tuple[str, ...]:
    """The commands after which it is there: on the storage `wanted`, if that takes what is to be imported."""
    able = _able(seen)
    if not able:
        # PVE refuses it on a storage that lacks the content.
        return fixes.content(seen, "import"), fetch(seen.host.node, fixes.home(seen))
    return (fetch(seen.host.node, wanted if wanted in able else able[0]),)


def _able(seen: Seen) -> list[str]:
    return [str(each["storage"]) for each in seen.storages if usable(each) and "import" in contents(each)]


def image(seen: Seen) -> Iterator[Finding]:
    """An image among the import volumes of the host, or the one that was named."""
    if seen.settings.template or not seen.boots:
        return
    if seen.settings.image is not None:
        wanted = image_file.read(seen.settings.image)
        yield from _named_image(seen) if wanted.kind == "volume" else _brought_image(seen, wanted)
        return
    importing = _able(seen)
    if not importing:
        yield Finding(
            "image", "a storage with content import, and a Debian cloud image in it", "no such storage",
            "Give one that content, and fetch an image.",
            fix=_fetched(seen),
        )  # fmt: skip
        return
    volumes = [volid for storage in importing for volid in _imports(seen, storage)]
    if images := image_file.debian(volumes):
        several = f", of {len(images)} Debian images the newest" if len(images) > 1 else ""
        seen.choose(f"found among the import volumes{several}", image=images[0])
    elif len(volumes) == 1:
        seen.choose("the only import volume", image=volumes[0])
    else:
        yield Finding(
            "image", f"a Debian cloud image among the import volumes of {', '.join(importing)}",
            ", ".join(sorted(volumes)) or "none", "Name one in nested_pve_image, or fetch one.",
            fix=_fetched(seen),
        )  # fmt: skip
        return
    yield fine("image", str(seen.choices.image))


def _brought_image(seen: Seen, wanted: image_file.Image) -> Iterator[Finding]:
    """One that the run brings: where it will be. Nothing is fetched before the VM is made."""
    origin, able = seen.settings.origin("image"), _able(seen)
    if not able:
        yield Finding(
            "image", f"a storage with content import, for {wanted.text} ({origin})", "no such storage",
            "Give one that content; the image is kept there.",
            fix=(fixes.content(seen, "import"),),
        )  # fmt: skip
        return
    chosen = seen.choices.storage
    storage = next((each for each in (chosen, "local") if each in able), able[0])
    assert storage is not None
    volid = wanted.volume(storage)
    seen.choose(origin, image=volid)
    there = volid in _imports(seen, storage)
    coming = f"to be {'downloaded by the host' if wanted.kind == 'url' else 'uploaded'} from {wanted.text}"
    yield fine("image", f"{volid}, {'there already' if there else coming}")


def _named_image(seen: Seen) -> Iterator[Finding]:
    settings, node, storages = seen.settings, seen.host.node, seen.storages
    name, origin = str(settings.image), settings.origin("image")
    storage, _, rest = name.partition(":")
    there = next((each for each in storages if each.get("storage") == storage), None)
    if there is None or not usable(there):
        names = ", ".join(sorted(str(each.get("storage")) for each in storages)) or "none"
        yield Finding(
            "image", f"{name} ({origin}) on a storage of {node}",
            f"no usable storage {storage!r} among {names}",
            "Set nested_pve_image to a volume that is there; these commands list them.",
            fix=_lists(seen),
        )  # fmt: skip
        return
    kind = "import" if rest.startswith("import/") else "images"
    if rest.startswith(("iso/", "snippets/", "vztmpl/", "backup/")):
        yield Finding(
            "image", f"a volume with content import, like {storage}:import/debian-13.qcow2 ({origin})", name,
            "PVE imports disks from content import or images only: put the file into that.",
            fix=_fetched(seen, storage),
        )  # fmt: skip
        return
    if kind not in contents(there):
        yield Finding(
            "image", f"{storage} to have content {kind}, for {name} ({origin})",
            ",".join(sorted(contents(there))), fix=(fixes.content(seen, kind, storage),),
        )  # fmt: skip
        return
    volumes = _imports(seen, storage, kind)
    if name not in volumes:
        yield Finding(
            "image", f"{name} ({origin})", ", ".join(sorted(volumes)) or f"no {kind} volume on {storage}",
            "Set nested_pve_image to one of these, or fetch one.", fix=_fetched(seen, storage),
        )  # fmt: skip
        return
    seen.choose(origin, image=name)
    yield fine("image", name)


def _lists(seen: Seen) -> tuple[str, ...]:
    return tuple(shlex.join(["pvesm", "list", name, "--content", "import"]) for name in _able(seen)[:3])


def _imports(seen: Seen, storage: str, kind: str = "import") -> list[str]:
    path = f"/nodes/{seen.host.node}/storage/{storage}/content"
    found = entries(seen.host.api.get(path, content=kind))
    return [volid for each in found if (volid := text(each.get("volid")))]


def _clones_to(seen: Seen, found: dict[str, Any], node: str) -> bool:
    """Whether a template of another node can be cloned to this one: that node itself says so."""
    api, where, vmid = seen.host.api, str(found.get("node")), whole(found.get("vmid"))
    return (
        vmid is not None and vm_can(api, where, vmid, "clone") is True and node in nodes_of(api, where, vmid)
    )


def template(seen: Seen) -> Iterator[Finding]:
    """The template that was named, on this node."""
    settings, node = seen.settings, seen.host.node
    if settings.template is None:
        return
    wanted, origin = settings.template, settings.origin("template")
    # /cluster/resources is a broadcast up to 10 s old, in which a new template is an unnamed VM.
    live = entries(seen.host.api.get(f"/nodes/{node}/qemu"))
    here = [{**each, "node": node, "type": "qemu"} for each in live]
    guests = here + [each for each in seen.guests if each.get("node") != node]
    same = [
        each for each in guests
        if each.get("type", "qemu") == "qemu"
        and (str(each.get("vmid")) == wanted or text(each.get("name")) == wanted)
    ]  # fmt: skip
    same = [each for each in same if str(each.get("vmid")) == wanted] or same
    templates = [each for each in guests if flag(each.get("template"))]
    listed = ", ".join(f"{each.get('vmid')} ({text(each.get('name')) or 'unnamed'})" for each in templates)
    advice = f"Templates here: {listed or 'none'}. Set nested_pve_template to one, or leave it out."
    others = fixes.instead(seen, "template", [each.get("vmid") for each in templates])
    if not same:
        yield Finding("template", f"the template {wanted!r} ({origin})", "no such VM", advice, others, True)
    elif len(same) > 1:
        ids = ", ".join(str(each.get("vmid")) for each in same)
        by_id = fixes.instead(seen, "template", [each.get("vmid") for each in same])
        what = f"one VM called {wanted!r} ({origin})"
        yield Finding("template", what, f"several: {ids}", "Give its id.", by_id, True)
    elif not flag(same[0].get("template")):
        what = f"{wanted} ({origin}) to be a template"
        yield Finding("template", what, "an ordinary VM", advice, others, True)
    elif same[0].get("node") != node and not _clones_to(seen, same[0], node):
        yield Finding(
            "template", f"{wanted} ({origin}) on {node}, or on shared storage that has linked clones",
            f"it is on {same[0].get('node')}, on storage of its own",
            "Connect to that node, or clone the template to this one.",
        )  # fmt: skip
    else:
        vmid = whole(same[0].get("vmid"))
        seen.choose(origin, template=vmid)
        yield fine("template", f"{vmid} ({text(same[0].get('name')) or 'unnamed'})")
