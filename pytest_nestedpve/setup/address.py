"""Where a VM of ours is, and that it is the one: its agent, its address, its first boot, its host keys."""

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

LOGIN = 60.0
"""Seconds, nominal, in which a machine that has booted must take a login."""
# The end by the file that cloud-init writes then: the start of its own command takes up to a second. What is
# neither done nor done with warnings (`recoverable_errors`), and what cannot be read, it says itself.
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
    found = [each for stage in stages for each in (stage.get("recoverable_errors") or {}).values()]
    for line in [line for each in found for line in each]:
        print("- " + str(line))
    sys.exit(2 if any(found) else 0)
except Exception:
    sys.exit(77)
"""
_CLOUD_INIT = (
    "command -v cloud-init >/dev/null || { echo absent; exit 0; }; "
    f"python3 -SE -c {shlex.quote(_FIRST_BOOT)} 2>/dev/null; rc=$?; "
    "[ $rc -eq 0 ] || [ $rc -eq 2 ] && exit $rc; "
    "exec cloud-init status --wait --long 2>&1"
)


class Impostor(PveError):
    """The address that a guest names is not the guest's."""


def wait_ip(env: Environment, level: Level, timeout: float) -> dict[str, Any]:
    """Wait for the agent, the address, the end of cloud-init; pin the host keys; log in once. Facts."""
    deadline = Deadline(timeout)
    host = level.host(env)
    facts = level.provision.of(env.facts)
    made, mac = facts.vm, facts.card
    env.progress("waiting for the guest agent")
    wait_until(
        lambda: _answers(host, made),
        deadline=deadline,
        what=lambda: (
            f"the guest agent of VM {made.vmid} to answer. Has the image an agent, or can the VM fetch it "
            f"(vendor-data, mirror, network)? {_console(host, made)}"
        ),
        interval=(0.1, 0.3),
    )
    env.progress("waiting for the end of cloud-init")
    first_boot, words = wait_cloud_init(host, made, deadline)
    env.progress("waiting for its address")
    found = locate(env, level, deadline)
    env.facts[level.wait_ip.phase] = found.values()
    with connect(env, level, found.ip) as ssh:
        await_login(ssh, deadline)
    if level.role == "nested" or AddressFacts.phase in env.facts:
        env.write_ssh_config()
    said = f"; cloud-init: {first_boot}" + (f" ({words})" if words else "")
    return {**replace(found, cloud_init=first_boot).values(), "did": f"{found.ip} by {mac}{said}"}


def probe_ip(env: Environment, level: Level) -> dict[str, Any] | None:
    """The facts, when the address is still the one and answers to the pinned key."""
    facts, vm = level.wait_ip.known(env.facts), level.provision.known(env.facts)
    if facts is None or vm is None:
        return None
    made = vm.vm
    host = level.host(env)
    try:
        seen = agent.ipv4_for_mac(agent.interfaces(host.api, made.node, made.vmid), vm.card)
    except PveError:
        return None
    if seen != facts.ip:
        return None
    try:
        with connect(env, level, facts.ip) as ssh:
            return dict(facts.recorded) if ssh.run(["true"], timeout=20).ok else None
    except HostKeyMismatch:
        raise
    except SshError:
        return None  # it may be booting: to be waited for


def locate(env: Environment, level: Level, deadline: Deadline) -> AddressFacts:
    """The VM's present address and its host keys, checked and pinned. Raises PveError."""
    host = level.host(env)
    facts = level.provision.of(env.facts)
    made, mac = facts.vm, facts.card

    def address() -> str | None:
        try:
            return agent.ipv4_for_mac(agent.interfaces(host.api, made.node, made.vmid), mac)
        except (AgentUnavailable, NotRunning):
            return None

    ip = wait_until(
        address, deadline=deadline, what=f"VM {made.vmid} to have an IPv4 address on the card {mac}",
        interval=(0.1, 0.3),
    )  # fmt: skip
    # Where it is by now.
    check_address(level.host(env), facts.bridge or "", ip, mac, deadline)
    keys = wait_until(
        lambda: _host_keys(host, made), deadline=deadline, what=f"the SSH host keys of VM {made.vmid}",
        interval=(0.1, 0.3),
    )  # fmt: skip
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    env.run.directory.pin_host_keys(facts.name, keys)
    return level.wait_ip(ip, tuple(keys))


