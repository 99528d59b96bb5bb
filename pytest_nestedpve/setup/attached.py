"""The phases on a PVE that is attached: what is looked at, what is so already, what is undone at the end.

The connection is the user's own, and the PVE is `env.outer` as well as `env.inner`. What a phase that was
chosen adds for the run is noted before it, on the PVE itself where it is a file: what was not there goes at
the end, what was there comes back.
"""

from __future__ import annotations

import contextlib
import ipaddress
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.config.settings import secret_destination
from pytest_nestedpve.ownership.pool import create_pool, host_clock
from pytest_nestedpve.pve.answers import entries, mapping
from pytest_nestedpve.pve.errors import PveError, SshError
from pytest_nestedpve.setup import host_phases, image_file, leaf_image
from pytest_nestedpve.setup.ansible import play_variables
from pytest_nestedpve.setup.attached_needs import STEPS, STORAGE, promised
from pytest_nestedpve.setup.checks.context import Seen
from pytest_nestedpve.setup.checks.finding import MISSING, WARNING, Finding, fine
from pytest_nestedpve.setup.checks.run_checks import CHECKS, Check, look, unreachable
from pytest_nestedpve.setup.preflight import PreflightError
from pytest_nestedpve.setup.vm import LEAF_DISK, task

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

# What these look for is needed to make a nested PVE, not to use one.
_NOT_LOOKED_AT = frozenset({"nested virtualisation", "memory", "template"})
_KEY = re.compile(r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)) [A-Za-z0-9+/]+={0,3}")


# -- preflight ------------------------------------------------------------------------------------


def preflight(env: Environment, chosen: frozenset[str] | None = None) -> dict[str, Any]:
    """What the VM inside needs of the attached PVE; facts: what will be used. Raises PreflightError.

    What steps that were chosen (`chosen`; None: all of the session's) will bring may be missing as yet: the
    fact `awaited` says what, and which phase brings it.
    """
    given = env.settings
    chosen = env.chosen if chosen is None else chosen
    try:
        host = env.outer
    except SshError as e:
        raise PreflightError(str(given.attach), [unreachable(str(given.attach), e)]) from e
    # A template of the profile is for nested VMs, of which none is made.
    shape = replace(
        given, template=None, disk=LEAF_DISK, origins={**given.origins, "template": "--nested-attach"}
    )
    without = _NOT_LOOKED_AT | ({"image"} if given.leaf_image else set())
    checks = [each for each in CHECKS if each.name not in without]
    seen = Seen(host, shape, workers=env.workers)
    found = look(seen, begin=env.progress, checks=[*checks, Check("virtualisation", _kvm, ("login", "PVE"))])
    env.settings = replace(seen.settings, disk=given.disk)
    awaited = promised(seen, chosen, found.of(MISSING))
    if missing := [each for each in found.of(MISSING) if each.what not in awaited]:
        could = promised(seen, STEPS, missing) if env.chosen is chosen else {}
        raise PreflightError(host.name, [_or_by(each, could) for each in missing]) from found.lost
    for finding in found.of(WARNING):
        env.remark(f"preflight: {finding}")
    facts = seen.choices.facts()
    # As it was named: what is to be fetched is fetched for the VM inside.
    facts["image"] = seen.settings.image or facts["image"]
    boots = given.leaf_image or facts["image"]
    told = {"storage": facts["storage"], "bridge": facts["bridge"], "image": boots}
    there = [f"{what} {name}" for what, name in told.items() if name]
    there += [f"{what} by {phase}" for what, phase in awaited.items()]
    pve = facts["version"] or ("does not answer" if host_phases.installed(host) else "is absent")
    did = f"attached to {host.name} (PVE {pve}), nothing is made outside of it; " + ", ".join(there)
    return {**facts, "awaited": awaited, "did": did}


