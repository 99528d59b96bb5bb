"""What phases work on (Environment), and what tests are given (NestedPve)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.ansible import PlaybookResult
    from pytest_nestedpve.audit import AuditLog
    from pytest_nestedpve.lease import LeaseKeeper
    from pytest_nestedpve.pve.forward import Forward
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh import CommandResult, SshConnection
    from pytest_nestedpve.run import Run
    from pytest_nestedpve.settings import Settings

API_PORT = 8006
# Whose own way each is of naming a PVE in the environment.
ENVIRONMENTS = ("bpg", "telmate", "ansible", "proxmoxer")
_TOKEN_FILE = "api_token"
_CA_FILE = "pve-root-ca.pem"


class NotReady(PveError):
    """Something was asked for whose phase has not been done."""


class Environment:
    """What the phases of one run share. State on the client is the run's; on the host, what facts name.

    `settings` change once, in preflight, when the host's profile is read. `facts` are by phase.
    `secrets` are values that playbooks' artifacts and the log must not show.
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
        self.settings = settings
        self.run = run
        self.audit = audit
        self.progress = progress
        self.rootdir = rootdir
        self.facts: dict[str, dict[str, Any]] = {}
        self.secrets: list[str] = []
        self._connect = connect
        self._lock = threading.RLock()
        self._outer: PveHost | None = None
        self._inner: PveHost | None = None
        self._leaf: SshConnection | None = None
        self._given_inner: PveHost | None = None
        self._on_close: list[Callable[[], None]] = []
        self._lease: LeaseKeeper | None = None

    def __repr__(self) -> str:
        return f"<Environment of run {self.run.id}>"

    # -- facts ------------------------------------------------------------------------------------

    def fact(self, phase: str, key: str) -> Any:
        """One fact of a phase. Raises NotReady when that phase has not said it."""
        try:
            return self.facts[phase][key]
        except KeyError as e:
            raise NotReady(
                f"expected the phase {phase} to have been done and to say its {key}; known of it: "
                f"{', '.join(sorted(self.facts.get(phase, {}))) or 'nothing'}"
            ) from e

    @property
    def ip(self) -> str:
        """The nested PVE's address as it is now: the network set-up may have changed it."""
        for phase in ("setup_network", "ensure_pve"):
            if self.facts.get(phase, {}).get("ip"):
                return str(self.facts[phase]["ip"])
        return str(self.fact("wait_ip", "ip"))

    def hide(self, secret: str) -> None:
        """Keep a value out of the log and out of playbooks' artifacts from now on."""
        self.audit.masker.add(secret)
        if secret not in self.secrets:
            self.secrets.append(secret)

    # -- lease ------------------------------------------------------------------------------------

    def keep_lease(self) -> None:
        """Renew the lease of the run's pool from now on, until `close`."""
        from pytest_nestedpve.lease import LeaseKeeper

        if self._lease is None:
            self._lease = LeaseKeeper(self.outer, self.run, self.settings, self.audit)
            self._lease.start()

    def check_lease(self) -> None:
        """Raises LeaseLost when the run's pool is not ours any more: then nothing more may be made."""
        if self._lease is not None:
            self._lease.check()

    # -- hosts ------------------------------------------------------------------------------------

    @property
    def outer(self) -> PveHost:
        """The outer host, connected at first use, its calls written to the audit log. Raises PveError."""
        from pytest_nestedpve.audit import audited

        with self._lock:
            if self._outer is None:
                host = self._connect()
                self._outer = audited(host, self.audit)
                self._outer.ssh_config = host.ssh_config
            return self._outer

    @property
    def inner(self) -> PveHost:
        """The nested PVE, reached through the outer host with the run's key. Raises NotReady, PveError."""
        with self._lock:
            if self._given_inner is not None:
                return self._given_inner
            if self._inner is None:
                self._inner = self._nested_host(str(self.fact("provision", "name")), self.ip)
            return self._inner

    def use_inner(self, host: PveHost) -> None:
        """Take `host` as the nested PVE, whatever its address: for phases that make it otherwise."""
        from pytest_nestedpve.audit import audited

        with self._lock:
            self._given_inner = audited(host, self.audit)

    @property
    def leaf_ssh(self) -> SshConnection:
        """A login at the leaf, through the outer host and the nested PVE. Raises NotReady."""
        with self._lock:
            if self._leaf is None:
                name = str(self.fact("leaf_provision", "name"))
                ip = str(self.fact("leaf_wait_ip", "ip"))
                self._leaf = self.guest_ssh(name, ip, cast("SshConnection", self.inner.ssh))
            return self._leaf

    def guest_ssh(self, name: str, ip: str, via: SshConnection, *, timeout: float = 20.0) -> SshConnection:
        """A login at a guest of ours: the run's key and nothing else is offered, its pinned key expected."""
        from pytest_nestedpve.pve.ssh import SshConnection, SshTarget

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
        return SshConnection(target, via=via, observer=self._observer(name))

    def forget_connections(self) -> None:
        """The nested PVE was rebooted or has a new address: log in anew at the next use."""
        with self._lock:
            for connection in (self._leaf, self._inner):
                if connection is not None:
                    with contextlib.suppress(Exception):
                        connection.close()
            self._leaf = self._inner = None

    def _nested_host(self, name: str, ip: str) -> PveHost:
        from pytest_nestedpve.audit import audited
        from pytest_nestedpve.pve.host import PveHost
        from pytest_nestedpve.pve.transport import PveshApi

        ssh = self.guest_ssh(name, ip, cast("SshConnection", self.outer.ssh))
        return audited(PveHost(name, ssh, PveshApi(ssh)), self.audit)

    def _observer(self, host: str) -> Callable[[CommandResult], None]:
        def observe(result: CommandResult) -> None:
            if " pvesh " not in result.command[:40]:  # API calls are in the log already
                self.audit.write(
                    "call", host=host, transport="ssh", cmd=result.command[:2000], rc=result.rc, ms=result.ms
                )

        return observe

    def write_ssh_config(self) -> Path:
        """The run's ssh_config for what is known now of the nested PVE and the leaf."""
        outer = self.outer
        target = getattr(outer.ssh, "target", None)
        return self.run.directory.write_ssh_config(
            getattr(target, "alias", "") or outer.name,
            outer.ssh_config,
            self.ip,
            str(self.fact("provision", "name")),
            self.facts.get("leaf_wait_ip", {}).get("ip"),
            self.facts.get("leaf_provision", {}).get("name"),
        )

    # -- the end ----------------------------------------------------------------------------------

    def on_close(self, close: Callable[[], None]) -> None:
        """Have `close` called at the end; the latest first."""
        self._on_close.append(close)

    def close(self) -> None:
        """End the lease's thread, forwards and the logins at guests; the outer host's connection belongs
        to who made it."""
        if self._lease is not None:
            self._lease.stop()
        for close in reversed(self._on_close):
            with contextlib.suppress(Exception):
                close()
        self._on_close.clear()
        self.forget_connections()


