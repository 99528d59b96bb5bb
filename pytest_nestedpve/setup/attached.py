"""Actions and probes of the phases on an attached PVE.

The connection is the user's own, and the PVE is `env.outer` as well as `env.inner`.
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

# A nested PVE is created by means of these; an existing one is used without them.
_NOT_CHECKED = frozenset({"nested virtualisation", "memory", "template"})
_KEY = re.compile(r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)) [A-Za-z0-9+/]+={0,3}")


# -- preflight ------------------------------------------------------------------------------------


def preflight(env: Environment, selected: frozenset[str] | None = None) -> dict[str, Any]:
    """Check the requirements of the VM inside. Facts: the resources it will use. Raises PreflightError.

    A result of the phases `selected` (None: those of all steps that were selected by name) may be missing
    as yet: the fact `awaited` has the phase by the name of the check.
    """
    given = env.settings
    selected = env.selected if selected is None else selected
    try:
        host = env.outer
    except SshError as e:
        raise PreflightError(str(given.attach), [unreachable(str(given.attach), e)]) from e
    # A template of the profile is for nested VMs, and none is created here.
    shape = replace(
        given, template=None, disk=vm.LEAF_DISK, origins={**given.origins, "template": "--nested-attach"}
    )
    excluded = _NOT_CHECKED | ({"image"} if given.leaf_image else set())
    checks = [each for each in CHECKS if each.name not in excluded]
    seen = Context(host, shape, workers=env.workers)
    found = run_checks(
        seen, begin=env.progress, checks=[*checks, Check("virtualisation", _kvm, ("login", "PVE"))]
    )
    env.settings = replace(seen.settings, disk=given.disk)
    awaited = awaited_results(seen, selected, found.of(MISSING))
    if missing := [each for each in found.of(MISSING) if each.what not in awaited]:
        could = awaited_results(seen, STEPS, missing) if env.selected is selected else {}
        raise PreflightError(
            host.name, [_with_step(each, could) for each in missing]
        ) from found.connection_error
    for finding in found.of(WARNING):
        env.remark(f"preflight: {finding}")
    facts = seen.choices.facts()
    # As it was configured: a URL or a file is fetched for the VM inside.
    facts["image"] = seen.settings.image or facts["image"]
    boots = given.leaf_image or facts["image"]
    resources = {"storage": facts["storage"], "bridge": facts["bridge"], "image": boots}
    listed = [f"{what} {name}" for what, name in resources.items() if name]
    listed += [f"{what} by {phase}" for what, phase in awaited.items()]
    pve = facts["version"] or ("does not answer" if host_phases.installed(host) else "is absent")
    did = f"attached to {host.name} (PVE {pve}), nothing is made outside of it; " + ", ".join(listed)
    return {**facts, "awaited": awaited, "did": did}


def _with_step(finding: Finding, could: Mapping[str, str]) -> Finding:
    """The finding, its advice completed by the step that would fix it."""
    if (phase := could.get(finding.what)) is None:
        return finding
    what = "that content" if phase == "setup_repos" else "it"
    return replace(finding, advice=f"{finding.advice} Or choose the step that brings {what}: -k {phase}.")


def _check_again(env: Environment) -> None:
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
            "Switch virtualisation on (where this PVE is a VM itself: CPU type host, nested=1 on its host), "
            "or do without (slow): `nested_pve_leaf_options = kvm=0`.",
        )  # fmt: skip


# -- phases whose result exists -------------------------------------------------------------------


def describe_pve(env: Environment) -> dict[str, Any]:
    """The facts of `provision`, without a VM. Raises PveError."""
    host = env.outer
    env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
    # PVE will call it so as well.
    name = host.run(["hostname", "-s"], timeout=30).check().stdout.strip() if _no_pve(env) else host.node
    return {
        **ProvisionFacts(name=name, node=name).values(),
        "did": f"attached: {name}, which exists, and is never destroyed, stopped or reconfigured",
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
    """Results that preflight did not find, and the phase of each."""
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
        f"expected /cluster/status of {env.outer.name} to say the address of its node {env.outer.node}, "
        f"found {str(status)[:200]}; does the node's name resolve there (/etc/hosts)?"
    )


def _reachable(name: str, text: str) -> str:
    """The address at which sshd took the login, unless it is of no use to others. Raises PveError."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv4Address(text)
        if not (address.is_loopback or address.is_unspecified):
            return str(address)
    raise PveError(
        f"expected the login at {name} to come in at an IPv4 address of its own ($SSH_CONNECTION there), "
        f"found {text[:60]!r}; give --nested-attach that address or a name of it, or reach it by ProxyJump "
        "instead of a forwarded port"
    )


def _host_keys(env: Environment) -> list[str]:
    """The host keys, for forwards, read over the login, whose own key was checked."""
    files = env.outer.run("cat /etc/ssh/ssh_host_*_key.pub", timeout=30)
    return [match[0] for line in files.stdout.splitlines() if (match := _KEY.match(line))]