def _or_by(finding: Finding, could: Mapping[str, str]) -> Finding:
    """With the step that would bring it, if there is one."""
    if (phase := could.get(finding.what)) is None:
        return finding
    what = "that content" if phase == "setup_repos" else "it"
    return replace(finding, advice=f"{finding.advice} Or choose the step that brings {what}: -k {phase}.")


def look_again(env: Environment) -> None:
    """Before the VM inside: what chosen steps were to bring has to be there now. Raises PreflightError."""
    if _awaited(env):
        env.facts["preflight"] = preflight(env, frozenset())


def _kvm(seen: Seen) -> Iterator[Finding]:
    """The VM inside runs on the PVE's own virtualisation."""
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


# -- taken as it is -------------------------------------------------------------------------------


def taken(env: Environment, phase: str) -> Mapping[str, Any]:
    """The facts of a phase that makes, starts or waits for the nested VM elsewhere. Raises PveError."""
    host = env.outer
    if phase == "provision":
        env.run.directory.ensure_key(f"nested-pve run {env.run.id}")
        # PVE will call it so as well.
        name = host.run(["hostname", "-s"], timeout=30).check().stdout.strip() if _no_pve(env) else host.node
        return {
            "name": name,
            "node": name,
            "did": f"attached: {name}, which exists, and is never destroyed, stopped or reconfigured",
        }
    if phase == "start_vm":
        return {"did": "attached: it runs, as it answers"}
    keys = _host_keys(env)
    if keys:
        env.run.directory.pin_host_keys(str(env.fact("provision", "name")), keys)
    ip = _address(env)
    env.facts["wait_ip"] = {"ip": ip}
    env.write_ssh_config()
    _rid_of_empty(env, ("/root/.ansible", "/root/.ansible/tmp"))
    return {"ip": ip, "host_keys": keys, "did": f"attached: {ip}"}


def _awaited(env: Environment) -> Mapping[str, str]:
    """What chosen steps were to bring when preflight looked, and which."""
    found: Mapping[str, str] = env.facts["preflight"].get("awaited", {})
    return found


def _no_pve(env: Environment) -> bool:
    """Whether PVE cannot be asked as yet: it is absent, or does not answer."""
    return "PVE" in _awaited(env)


def _address(env: Environment) -> str:
    """Its own address, as PVE knows it, or as sshd does. Raises PveError."""
    if _no_pve(env):
        said = env.outer.run('set -- $SSH_CONNECTION && echo "$3"', timeout=30).check().stdout.strip()
        return _reachable(env.outer.name, said)
    found = entries(env.outer.api.get("/cluster/status"), call="get /cluster/status")
    for each in found:
        if each.get("type") == "node" and each.get("name") == env.outer.node and each.get("ip"):
            return str(each["ip"])
    raise PveError(
        f"expected /cluster/status of {env.outer.name} to say the address of its node {env.outer.node}, "
        f"found {str(found)[:200]}; does the node's name resolve there (/etc/hosts)?"
    )


def _reachable(name: str, said: str) -> str:
    """The address that sshd was asked at, if others may use it. Raises PveError."""
    with contextlib.suppress(ValueError):
        address = ipaddress.IPv4Address(said)
        if not (address.is_loopback or address.is_unspecified):
            return str(address)
    raise PveError(
        f"expected the login at {name} to come in at an IPv4 address of its own ($SSH_CONNECTION there), "
        f"found {said[:60]!r}; give --nested-attach that address or a name of it, or reach it by ProxyJump "
        "instead of a forwarded port"
    )


def _host_keys(env: Environment) -> list[str]:
    """Its host keys, read over the login that was checked already: for forwards to it."""
    said = env.outer.run("cat /etc/ssh/ssh_host_*_key.pub", timeout=30)
    return [match[0] for line in said.stdout.splitlines() if (match := _KEY.match(line))]


# -- probes: what there is, or in env.missing what there is not -----------------------------------


def _lacks(env: Environment, phase: str, what: str) -> dict[str, Any] | None:
    env.missing[phase] = what
    return None


