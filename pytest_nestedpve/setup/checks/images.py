"""Checks of the image to import, or of the template to clone, for the nested VM."""

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
    from pytest_nestedpve.setup.checks.context import Context

_SITE = "cloud.debian.org"
_NAME = "debian-13-genericcloud-amd64.qcow2"


def download(node: str, storage: str) -> str:
    """The command by which the host downloads Debian's cloud image."""
    return shlex.join(
        [
            "pvesh", "create", f"/nodes/{node}/storage/{storage}/download-url", "--content", "import",
            "--filename", _NAME, "--url", f"https://{_SITE}/images/cloud/trixie/latest/{_NAME}",
        ]
    )  # fmt: skip


def _download_commands(context: Context, preferred: str = "") -> tuple[str, ...]:
    """The commands that download an image: to the storage `preferred`, if it has content import."""
    able = _import_storages(context)
    if not able:
        # PVE refuses a download to a storage without that content type.
        return fixes.content(context, "import"), download(context.host.node, fixes.file_storage(context))
    return (download(context.host.node, preferred if preferred in able else able[0]),)


def _import_storages(context: Context) -> list[str]:
    storages = [entry for entry in context.storages if usable(entry) and "import" in contents(entry)]
    return [str(entry["storage"]) for entry in storages]


def image(context: Context) -> Iterator[Finding]:
    """Check the configured image, or find one among the import volumes of the host."""
    if context.settings.template or not context.boots:
        return
    if context.settings.image is not None:
        source = image_file.read(context.settings.image)
        yield from _volume(context) if source.kind == "volume" else _transferred_image(context, source)
        return
    able = _import_storages(context)
    if not able:
        yield Finding(
            "image", "a storage with content import, and a Debian cloud image in it", "no such storage",
            "Add that content to one, and download an image.",
            fix=_download_commands(context),
        )  # fmt: skip
        return
    volumes = [volid for storage in able for volid in _volumes(context, storage)]
    if images := image_file.debian_images(volumes):
        which = f"newest of {len(images)} Debian images" if len(images) > 1 else "only Debian image"
        context.choose(f"the {which} among the import volumes", image=images[0])
    elif len(volumes) == 1:
        context.choose("the only import volume", image=volumes[0])
    else:
        yield Finding(
            "image", f"a Debian cloud image among the import volumes of {', '.join(able)}",
            ", ".join(sorted(volumes)) or "none", "Set nested_pve_image to one, or download one.",
            fix=_download_commands(context),
        )  # fmt: skip
        return
    yield fine("image", str(context.choices.image))


def _transferred_image(context: Context, source: image_file.Image) -> Iterator[Finding]:
    """Choose the storage for an image that the run uploads or the host downloads, in a later phase."""
    origin, able = context.settings.origin("image"), _import_storages(context)
    if not able:
        yield Finding(
            "image", f"a storage with content import, for {source.text} ({origin})", "no such storage",
            "Add that content to one; the image is kept there.",
            fix=(fixes.content(context, "import"),),
        )  # fmt: skip
        return
    chosen = context.choices.storage
    storage = next((name for name in (chosen, "local") if name in able), able[0])
    assert storage is not None
    volid = source.volume(storage)
    context.choose(origin, image=volid)
    exists = volid in _volumes(context, storage)
    transfer = f"to be {'downloaded by the host' if source.kind == 'url' else 'uploaded'} from {source.text}"
    yield fine("image", f"{volid}, {'exists' if exists else transfer}")


