"""Templates that this tool made: what is theirs on a host, the proof of it, and their end.

A template belongs to no run. Its pool, `npve-template-<id>`, has no lease, its marker is no run's: neither
another session nor a clean-up takes it, unless it is named. The only exception is one whose making was cut
off, on this machine: that is a left-over like any other.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.killed_tasks import running_tasks
from pytest_nestedpve.ownership.marker import parse_marker, uuid_of
from pytest_nestedpve.ownership.pool import read_pool, remove_pool
from pytest_nestedpve.ownership.proof import name_matches
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.errors import GuestNotFound, PveError
from pytest_nestedpve.run.identity import client_hash, owner
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.teardown.destroy import Outcome
from pytest_nestedpve.teardown.plan_row import Row
from pytest_nestedpve.teardown.volumes import Volumes

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost

PREFIX = "template-"
MARKER = "nestedpve-template:"
NAME = re.compile(r"template-[0-9a-f]{12}\Z")
_POOL = re.compile(r"(?:[A-Za-z0-9._-]+/){0,2}npve-(template-[0-9a-f]{12})\Z")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")
MAKING, READY = "making", "ready"


@dataclass(frozen=True)
class Deed:
    """The comment of a template's pool: which VM it is, and whose. `state`: making | ready."""

    template: str
    vmid: int
    uuid: str
    owner: str
    client: str
    created: int
    state: str

    def to_text(self) -> str:
        """One line of JSON."""
        return json.dumps({"v": 1, **vars(self)}, separators=(",", ":"))


def parse_deed(comment: object) -> Deed | None:
    """The deed in a pool's comment; None unless it is exactly one as we write it."""
    try:
        data = json.loads(comment) if isinstance(comment, str) else None
    except (ValueError, RecursionError):
        return None
    names = {
        "template": str,
        "vmid": int,
        "uuid": str,
        "owner": str,
        "client": str,
        "created": int,
        "state": str,
    }
    if not isinstance(data, dict) or set(data) != {"v", *names} or data.pop("v") != 1:
        return None
    if any(type(data[key]) is not kind for key, kind in names.items()):
        return None
    sound = NAME.match(data["template"]) and _UUID.match(data["uuid"]) and qemu.is_vmid(data["vmid"])
    return Deed(**data) if sound and data["state"] in (MAKING, READY) else None


def marker(deed: Deed) -> str:
    """The line of the template's description."""
    what = {"v": 1, "template": deed.template, "vmid": deed.vmid, "uuid": deed.uuid}
    return f"{MARKER} {json.dumps(what, separators=(',', ':'))}"


def pool_name(settings: Settings, template: str) -> str:
    """The template's pool, below `pool_parent` if that is set."""
    return f"{settings.pool_parent}/npve-{template}" if settings.pool_parent else f"npve-{template}"


def guest_name(settings: Settings, template: str) -> str:
    """What the template is called."""
    return f"{settings.name_prefix}-{template}"


def own_deed(settings_run: str, vmid: int, uuid: str, now: int) -> Deed:
    """A deed for the VM of the run `settings_run`, which is about to become a template."""
    return Deed(f"{PREFIX}{settings_run}", vmid, uuid, owner(), client_hash(), now, MAKING)


@dataclass(frozen=True)
class Proof:
    """Whether a VM is the template that a pool says; `reason` why not."""

    ok: bool
    reason: str = ""
    gone: bool = False
    status: str = ""


def prove(host: PveHost, settings: Settings, pool: str, deed: Deed, node: str) -> Proof:
    """Read pool, status and configuration anew and judge. Raises PveError when the host cannot be asked."""
    found = read_pool(host.api, pool)
    if found is None or parse_deed(found.comment) != deed:
        return Proof(False, f"the pool {pool} does not say so any more")
    base = qemu.path_of(node, deed.vmid)
    try:
        status = host.api.get(f"{base}/status/current")
        config = host.api.get(f"{base}/config", current=1)
    except GuestNotFound:
        return Proof(False, "there is no such VM", gone=True)
    if not isinstance(config, dict) or not isinstance(status, dict):
        return Proof(False, "its configuration is not readable")
    reason = _against(settings, deed, config, status)
    if not reason and ("qemu", deed.vmid, node) not in found.members:
        reason = f"it is not in the pool {pool}"
    return Proof(not reason, reason, status=str(status.get("status") or ""))


