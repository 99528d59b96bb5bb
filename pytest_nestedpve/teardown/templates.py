"""Templates that this tool created: their pool, marker and proof, and their destruction.

A template belongs to no run. Its pool, `npve-template-<id>`, has no lease, and its marker names no run:
neither another session nor a clean-up destroys it unless it is named. The only exception is a template whose
creation was interrupted on this machine: that is a leftover like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.discover import Candidate
from pytest_nestedpve.ownership.marker import parse_marker, uuid_of
from pytest_nestedpve.ownership.pool import read_pool, remove_pool
from pytest_nestedpve.ownership.proof import Proof, name_matches, prove_where_it_is
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import GuestNotFound
from pytest_nestedpve.run.identity import client_hash, owner
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.plan_row import Row

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.ownership.proof import Located
    from pytest_nestedpve.pve.host import PveHost

PREFIX = "template-"
MARKER = "nestedpve-template:"
NAME = re.compile(r"template-[0-9a-f]{12}\Z")
_POOL = re.compile(r"(?:[A-Za-z0-9._-]+/){0,2}npve-(template-[0-9a-f]{12})\Z")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")
MAKING, READY = "making", "ready"


@dataclass(frozen=True)
class Deed:
    """The comment of a template's pool: its VM and its owner. `state`: making | ready."""

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
    """The name of the template's VM."""
    return f"{settings.name_prefix}-{template}"


def own_deed(run_id: str, vmid: int, uuid: str, now: int) -> Deed:
    """The deed of the VM of the run `run_id`, from which a template is created."""
    return Deed(f"{PREFIX}{run_id}", vmid, uuid, owner(), client_hash(), now, MAKING)


@dataclass(frozen=True)
class TemplateProver:
    """Proves that a VM is the template of a `deed`, which the template's `pool` still has."""

    host: PveHost
    settings: Settings
    pool: str
    deed: Deed
    own_tasks: frozenset[str] | None = None
    retries: bool = True

    def prove(self, vm: Located) -> Proof:
        """Read pool, status and configuration and judge. Raises PveError when the host cannot be asked."""
        return prove_where_it_is(self.host.api, vm, self._prove_at)

    def _prove_at(self, node: str) -> Proof:
        api, pool, deed = self.host.api, self.pool, self.deed
        listed = read_pool(api, pool)
        if listed is None or parse_deed(listed.comment) != deed:
            return Proof(False, f"the comment of the pool {pool} is not that of this template any more")
        base = qemu.path_of(node, deed.vmid)
        try:
            status = api.get(f"{base}/status/current")
            config = api.get(f"{base}/config", current=1)
        except GuestNotFound:
            return Proof(False, "there is no such VM", gone=True)
        if not isinstance(config, dict) or not isinstance(status, dict):
            return Proof(False, "its configuration is not readable")
        reason = _obstacle(self.settings, deed, config, status)
        if not reason and ("qemu", deed.vmid, node) not in listed.members:
            reason = f"it is not in the pool {pool}"
        lock = config.get("lock") or status.get("lock")
        return Proof(
            not reason,
            reason,
            status=str(status.get("status") or ""),
            lock=str(lock) if lock else None,
            identity=uuid_of(config) or "",
            config=config,
            marked=not reason,
        )


def _obstacle(settings: Settings, deed: Deed, config: Mapping[str, Any], status: Mapping[str, Any]) -> str:
    """Why the VM is not the template, or must not be destroyed; empty if it may."""
    lines = [line.strip() for line in str(config.get("description") or "").split("\n")]
    if lines.count(marker(deed)) != 1 and not (deed.state == MAKING and _has_run_marker(deed, config)):
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


def _has_run_marker(deed: Deed, config: Mapping[str, Any]) -> bool:
    """Whether the VM still has the marker of the run that was making a template of it."""
    marked = parse_marker(config.get("description"))
    return marked is not None and (marked.vmid, marked.uuid, f"{PREFIX}{marked.run}") == (
        deed.vmid, deed.uuid, deed.template,
    )  # fmt: skip


# -- clean-up ------------------------------------------------------------------------------------


def rows(host: PveHost, settings: Settings) -> list[Row]:
    """The templates on the host; `settings.run_id` names the one to destroy. Raises PveError."""
    templates = []
    for entry in entries(host.api.get("/pools"), call="get /pools"):
        match = _POOL.match(str(entry.get("poolid")))
        if match and settings.run_id in (None, match[1]):
            templates.append(_row(host, settings, match[0], match[1], parse_deed(entry.get("comment"))))
    return templates


def _row(host: PveHost, settings: Settings, pool: str, template: str, deed: Deed | None) -> Row:
    row = Row(None, host.node, f"pool {pool}", template, None, None, None, "keep", "", pool=pool)
    if deed is None or deed.template != template:
        return row.kept("its pool's comment does not name its VM: remove it by hand", is_leftover=False)
    listed = read_pool(host.api, pool)
    members = listed.members if listed else ()
    node = next((node for _, vmid, node in members if vmid == deed.vmid), None)
    name = guest_name(settings, template)
    row = replace(row, owner=deed.owner, created=deed.created)
    if node is not None:
        row = replace(row, vmid=deed.vmid, node=node, name=name)
    if settings.run_id != template:
        if not _was_interrupted(deed):
            return row.kept(f"a template; `--nested-run {template}` removes it", is_leftover=False)
        row = replace(row, verdict="destroy", reason="its creation was interrupted")
    else:
        row = replace(row, verdict="destroy", reason="it was named")
    if node is None:
        return row
    proof = TemplateProver(host, settings, pool, deed).prove(Candidate(deed.vmid, node, row.reason))
    return row if proof.ok or proof.gone else row.kept(f"not proved: {proof.reason}")


def _was_interrupted(deed: Deed) -> bool:
    """Whether a session on this machine was creating it, and has exited."""
    mine = (deed.client, deed.owner) == (client_hash(), owner())
    return deed.state == MAKING and mine and SessionLock.alive(deed.template.removeprefix(PREFIX)) is False


def destroy_template(host: PveHost, settings: Settings, row: Row) -> Outcome:
    """Destroy a template and then its pool. Never raises."""
    vmid, pool = row.vmid or 0, str(row.pool)
    try:
        listed = read_pool(host.api, pool)
        deed = parse_deed(listed.comment) if listed else None
        if listed is None:
            return Outcome(vmid, row.node, "gone")
        if deed is None or deed.template != row.run:
            return Outcome(vmid, row.node, "foreign", "its pool's comment is another one now")
        if row.vmid is not None:
            outcome = _destroy_vm(host, settings, TemplateProver(host, settings, pool, deed), row)
            if outcome.result != "gone":
                return outcome
        remaining = read_pool(host.api, pool)
        if remaining is not None and remaining.members:
            members = ", ".join(map(str, sorted(remaining.vmids)))
            return Outcome(vmid, row.node, "left", f"pool {pool}: it still contains {members}")
        remove_pool(host.api, pool)
    except Exception as e:
        return Outcome(vmid, row.node, "left", f"{type(e).__name__}: {e}")
    return Outcome(vmid, row.node, "gone")


def _destroy_vm(host: PveHost, settings: Settings, prover: TemplateProver, row: Row) -> Outcome:
    vm = Candidate(prover.deed.vmid, row.node, row.reason)
    outcome = destroy(host, prover, [vm], force_stop=settings.force_stop)[0]
    if outcome.result == "left" and "linked clone" in outcome.reason:
        return replace(outcome, reason=f"{outcome.reason}; destroy the VMs that were cloned from it first")
    return outcome