def _volume(context: Context) -> Iterator[Finding]:
    """Check that the configured volume exists and can be imported."""
    settings, node, storages = context.settings, context.host.node, context.storages
    name, origin = str(settings.image), settings.origin("image")
    storage, _, path = name.partition(":")
    entry = next((entry for entry in storages if entry.get("storage") == storage), None)
    if entry is None or not usable(entry):
        names = ", ".join(sorted(str(entry.get("storage")) for entry in storages)) or "none"
        yield Finding(
            "image", f"{name} ({origin}) on a storage of {node}",
            f"no usable storage {storage!r} among {names}",
            "Set nested_pve_image to an existing volume; these commands list them.",
            fix=_list_commands(context),
        )  # fmt: skip
        return
    kind = "import" if path.startswith("import/") else "images"
    if path.startswith(("iso/", "snippets/", "vztmpl/", "backup/")):
        yield Finding(
            "image", f"a volume with content import, like {storage}:import/debian-13.qcow2 ({origin})", name,
            "PVE imports disks from content import or images only: move the file to one of them.",
            fix=_download_commands(context, storage),
        )  # fmt: skip
        return
    if kind not in contents(entry):
        yield Finding(
            "image", f"{storage} to have content {kind}, for {name} ({origin})",
            ",".join(sorted(contents(entry))), fix=(fixes.content(context, kind, storage),),
        )  # fmt: skip
        return
    volumes = _volumes(context, storage, kind)
    if name not in volumes:
        yield Finding(
            "image", f"{name} ({origin})", ", ".join(sorted(volumes)) or f"no {kind} volume on {storage}",
            "Set nested_pve_image to one of these, or download one.",
            fix=_download_commands(context, storage),
        )  # fmt: skip
        return
    context.choose(origin, image=name)
    yield fine("image", name)


def _list_commands(context: Context) -> tuple[str, ...]:
    return tuple(
        shlex.join(["pvesm", "list", name, "--content", "import"]) for name in _import_storages(context)[:3]
    )


def _volumes(context: Context, storage: str, kind: str = "import") -> list[str]:
    path = f"/nodes/{context.host.node}/storage/{storage}/content"
    volumes = entries(context.host.api.get(path, content=kind))
    return [volid for volume in volumes if (volid := text(volume.get("volid")))]


def _clones_to(context: Context, vm: dict[str, Any], node: str) -> bool:
    """Whether a template of another node can be cloned to `node`, by the answer of its own node."""
    api, source, vmid = context.host.api, str(vm.get("node")), whole(vm.get("vmid"))
    return (
        vmid is not None
        and vm_can(api, source, vmid, "clone") is True
        and node in nodes_of(api, source, vmid)
    )


def template(context: Context) -> Iterator[Finding]:
    """Check that the configured template exists and can be cloned to this node."""
    settings, node = context.settings, context.host.node
    if settings.template is None:
        return
    requested, origin = settings.template, settings.origin("template")
    # /cluster/resources is a broadcast up to 10 s old, in which a new template is an unnamed VM.
    live = entries(context.host.api.get(f"/nodes/{node}/qemu"))
    here = [{**vm, "node": node, "type": "qemu"} for vm in live]
    guests = here + [vm for vm in context.guests if vm.get("node") != node]
    matches = [
        vm for vm in guests
        if vm.get("type", "qemu") == "qemu"
        and (str(vm.get("vmid")) == requested or text(vm.get("name")) == requested)
    ]  # fmt: skip
    matches = [vm for vm in matches if str(vm.get("vmid")) == requested] or matches
    templates = [vm for vm in guests if flag(vm.get("template"))]
    names = ", ".join(f"{vm.get('vmid')} ({text(vm.get('name')) or 'unnamed'})" for vm in templates)
    advice = f"Existing templates: {names or 'none'}. Set nested_pve_template to one, or leave it out."
    others = fixes.alternatives(context, "template", [vm.get("vmid") for vm in templates])
    if not matches:
        yield Finding(
            "template", f"the template {requested!r} ({origin})", "no such VM", advice, others, True
        )
    elif len(matches) > 1:
        ids = ", ".join(str(vm.get("vmid")) for vm in matches)
        by_id = fixes.alternatives(context, "template", [vm.get("vmid") for vm in matches])
        expected = f"one VM named {requested!r} ({origin})"
        yield Finding("template", expected, f"several: {ids}", "Set its id.", by_id, True)
    elif not flag(matches[0].get("template")):
        expected = f"{requested} ({origin}) to be a template"
        yield Finding("template", expected, "an ordinary VM", advice, others, True)
    elif matches[0].get("node") != node and not _clones_to(context, matches[0], node):
        yield Finding(
            "template", f"{requested} ({origin}) on {node}, or on shared storage that has linked clones",
            f"it is on {matches[0].get('node')}, on storage that {node} does not share",
            "Connect to that node, or clone the template to this one.",
        )  # fmt: skip
    else:
        vmid = whole(matches[0].get("vmid"))
        context.choose(origin, template=vmid)
        yield fine("template", f"{vmid} ({text(matches[0].get('name')) or 'unnamed'})")