def relocate(env: Environment, timeout: float = 120.0) -> str:
    """The nested PVE's address after a reboot or a change of the network, and that it takes logins again.

    Known hosts, ssh_config and connections follow. Raises PveError.
    """
    deadline = Deadline(timeout)
    _find_again(env, deadline)
    await_login(env.inner.ssh, deadline)
    return env.ip


def reconnect(env: Environment, timeout: float = 120.0) -> str:
    """The nested PVE's address, once a PVE that keeps its address takes logins again. Raises PveError."""
    await_login(env.inner.ssh, Deadline(timeout))
    return env.ip


def _find_again(env: Environment, deadline: Deadline) -> None:
    host, made = NESTED.host(env), NESTED.vm(env)
    wait_until(
        lambda: _answers(host, made), deadline=deadline, interval=(0.1, 0.3),
        what=f"the guest agent of VM {made.vmid} to answer again",
    )  # fmt: skip
    found = locate(env, NESTED, deadline)
    found.record(env.facts)
    for facts in (PveFacts.known(env.facts), NetworkFacts.known(env.facts)):
        if facts is not None and "ip" in facts.recorded:
            replace(facts, ip=found.ip).record(env.facts)
    env.forget_connections()
    env.write_ssh_config()


def await_login(ssh: SshLike, deadline: Deadline) -> None:
    """Wait for a login of a machine that has just booted. Raises SshError as it was seen last.

    The agent may answer before sshd listens; and root's authorized_keys, which a PVE node has in /etc/pve,
    is not there before pmxcfs is. What does not pass in LOGIN seconds is no matter of time.
    """
    patience = Deadline(min(LOGIN, deadline.nominal()))

    def logs_in() -> bool:
        try:
            return ssh.run(["true"], timeout=20).check().ok
        except HostKeyMismatch:
            raise
        except SshError:
            if patience.expired:
                raise
            return False

    wait_until(logs_in, deadline=deadline, interval=(0.1, 0.3), what="a login")


def _answers(host: PveHost, made: Created) -> bool:
    if agent.ping(host.api, made.node, made.vmid):
        return True
    status = host.api.get(f"/nodes/{made.node}/qemu/{made.vmid}/status/current")
    # A VM that reboots is stopped for a moment, but its lifetime is not over: qmpstatus says so too late.
    if isinstance(status, dict) and status.get("status") == "stopped" and not _comes_back(host, made):
        raise PveError(
            f"VM {made.vmid} stopped while its agent was waited for; start it by hand and look why. "
            + _console(host, made)
        )
    return False


def _console(host: PveHost, made: Created) -> str:
    """Where to see what the guest says, by its configuration: `vm_options` may have taken serial0 away.

    Whether the guest writes to its serial device is its own affair (Debian's cloud images do).
    """
    screen = f"the console of VM {made.vmid} in the web interface of {host.name} shows its screen"
    try:
        config = guest_config(host.api, made.node, made.vmid)
    except PveError:
        config = {}
    if config.get("serial0") != "socket":
        return screen[0].upper() + screen[1:]
    return (
        f"If the guest uses its serial device, `qm terminal {made.vmid}` on {host.name} shows what it says; "
        + screen
    )


def _comes_back(host: PveHost, made: Created) -> bool:
    def running() -> bool:
        status = host.api.get(f"/nodes/{made.node}/qemu/{made.vmid}/status/current")
        return isinstance(status, dict) and status.get("status") == "running"

    try:
        return wait_until(running, deadline=Deadline(15), what=f"VM {made.vmid} to come back")
    except CommandTimeout:
        return False


def _host_keys(host: PveHost, made: Created) -> tuple[str, ...] | None:
    try:
        return agent.host_keys(host.api, made.node, made.vmid) or None
    except AgentUnavailable:
        return None


def connect(env: Environment, level: Level, ip: str) -> SshConnection:
    """A login of its own at the VM; the caller closes it."""
    via = cast("SshConnection", level.host(env).entry.ssh)
    return env.guest_ssh(level.provision.of(env.facts).name, ip, via)


# -- first boot -----------------------------------------------------------------------------------


