"""Preflight: all that has to be true of the outer host, looked at before anything is made on it.

What is found wrong is collected, so that one run of preflight names all of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_nestedpve.creation import free_ids
from pytest_nestedpve.pve.answers import entries, flag, mapping, text, whole
from pytest_nestedpve.pve.errors import ApiError, NoPve, PveError, SshError
from pytest_nestedpve.pve.host import PveHost

if TYPE_CHECKING:
    from pytest_nestedpve.environment import Environment
    from pytest_nestedpve.settings import Settings

T = TypeVar("T")

LEAST_VERSION = (8, 2)  # the first with content type `import`
CLOCK_LIMIT = 300  # seconds; beyond it certificates made on the host are not valid yet here
GIB = 1024**3
# A nested PVE with a leaf uses about this much of a disk that grows with its use.
GROWN = 8 * GIB
THIN = frozenset({"qcow2", "subvol"})
THIN_TYPES = frozenset({"lvmthin", "zfspool", "rbd", "btrfs"})
_BRIDGES = frozenset({"bridge", "OVSBridge", "vnet"})
_IMAGE = re.compile(r"debian-(?P<release>12|13)\b.*\.(?:qcow2|raw)\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it has to be."""

    what: str
    expected: str
    found: str
    advice: str

    def __str__(self) -> str:
        end = "" if self.found.endswith((".", "?", "!")) else "."
        return f"{self.what}: expected {self.expected}; found {self.found}{end} {self.advice}".rstrip()


