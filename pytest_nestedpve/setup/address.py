"""The address of a VM of the run: guest agent, first boot, host keys, and the proof that it is the VM's."""

from __future__ import annotations

import ipaddress
import json
import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from pytest_nestedpve.environment.facts import AddressFacts, NetworkFacts, PveFacts
from pytest_nestedpve.ownership.create import Created
from pytest_nestedpve.pve import agent
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import (
    AgentUnavailable,
    ApiError,
    CommandTimeout,
    HostKeyMismatch,
    NotRunning,
    PveError,
    SshError,
)
from pytest_nestedpve.pve.host import PveHost, SshLike
from pytest_nestedpve.pve.qemu import guest_config
from pytest_nestedpve.setup.vm import NESTED, Level

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.ssh.connection import SshConnection

LOGIN_LIMIT = 60.0
"""Nominal seconds within which a machine that has booted must accept a login."""
# The end is detected by the file that cloud-init writes: the start of its command takes up to a second. The
# command runs only after errors, and when the files cannot be read; `recoverable_errors` are warnings.
_FIRST_BOOT = r"""
import json, os, select, sys
def read(name):
    with open("/run/cloud-init/" + name) as file:
        return json.load(file)["v1"]
try:
    left = 1200
    while not os.path.exists("/run/cloud-init/result.json"):
        left -= 1
        if not left or not os.path.exists("/run/cloud-init/enabled"):
            sys.exit(77)
        select.select([], [], [], 0.05)
    stages = [stage for stage in read("status.json").values() if isinstance(stage, dict)]
    if read("result.json")["errors"] or any(stage.get("errors") for stage in stages):
        sys.exit(77)
    warnings = [lines for stage in stages for lines in (stage.get("recoverable_errors") or {}).values()]
    for line in [line for lines in warnings for line in lines]:
        print("- " + str(line))
    sys.exit(2 if any(warnings) else 0)
except Exception:
    sys.exit(77)
"""
_CLOUD_INIT = (
    "command -v cloud-init >/dev/null || { echo absent; exit 0; }; "
    f"python3 -SE -c {shlex.quote(_FIRST_BOOT)} 2>/dev/null; rc=$?; "
    "[ $rc -eq 0 ] || [ $rc -eq 2 ] && exit $rc; "
    "exec cloud-init status --wait --long 2>&1"
)


class ForeignAddress(PveError):
    """The address that a guest reports is not the guest's own."""


def wait_ip(env: Environment, level: Level, timeout: float) -> dict[str, Any]:
    """Wait for agent, cloud-init and address, pin the host keys, log in once; the facts. Raises PveError."""
    deadline = Deadline(timeout)
    host = level.host(env)
    facts = level.provision.of(env.facts)
    vm, mac = facts.vm, facts.card
    env.progress("waiting for the guest agent")
    wait_until(
        lambda: _agent_answers(host, vm),
        deadline=deadline,
        what=lambda: (
            f"the guest agent of VM {vm.vmid} to answer. Has the image an agent, or can the VM install it "
            f"(vendor-data, mirror, network)? {_console_advice(host, vm)}"
        ),
        interval=(0.1, 0.3),
    )
    env.progress("waiting for the end of cloud-init")
    first_boot, warnings = wait_cloud_init(host, vm, deadline)
    env.progress("waiting for its address")
    located = locate(env, level, deadline)
    env.facts[level.wait_ip.phase] = located.values()
    with connect(env, level, located.ip) as ssh:
        await_login(ssh, deadline)
    if level.role == "nested" or AddressFacts.phase in env.facts:
        env.write_ssh_config()
    did = f"{located.ip} by {mac}; cloud-init: {first_boot}" + (f" ({warnings})" if warnings else "")
    return {**replace(located, cloud_init=first_boot).values(), "did": did}


def probe_ip(env: Environment, level: Level) -> dict[str, Any] | None:
    """Proved when the VM still has the recorded address, and accepts a login with the pinned host key."""
    facts, vm_facts = level.wait_ip.known(env.facts), level.provision.known(env.facts)
    if facts is None or vm_facts is None:
        return None
    vm = vm_facts.vm
    host = level.host(env)
    try:
        ip = agent.ipv4_for_mac(agent.interfaces(host.api, vm.node, vm.vmid), vm_facts.card)
    except PveError:
        return None
    if ip != facts.ip:
        return None
    try:
        with connect(env, level, facts.ip) as ssh:
            return dict(facts.recorded) if ssh.run(["true"], timeout=20).ok else None
    except HostKeyMismatch:
        raise
    except SshError:
        return None  # it may be booting: the action waits for it


