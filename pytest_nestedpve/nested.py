"""What tests are given as `nested_pve`."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment import NotReady

if TYPE_CHECKING:
    from pytest_nestedpve.ansible import PlaybookResult
    from pytest_nestedpve.environment import Environment
    from pytest_nestedpve.pve.forward import Forward
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh import CommandResult, SshConnection

API_PORT = 8006
# Whose own way each is of naming a PVE in the environment.
ENVIRONMENTS = ("bpg", "telmate", "ansible", "proxmoxer")
_TOKEN_FILE = "api_token"
_CA_FILE = "pve-root-ca.pem"


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
        self._env.leaf_used = True
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