# -- probes: facts, or None and the reason in env.missing ----------------------------------------


def _missing(env: Environment, phase: str, reason: str) -> dict[str, Any] | None:
    env.missing[phase] = reason
    return None


def probe_pve(env: Environment) -> dict[str, Any] | None:
    """Proved when commands, API and services of PVE are well."""
    installed = host_phases.installed(env.inner)
    version, wrong = host_phases.health(env.inner) if installed else (None, "PVE's commands are not there")
    if version is None:
        return _missing(env, "ensure_pve", wrong)
    return {**PveFacts(version, "healthy").values(), "did": f"PVE {version} is there and well"}


_BRIDGE = r"""
[ -d "/sys/class/net/$1" ] || { echo "there is no $1"; exit; }
ip link show dev "$1" up 2>/dev/null | grep -q . || { echo "$1 is down"; exit; }
getent hosts "$(hostname)" >/dev/null || { echo "the own name does not resolve"; exit; }
"""


def probe_network(env: Environment) -> dict[str, Any] | None:
    """Proved when the bridge of the VM inside is up, and the node's own name resolves."""
    bridge = PreflightFacts.of(env.facts).bridge or "vmbr0"
    wrong = env.inner.run(["sh", "-c", _BRIDGE, "sh", bridge], timeout=60).check().stdout.strip()
    if wrong:
        return _missing(env, "setup_network", wrong)
    return {**NetworkFacts(env.ip, "as it is").values(), "did": f"{bridge} is there"}


def probe_ssh(env: Environment) -> dict[str, Any] | None:
    """Proved when root has a key pair for logins at its VMs."""
    own = host_phases.root_public_key(env.inner)
    if own is None or not env.inner.run(["test", "-s", "/root/.ssh/id_rsa"], timeout=30).ok:
        return _missing(env, "setup_ssh", "root has no key pair /root/.ssh/id_rsa to log in to its VMs with")
    return {**SshFacts(own, own_key=True).values(), "did": "root has a key of its own for its VMs"}


def probe_repos(env: Environment) -> dict[str, Any] | None:
    """Proved when the stored token answers, the sources are up to date, and no content type is missing."""
    if content := [what for what, phase in _awaited(env).items() if phase == "setup_repos"]:
        return _missing(
            env, "setup_repos", f"content types of the storage {STORAGE}, for {', '.join(content)}"
        )
    packed = play_variables.pack_sources(env.settings, env.run)
    names = [each.name for each in packed]
    absent = [
        each.name for each in packed if not host_phases.source_there(env, env.inner, each.name, each.digest)
    ]
    if absent:
        where = env.settings.sources_dest
        return _missing(env, "setup_repos", f"not in {where}, or in another state: {', '.join(absent)}")
    try:
        token_id = host_phases.fetch_token(env)
    except SshError:
        raise
    except PveError as e:
        return _missing(env, "setup_repos", str(e))
    return {"token_id": token_id, "sources": names, "did": "token and sources there"}


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
for each in "/sys/class/net/$dev/brif/"*; do
    [ -e "/sys/class/net/${each##*/}/device" ] && dev=${each##*/} && break
done
cat "/sys/class/net/$dev/address"
"""


def _card(env: Environment) -> str:
    answer = env.inner.run(["sh", "-c", _CARD, "sh", env.ip], timeout=30)
    if not answer.ok or not re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", answer.stdout.strip()):
        raise PveError(f"expected a card of {env.outer.name} to have its address {env.ip}, found none")
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
    """Provide the image; a volume is the PVE's own and used as it is. Raises PveError."""
    _check_again(env)
    attached_undo.before_image(env)
    image = image_file.read(leaf_image.source(env))
    if image.kind == "volume":
        return {**ImageFacts(image.text, image.text).values(), "did": f"{image.text} is there already"}
    return leaf_image.download_image(env, timeout)


def probe_image(env: Environment) -> dict[str, Any] | None:
    """Proved when the image is a volume, or is on the storage."""
    _check_again(env)
    try:
        image = image_file.read(leaf_image.source(env))
    except PveError:
        return None
    if image.kind == "volume":
        return {**ImageFacts(image.text, image.text).values(), "did": f"{image.text} is there"}
    return leaf_image.probe_image(env)


def provision_leaf(env: Environment) -> dict[str, Any]:
    """Create the VM inside, with storage and bridge of preflight. Raises PveError."""
    _check_again(env)
    facts = PreflightFacts.of(env.facts)
    return vm.provision_leaf(
        env, vm.ATTACHED_LEAF, storage=facts.storage, snippets=facts.snippets, bridge=facts.bridge
    )


def verify_chain(env: Environment, timeout: float) -> dict[str, Any]:
    """Log in at the leaf by way of the attached PVE. Raises PveError."""
    attached_undo.before_chain(env)
    return ssh_chain.verify_ssh_chain(env, timeout, direct=True)