def _against(settings: Settings, deed: Deed, config: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    lines = [each.strip() for each in str(config.get("description") or "").split("\n")]
    if lines.count(marker(deed)) != 1 and not (deed.state == MAKING and _still_the_runs(deed, config)):
        return "its marker is not this template's"
    if uuid_of(config) != deed.uuid:
        return "its SMBIOS uuid is not the one in its pool's comment: it is a copy, or another VM"
    if not name_matches(settings, config.get("name")):
        return f"its name {str(config.get('name'))[:60]!r} does not match the pattern"
    if qemu.protects(config, "protection"):
        return "it is protected"
    managed = status.get("ha")
    if not isinstance(managed, dict) or qemu.cautious(managed.get("managed", 1)):
        return "HA may manage it"
    if deed.state == READY and not qemu.protects(config, "template"):
        return "it is no template any more"
    return ""


def _still_the_runs(deed: Deed, config: Mapping[str, Any]) -> bool:
    found = parse_marker(config.get("description"))
    return found is not None and (found.vmid, found.uuid, f"{PREFIX}{found.run}") == (
        deed.vmid, deed.uuid, deed.template,
    )  # fmt: skip


# -- what a clean-up shows and takes -------------------------------------------------------------


def rows(host: PveHost, settings: Settings) -> list[Row]:
    """The templates on the host; `settings.run_id` names the one that may go. Raises PveError."""
    found = []
    for entry in entries(host.api.get("/pools"), call="get /pools"):
        match = _POOL.match(str(entry.get("poolid")))
        if match and settings.run_id in (None, match[1]):
            found.append(_row(host, settings, match[0], match[1], parse_deed(entry.get("comment"))))
    return found


def _row(host: PveHost, settings: Settings, pool: str, template: str, deed: Deed | None) -> Row:
    row = Row(None, host.node, f"pool {pool}", template, None, None, None, "keep", "", pool=pool)
    if deed is None or deed.template != template:
        return row.kept("its pool's comment does not say which VM it is: remove it by hand", owed=False)
    members = read_pool(host.api, pool)
    node = next((each[2] for each in members.members if each[1] == deed.vmid), None) if members else None
    name = guest_name(settings, template)
    row = replace(row, owner=deed.owner, created=deed.created)
    if node is not None:
        row = replace(row, vmid=deed.vmid, node=node, name=name)
    if settings.run_id != template:
        if not _cut_off(deed):
            return row.kept(f"a template; `--nested-run {template}` removes it", owed=False)
        row = replace(row, verdict="destroy", reason="its making was cut off")
    else:
        row = replace(row, verdict="destroy", reason="it was named")
    if node is None:
        return row
    proof = prove(host, settings, pool, deed, node)
    return row if proof.ok or proof.gone else row.kept(f"not proved: {proof.reason}")


def _cut_off(deed: Deed) -> bool:
    """Whether it was being made by a session on this machine that is dead."""
    mine = (deed.client, deed.owner) == (client_hash(), owner())
    return deed.state == MAKING and mine and SessionLock.alive(deed.template.removeprefix(PREFIX)) is False


def end(host: PveHost, settings: Settings, row: Row) -> Outcome:
    """Destroy a template and its pool, proved again right before each blow. Never raises."""
    try:
        return _end(host, settings, row)
    except Exception as e:
        hint = "; VMs that were cloned from it go first" if "linked clone" in str(e) else ""
        return Outcome(row.vmid or 0, row.node, "left", f"{type(e).__name__}: {e}{hint}")


def _end(host: PveHost, settings: Settings, row: Row) -> Outcome:
    vmid, pool = row.vmid or 0, str(row.pool)
    listed = read_pool(host.api, pool)
    deed = parse_deed(listed.comment) if listed else None
    if listed is None:
        return Outcome(vmid, row.node, "gone")
    if deed is None or deed.template != row.run:
        return Outcome(vmid, row.node, "foreign", "its pool's comment is another one now")
    if row.vmid is not None:
        stays = _destroy(host, settings, pool, deed, row)
        if stays is not None:
            return stays
    inside = read_pool(host.api, pool)
    if inside is not None and inside.members:
        members = ", ".join(map(str, sorted(inside.vmids)))
        return Outcome(vmid, row.node, "left", f"pool {pool}: it still contains {members}")
    remove_pool(host.api, pool)
    return Outcome(vmid, row.node, "gone")


def _destroy(host: PveHost, settings: Settings, pool: str, deed: Deed, row: Row) -> Outcome | None:
    """None when it is gone."""
    volumes = Volumes(host.api)
    volumes.look(row.node)
    proof = prove(host, settings, pool, deed, row.node)
    if proof.ok:
        config = qemu.guest_config(host.api, row.node, deed.vmid)
        volumes.note(row.node, deed.vmid, config, marked=True)
        if proof.status != "stopped":
            qemu.stop(host.api, row.node, deed.vmid)
        # A delete is never sent to queue behind a task: what then has the id may be another VM.
        if tasks := running_tasks(host.api, row.node, deed.vmid):
            return Outcome(deed.vmid, row.node, "left", f"the task {tasks[0]} works on it")
        proof = prove(host, settings, pool, deed, row.node)
        if proof.ok:
            qemu.destroy(host.api, row.node, deed.vmid)
            proof = Proof(False, gone=True)
    if not proof.gone:
        return Outcome(deed.vmid, row.node, "foreign", proof.reason)
    for _, stays in volumes.sweep({deed.vmid: row.node}):
        return Outcome(deed.vmid, row.node, "left", stays)
    return None


# -- making one ------------------------------------------------------------------------------------


def claim(host: PveHost, settings: Settings, deed: Deed) -> str:
    """Make the template's pool and move the VM into it, out of its run's; its name. Raises PveError."""
    pool = pool_name(settings, deed.template)
    move = {"vms": str(deed.vmid), "allow-move": 1}
    patiently(lambda: host.api.post("/pools", poolid=pool, comment=deed.to_text()))
    patiently(lambda: host.api.put("/pools", poolid=pool, **move))
    return pool


def convert(
    host: PveHost, settings: Settings, deed: Deed, node: str, say: Callable[[str], None], limit: float = 600.0
) -> str:
    """Make the stopped VM, which is in its pool, the template; returns its name. Raises PveError."""
    path, pool = qemu.path_of(node, deed.vmid), pool_name(settings, deed.template)
    name = guest_name(settings, deed.template)
    made = time.strftime("%Y-%m-%d", time.gmtime(deed.created))
    note = f"Nested Proxmox VE for fast starts, made on {made} by {deed.owner}"
    say("writing whose it is")
    whose = {"description": f"{marker(deed)}\n{note}", "tags": "nestedpve;nestedpve-template"}
    # The snippet goes with the run, whose keys are no use to a clone.
    patiently(lambda: host.api.put(f"{path}/config", name=name, delete="cicustom,sshkeys", **whose))
    say("converting it")
    qemu.awaited(host.api, lambda: host.api.post(f"{path}/template"), limit)
    patiently(lambda: host.api.put("/pools", poolid=pool, comment=replace(deed, state=READY).to_text()))
    return name


def undo(host: PveHost, settings: Settings, deed: Deed) -> str:
    """Remove what a making that failed has left; says what stays, if anything does. Never raises."""
    try:
        chosen = replace(settings, run_id=deed.template)
        for row in rows(host, chosen):
            outcome = end(host, chosen, row) if row.verdict == "destroy" else None
            if outcome is None or outcome.result != "gone":
                return f"{row.name}: {outcome.reason if outcome else row.reason}"
    except PveError as e:
        return str(e)
    return ""
