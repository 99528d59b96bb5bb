"""Actions and probes of the phases on an attached PVE.

The connection is that of the user's SSH configuration; `env.outer` and `env.inner` are the same PVE.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import (
    AddressFacts,
    ImageFacts,
    NetworkFacts,
    PreflightFacts,
    ProvisionFacts,
    PveFacts,
    SshFacts,
)
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import PveError, SshError
from pytest_nestedpve.setup import address, attached_undo, host_phases, image_file, leaf_image, ssh_chain, vm
from pytest_nestedpve.setup.ansible import play_variables
from pytest_nestedpve.setup.attached_needs import STEPS, STORAGE, awaited_results
from pytest_nestedpve.setup.checks.context import Context
from pytest_nestedpve.setup.checks.finding import MISSING, WARNING, Finding, fine
from pytest_nestedpve.setup.checks.run_checks import CHECKS, Check, run_checks, unreachable
from pytest_nestedpve.setup.preflight import PreflightError

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

# Requirements for the creation of a nested PVE; an existing one is used without them.
_NOT_CHECKED = frozenset({"nested virtualisation", "memory", "template"})
_KEY = re.compile(r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)) [A-Za-z0-9+/]+={0,3}")


# -- preflight ------------------------------------------------------------------------------------


def preflight(env: Environment, selected: frozenset[str] | None = None) -> dict[str, Any]:
    """Check the requirements of the VM inside. Facts: the resources it will use. Raises PreflightError.

    A result of the phases `selected` (None: those of all steps that were selected by name) may be missing
    as yet: the fact `awaited` has the phase by the name of the check.
    """
    configured = env.settings
    selected = env.selected if selected is None else selected
    try:
        host = env.outer
    except SshError as e:
        raise PreflightError(str(configured.attach), [unreachable(str(configured.attach), e)]) from e
    # A template of the profile is for nested VMs, and none is created here.
    origins = {**configured.origins, "template": "--nested-attach"}
    shape = replace(configured, template=None, disk=vm.LEAF_DISK, origins=origins)
    excluded = _NOT_CHECKED | ({"image"} if configured.leaf_image else set())
    checks = [check for check in CHECKS if check.name not in excluded]
    checks.append(Check("virtualisation", _kvm, ("login", "PVE")))
    context = Context(host, shape, workers=env.workers)
    results = run_checks(context, begin=env.progress, checks=checks)
    env.settings = replace(context.settings, disk=configured.disk)
    awaited = awaited_results(context, selected, results.of(MISSING))
    if missing := [finding for finding in results.of(MISSING) if finding.what not in awaited]:
        fixes = awaited_results(context, STEPS, missing) if env.selected is selected else {}
        advised = [_with_step(finding, fixes) for finding in missing]
        raise PreflightError(host.name, advised) from results.connection_error
    for finding in results.of(WARNING):
        env.remark(f"preflight: {finding}")
    facts = context.choices.facts()
    # The configured image: a URL or a file is fetched for the VM inside.
    facts["image"] = context.settings.image or facts["image"]
    boots = configured.leaf_image or facts["image"]
    resources = {"storage": facts["storage"], "bridge": facts["bridge"], "image": boots}
    listed = [f"{what} {name}" for what, name in resources.items() if name]
    listed += [f"{what} by {phase}" for what, phase in awaited.items()]
    pve = facts["version"] or ("does not answer" if host_phases.installed(host) else "is absent")
    did = f"attached to {host.name} (PVE {pve}), nothing outside of it is changed; " + ", ".join(listed)
    return {**facts, "awaited": awaited, "did": did}


def _with_step(finding: Finding, phases: Mapping[str, str]) -> Finding:
    """The finding, its advice completed by the step that would fix it."""
    if (phase := phases.get(finding.what)) is None:
        return finding
    what = "adds that content" if phase == "setup_repos" else "provides it"
    return replace(finding, advice=f"{finding.advice} Or select the step that {what}: -k {phase}.")


def _repeat_preflight(env: Environment) -> None:
    """Repeat preflight if it awaited results of phases, which must exist now. Raises PreflightError."""
    if _awaited(env):
        env.facts[PreflightFacts.phase] = preflight(env, frozenset())


def _kvm(seen: Context) -> Iterator[Finding]:
    """Check the PVE's own virtualisation, for the VM inside."""
    if seen.settings.leaf_options.get("kvm") == "0":
        yield fine("virtualisation", "not needed: kvm=0 (nested_pve_leaf_options)")
    elif seen.host.run(["test", "-e", "/dev/kvm"], timeout=20).ok:
        yield fine("virtualisation", "/dev/kvm")
    else:
        yield Finding(
            "virtualisation", "/dev/kvm", "none",
            "Enable virtualisation (if this PVE is a VM: CPU type host, and nested=1 on its host), "
            "or do without (slow): `nested_pve_leaf_options = kvm=0`.",
        )  # fmt: skip