def probe_pve(env: Environment) -> dict[str, Any] | None:
    """Whether PVE is well."""
    there = host_phases.installed(env.inner)
    version, wrong = host_phases.health(env.inner) if there else (None, "PVE's commands are not there")
    if version is None:
        return _lacks(env, "ensure_pve", wrong)
    return {"version": version, "action": "healthy", "did": f"PVE {version} is there and well"}


_BRIDGE = r"""
[ -d "/sys/class/net/$1" ] || { echo "there is no $1"; exit; }
ip link show dev "$1" up 2>/dev/null | grep -q . || { echo "$1 is down"; exit; }
getent hosts "$(hostname)" >/dev/null || { echo "the own name does not resolve"; exit; }
"""


def probe_network(env: Environment) -> dict[str, Any] | None:
    """Whether there is a bridge for VMs, and the node's own name resolves; the rest is its own affair."""
    bridge = str(env.fact("preflight", "bridge") or "vmbr0")
    wrong = env.inner.run(["sh", "-c", _BRIDGE, "sh", bridge], timeout=60).check().stdout.strip()
    if wrong:
        return _lacks(env, "setup_network", wrong)
    return {"ip": env.ip, "mode": "as it is", "did": f"{bridge} is there"}


def probe_ssh(env: Environment) -> dict[str, Any] | None:
    """Whether the node can log in to its VMs by a key of root's own; this side's login is the user's."""
    own = host_phases.root_public_key(env.inner)
    if own is None or not env.inner.run(["test", "-s", "/root/.ssh/id_rsa"], timeout=30).ok:
        return _lacks(env, "setup_ssh", "root has no key pair /root/.ssh/id_rsa to log in to its VMs with")
    return {"root_public_key": own, "own_key": True, "did": "root has a key of its own for its VMs"}


def probe_repos(env: Environment) -> dict[str, Any] | None:
    """Whether a kept token answers, the sources are there as they are here now, and content types."""
    if lacking := [what for what, phase in _awaited(env).items() if phase == "setup_repos"]:
        return _lacks(env, "setup_repos", f"content types of the storage {STORAGE}, for {', '.join(lacking)}")
    packed = play_variables.pack_sources(env.settings, env.run)
    names = [each.name for each in packed]
    absent = [
        each.name for each in packed if not host_phases.source_there(env, env.inner, each.name, each.digest)
    ]
    if absent:
        where = env.settings.sources_dest
        return _lacks(env, "setup_repos", f"not in {where}, or in another state: {', '.join(absent)}")
    try:
        token_id = host_phases.fetch_token(env)
    except SshError:
        raise
    except PveError as e:
        return _lacks(env, "setup_repos", str(e))
    return {"token_id": token_id, "sources": names, "did": "token and sources there"}


# -- before a phase that was chosen: what is there already, and how the end finds back to it -------


def before_network(env: Environment) -> None:
    """Find the card that has the address. Nothing of what follows can be undone."""
    env.facts["provision"]["mac"] = _card(env)
    _tell_at_end(env, "setup_network changed how it is on the network")


_CARD = r"""
dev=$(ip -4 -o addr show | awk -v ip="$1" '{ split($4, a, "/"); if (a[1] == ip) { print $2; exit } }')
[ "$dev" ] || exit 3
for each in "/sys/class/net/$dev/brif/"*; do
    [ -e "/sys/class/net/${each##*/}/device" ] && dev=${each##*/} && break
done
cat "/sys/class/net/$dev/address"
"""


def _card(env: Environment) -> str:
    said = env.inner.run(["sh", "-c", _CARD, "sh", env.ip], timeout=30)
    if not said.ok or not re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", said.stdout.strip()):
        raise PveError(f"expected a card of {env.outer.name} to have its address {env.ip}, found none")
    return said.stdout.strip()


def before_pve(env: Environment) -> None:
    """Nothing of what follows can be undone."""
    _tell_at_end(
        env, "ensure_pve mended it" if host_phases.installed(env.outer) else "ensure_pve installed PVE"
    )