def locate(env: Environment, level: Level, deadline: Deadline) -> AddressFacts:
    """The VM's present address and its host keys, checked and pinned. Raises PveError."""
    host = level.host(env)
    facts = level.provision.of(env.facts)
    vm, mac = facts.vm, facts.card

    def address() -> str | None:
        try:
            return agent.ipv4_for_mac(agent.interfaces(host.api, vm.node, vm.vmid), mac)
        except (AgentUnavailable, NotRunning):
            return None

    ip = wait_until(
        address, deadline=deadline, what=f"VM {vm.vmid} to have an IPv4 address on the card {mac}",
        interval=(0.1, 0.3),
    )  # fmt: skip
    # The VM may have been moved meanwhile.
    check_address(level.host(env), facts.bridge or "", ip, mac, deadline)
    keys = wait_until(
        lambda: _host_keys(host, vm), deadline=deadline, what=f"the SSH host keys of VM {vm.vmid}",
        interval=(0.1, 0.3),
    )  # fmt: skip
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    env.run.directory.pin_host_keys(facts.name, keys)
    return level.wait_ip(ip, tuple(keys))


def relocate(env: Environment, timeout: float = 120.0) -> str:
    """Find the nested PVE after a reboot or a change of its network, and wait for a login; its address.

    Known hosts, ssh_config, facts and connections are updated. Raises PveError.
    """
    deadline = Deadline(timeout)
    _update_address(env, deadline)
    await_login(env.inner.ssh, deadline)
    return env.ip


def reconnect(env: Environment, timeout: float = 120.0) -> str:
    """Wait until a PVE that keeps its address accepts logins again; returns the address. Raises PveError."""
    await_login(env.inner.ssh, Deadline(timeout))
    return env.ip


def _update_address(env: Environment, deadline: Deadline) -> None:
    host, vm = NESTED.host(env), NESTED.vm(env)
    wait_until(
        lambda: _agent_answers(host, vm), deadline=deadline, interval=(0.1, 0.3),
        what=f"the guest agent of VM {vm.vmid} to answer again",
    )  # fmt: skip
    located = locate(env, NESTED, deadline)
    located.record(env.facts)
    for facts in (PveFacts.known(env.facts), NetworkFacts.known(env.facts)):
        if facts is not None and "ip" in facts.recorded:
            replace(facts, ip=located.ip).record(env.facts)
    env.forget_connections()
    env.write_ssh_config()


def await_login(ssh: SshLike, deadline: Deadline) -> None:
    """Wait until a machine that has just booted accepts a login. Raises the last SshError.

    The agent may answer before sshd listens; and root's authorized_keys, which a PVE node has in /etc/pve,
    does not exist before pmxcfs runs. An error that lasts LOGIN_LIMIT seconds is not one of a boot.
    """
    limit = Deadline(min(LOGIN_LIMIT, deadline.nominal()))

    def logs_in() -> bool:
        try:
            return ssh.run(["true"], timeout=20).check().ok
        except HostKeyMismatch:
            raise
        except SshError:
            if limit.expired:
                raise
            return False

    wait_until(logs_in, deadline=deadline, interval=(0.1, 0.3), what="a login")


def _agent_answers(host: PveHost, vm: Created) -> bool:
    if agent.ping(host.api, vm.node, vm.vmid):
        return True
    status = host.api.get(f"/nodes/{vm.node}/qemu/{vm.vmid}/status/current")
    # A VM that reboots is stopped for a moment: it gets time to start.
    if isinstance(status, dict) and status.get("status") == "stopped" and not _runs_again(host, vm):
        raise PveError(
            f"VM {vm.vmid} stopped while its agent was waited for; start it by hand (`qm start {vm.vmid}` on "
            f"{host.name}) and read its console. {_console_advice(host, vm)}"
        )
    return False


def _console_advice(host: PveHost, vm: Created) -> str:
    """The commands that show the guest's output, by its configuration: `vm_options` may have removed serial0.

    Not every image writes to the serial device (Debian's cloud images do).
    """
    screen = f"the console of VM {vm.vmid} in the web interface of {host.name} shows its screen"
    try:
        config = guest_config(host.api, vm.node, vm.vmid)
    except PveError:
        config = {}
    if config.get("serial0") != "socket":
        return screen[0].upper() + screen[1:]
    return (
        f"If the guest uses its serial device, `qm terminal {vm.vmid}` on {host.name} shows its output; "
        + screen
    )


def _runs_again(host: PveHost, vm: Created) -> bool:
    def running() -> bool:
        status = host.api.get(f"/nodes/{vm.node}/qemu/{vm.vmid}/status/current")
        return isinstance(status, dict) and status.get("status") == "running"

    try:
        return wait_until(running, deadline=Deadline(15), what=f"VM {vm.vmid} to run again")
    except CommandTimeout:
        return False


def _host_keys(host: PveHost, vm: Created) -> tuple[str, ...] | None:
    try:
        return agent.host_keys(host.api, vm.node, vm.vmid) or None
    except AgentUnavailable:
        return None


