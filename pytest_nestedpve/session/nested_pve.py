"""The value of the fixture `nested_pve`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import NotReady, ProvisionFacts

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.ssh.connection import CommandResult, SshConnection
    from pytest_nestedpve.pve.ssh.forward import Forward
    from pytest_nestedpve.session.tool_environment import Api
    from pytest_nestedpve.setup.ansible.runner import PlaybookResult

API_PORT = 8006
SSH_PORT = 22
_TOKEN_FILE = "api_token"
_CA_FILE = "pve-root-ca.pem"
_PASSWORD_FILE = "root_password"


class NestedPve:
    """The nested PVE, as tests get it from the fixture `nested_pve`."""

    def __init__(self, environment: Environment, before_use: Callable[[], None] = lambda: None) -> None:
        """`before_use` is called before each use: it runs the phases that the current test requests."""
        self._environment = environment
        self._before_use = before_use
        self._forwards: dict[int, Forward] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        env = self._environment
        facts = ProvisionFacts.known(env.facts) or ProvisionFacts()
        what = "attached" if env.attached else f"VM {facts.vmid or '?'}"
        return f"<NestedPve {facts.name or '?'} ({what}) run {env.run.id}>"

    @property
    def _env(self) -> Environment:
        self._before_use()
        return self._environment

    def _refuse_if_attached(self, reason: str) -> None:
        if self._env.attached:
            from pytest_nestedpve.environment.attached import NotOurs

            raise NotOurs(f"the nested PVE is attached ({self._env.settings.attach}): {reason}")

    @property
    def ip(self) -> str:
        """Its IP address, reachable from the outer host."""
        return self._env.ip

    @property
    def vmid(self) -> int:
        """Its id as a VM of the outer host. Raises NotOurs for an attached one."""
        self._refuse_if_attached("its VM is unknown, so it has no vmid")
        return ProvisionFacts.of(self._env.facts).vm_id

    @property
    def name(self) -> str:
        """Its name as a VM, also its host name and node name."""
        return ProvisionFacts.of(self._env.facts).name

    @property
    def node(self) -> str:
        """Its own node name, the NODE of /nodes/NODE. Raises PveError."""
        return self._env.inner.node

    @property
    def host(self) -> PveHost:
        """The outer host. Raises NotOurs for an attached one."""
        self._refuse_if_attached("its outer host is unknown; `inner` is the PVE itself")
        return self._env.outer

    @property
    def inner(self) -> PveHost:
        """The nested PVE as a host: `inner.api.get("/version")`, `inner.run("pveversion")`.

        With root's rights for everything: this PVE belongs to the test.
        """
        return self._env.inner.free()

    @property
    def leaf(self) -> SshConnection:
        """A login at the VM inside: `leaf.run("uname -n")`. Raises NotReady before leaf_wait_ip."""
        self._env.leaf_used = True
        return self._env.leaf_ssh

    def ssh(self, command: str | list[str], *, timeout: float = 60.0) -> CommandResult:
        """Run a command on the nested PVE as root; a list is an argv, a string is shell text."""
        return self._env.inner.run(command, timeout=timeout)

    @property
    def ssh_config(self) -> Path:
        """The file for `ssh -F FILE nested` (or its name) and `ssh -F FILE leaf`."""
        return self._env.write_ssh_config()

    @property
    def known_hosts(self) -> Path:
        """The pinned host keys of the nested PVE and the leaf."""
        return self._env.run.directory.known_hosts

    @property
    def ssh_key(self) -> Path:
        """The run's private key. It logs in as root on the nested PVE and the leaf; on an attached PVE only
        if this run did setup_ssh."""
        return self._env.run.directory.key

    def forward(self, port: int) -> tuple[str, int]:
        """(127.0.0.1, PORT): a listening forward to `port` of the nested PVE, open until the session's end.

        For port 22 the host key is in `known_hosts` too, as [127.0.0.1]:PORT.
        """
        with self._lock:
            forward = self._forwards.get(port)
            if forward is None:
                forward = self._env.outer.ssh.forward(self.ip, port)  # type: ignore[attr-defined]
                self._forwards[port] = forward
                self._env.on_close(forward.close)
                if port == SSH_PORT:
                    self._env.run.directory.pin_forward(forward.address, self.name)
            return forward.address

    @property
    def api_url(self) -> str:
        """https://127.0.0.1:PORT, a forward to the nested PVE's port 8006, opened at first use."""
        host, port = self.forward(API_PORT)
        return f"https://{host}:{port}"

    @property
    def ca_file(self) -> Path:
        """The certificate authority of the nested PVE's certificate, read over SSH."""
        path = self._env.run.dir / _CA_FILE
        if not path.exists():
            authority = self._env.inner.ssh.get("/etc/pve/pve-root-ca.pem")
            return self._env.run.directory.write(_CA_FILE, authority)
        return path

    @property
    def api_token(self) -> str:
        """USER@REALM!NAME=SECRET. Raises NotReady before setup_repos."""
        try:
            return (self._env.run.dir / _TOKEN_FILE).read_text(encoding="ascii").strip()
        except FileNotFoundError as e:
            raise NotReady("the API token is created by the phase setup_repos, which has not run") from e

    @property
    def root_password(self) -> str:
        """A password of root on the nested PVE (as `root@pam` too): generated at first use, then the same for
        the whole run. Raises PveError when it cannot be set."""
        import secrets

        self._refuse_if_attached("the password of its root is not changed")
        path = self._env.run.dir / _PASSWORD_FILE
        with self._lock:
            known = path.exists()
            password = path.read_text(encoding="ascii").strip() if known else secrets.token_urlsafe(24)
            self._env.hide(password)
            # Each time: a rollback may have restored a state from before the first use.
            line = f"root:{password}\n".encode()
            self._env.inner.run(["chpasswd"], stdin=line, timeout=60, secret=True).check()
            if not known:
                self._env.run.directory.write(path.name, password + "\n")
            return password

    def environ(self, *consumers: str) -> dict[str, str]:
        """Environment variables by which `consumers` find this PVE: bpg, telmate, ansible, proxmoxer.

        Without arguments: the variables of all consumers, and NESTED_… for other programs. They contain the
        token: keep them out of logs. Raises ValueError for another consumer, NotReady before setup_repos.
        """
        from pytest_nestedpve.session import tool_environment
        from pytest_nestedpve.session.certificate_bundle import with_roots

        authority = self.ca_file.read_bytes()
        roots = {
            variable: self._env.run.directory.write(
                f"{variable.lower()}.pem", with_roots(variable, authority)
            )
            for variable in tool_environment.ROOTS
        }
        api = tool_environment.Api(*self.forward(API_PORT), self.api_token, self.ca_file, roots)
        variables = tool_environment.variables(api, consumers or tuple(tool_environment.CONSUMERS))
        return variables if consumers else {**variables, **self._general(api)}

    def _general(self, api: Api) -> dict[str, str]:
        """The variables NESTED_… for other programs, such as curl, ssh and scripts."""
        host, port = self.forward(SSH_PORT)
        return {
            "CURL_CA_BUNDLE": str(api.roots["CURL_CA_BUNDLE"]),
            "NESTED_API_URL": api.url,
            "NESTED_API_TOKEN": api.token,
            "NESTED_CA_FILE": str(api.authority),
            "NESTED_NODE": self.node,
            "NESTED_IP": self.ip,
            "NESTED_SSH_CONFIG": str(self.ssh_config),
            "NESTED_SSH_KEY": str(self.ssh_key),
            "NESTED_SSH_HOST": host,
            "NESTED_SSH_PORT": str(port),
            "NESTED_KNOWN_HOSTS": str(self.known_hosts),
        }

    def run_playbook(
        self, path: str | Path, *, timeout: float = 1800.0, check: bool = True, **variables: Any
    ) -> PlaybookResult:
        """Run a playbook against the nested PVE; a relative path is below the rootdir.

        Raises PlaybookFailed (unless `check` is false), PlaybookTimeout after `timeout` seconds (nominal).
        """
        from pytest_nestedpve.setup.ansible.playbooks import run

        playbook = self._env.rootdir / Path(path)
        merged: Mapping[str, Any] = {**self._env.settings.extra_vars, **variables}
        return run(self._env, playbook, merged, timeout=timeout, check=check)