_ASIDE = r"""
mark=$1; shift
for f; do [ ! -e "$f" ] || [ -e "$f$mark" ] || cp -p "$f" "$f$mark" || exit; done
"""
_BACK = r"""
mark=$1; shift
for f; do
    if [ -e "$f$mark" ]; then mv -f "$f$mark" "$f" || exit; else rm -f "$f" || exit; fi
done
"""
# The file may be a link into pmxcfs: what it names is replaced, in one step.
_WITHOUT = r"""
what=$1 there=$2 f=$3
[ -e "$f" ] || exit 0
real=$(readlink -f "$f") && t=$real.npve-$$ || exit
umask 077
grep -v -- "$what" "$real" >"$t"
[ $? -le 1 ] || { rm -f "$t"; exit 1; }
if [ "$there" = no ] && [ ! -s "$t" ]; then rm -f "$t" "$real"; else mv -f "$t" "$real"; fi
"""
_BLOCK = r"""
there=$1 f=/root/.ssh/config
[ -e "$f" ] || exit 0
sed -i '/^# BEGIN nested-pve leaves$/,/^# END nested-pve leaves$/d' "$f" || exit
[ "$there" = yes ] || [ -s "$f" ] || rm -f "$f"
"""


def _claim(env: Environment) -> None:
    """The run's pool and lease, by which also what no VM goes with is found after a crash."""
    host = env.outer
    create_pool(host.api, env.run, env.settings, host_clock(host))
    env.keep_lease()


def before_ssh(env: Environment) -> None:
    """The run's key pair, and the key among those that log in."""
    _claim(env)
    files = [host_phases.KEY_FILE, f"{host_phases.KEY_FILE}.pub"]
    _aside(env, files)
    had_block = env.inner.run(["grep", "-q", "^# BEGIN nested-pve leaves$", "/root/.ssh/config"]).ok
    there = _existing(env, ["/root/.ssh/config", "/root/.ssh/authorized_keys2"])
    public = env.run.directory.ensure_key(f"nested-pve run {env.run.id}").split()[1]

    def undo() -> None:
        _back(env, files)
        if not had_block:
            _sh(env, _BLOCK, "yes" if "/root/.ssh/config" in there else "no")
        _without(env, public, "/root/.ssh/authorized_keys", there=True)
        second = "/root/.ssh/authorized_keys2"
        _without(env, public, second, there=second in there)

    _at_end(env, "the run's key", undo)


_IDENTITY = (
    "/etc/hosts",
    "/etc/hostname",
    "/etc/cloud/templates/hosts.debian.tmpl",
    "/etc/pve/local/pve-ssl.pem",
)


def before_repos(env: Environment) -> None:
    """Token, sources, secrets, content types of the storage."""
    _claim(env)
    _rid_of_empty(env, ("/root/.config", posixpath.dirname(host_phases.TOKEN_STORE)))
    _aside(env, [host_phases.TOKEN_STORE])
    settings = env.settings
    base = settings.sources_dest.rstrip("/")
    names = [source.name for source in settings.sources]
    own = [base, f"{base}/.nested-pve", f"{base}/.nested-pve/secrets", f"{base}/.nested-pve/bootstrap.done"]
    for name in names:
        kept = f"{base}/.nested-pve/{name}"
        own += [f"{base}/{name}", kept, f"{kept}.digest", f"{kept}.tar.gz"]
    own += [secret_destination(path, settings) for path in settings.secrets]
    there = _existing(env, own)
    before = mapping(env.inner.api.get("/storage/local")).get("content")

    def undo() -> None:
        _back(env, [host_phases.TOKEN_STORE])
        gone = [path for path in own if path not in there]
        if gone:
            env.inner.run(["rm", "-rf", "--", *gone], timeout=300).check()
        now = mapping(env.inner.api.get("/storage/local")).get("content")
        if before and now != before:
            env.inner.api.put("/storage/local", content=before)

    _at_end(env, "sources and token", undo)
    replaced = [path for path in own[1:] if path in there and path.rpartition("/")[2] in names]
    if replaced:
        _tell_at_end(env, f"setup_repos replaced what was in {', '.join(replaced)}")
    identity = _sums(env, _IDENTITY)

    def changed() -> list[str]:
        now = _sums(env, _IDENTITY)
        others = [path for path in _IDENTITY if now.get(path) != identity.get(path)]
        if others:
            env.remark(f"{env.outer.name} stays as it is now: setup_repos mended {', '.join(others)}")
        return []

    env.undo.append(changed)
    if settings.bootstrap:
        _tell_at_end(env, "the bootstrap command was run")


