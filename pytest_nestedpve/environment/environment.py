"""The environment of a run: settings, facts, hosts and logins, shared by its phases."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_nestedpve.environment.facts import (
    AddressFacts,
    LeafAddressFacts,
    LeafProvisionFacts,
    NotReady,
    PreflightFacts,
    ProvisionFacts,
    missing_fact,
    nested_address,
)
from pytest_nestedpve.run.phase_record import PhaseRecord

__all__ = ["Environment", "NotReady"]

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.lease_keeper import LeaseKeeper
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import SshConnection
    from pytest_nestedpve.run.audit_log import AuditLog
    from pytest_nestedpve.run.identity import Run


class Environment:
    """The state that the phases of one run share.

    `settings` change once, in preflight, when the host's profile is read; `initial_settings` are
    those before that.
    `facts` are by phase, in their JSON form; `record` has the inputs that each phase was done for.
    `resumed`: the run is a kept one. `secrets` are values that artifacts of playbooks and the log must not
    show.
    """

    def __init__(
        self,
        *,
        settings: Settings,
        run: Run,
        connect: Callable[[], PveHost],
        audit: AuditLog,
        progress: Callable[[str], None],
        rootdir: Path,
    ) -> None:
        self.settings = self.initial_settings = settings
        self.run = run
        self.audit = audit
        self.progress = progress
        self.rootdir = rootdir
        self.facts: dict[str, dict[str, Any]] = {}
        self.record = PhaseRecord()
        self.resumed = False
        self.remarks: list[str] = []
        self.leaf_used = False  # whether a test has logged in to the VM inside
        self.workers = 1  # environments of the session that exist at the same time
        self.secrets: list[str] = []
        self.undo: list[Callable[[], list[str]]] = []  # called at the end, latest first; return leftovers
        self.missing: dict[str, str] = {}  # of an attached PVE, by phase: the reason why its probe failed
        self.selected: frozenset[str] = frozenset()  # of an attached PVE: phases of steps selected by name
        self._connect = connect
        self._lock = threading.RLock()
        self._outer: PveHost | None = None
        self._inner: PveHost | None = None
        self._leaf: SshConnection | None = None
        self._on_close: list[Callable[[], None]] = []
        self._lease: LeaseKeeper | None = None

    def __repr__(self) -> str:
        return f"<Environment of run {self.run.id}>"

    # -- facts ------------------------------------------------------------------------------------

    def fact(self, phase: str, key: str) -> Any:
        """One fact of a phase, for phases of a project. Raises NotReady when it is not recorded."""
        try:
            return self.facts[phase][key]
        except KeyError as e:
            raise missing_fact(phase, key, self.facts.get(phase, {})) from e

    @property
    def attached(self) -> bool:
        """Whether the nested PVE is an existing one; then `outer` is the same PVE."""
        return self.settings.attach is not None

    @property
    def ip(self) -> str:
        """The nested PVE's present address, which its set-up may change. Raises NotReady."""
        return nested_address(self.facts) or AddressFacts.of(self.facts).ip

    def hide(self, secret: str) -> None:
        """Mask a value in the log and in artifacts of playbooks from now on."""
        self.audit.masker.add(secret)
        if secret not in self.secrets:
            self.secrets.append(secret)

    def start_over(self) -> None:
        """Discard all facts and records of a kept run but those of preflight."""
        for name in [name for name in self.facts if name != PreflightFacts.phase]:
            del self.facts[name]
        self.record.digests.clear()
        self.record.begun = None
        self.forget_connections()

    def remark(self, text: str) -> None:
        """Report `text` in the log, now as progress, and at the end of the session."""
        self.remarks.append(text)
        self.audit.write("remark", cause=text)
        self.progress(text)

    # -- lease ------------------------------------------------------------------------------------

    def keep_lease(self) -> None:
        """Renew the lease of the run's pool from now on, until `close`."""
        from pytest_nestedpve.environment.lease_keeper import LeaseKeeper

        if self._lease is None:
            self._lease = LeaseKeeper(self.outer, self.run, self.settings, self.audit)
            self._lease.start()

    @property
    def has_lease(self) -> bool:
        """Whether the run's lease is being renewed."""
        return self._lease is not None

    def end_lease(self) -> None:
        """Stop renewing the lease."""
        if self._lease is not None:
            self._lease.stop()

    def check_lease(self) -> None:
        """Raises LeaseLost when the lease is lost: then the run must not create anything more."""
        if self._lease is not None:
            self._lease.check()

    # -- hosts ------------------------------------------------------------------------------------

    @property
    def outer(self) -> PveHost:
        """The outer host, connected at first use, its calls written to the audit log. Raises PveError."""
        with self._lock:
            if self._outer is None:
                from pytest_nestedpve.ownership.pool import pool_name

                host = self._connect()
                host = host.logged(self.audit.calls(host.name))
                # PVE itself refuses a call for a guest outside the run's pool.
                self._outer = host.within(lambda: pool_name(self.settings, self.run))
            return self._outer

    @property
    def inner(self) -> PveHost:
        """The nested PVE, reached through the outer host with the run's key. Raises NotReady, PveError."""
        if self.attached:
            return self.outer
        with self._lock:
            if self._inner is None:
                self._inner = self._nested_host(ProvisionFacts.of(self.facts).name, self.ip)
            return self._inner

    @property
    def leaf_ssh(self) -> SshConnection:
        """A login at the leaf, through the outer host and the nested PVE. Raises NotReady."""
        with self._lock:
            if self._leaf is None:
                name = LeafProvisionFacts.of(self.facts).name
                ip = LeafAddressFacts.of(self.facts).ip
                self._leaf = self.guest_ssh(name, ip, cast("SshConnection", self.inner.ssh))
            return self._leaf

    def guest_ssh(self, name: str, ip: str, via: SshConnection, *, timeout: float = 20.0) -> SshConnection:
        """A login at a guest of the run: only the run's key is offered, and the pinned host key expected."""
        from pytest_nestedpve.pve.ssh.connection import SshConnection, SshTarget

        directory = self.run.directory
        target = SshTarget(
            host=ip,
            identity_files=(directory.key,),
            known_hosts=(directory.known_hosts,),
            host_key_alias=name,
            allow_agent=False,
            identities_only=True,
            connect_timeout=timeout,
            alias=name,
        )
        return SshConnection(target, via=via, log=self.audit.calls(name))

    def forget_connections(self) -> None:
        """Close the logins after a reboot or a change of address; the next use logs in again."""
        with self._lock:
            # Only the logins: API tokens on a node that is rebooting expire by themselves.
            for connection in (self._leaf, self._inner.ssh if self._inner is not None else None):
                if connection is not None:
                    with contextlib.suppress(Exception):
                        connection.close()
            self._leaf = self._inner = None

    def _nested_host(self, name: str, ip: str) -> PveHost:
        from pytest_nestedpve.ownership.pool import pool_name
        from pytest_nestedpve.pve.host import PveHost
        from pytest_nestedpve.pve.transports import HostApi

        ssh = self.guest_ssh(name, ip, cast("SshConnection", self.outer.ssh))
        host = PveHost(name, ssh, HostApi(ssh, self.audit.calls(name)))
        settings = replace(self.settings, pool_parent=None)
        return host.within(lambda: pool_name(settings, self.run))

    def write_ssh_config(self) -> Path:
        """Write the run's ssh_config for the nested PVE and, once its address is known, the leaf."""
        outer, name = self.outer, ProvisionFacts.of(self.facts).name
        target = getattr(outer.ssh, "target", None)
        leaf, leaf_address = LeafProvisionFacts.known(self.facts), LeafAddressFacts.known(self.facts)
        block = None
        if self.attached:
            from pytest_nestedpve.run.directory import ssh_block

            block = ssh_block(target, name, self.ip, self.run.directory.known_hosts)
        return self.run.directory.write_ssh_config(
            getattr(target, "alias", "") or outer.name,
            outer.ssh_config,
            self.ip,
            name,
            leaf_address.ip if leaf_address is not None else None,
            leaf.name if leaf is not None else None,
            nested_block=block,
        )

    # -- the end ----------------------------------------------------------------------------------

    def on_close(self, close: Callable[[], None]) -> None:
        """Register `close` for the end; the latest is called first."""
        self._on_close.append(close)

    def close(self) -> None:
        """End the lease's thread, forwards and logins at guests, but not the outer host's connection."""
        if self._lease is not None:
            self._lease.stop()
        for close in reversed(self._on_close):
            with contextlib.suppress(Exception):
                close()
        self._on_close.clear()
        self.forget_connections()