# -- phases whose result exists -------------------------------------------------------------------


def describe_pve(env: Environment) -> dict[str, Any]:
    """The facts of `provision`, without a VM. Raises PveError."""
    host = env.outer
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    # PVE names a node by its host name.
    name = host.run(["hostname", "-s"], timeout=30).check().stdout.strip() if _no_pve(env) else host.node
    return {
        **ProvisionFacts(name=name, node=name).values(),
        "did": f"attached: {name}, an existing PVE, which is never destroyed, stopped or reconfigured",
    }


def describe_address(env: Environment) -> dict[str, Any]:
    """The facts of `wait_ip`; the host keys are pinned. Raises PveError."""
    keys = _host_keys(env)
    if keys:
        env.run.directory.pin_host_keys(ProvisionFacts.of(env.facts).name, keys)
    ip = _address(env)
    AddressFacts(ip).record(env.facts)
    env.write_ssh_config()
    attached_undo.remove_new_directories(env, ("/root/.ansible", "/root/.ansible/tmp"))
    return {**AddressFacts(ip, tuple(keys)).values(), "did": f"attached: {ip}"}


def _awaited(env: Environment) -> Mapping[str, str]:
    """The phases whose results were missing in preflight, by the name of the check."""
    return PreflightFacts.of(env.facts).awaited


def _no_pve(env: Environment) -> bool:
    """Whether PVE was absent, or did not answer, in preflight."""
    return "PVE" in _awaited(env)


def _address(env: Environment) -> str:
    """The node's own address by the cluster status, or by sshd. Raises PveError."""
    if _no_pve(env):
        text = env.outer.run('set -- $SSH_CONNECTION && echo "$3"', timeout=30).check().stdout.strip()
        return _reachable(env.outer.name, text)
    status = entries(env.outer.api.get("/cluster/status"), call="get /cluster/status")
    for entry in status:
        if entry.get("type") == "node" and entry.get("name") == env.outer.node and entry.get("ip"):
            return str(entry["ip"])
    raise PveError(
        f"expected /cluster/status of {env.outer.name} to contain the address of its node {env.outer.node}, "
        f"found {str(status)[:200]}; does the node's name resolve there (/etc/hosts)?"
    )


def _reachable(name: str, text: str) -> str:
    """The address at which sshd accepted the login, if other machines can reach it. Raises PveError."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv4Address(text)
        if not (address.is_loopback or address.is_unspecified):
            return str(address)
    raise PveError(
        f"expected the login at {name} to arrive at an IPv4 address of its network ($SSH_CONNECTION there), "
        f"found {text[:60]!r}; give --nested-attach such an address or its name, or connect by ProxyJump "
        "instead of a forwarded port"
    )


def _host_keys(env: Environment) -> list[str]:
    """The host keys, for later logins, read over the present login, whose host key was checked."""
    files = env.outer.run("cat /etc/ssh/ssh_host_*_key.pub", timeout=30)
    return [match[0] for line in files.stdout.splitlines() if (match := _KEY.match(line))]


# -- probes: facts, or None and the reason in env.missing ----------------------------------------


def _missing(env: Environment, phase: str, reason: str) -> dict[str, Any] | None:
    env.missing[phase] = reason
    return None


def probe_pve(env: Environment) -> dict[str, Any] | None:
    """Proved when commands, API and services of PVE work."""
    installed = host_phases.installed(env.inner)
    version, fault = host_phases.health(env.inner) if installed else (None, "PVE's commands do not exist")
    if version is None:
        return _missing(env, "ensure_pve", fault)
    return {**PveFacts(version, "healthy").values(), "did": f"PVE {version} is installed and works"}


_BRIDGE = r"""
[ -d "/sys/class/net/$1" ] || { echo "$1 does not exist"; exit; }
ip link show dev "$1" up 2>/dev/null | grep -q . || { echo "$1 is down"; exit; }
getent hosts "$(hostname)" >/dev/null || { echo "the node's name does not resolve"; exit; }
"""


def probe_network(env: Environment) -> dict[str, Any] | None:
    """Proved when the bridge of the VM inside is up, and the node's own name resolves."""
    bridge = PreflightFacts.of(env.facts).bridge or "vmbr0"
    fault = env.inner.run(["sh", "-c", _BRIDGE, "sh", bridge], timeout=60).check().stdout.strip()
    if fault:
        return _missing(env, "setup_network", fault)
    return {**NetworkFacts(env.ip, "as it is").values(), "did": f"{bridge} is up"}