def before_chain(env: Environment) -> None:
    """The leaf's host keys among those that root knows."""
    file, name = "/root/.ssh/known_hosts", str(env.fact("leaf_provision", "name"))
    there = file in _existing(env, [file])
    _at_end(env, "the leaf's host keys", lambda: _without(env, f"^{name} ", file, there=there))


def before_image(env: Environment) -> None:
    """A volume that is not there yet goes again at the end."""
    wanted = image_file.read(leaf_image.source(env))
    volid = wanted.volume(leaf_image.STORAGE)
    if wanted.kind == "volume" or volid in image_file.listed(env.inner, leaf_image.STORAGE):
        return

    def undo() -> None:
        if volid in image_file.listed(env.inner, leaf_image.STORAGE):
            path = f"/nodes/{env.inner.node}/storage/{leaf_image.STORAGE}/content/{volid}"
            task(env.inner, env.inner.api.delete(path), 120.0)

    _at_end(env, f"the image {volid}", undo)


def _at_end(env: Environment, what: str, undo: Callable[[], None]) -> None:
    def lines() -> list[str]:
        try:
            undo()
        except PveError as e:
            return [f"{what} on {env.outer.name}: {e}"]
        return []

    env.undo.append(lines)


def _tell_at_end(env: Environment, what: str) -> None:
    def tell() -> list[str]:
        env.remark(f"{env.outer.name} stays as it is now: {what}")
        return []

    env.undo.append(tell)


def _rid_of_empty(env: Environment, folders: Sequence[str]) -> None:
    """Directories that are not there yet go at the end, if nothing is in them; the inner ones come last."""
    said = env.inner.run(["ls", "-d", "--", *folders], timeout=30)
    there = frozenset(said.stdout.splitlines())
    mine = [folder for folder in reversed(folders) if folder not in there]

    def remove() -> list[str]:
        env.inner.run(["rmdir", "--", *mine], timeout=30)
        return []  # one that is not empty, or never came to be, is no fault

    if mine:
        env.undo.append(remove)


def _sums(env: Environment, files: Iterable[str]) -> dict[str, str]:
    said = env.inner.run(["sha256sum", "--", *files], timeout=30)
    return {path: digest for digest, _, path in (line.partition("  ") for line in said.stdout.splitlines())}


def _mark(env: Environment) -> str:
    return f".npve-{env.run.id}"


def _sh(env: Environment, script: str, *words: str) -> str:
    return env.inner.run(["sh", "-c", script, "sh", *words], timeout=60).check().stdout


def _aside(env: Environment, files: Iterable[str]) -> None:
    _sh(env, _ASIDE, _mark(env), *files)


def _back(env: Environment, files: Iterable[str]) -> None:
    _sh(env, _BACK, _mark(env), *files)


def _without(env: Environment, what: str, file: str, *, there: bool) -> None:
    _sh(env, _WITHOUT, what, "yes" if there else "no", file)


def _existing(env: Environment, paths: Iterable[str]) -> frozenset[str]:
    script = 'for f; do if [ -e "$f" ] || [ -L "$f" ]; then printf "%s\\n" "$f"; fi; done'
    return frozenset(_sh(env, script, *paths).splitlines())