class PreflightError(PveError):
    """The outer host cannot be used as it is; `findings` has every reason."""

    def __init__(self, host: str, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        lines = "".join(f"\n  - {finding}" for finding in self.findings)
        count = len(self.findings)
        super().__init__(f"{host} cannot be used as it is, {count} finding{'s' * (count != 1)}:{lines}")


@dataclass
class _Looker:
    """Collects findings; a check that raises is a finding too."""

    findings: list[Finding]

    def add(self, what: str, expected: str, found: str, advice: str) -> None:
        self.findings.append(Finding(what, expected, found, advice))

    def ask(self, what: str, question: Callable[[], T]) -> T | None:
        try:
            return question()
        except SshError:
            raise
        except PveError as e:
            words = e.text if isinstance(e, ApiError) else str(e)
            self.add(what, "an answer", " / ".join(words.split("\n")[:3]), "Mend that on the host first.")
            return None


def preflight(env: Environment, *, image: bool = True) -> dict[str, Any]:
    """Look at everything, but `image`s only if wanted; facts: what will be used. Raises PreflightError."""
    looker = _Looker([])
    try:
        host = env.outer
        if not _reachable_as_root(looker, host):
            raise PreflightError(host.name, looker.findings)
        facts = _look(looker, env, host, image)
    except SshError as e:
        name = env.settings.host or "the outer host"
        said = "by hand" in str(e) or str(e).endswith("?")  # what to do
        looker.add("SSH", f"a login as root at {name}", str(e), "" if said else "Try `ssh` by hand.")
        raise PreflightError(name, looker.findings) from e
    if looker.findings:
        raise PreflightError(host.name, looker.findings)
    what = next((f"{each} {facts[each]}" for each in ("image", "template") if facts[each]), "a VM of its own")
    where = f"storage {facts['storage']}, bridge {facts['bridge']}"
    did = f"PVE {facts['version']} on {host.name}, {where}, {what}"
    return {**facts, "did": did}


def _look(looker: _Looker, env: Environment, host: PveHost, boots: bool) -> dict[str, Any]:
    version = _version(looker, host)
    if version is None:
        raise PreflightError(host.name, looker.findings)
    env.progress("clock, profile, nested virtualisation")
    offset = _clock(looker, host)
    _profile(looker, env, host)
    settings = env.settings
    _virtualisation(looker, host, settings)
    node = looker.ask("node", lambda: host.node)
    if node is None:
        raise PreflightError(host.name, looker.findings)
    env.progress("storages, networks, guests")
    guests = looker.ask("guests", lambda: entries(host.api.get("/cluster/resources", type="vm"))) or []
    storages = looker.ask("storages", lambda: _storages(host, node)) or []
    template = _template(looker, host, settings, guests, node)
    storage = _storage(looker, settings, storages)
    snippets = None if settings.template or not boots else _snippets(looker, storages, storage)
    image = None if settings.template or not boots else _image(looker, host, node, settings, storages)
    if storage is not None:
        _space(looker, settings, storage)
    bridge = _bridge(looker, host, node, settings)
    _free_id(looker, host, settings)
    _pool_parent(looker, host, settings)
    return {
        "version": version,
        "node": node,
        "clock_offset": offset,
        "storage": storage and storage["storage"],
        "format": storage and disk_format(storage),
        "snippets": snippets,
        "image": image,
        "template": template,
        "bridge": bridge,
    }


def _reachable_as_root(looker: _Looker, host: PveHost) -> bool:
    who = host.run(["id", "-u"], timeout=20)
    if who.stdout.strip() == "0":
        return True
    found = f"uid {who.stdout.strip()[:20]}" if who.ok else who.stderr.strip()[:200]
    looker.add(
        "user", "root on the host (uid 0)", found,
        "Log in as root: `--pve-host root@HOST`, or User root in ~/.ssh/config; PVE's commands need it.",
    )  # fmt: skip
    return False


def _version(looker: _Looker, host: PveHost) -> str | None:
    try:
        answer = mapping(host.api.get("/version"))
    except NoPve as e:
        looker.add(
            "PVE", f"a Proxmox VE host at {host.name}", f"no pvesh there ({e.text.splitlines()[0][:120]})",
            "Name a Proxmox VE host.",
        )  # fmt: skip
        return None
    except SshError:
        raise
    except PveError as e:
        looker.add("PVE", "`pvesh get /version` to answer", str(e), "Mend the host's PVE services first.")
        return None
    found = str(answer.get("version", ""))
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if not numbers or (int(numbers[1]), int(numbers[2])) < LEAST_VERSION:
        looker.add(
            "version", f"PVE {'.'.join(map(str, LEAST_VERSION))} or newer", found or "no version",
            "Upgrade the host.",
        )  # fmt: skip
    return found


def _clock(looker: _Looker, host: PveHost) -> int | None:
    from pytest_nestedpve.ownership import host_clock

    now = looker.ask("clock", lambda: host_clock(host))
    if now is None:
        return None
    offset = round(now - time.time())
    if abs(offset) > CLOCK_LIMIT:
        looker.add(
            "clock", f"at most {CLOCK_LIMIT} s between the host's clock and this machine's",
            f"{abs(offset)} s ({'ahead' if offset > 0 else 'behind'})",
            "Set the clocks (`timedatectl`, `chronyc tracking`): leases and certificates need them.",
        )  # fmt: skip
    return offset


def _profile(looker: _Looker, env: Environment, host: PveHost) -> None:
    from pytest_nestedpve.hosts import host_profile
    from pytest_nestedpve.pve.errors import ProfileError
    from pytest_nestedpve.settings import SettingsError

    where = f"/etc/nested-pve.ini on {host.name}"
    try:
        env.settings = env.settings.with_profile(host_profile(host), where=where)
    except (ProfileError, SettingsError) as e:
        looker.add("profile", f"{where} to be readable and right", str(e), "Mend or remove that file.")


def _virtualisation(looker: _Looker, host: PveHost, settings: Settings) -> None:
    if settings.vm_options.get("kvm") == "0":
        return
    read = host.run(["cat", "/sys/module/kvm_intel/parameters/nested"], timeout=20)
    module = "kvm_intel"
    if not read.ok:
        module = "kvm_amd"
        read = host.run(["cat", "/sys/module/kvm_amd/parameters/nested"], timeout=20)
    state = read.stdout.strip()
    advice = (
        f"Switch it on: `echo 'options {module} nested=1' > /etc/modprobe.d/kvm-nested.conf`, then load the "
        f"module anew or reboot; or do without (slow): `nested_pve_vm_options = kvm=0`."
    )
    if not read.ok:
        looker.add(
            "nested virtualisation", "kvm_intel or kvm_amd loaded", "neither",
            "Switch virtualisation on in the firmware (of the VM's host, where this host is a VM itself: CPU "
            "type host); or do without (slow): `nested_pve_vm_options = kvm=0`.",
        )  # fmt: skip
    elif state not in ("Y", "1"):
        looker.add("nested virtualisation", f"{module}'s parameter nested to be Y or 1", state[:20], advice)
    elif not host.run(["test", "-e", "/dev/kvm"], timeout=20).ok:
        looker.add(
            "nested virtualisation", "/dev/kvm", "none",
            "Switch it on in the firmware; or do without (slow): `nested_pve_vm_options = kvm=0`.",
        )  # fmt: skip


def _storages(host: PveHost, node: str) -> list[dict[str, Any]]:
    return entries(host.api.get(f"/nodes/{node}/storage", format=True))


def contents(storage: dict[str, Any]) -> frozenset[str]:
    """The content types of a storage as /nodes/N/storage lists it."""
    return frozenset(str(storage.get("content") or "").split(","))


def usable(storage: dict[str, Any]) -> bool:
    """Whether a storage is enabled and active."""
    return flag(storage.get("active", 1)) and flag(storage.get("enabled", 1))


def disk_format(storage: dict[str, Any]) -> str | None:
    """qcow2 where the storage can have it (raw files have no snapshots), else None: its own default.

    What it can have it says itself, in `formats` of /nodes/N/storage?format=1: {"supported": […]}, in
    PVE 8 and older a list whose first element holds the formats as keys.
    """
    formats = storage.get("formats", storage.get("format"))
    supported: Any = ()
    if isinstance(formats, dict):
        supported = formats.get("supported", ())
    elif isinstance(formats, list) and formats and isinstance(formats[0], dict):
        supported = [name for name, able in formats[0].items() if flag(able)]
    if not formats:
        return "qcow2" if storage.get("type") in ("dir", "nfs", "cifs") else None
    return "qcow2" if isinstance(supported, (list, tuple)) and "qcow2" in supported else None


def _storage(looker: _Looker, settings: Settings, storages: list[dict[str, Any]]) -> dict[str, Any] | None:
    able = [each for each in storages if usable(each) and "images" in contents(each)]
    names = ", ".join(sorted(str(each.get("storage")) for each in able)) or "none"
    if settings.storage is None:
        if not able:
            there = ", ".join(sorted(str(each.get("storage")) for each in storages)) or "none"
            looker.add(
                "storage", "an active storage with content images", f"none such among {there}",
                "Give one that content: `pvesm set local --content images,…`.",
            )  # fmt: skip
            return None
        return max(able, key=lambda each: (whole(each.get("avail")) or 0, str(each.get("storage"))))
    found = next((each for each in storages if each.get("storage") == settings.storage), None)
    origin = settings.origin("storage")
    if found is None:
        looker.add(
            "storage", f"the storage {settings.storage!r} ({origin})", f"no such one; with images: {names}",
            "Set nested_pve_storage to one of them.",
        )  # fmt: skip
        return None
    if not usable(found):
        looker.add(
            "storage", f"{settings.storage} ({origin}) to be active", "it is disabled or not active",
            f"See `pvesm status --storage {settings.storage}` on the host.",
        )  # fmt: skip
        return None
    if "images" not in contents(found):
        wanted = ",".join(sorted(contents(found) | {"images"}))
        looker.add(
            "storage", f"{settings.storage} ({origin}) to have content images",
            ",".join(sorted(contents(found))),
            f"Run `pvesm set {settings.storage} --content {wanted}` there, or set nested_pve_storage to one "
            f"of: {names}.",
        )  # fmt: skip
        return None
    return found


def _snippets(looker: _Looker, storages: list[dict[str, Any]], chosen: dict[str, Any] | None) -> str | None:
    able = [str(each["storage"]) for each in storages if usable(each) and "snippets" in contents(each)]
    for preferred in (chosen and chosen.get("storage"), "local"):
        if preferred in able:
            return str(preferred)
    if able:
        return able[0]
    local = next((each for each in storages if each.get("storage") == "local"), None)
    wanted = ",".join(sorted((contents(local) if local else frozenset({"iso"})) | {"snippets"}))
    looker.add(
        "snippets", "an active storage with content snippets (the guest agent comes to the VM that way)",
        "none", f"Run `pvesm set local --content {wanted}` there, or use a template that has the agent.",
    )  # fmt: skip
    return None


def _image(
    looker: _Looker, host: PveHost, node: str, settings: Settings, storages: list[dict[str, Any]]
) -> str | None:
    importing = [str(each["storage"]) for each in storages if usable(each) and "import" in contents(each)]
    if settings.image is not None:
        return _named_image(looker, host, node, settings, storages)
    if not importing:
        local = next((each for each in storages if each.get("storage") == "local"), None)
        wanted = ",".join(sorted((contents(local) if local else frozenset({"iso"})) | {"import"}))
        looker.add(
            "image", "a storage with content import, and a Debian cloud image in it", "no such storage",
            f"Run `pvesm set local --content {wanted}` there, then {_fetch(node, 'local')}.",
        )  # fmt: skip
        return None
    volumes = []
    for storage in importing:
        volumes += looker.ask("image", lambda s=storage: _imports(host, node, s)) or []  # type: ignore[misc]
    matches = {volid: m for volid in volumes if (m := _IMAGE.search(volid.rpartition("/")[2]))}
    if matches:
        # The newest release; of one release's images the generic ones, which have all drivers.
        return max(matches, key=lambda v: (int(matches[v]["release"]), "generic" in v, v))
    if len(volumes) == 1:
        return volumes[0]
    looker.add(
        "image", f"a Debian cloud image among the import volumes of {', '.join(importing)}",
        ", ".join(sorted(volumes)) or "none",
        f"Name one in nested_pve_image, or fetch one: {_fetch(node, importing[0])}.",
    )  # fmt: skip
    return None


def _named_image(
    looker: _Looker, host: PveHost, node: str, settings: Settings, storages: list[dict[str, Any]]
) -> str | None:
    image, origin = str(settings.image), settings.origin("image")
    storage, _, rest = image.partition(":")
    there = next((each for each in storages if each.get("storage") == storage), None)
    if there is None or not usable(there):
        names = ", ".join(sorted(str(each.get("storage")) for each in storages)) or "none"
        looker.add(
            "image", f"{image} ({origin}) on a storage of {node}",
            f"no usable storage {storage!r} among {names}",
            "Set nested_pve_image to a volume that is there.",
        )  # fmt: skip
        return None
    kind = "import" if rest.startswith("import/") else "images"
    if rest.startswith(("iso/", "snippets/", "vztmpl/", "backup/")):
        looker.add(
            "image", f"a volume with content import, like {storage}:import/debian-13.qcow2 ({origin})", image,
            "PVE imports disks from content import or images only: put the file into that.",
        )  # fmt: skip
        return None
    if kind not in contents(there):
        wanted = ",".join(sorted(contents(there) | {kind}))
        looker.add(
            "image", f"{storage} to have content {kind}, for {image} ({origin})",
            ",".join(sorted(contents(there))), f"Run `pvesm set {storage} --content {wanted}` there.",
        )  # fmt: skip
        return None
    volumes = looker.ask("image", lambda: _imports(host, node, storage, kind))
    if volumes is not None and image not in volumes:
        looker.add(
            "image", f"{image} ({origin})", ", ".join(sorted(volumes)) or f"no {kind} volume on {storage}",
            f"Set nested_pve_image to one of these, or fetch one: {_fetch(node, storage)}.",
        )  # fmt: skip
        return None
    return image


def _imports(host: PveHost, node: str, storage: str, kind: str = "import") -> list[str]:
    found = entries(host.api.get(f"/nodes/{node}/storage/{storage}/content", content=kind))
    return [volid for each in found if (volid := text(each.get("volid")))]


def _fetch(node: str, storage: str) -> str:
    name = "debian-13-genericcloud-amd64.qcow2"
    return (
        f"`SITE=cloud.debian.org; pvesh create /nodes/{node}/storage/{storage}/download-url --content import "
        f"--filename {name} --url https://$SITE/images/cloud/trixie/latest/{name}`"
    )


def _space(looker: _Looker, settings: Settings, storage: dict[str, Any]) -> None:
    free = whole(storage.get("avail"))
    if free is None:
        return
    whole_disk = settings.disk * GIB
    thin = disk_format(storage) in THIN or storage.get("type") in THIN_TYPES
    needed = min(GROWN, whole_disk) if thin or settings.template else whole_disk
    if free < needed:
        looker.add(
            "space", f"{needed / GIB:.0f} GiB free on {storage.get('storage')}"
            + ("" if thin else f" for a disk of {settings.disk} GiB, which takes its room at once"),
            f"{free / GIB:.1f} GiB", "Make room, name another storage, or a smaller nested_pve_disk.",
        )  # fmt: skip


def _bridge(looker: _Looker, host: PveHost, node: str, settings: Settings) -> str | None:
    found = looker.ask("bridge", lambda: entries(host.api.get(f"/nodes/{node}/network")))
    if found is None:
        return None
    names = sorted(str(each.get("iface")) for each in found if each.get("type") in _BRIDGES)
    listed = ", ".join(names) or "none"
    if settings.bridge is not None:
        if settings.bridge in names:
            return settings.bridge
        looker.add(
            "bridge", f"the bridge {settings.bridge!r} ({settings.origin('bridge')}) on {node}",
            f"no such one; there: {listed}", "Set nested_pve_bridge to one of them.",
        )  # fmt: skip
        return None
    if "vmbr0" in names or len(names) == 1:
        return "vmbr0" if "vmbr0" in names else names[0]
    looker.add(
        "bridge", "vmbr0, or one single bridge", listed, "Say which one in nested_pve_bridge.",
    )  # fmt: skip
    return None


def _template(
    looker: _Looker, host: PveHost, settings: Settings, guests: list[dict[str, Any]], node: str
) -> int | None:
    if settings.template is None:
        return None
    wanted, origin = settings.template, settings.origin("template")
    # /cluster/resources is a broadcast up to 10 s old, in which a new template is an unnamed VM.
    live = looker.ask("template", lambda: entries(host.api.get(f"/nodes/{node}/qemu"))) or []
    here = [{**each, "node": node, "type": "qemu"} for each in live]
    elsewhere = [each for each in guests if each.get("node") != node]
    guests = here + elsewhere
    same = [
        each for each in guests
        if each.get("type", "qemu") == "qemu"
        and (str(each.get("vmid")) == wanted or text(each.get("name")) == wanted)
    ]  # fmt: skip
    by_id = [each for each in same if str(each.get("vmid")) == wanted]
    same = by_id or same
    templates = [each for each in guests if flag(each.get("template"))]
    listed = ", ".join(f"{each.get('vmid')} ({text(each.get('name')) or 'unnamed'})" for each in templates)
    advice = f"Templates here: {listed or 'none'}. Set nested_pve_template to one, or leave it out."
    if not same:
        looker.add("template", f"the template {wanted!r} ({origin})", "no such VM", advice)
        return None
    if len(same) > 1:
        ids = ", ".join(str(each.get("vmid")) for each in same)
        looker.add("template", f"one VM called {wanted!r} ({origin})", f"several: {ids}", "Give its id.")
        return None
    if not flag(same[0].get("template")):
        looker.add("template", f"{wanted} ({origin}) to be a template", "an ordinary VM", advice)
        return None
    if same[0].get("node") != node:
        looker.add(
            "template", f"{wanted} ({origin}) on {node}", f"it is on {same[0].get('node')}",
            "Connect to that node, or clone the template to this one.",
        )  # fmt: skip
        return None
    return whole(same[0].get("vmid"))


def _free_id(looker: _Looker, host: PveHost, settings: Settings) -> None:
    free = looker.ask("VM id", lambda: next(free_ids(host, settings), 0))
    if free != 0:
        return
    ranges = ", ".join(f"{low}-{high}" for low, high in settings.vmid_ranges)
    looker.add(
        "VM id", f"a free id in {ranges} ({settings.origin('vmid_range')})",
        "all of them are taken: by guests, by volumes on a storage, or in a pool",
        "See what earlier runs left (`pytest --nested-destroy-only --nested-dry-run`), or set another "
        "nested_pve_vmid_range.",
    )  # fmt: skip


def _pool_parent(looker: _Looker, host: PveHost, settings: Settings) -> None:
    from pytest_nestedpve.ownership import read_pool

    parent = settings.pool_parent
    if parent is None:
        return
    failures = len(looker.findings)
    found = looker.ask("pool", lambda: read_pool(host.api, parent))
    if found is None and len(looker.findings) == failures:
        looker.add(
            "pool", f"the pool {parent!r} ({settings.origin('pool_parent')})", "no such pool",
            f"Make it (`pveum pool add {parent}`), or leave nested_pve_pool_parent out.",
        )  # fmt: skip