def connect(env: Environment, level: Level, ip: str) -> SshConnection:
    """A separate login at the VM; the caller closes it."""
    via = cast("SshConnection", level.host(env).entry.ssh)
    return env.guest_ssh(level.provision.of(env.facts).name, ip, via)


# -- first boot -----------------------------------------------------------------------------------


def wait_cloud_init(host: PveHost, vm: Created, deadline: Deadline) -> tuple[str, str]:
    """Wait for the end of cloud-init; returns "absent", "done" or "done with warnings", and the warnings.

    Exit status 2 is a warning (from cloud-init 23.4 on, PVE's own user-data causes one), 1 is an error.
    Raises PveError with cloud-init's messages.
    """
    for attempt in (1, 2):
        try:
            ended = agent.execute(
                host.api, vm.node, vm.vmid, ["/bin/sh", "-c", _CLOUD_INIT],
                deadline=deadline, what="`cloud-init status --wait`", retry=True,
            )  # fmt: skip
            break
        except ApiError as e:
            # The agent was restarted, and no longer has the number of the command.
            if attempt == 2 or ("PID" not in str(e) and "pid" not in str(e)):
                raise
    messages = _messages(ended.stdout)
    if ended.rc == 0:
        return ("absent" if ended.stdout.strip() == "absent" else "done"), ""
    if ended.rc == 2:
        return "done with warnings", messages
    err = ended.stderr if ended.signal is None else f"ended by signal {ended.signal}"
    log = "the whole output is in `/var/log/cloud-init-output.log` in the VM"
    raise PveError(
        f"cloud-init in VM {vm.vmid} ended with an error (exit status {ended.rc}): "
        f"{messages or (ended.stdout + err).strip()[-800:] or 'no output'}; {log}"
    )


def _messages(out: str) -> str:
    """Errors and recoverable errors of `cloud-init status --long`, in one line."""
    lines = [line.strip() for line in out.splitlines()]
    messages = [line.lstrip("- ") for line in lines if line.startswith("- ")]
    return "; ".join(dict.fromkeys(messages))[:600]


# -- the owner of an address -----------------------------------------------------------------------


def check_address(host: PveHost, bridge: str, ip: str, mac: str, deadline: Deadline) -> None:
    """Check that a guest reports the address of its own card. Raises ForeignAddress, PveError.

    If the host has an address in that network on that bridge, its neighbour table decides; otherwise only
    the pinned host key does. An address of the host itself is always refused. In a cluster, both the node
    that the guest is on and the node from which the login is made are checked.
    """
    for node in dict.fromkeys((host, host.entry)):
        _check_address(node, bridge, ip, mac, deadline)


def _check_address(host: PveHost, bridge: str, ip: str, mac: str, deadline: Deadline) -> None:
    address = ipaddress.ip_address(ip)
    if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        raise ForeignAddress(f"the guest with the card {mac} reports {ip}, which no machine can have")
    links = _json(host.run(["ip", "-j", "-4", "addr", "show"], timeout=20).check().stdout)
    direct = False
    for link in links:
        for entry in link.get("addr_info") or ():
            if entry.get("local") == ip:
                raise ForeignAddress(
                    f"the guest with the card {mac} reports {ip}, which {host.name} has itself"
                )
            network = f"{entry.get('local')}/{entry.get('prefixlen')}"
            if link.get("ifname") == bridge and address in ipaddress.ip_network(network, strict=False):
                direct = True
    if not direct:
        return
    seen = "no entry"

    def neighbour() -> str | None:
        nonlocal seen
        # Any packet makes the kernel send an ARP request; port 22 need not answer.
        host.run(["timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{ip}/22"], timeout=20)
        listing = host.run(["ip", "-j", "neigh", "show", "to", ip, "dev", bridge], timeout=20)
        entries = _json(listing.stdout) if listing.ok else []
        cards = [str(entry.get("lladdr") or "").lower() for entry in entries]
        cards = [card for card in cards if re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", card)]
        seen = cards[0] if cards else f"no entry ({', '.join(_states(entries)) or 'none'})"
        return cards[0] if cards else None

    owner = wait_until(
        neighbour, deadline=Deadline(min(60.0, deadline.nominal() or 1.0)),
        what=lambda: f"{ip} to appear in {host.name}'s neighbour table on {bridge}; last seen: {seen}",
    )  # fmt: skip
    if owner != mac.lower():
        raise ForeignAddress(
            f"the guest with the card {mac} reports {ip}, but on {bridge} of {host.name} the card {owner} "
            "has that address; no login was tried there"
        )


def _states(entries: list[dict[str, Any]]) -> list[str]:
    return [str(state) for entry in entries for state in entry.get("state") or ()]


def _json(text: str) -> list[dict[str, Any]]:
    try:
        links = json.loads(text or "[]")
    except ValueError as e:
        raise PveError(f"expected JSON from `ip -j`, found {text[:200]!r}") from e
    return [link for link in links if isinstance(link, dict)] if isinstance(links, list) else []