def probe_ssh(env: Environment) -> dict[str, Any] | None:
    """Proved when root has a key pair for logins at its VMs."""
    public = host_phases.root_public_key(env.inner)
    if public is None or not env.inner.run(["test", "-s", "/root/.ssh/id_rsa"], timeout=30).ok:
        return _missing(env, "setup_ssh", "root has no key pair /root/.ssh/id_rsa to log in to its VMs with")
    return {**SshFacts(public, own_key=True).values(), "did": "root has a key pair for logins at its VMs"}


def probe_repos(env: Environment) -> dict[str, Any] | None:
    """Proved when the stored token answers, the sources are up to date, and no content type is missing."""
    if content := [what for what, phase in _awaited(env).items() if phase == "setup_repos"]:
        return _missing(
            env, "setup_repos", f"content types of the storage {STORAGE}, for {', '.join(content)}"
        )
    packed = play_variables.pack_sources(env.settings, env.run)
    names = [source.name for source in packed]
    absent = [
        name
        for name, digest in ((source.name, source.digest) for source in packed)
        if not host_phases.has_source(env, env.inner, name, digest)
    ]
    if absent:
        where = env.settings.sources_dest
        return _missing(env, "setup_repos", f"absent from {where}, or not up to date: {', '.join(absent)}")
    try:
        token_id = host_phases.fetch_token(env)
    except SshError:
        raise
    except PveError as e:
        return _missing(env, "setup_repos", str(e))
    return {"token_id": token_id, "sources": names, "did": "the token and the sources are installed"}


# -- actions: the preparation of the undo, then the phase ------------------------------------------


def ensure_pve(env: Environment, timeout: float) -> dict[str, Any]:
    """Install or repair PVE; that remains. Raises PveError."""
    attached_undo.before_pve(env)
    return host_phases.ensure_pve(env, timeout, find=address.reconnect)


def setup_network(env: Environment, timeout: float) -> dict[str, Any]:
    """Turn the card that has the address into a port of the bridge; that remains. Raises PveError."""
    replace(ProvisionFacts.of(env.facts), mac=_card(env)).record(env.facts)
    attached_undo.before_network(env)
    return host_phases.setup_network(env, timeout, find=address.reconnect)


_CARD = r"""
dev=$(ip -4 -o addr show | awk -v ip="$1" '{ split($4, a, "/"); if (a[1] == ip) { print $2; exit } }')
[ "$dev" ] || exit 3
for port in "/sys/class/net/$dev/brif/"*; do
    [ -e "/sys/class/net/${port##*/}/device" ] && dev=${port##*/} && break
done
cat "/sys/class/net/$dev/address"
"""


def _card(env: Environment) -> str:
    answer = env.inner.run(["sh", "-c", _CARD, "sh", env.ip], timeout=30)
    if not answer.ok or not re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", answer.stdout.strip()):
        raise PveError(f"expected a network card of {env.outer.name} with its address {env.ip}, found none")
    return answer.stdout.strip()


def setup_ssh(env: Environment, timeout: float) -> dict[str, Any]:
    """Install the run's key pair. Raises PveError."""
    attached_undo.before_ssh(env)
    return host_phases.setup_ssh(env, timeout)


def setup_repos(env: Environment, timeout: float) -> dict[str, Any]:
    """Install sources, secrets and an API token, whose name identifies it as the run's. Raises PveError."""
    attached_undo.before_repos(env)
    name = f"npve-{env.run.id}-{env.run.session[:8]}"
    return host_phases.setup_repos(env, timeout, outer=None, token_name=name)


def download_image(env: Environment, timeout: float) -> dict[str, Any]:
    """Provide the image; a volume is used where it is. Raises PveError."""
    _repeat_preflight(env)
    attached_undo.before_image(env)
    image = image_file.read(leaf_image.source(env))
    if image.kind == "volume":
        return {**ImageFacts(image.text, image.text).values(), "did": f"{image.text} exists already"}
    return leaf_image.download_image(env, timeout)


def probe_image(env: Environment) -> dict[str, Any] | None:
    """Proved when the image is a volume, or is on the storage."""
    _repeat_preflight(env)
    try:
        image = image_file.read(leaf_image.source(env))
    except PveError:
        return None
    if image.kind == "volume":
        return {**ImageFacts(image.text, image.text).values(), "did": f"{image.text} exists"}
    return leaf_image.probe_image(env)


def provision_leaf(env: Environment) -> dict[str, Any]:
    """Create the VM inside, with storage and bridge of preflight. Raises PveError."""
    _repeat_preflight(env)
    facts = PreflightFacts.of(env.facts)
    return vm.provision_leaf(
        env, vm.ATTACHED_LEAF, storage=facts.storage, snippets=facts.snippets, bridge=facts.bridge
    )


def verify_chain(env: Environment, timeout: float) -> dict[str, Any]:
    """Log in at the leaf through the attached PVE. Raises PveError."""
    attached_undo.before_chain(env)
    return ssh_chain.verify_ssh_chain(env, timeout, direct=True)