class NestedPve:
    """The nested PVE, as tests get it from the fixture `nested_pve`."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment
        self._forward: Forward | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        facts = self._env.facts.get("provision", {})
        return f"<NestedPve {facts.get('name', '?')} (VM {facts.get('vmid', '?')}) run {self._env.run.id}>"

    @property
    def ip(self) -> str:
        """Its address, as the outer host reaches it."""
        return self._env.ip

    @property
    def vmid(self) -> int:
        """Its id as a VM of the outer host."""
        return int(self._env.fact("provision", "vmid"))

    @property
    def name(self) -> str:
        """Its name as a VM, which is its host name and node name too."""
        return str(self._env.fact("provision", "name"))

    @property
    def node(self) -> str:
        """Its own node name, the NODE of /nodes/NODE. Raises PveError."""
        return self.inner.node

    @property
    def host(self) -> PveHost:
        """The outer host."""
        return self._env.outer

    @property
    def inner(self) -> PveHost:
        """The nested PVE as a host: `inner.api.get("/version")`, `inner.run("pveversion")`."""
        return self._env.inner

    @property
    def leaf(self) -> SshConnection:
        """A login at the VM inside; `leaf.run("uname -n")`. Raises NotReady before leaf_wait_ip."""
        return self._env.leaf_ssh

    def ssh(self, command: str | list[str], *, timeout: float = 60.0) -> CommandResult:
        """Run a command on the nested PVE as root; a list is an argv, a string is shell text."""
        return self.inner.run(command, timeout=timeout)

    @property
    def ssh_config(self) -> Path:
        """`ssh -F` this file, host `nested` (or its name), and `leaf`."""
        return self._env.write_ssh_config()

    @property
    def known_hosts(self) -> Path:
        """The pinned host keys of the nested PVE and the leaf."""
        return self._env.run.directory.known_hosts

    @property
    def api_url(self) -> str:
        """https://127.0.0.1:PORT, a forward to the nested PVE's port 8006, opened at first use."""
        with self._lock:
            if self._forward is None:
                self._forward = self._env.outer.ssh.forward(self.ip, API_PORT)  # type: ignore[attr-defined]
                self._env.on_close(self._forward.close)
            host, port = self._forward.address
            return f"https://{host}:{port}"

    @property
    def ca_file(self) -> Path:
        """The certificate authority that the nested PVE's certificate is of, read over SSH."""
        path = self._env.run.dir / _CA_FILE
        if not path.exists():
            return self._env.run.directory.write(_CA_FILE, self.inner.ssh.get("/etc/pve/pve-root-ca.pem"))
        return path

    @property
    def api_token(self) -> str:
        """USER@REALM!NAME=SECRET. Raises NotReady before setup_repos."""
        try:
            return (self._env.run.dir / _TOKEN_FILE).read_text(encoding="ascii").strip()
        except FileNotFoundError as e:
            raise NotReady("the API token is made by the phase setup_repos, which has not been done") from e

    def environ(self, consumer: str) -> dict[str, str]:
        """Environment variables that name this PVE to `consumer`: bpg, telmate, ansible, proxmoxer.

        Holds the token: keep it out of logs. Raises ValueError for another consumer.
        """
        url, (user, _, secret) = self.api_url, self.api_token.partition("=")
        ca = str(self.ca_file)
        address, _, port = url.removeprefix("https://").partition(":")
        if consumer == "bpg":
            return {
                "PROXMOX_VE_ENDPOINT": url + "/",
                "PROXMOX_VE_API_TOKEN": f"{user}={secret}",
                "SSL_CERT_FILE": ca,
            }
        if consumer == "telmate":
            return {
                "PM_API_URL": f"{url}/api2/json",
                "PM_API_TOKEN_ID": user,
                "PM_API_TOKEN_SECRET": secret,
                "SSL_CERT_FILE": ca,
            }
        account, _, token_name = user.partition("!")
        if consumer == "ansible":
            return {
                "PROXMOX_HOST": address,
                "PROXMOX_PORT": port,
                "PROXMOX_USER": account,
                "PROXMOX_TOKEN_ID": token_name,
                "PROXMOX_TOKEN_SECRET": secret,
                "REQUESTS_CA_BUNDLE": ca,
            }
        if consumer == "proxmoxer":
            return {
                "PROXMOXER_HOST": f"{address}:{port}",
                "PROXMOXER_USER": account,
                "PROXMOXER_TOKEN_NAME": token_name,
                "PROXMOXER_TOKEN_VALUE": secret,
                "REQUESTS_CA_BUNDLE": ca,
            }
        raise ValueError(f"expected one of {', '.join(ENVIRONMENTS)}, found {consumer!r}")

    def run_playbook(
        self, path: str | Path, *, timeout: float = 1800.0, check: bool = True, **variables: Any
    ) -> PlaybookResult:
        """Run a playbook against the nested PVE; a relative path is below the rootdir.

        Raises PlaybookFailed (unless `check` is false), PlaybookTimeout after `timeout` seconds (nominal).
        """
        from pytest_nestedpve.builtin.playbooks import run

        playbook = self._env.rootdir / Path(path)
        merged: Mapping[str, Any] = {**self._env.settings.extra_vars, **variables}
        return run(self._env, playbook, merged, timeout=timeout, check=check)
