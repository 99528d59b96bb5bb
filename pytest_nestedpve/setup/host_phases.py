"""The phases that are playbooks: from a fresh Debian to a Proxmox VE with sources, keys and API token."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import (
    LeafProvisionFacts,
    NetworkFacts,
    PreflightFacts,
    ProvisionFacts,
    PveFacts,
    SshFacts,
)
from pytest_nestedpve.pve.answers import mapping
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.setup.address import relocate
from pytest_nestedpve.setup.ansible import play_variables, playbooks
from pytest_nestedpve.setup.ansible.inventory import Inventory, InventoryHost
from pytest_nestedpve.setup.ansible.runner import PlaybookFailed, PlaybookResult, playbook_path
from pytest_nestedpve.setup.checks.host import LEAST_VERSION

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

TOKEN_STORE = "/root/.config/nested-pve/api-token"
TOKEN_FILE = "api_token"
KEY_FILE = "/root/.ssh/id_nestedpve"
_TOKEN = re.compile(r"[A-Za-z0-9._-]+@[a-z]+![A-Za-z0-9._-]+=[0-9a-f-]{36}\Z")
_PUBLIC_KEY = re.compile(r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp\d+) [A-Za-z0-9+/]+={0,3}(?: .*)?\Z")


def ask_pveproxy(host: PveHost, path: str, token: str = "", *, timeout: float = 60.0) -> str:
    """Request `path` from a PVE node's own pveproxy, on the node; the error, or "".

    Raises SshError.
    """
    script = playbook_path("roles/nested_pve_identity/files/check_pveproxy.py").read_text(encoding="utf-8")
    answer = host.run(
        ["python3", "-c", script, path], stdin=token.encode() or None, timeout=timeout, secret=bool(token)
    )
    return "" if answer.ok else (answer.stderr.strip().splitlines() or ["no answer"])[-1]


# -- ensure_pve -----------------------------------------------------------------------------------


def installed(host: PveHost) -> bool:
    """Whether the commands of PVE exist. Raises SshError."""
    return host.run("command -v pveversion pvesh pveproxy >/dev/null", timeout=30).ok


def health(host: PveHost) -> tuple[str | None, str]:
    """The version if commands, API and services of PVE work, else None and the fault. Raises SshError."""
    answer = host.run(["pveversion"], timeout=60)
    if not answer.ok:
        return None, f"pveversion: {(answer.stderr or answer.stdout).strip()[:300]}"
    try:
        version = str(mapping(host.api.get("/version")).get("version", ""))
    except PveError as e:
        return None, str(e)[:300]
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and (int(numbers[1]), int(numbers[2])) < LEAST_VERSION:
        return None, f"it is PVE {version}; expected {'.'.join(map(str, LEAST_VERSION))} or newer"
    for service in ("pve-cluster", "pvedaemon", "pveproxy"):
        state = host.run(["systemctl", "is-active", service], timeout=30).stdout.strip()
        if state != "active":
            return None, f"the service {service} is {state or 'unknown'}"
    # The page needs no login: a call without a ticket is refused too, but only after three seconds.
    if silent := ask_pveproxy(host, "/", timeout=40):
        return None, f"pveproxy: {silent[:300]}"
    return version or answer.stdout.strip(), ""


def probe_pve(env: Environment) -> dict[str, Any] | None:
    """Proved when commands, API and services of PVE work."""
    host = env.inner
    version = health(host)[0] if installed(host) else None
    return None if version is None else _healthy(env, version)


def _healthy(env: Environment, version: str) -> dict[str, Any]:
    return {**PveFacts(version, "healthy", env.ip).values(), "did": f"PVE {version} is installed and works"}


def ensure_pve(
    env: Environment, timeout: float, *, find: Callable[[Environment], str] = relocate
) -> dict[str, Any]:
    """Install PVE where it is absent, repair it where it does not work, by the same playbook.

    `find` returns the node's address after its reboot. Raises PveError.
    """
    deadline = Deadline(timeout)
    was_installed = installed(env.inner)
    fault = "absent"
    if was_installed:
        version, fault = health(env.inner)
        if version is not None:
            return _healthy(env, version)
    env.progress("installing PVE" if not was_installed else f"repairing PVE: {fault}")
    variables = play_variables.pve_install(env.settings, env.facts)
    result = _play(env, "pve-install.yml", variables, deadline)
    # The node was rebooted for its new kernel: DHCP may have assigned another address.
    ip = find(env)
    version, fault = health(env.inner)
    if version is None:
        raise PveError(f"expected PVE to work after pve-install.yml, found: {fault}")
    action = "repaired" if was_installed else "installed"
    facts = PveFacts(version, action, ip)
    return {**facts.values(), "did": f"PVE {version} {action}; {playbooks.summary(result)}"}


def _play(
    env: Environment,
    name: str,
    variables: dict[str, Any],
    deadline: Deadline,
    *,
    inventory: Inventory | None = None,
) -> PlaybookResult:
    return playbooks.run(
        env, playbook_path(name, env.settings), variables, timeout=deadline.nominal(), inventory=inventory
    )


# -- setup_network --------------------------------------------------------------------------------


def setup_network(
    env: Environment, timeout: float, *, find: Callable[[Environment], str] = relocate
) -> dict[str, Any]:
    """Turn the card into a port of vmbr0.

    `find` returns the node's address afterwards. Raises PveError.
    """
    deadline = Deadline(timeout)
    if came_with_template(env, "setup_network") and (facts := probe_network(env)) is not None:
        return facts
    variables = play_variables.network(env.settings, env.facts)
    before = env.ip
    try:
        result = _play(env, "nested-pve-network.yml", variables, deadline)
    except PlaybookFailed as e:
        if e.result is None or not e.result.unreachable:
            raise
        ip = find(env)
        if ip == before:
            raise
        env.progress(f"the node has the address {ip} now")
        result = _play(
            env, "nested-pve-network.yml", play_variables.network(env.settings, env.facts), deadline
        )
    ip = find(env)
    mode = str(variables.get("nested_pve_network_mode", "dhcp"))
    wrong = network_fault(env.inner, ip, ProvisionFacts.of(env.facts).card)
    if wrong:
        raise PveError(f"expected vmbr0 to have taken the network over; found: {wrong}")
    return {**NetworkFacts(ip, mode).values(), "did": f"vmbr0 at {ip} ({mode}); {playbooks.summary(result)}"}


def came_with_template(env: Environment, phase: str) -> bool:
    """Whether the VM is a clone in which this run has not done the phase, and must not repeat it."""
    preflight = PreflightFacts.known(env.facts)
    cloned = preflight is not None and preflight.template is not None
    return cloned and not env.record.digests.get(phase) and not env.settings.redo


def probe_network(env: Environment) -> dict[str, Any] | None:
    """Proved when vmbr0 has the address, the card is its port, only ifupdown2 manages it, names resolve."""
    host, ip = env.inner, env.ip
    variables = play_variables.network(env.settings, env.facts)
    static, mode = variables.get("nested_pve_address"), str(variables["nested_pve_network_mode"])
    if mode == "static" and str(static).partition("/")[0] != ip:
        return None
    if network_fault(host, ip, ProvisionFacts.of(env.facts).card):
        return None
    return {**NetworkFacts(ip, mode).values(), "did": f"vmbr0 has {ip} already"}


_NETWORK = r"""
ip=$1 mac=$2
ip -4 -o addr show dev vmbr0 2>/dev/null | grep -qF " $ip/" || { echo "vmbr0 lacks the address $ip"; exit; }
port=
for link in /sys/class/net/vmbr0/brif/*; do
    [ -e "$link" ] && [ "$(cat "/sys/class/net/${link##*/}/address")" = "$mac" ] && port=${link##*/}
done
[ "$port" ] || { echo "no port of vmbr0 has the address $mac"; exit; }
ip -4 -o addr show dev "$port" | grep -q . && { echo "$port has an address of its own"; exit; }
for service in systemd-networkd NetworkManager; do
    systemctl -q is-active $service && { echo "$service runs beside ifupdown2"; exit; }
done
own=$(getent ahostsv4 "$(hostname)" | cut -d' ' -f1 | sort -u)
echo "$own" | grep -qxF "$ip" || { echo "the node's name resolves to ${own:-nothing}, not $ip"; exit; }
[ -z "$3" ] || getent ahosts "$3" >/dev/null || { echo "the name $3 does not resolve"; exit; }
"""


def network_fault(host: PveHost, ip: str, mac: str, name: str = "") -> str:
    """The first difference from the result of setup_network, or "". Raises SshError."""
    answer = host.run(["sh", "-c", _NETWORK, "sh", ip, mac, name], timeout=60).check()
    return answer.stdout.strip()


# -- setup_ssh ------------------------------------------------------------------------------------


def setup_ssh(env: Environment, timeout: float) -> dict[str, Any]:
    """Install the run's key pair on the nested node, for logins at its leaves. Raises PveError."""
    variables = play_variables.ssh(env.settings, env.facts, env.run)
    env.hide(str(variables["nested_pve_run_key"]))
    result = _play(env, "nested-pve-ssh.yml", variables, Deadline(timeout))
    return {**SshFacts(root_public_key(env.inner)).values(), "did": playbooks.summary(result)}


def probe_ssh(env: Environment) -> dict[str, Any] | None:
    """Proved when the key pair is installed, and its public key in authorized_keys."""
    host = env.inner
    public = env.run.directory.ensure_key(f"nested-pve run {env.run.id}").split()[1]
    installed_key = host.run(["cat", f"{KEY_FILE}.pub"], timeout=30)
    keys = host.run(["cat", "/root/.ssh/authorized_keys"], timeout=30)
    private = host.run(["test", "-s", KEY_FILE], timeout=30)
    if public not in installed_key.stdout or public not in keys.stdout or not private.ok:
        return None
    return {**SshFacts(root_public_key(host)).values(), "did": "the run's key pair is installed"}


def root_public_key(host: PveHost) -> str | None:
    """The public key of the host's root, generated by PVE; None without one. Raises SshError."""
    answer = host.run(["cat", "/root/.ssh/id_rsa.pub"], timeout=30)
    line = answer.stdout.strip()
    return line if answer.ok and _PUBLIC_KEY.match(line) else None


# -- setup_repos, sync_repos ----------------------------------------------------------------------


def setup_repos(
    env: Environment, timeout: float, *, outer: PveHost | None, token_name: str | None = None
) -> dict[str, Any]:
    """Install sources, secrets, content types, certificate, API token; run the bootstrap; fetch the token.

    The root of `outer` may log in at the nested PVE afterwards. `token_name`: None for the playbook's own.
    Raises PveError.
    """
    deadline = Deadline(timeout)
    env.progress("packing sources")
    packed = play_variables.pack_sources(env.settings, env.run)
    outer_key = root_public_key(outer) if outer is not None else None
    variables = play_variables.repos(
        env.settings, env.facts, packed=packed, outer_keys=[outer_key] if outer_key else []
    )
    if token_name is not None:
        variables.setdefault("nested_pve_token_name", token_name)
    result = _play(env, "nested-pve-repos.yml", variables, deadline)
    token_id = fetch_token(env)
    names = [source.name for source in packed]
    sources = ", ".join(names) or "no sources"
    return {"token_id": token_id, "sources": names, "did": f"{sources}; {playbooks.summary(result)}"}


def probe_repos(env: Environment) -> dict[str, Any] | None:
    """Proved when the token is accepted, and the sources are up to date."""
    if not (env.run.dir / TOKEN_FILE).exists():
        return None
    packed = play_variables.pack_sources(env.settings, env.run)
    if not all(has_source(env, env.inner, source.name, source.digest) for source in packed):
        return None
    try:
        token_id = fetch_token(env)
    except PveError:
        return None
    return {
        "token_id": token_id,
        "sources": [source.name for source in packed],
        "did": "the token and the sources are installed",
    }


def has_source(env: Environment, host: Any, name: str, digest: str) -> bool:
    """Whether a machine has the source with that digest. Raises SshError."""
    return bool(
        host.run(["cat", f"{env.settings.sources_dest}/.nested-pve/{name}.digest"], timeout=30).stdout.strip()
        == digest
    )


def fetch_token(env: Environment) -> str:
    """Read the API token that the playbook stored on the node, test it, and store it here (0600).

    Returns the id of the token, which is no secret. Raises PveError.
    """
    answer = env.inner.run(["cat", TOKEN_STORE], timeout=30, secret=True)
    token = answer.stdout.strip()
    if not answer.ok or not _TOKEN.match(token):
        raise PveError(f"expected an API token in {TOKEN_STORE} on the nested PVE, found no valid one")
    env.hide(token.partition("=")[2])
    if reason := ask_pveproxy(env.inner, "/api2/json/version", token):
        raise PveError(f"expected the API of the nested PVE to accept the token, found: {reason[:200]}")
    env.run.directory.write(TOKEN_FILE, token + "\n")
    return token.partition("=")[0]


def sync_repos(env: Environment, timeout: float) -> dict[str, Any]:
    """Copy the sources to the leaf; secrets remain on the nested PVE alone. Raises PveError."""
    deadline = Deadline(timeout)
    packed = play_variables.pack_sources(env.settings, env.run)
    if not packed:
        return {"sources": [], "did": "no sources are configured"}
    name = LeafProvisionFacts.of(env.facts).name
    inventory = Inventory((InventoryHost(name, {"ansible_host": name, "ansible_user": "root"}),))
    result = _play(
        env, "nested-pve-leaf.yml", play_variables.leaf(env.settings, packed), deadline, inventory=inventory
    )
    missing = [
        source.name for source in packed if not has_source(env, env.leaf_ssh, source.name, source.digest)
    ]
    if missing:
        raise PveError(f"expected these sources on the leaf, missing there: {', '.join(missing)}")
    names = [source.name for source in packed]
    return {"sources": names, "did": f"{', '.join(names)}; {playbooks.summary(result)}"}


def probe_sync(env: Environment) -> dict[str, Any] | None:
    """Proved when the sources on the leaf are up to date."""
    packed = play_variables.pack_sources(env.settings, env.run)
    if not all(has_source(env, env.leaf_ssh, source.name, source.digest) for source in packed):
        return None
    return {"sources": [source.name for source in packed], "did": "the sources are on the leaf"}