def wait_cloud_init(host: PveHost, made: Created, deadline: Deadline) -> tuple[str, str]:
    """Wait for the end of the first boot's set-up; its state, and its own words where it warns.

    Exit status 2 is a warning (PVE's own user-data earns one from cloud-init 23.4 on), 1 is an error.
    Raises PveError with what cloud-init says.
    """
    for attempt in (1, 2):
        try:
            ended = agent.execute(
                host.api, made.node, made.vmid, ["/bin/sh", "-c", _CLOUD_INIT],
                deadline=deadline, what="`cloud-init status --wait`", retry=True,
            )  # fmt: skip
            break
        except ApiError as e:
            # The agent that took the command was restarted and does not know its number any more.
            if attempt == 2 or ("PID" not in str(e) and "pid" not in str(e)):
                raise
    words = _complaints(ended.stdout)
    if ended.rc == 0:
        return ("absent" if ended.stdout.strip() == "absent" else "done"), ""
    if ended.rc == 2:
        return "done with warnings", words
    err = ended.stderr if ended.signal is None else f"ended by signal {ended.signal}"
    log = "`/var/log/cloud-init-output.log` in the VM has it all"
    raise PveError(
        f"cloud-init in VM {made.vmid} ended with an error (exit status {ended.rc}): "
        f"{words or (ended.stdout + err).strip()[-800:] or 'it said nothing'}; {log}"
    )


def _complaints(out: str) -> str:
    """What `cloud-init status --long` lists under errors and recoverable errors, in one line."""
    lines = [line.strip() for line in out.splitlines()]
    said = [line.lstrip("- ") for line in lines if line.startswith("- ")]
    return "; ".join(dict.fromkeys(said))[:600]


# -- whose address is it --------------------------------------------------------------------------


def check_address(host: PveHost, bridge: str, ip: str, mac: str, deadline: Deadline) -> None:
    """A guest is not trusted: the address it names must be its own card's. Raises Impostor, PveError.

    Where the host has an address in that network on that bridge, its neighbour table decides; where it
    has not, only the pinned host key does. An address of the host itself is refused anywhere. In a cluster
    that holds for the node that the guest is on, and for the one that the login goes out from.
    """
    for each in dict.fromkeys((host, host.entry)):
        _check_address(each, bridge, ip, mac, deadline)


def _check_address(host: PveHost, bridge: str, ip: str, mac: str, deadline: Deadline) -> None:
    address = ipaddress.ip_address(ip)
    if address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified:
        raise Impostor(f"the guest with the card {mac} names {ip}, which is no address of a machine")
    links = _json(host.run(["ip", "-j", "-4", "addr", "show"], timeout=20).check().stdout)
    direct = False
    for link in links:
        for each in link.get("addr_info") or ():
            if each.get("local") == ip:
                raise Impostor(f"the guest with the card {mac} names {ip}, which {host.name} has itself")
            network = f"{each.get('local')}/{each.get('prefixlen')}"
            if link.get("ifname") == bridge and address in ipaddress.ip_network(network, strict=False):
                direct = True
    if not direct:
        return
    seen = "no entry"

    def neighbour() -> str | None:
        nonlocal seen
        # Any packet there makes the kernel ask for the card; whether port 22 answers does not matter.
        host.run(["timeout", "1", "bash", "-c", f"exec 3<>/dev/tcp/{ip}/22"], timeout=20)
        shown = host.run(["ip", "-j", "neigh", "show", "to", ip, "dev", bridge], timeout=20)
        entries = _json(shown.stdout) if shown.ok else []
        found = [str(each.get("lladdr") or "").lower() for each in entries]
        found = [each for each in found if re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", each)]
        seen = found[0] if found else f"no entry ({', '.join(_states(entries)) or 'none'})"
        return found[0] if found else None

    owner = wait_until(
        neighbour, deadline=Deadline(min(60.0, deadline.nominal() or 1.0)),
        what=lambda: f"{ip} to appear in {host.name}'s neighbour table on {bridge}; last seen: {seen}",
    )  # fmt: skip
    if owner != mac.lower():
        raise Impostor(
            f"the guest with the card {mac} names {ip}, but on {bridge} of {host.name} that address is "
            f"{owner}'s; no login was tried there"
        )


def _states(entries: list[dict[str, Any]]) -> list[str]:
    return [str(state) for each in entries for state in each.get("state") or ()]


def _json(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "[]")
    except ValueError as e:
        raise PveError(f"expected JSON of `ip -j`, found {text[:200]!r}") from e
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
