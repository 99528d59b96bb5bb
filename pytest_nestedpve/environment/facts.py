"""The facts of the packaged phases, typed.

Their JSON form is `environment.facts`, a mapping by phase and key: state.json, the context file, the audit
log and projects have that form. Only this module knows the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.ownership.create import Created

ByPhase = Mapping[str, Mapping[str, Any]]
Value = TypeVar("Value")


class NotReady(PveError):
    """The request needs the facts of a phase that has not been done."""


def missing_fact(phase: str, key: str, recorded: Mapping[str, Any]) -> NotReady:
    """The error for a fact that the phase has not recorded."""
    keys = ", ".join(sorted(recorded)) or "nothing"
    return NotReady(f"expected the phase {phase} to be done and to record its {key}, found: {keys}")


def _fact(read: Callable[[Any], Any], default: Any = None) -> Any:
    """A field whose value is read from JSON by `read`; `default` where the key is absent or null."""
    return field(default=default, metadata={"read": read})


def _texts(values: Any) -> tuple[str, ...]:
    return tuple(str(value) for value in values)


@dataclass(frozen=True)
class PhaseFacts:
    """Base of the facts of a phase. `recorded` is their JSON form, including the keys of a project."""

    phase: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = ()
    """Keys without which `of` fails."""
    nullable: ClassVar[tuple[str, ...]] = ()
    """Keys that are also written without a value."""
    recorded: Mapping[str, Any] = field(default_factory=dict, kw_only=True, repr=False)

    @classmethod
    def of(cls, facts: ByPhase) -> Self:
        """The facts of the phase. Raises NotReady when it has recorded none, or lacks a required one."""
        recorded = cls.known(facts)
        if recorded is None:
            raise missing_fact(cls.phase, (*cls.required, "facts")[0], {})
        for key in cls.required:
            recorded._require(key, getattr(recorded, key) or None)
        return recorded

    @classmethod
    def known(cls, facts: ByPhase) -> Self | None:
        """The facts of the phase; None when it has recorded none."""
        return cls.read(facts[cls.phase]) if cls.phase in facts else None

    @classmethod
    def read(cls, recorded: Mapping[str, Any]) -> Self:
        """The facts from their JSON form. Raises PveError for a value of another type."""
        values = {}
        for fact in fields(cls):
            value = recorded.get(fact.name)
            if "read" not in fact.metadata or value is None:
                continue
            try:
                values[fact.name] = fact.metadata["read"](value)
            except (TypeError, ValueError) as e:
                raise PveError(
                    f"expected the phase {cls.phase} to record its {fact.name} as {fact.type}, "
                    f"found {str(value)[:200]!r}"
                ) from e
        return cls(**values, recorded=dict(recorded))

    def values(self) -> dict[str, Any]:
        """The JSON form of the declared facts: those that have a value, or that were recorded without one."""
        values = {}
        for fact in fields(self):
            value = getattr(self, fact.name)
            written = fact.name in self.recorded or fact.name in self.nullable or value != fact.default
            if "read" in fact.metadata and written:
                values[fact.name] = list(value) if isinstance(value, tuple) else value
        return values

    def record(self, facts: MutableMapping[str, dict[str, Any]]) -> None:
        """Write the declared facts into the mapping by phase; other keys of the phase remain."""
        facts.setdefault(self.phase, {}).update(self.values())

    def _require(self, key: str, value: Value | None) -> Value:
        if value is None:
            raise missing_fact(self.phase, key, self.recorded)
        return value


@dataclass(frozen=True)
class PreflightFacts(PhaseFacts):
    """The resources of the outer host that the run will use.

    `awaited` is for an attached PVE: by the name of the check, the phase whose result is still missing.
    """

    phase = "preflight"
    version: str | None = _fact(str)
    node: str | None = _fact(str)
    clock_offset: int | None = _fact(int)
    storage: str | None = _fact(str)
    format: str | None = _fact(str)
    snippets: str | None = _fact(str)
    image: str | None = _fact(str)
    template: int | None = _fact(int)
    bridge: str | None = _fact(str)
    awaited: Mapping[str, str] = field(default_factory=dict, metadata={"read": dict})


@dataclass(frozen=True)
class ProvisionFacts(PhaseFacts):
    """The nested VM; of an attached PVE, only name and node. `mac` is that of its card net0."""

    phase = "provision"
    required = ("name",)
    vmid: int | None = _fact(int)
    node: str | None = _fact(str)
    uuid: str | None = _fact(str)
    name: str = _fact(str, "")
    pool: str | None = _fact(str)
    storage: str | None = _fact(str)
    bridge: str | None = _fact(str)
    mac: str | None = _fact(str)
    snippet: str | None = _fact(str)

    @property
    def vm_id(self) -> int:
        """The id of the VM. Raises NotReady when there is none."""
        return self._require("vmid", self.vmid)

    @property
    def card(self) -> str:
        """The MAC address of the VM's card. Raises NotReady while it is not known."""
        return self._require("mac", self.mac)

    @property
    def vm(self) -> Created:
        """The VM, for a proof. Raises NotReady when there is none."""
        from pytest_nestedpve.ownership.create import Created

        node, uuid = self._require("node", self.node), self._require("uuid", self.uuid)
        return Created(self.vm_id, node, self.name, uuid)


@dataclass(frozen=True)
class LeafProvisionFacts(ProvisionFacts):
    """The VM inside."""

    phase = "leaf_provision"


@dataclass(frozen=True)
class AddressFacts(PhaseFacts):
    """Address and host keys of the nested PVE, and the result of its first boot."""

    phase = "wait_ip"
    required = ("ip",)
    nullable = ("host_keys",)
    ip: str = _fact(str, "")
    host_keys: tuple[str, ...] = _fact(_texts, ())
    cloud_init: str | None = _fact(str)


@dataclass(frozen=True)
class LeafAddressFacts(AddressFacts):
    """Address and host keys of the VM inside, and the result of its first boot."""

    phase = "leaf_wait_ip"


@dataclass(frozen=True)
class PveFacts(PhaseFacts):
    """The version of the nested PVE, the action that installed or repaired it, and its address afterwards."""

    phase = "ensure_pve"
    version: str | None = _fact(str)
    action: str | None = _fact(str)
    ip: str | None = _fact(str)


@dataclass(frozen=True)
class NetworkFacts(PhaseFacts):
    """The address of the nested PVE on its bridge, and how the bridge is configured."""

    phase = "setup_network"
    ip: str | None = _fact(str)
    mode: str | None = _fact(str)


@dataclass(frozen=True)
class SshFacts(PhaseFacts):
    """The public key of the nested node's root; `own_key`: the run has installed no key pair beside it."""

    phase = "setup_ssh"
    nullable = ("root_public_key",)
    root_public_key: str | None = _fact(str)
    own_key: bool = _fact(bool, False)


@dataclass(frozen=True)
class ImageFacts(PhaseFacts):
    """The image of the VM inside: its volume id, and the text that named it."""

    phase = "download_image"
    required = ("volid",)
    volid: str = _fact(str, "")
    source: str | None = _fact(str)


def nested_address(facts: ByPhase) -> str | None:
    """The address of the nested PVE by the latest phase that recorded one; None while there is none."""
    latest = (NetworkFacts.known(facts), PveFacts.known(facts), AddressFacts.known(facts))
    return next((known.ip for known in latest if known is not None and known.ip), None)
