"""Preparation of the phases that change an attached PVE, and the undo of their changes at the end.

The state before a change is recorded first, files as copies on the PVE itself: at the end new files are
deleted, and former ones restored.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from pytest_nestedpve.config.settings import secret_destination
from pytest_nestedpve.environment.facts import LeafProvisionFacts
from pytest_nestedpve.ownership.pool import create_pool, host_clock
from pytest_nestedpve.pve.answers import mapping
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup import host_phases, image_file, leaf_image
from pytest_nestedpve.setup.vm import await_task

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

_SAVE = r"""
mark=$1; shift
for f; do [ ! -e "$f" ] || [ -e "$f$mark" ] || cp -p "$f" "$f$mark" || exit; done
"""
_RESTORE = r"""
mark=$1; shift
for f; do
    if [ -e "$f$mark" ]; then mv -f "$f$mark" "$f" || exit; else rm -f "$f" || exit; fi
done
"""
# The file may be a link into pmxcfs: its target is replaced, in one step.
_REMOVE_LINES = r"""
pattern=$1 existed=$2 f=$3
[ -e "$f" ] || exit 0
real=$(readlink -f "$f") && t=$real.npve-$$ || exit
umask 077
grep -v -- "$pattern" "$real" >"$t"
[ $? -le 1 ] || { rm -f "$t"; exit 1; }
if [ "$existed" = no ] && [ ! -s "$t" ]; then rm -f "$t" "$real"; else mv -f "$t" "$real"; fi
"""
_REMOVE_BLOCK = r"""
existed=$1 f=/root/.ssh/config
[ -e "$f" ] || exit 0
sed -i '/^# BEGIN nested-pve leaves$/,/^# END nested-pve leaves$/d' "$f" || exit
[ "$existed" = yes ] || [ -s "$f" ] || rm -f "$f"
"""
_IDENTITY = (
    "/etc/hosts",
    "/etc/hostname",
    "/etc/cloud/templates/hosts.debian.tmpl",
    "/etc/pve/local/pve-ssl.pem",
)


# -- before each phase ----------------------------------------------------------------------------


def before_pve(env: Environment) -> None:
    """Announce that the changes of ensure_pve remain."""
    change = "ensure_pve repaired it" if host_phases.installed(env.outer) else "ensure_pve installed PVE"
    _report_at_end(env, change)


def before_network(env: Environment) -> None:
    """Announce that the changes of setup_network remain."""
    _report_at_end(env, "setup_network changed its network configuration")


def before_ssh(env: Environment) -> None:
    """Prepare the undo for the run's key pair, and for the key in authorized_keys. Raises PveError."""
    _claim(env)
    files = [host_phases.KEY_FILE, f"{host_phases.KEY_FILE}.pub"]
    _save_files(env, files)
    had_block = env.inner.run(["grep", "-q", "^# BEGIN nested-pve leaves$", "/root/.ssh/config"]).ok
    existing = _existing(env, ["/root/.ssh/config", "/root/.ssh/authorized_keys2"])
    public = env.run.directory.ensure_key(f"nested-pve run {env.run.id}").split()[1]

    def undo() -> None:
        _restore_files(env, files)
        if not had_block:
            _run_script(env, _REMOVE_BLOCK, "yes" if "/root/.ssh/config" in existing else "no")
        _remove_lines(env, public, "/root/.ssh/authorized_keys", existed=True)
        second = "/root/.ssh/authorized_keys2"
        _remove_lines(env, public, second, existed=second in existing)

    _undo_at_end(env, "the run's key", undo)


def before_repos(env: Environment) -> None:
    """Prepare the undo for token, sources, secrets and content types of the storage. Raises PveError."""
    _claim(env)
    remove_new_directories(env, ("/root/.config", posixpath.dirname(host_phases.TOKEN_STORE)))
    _save_files(env, [host_phases.TOKEN_STORE])
    settings = env.settings
    base = settings.sources_dest.rstrip("/")
    names = [source.name for source in settings.sources]
    paths = [base, f"{base}/.nested-pve", f"{base}/.nested-pve/secrets", f"{base}/.nested-pve/bootstrap.done"]
    for name in names:
        record = f"{base}/.nested-pve/{name}"
        paths += [f"{base}/{name}", record, f"{record}.digest", f"{record}.tar.gz"]
    paths += [secret_destination(path, settings) for path in settings.secrets]
    existing = _existing(env, paths)
    before = mapping(env.inner.api.get("/storage/local")).get("content")

    def undo() -> None:
        _restore_files(env, [host_phases.TOKEN_STORE])
        new = [path for path in paths if path not in existing]
        if new:
            env.inner.run(["rm", "-rf", "--", *new], timeout=300).check()
        current = mapping(env.inner.api.get("/storage/local")).get("content")
        if before and current != before:
            env.inner.api.put("/storage/local", content=before)

    _undo_at_end(env, "sources and token", undo)
    replaced = [path for path in paths[1:] if path in existing and path.rpartition("/")[2] in names]
    if replaced:
        _report_at_end(env, f"setup_repos replaced the content of {', '.join(replaced)}")
    identity = _checksums(env, _IDENTITY)

    def report_identity() -> list[str]:
        current = _checksums(env, _IDENTITY)
        changed = [path for path in _IDENTITY if current.get(path) != identity.get(path)]
        if changed:
            env.remark(f"{env.outer.name} is not restored: setup_repos changed {', '.join(changed)}")
        return []

    env.undo.append(report_identity)
    if settings.bootstrap:
        _report_at_end(env, "setup_repos ran the bootstrap command")


def before_chain(env: Environment) -> None:
    """Prepare the undo for the leaf's host keys in root's known_hosts. Raises PveError."""
    file, name = "/root/.ssh/known_hosts", LeafProvisionFacts.of(env.facts).name
    existed = file in _existing(env, [file])
    _undo_at_end(env, "the leaf's host keys", lambda: _remove_lines(env, f"^{name} ", file, existed=existed))


def before_image(env: Environment) -> None:
    """Prepare the deletion of the image, unless the storage has it already. Raises PveError."""
    image = image_file.read(leaf_image.source(env))
    volid = image.volume(leaf_image.STORAGE)
    if image.kind == "volume" or volid in image_file.list_images(env.inner, leaf_image.STORAGE):
        return

    def undo() -> None:
        if volid in image_file.list_images(env.inner, leaf_image.STORAGE):
            path = f"/nodes/{env.inner.node}/storage/{leaf_image.STORAGE}/content/{volid}"
            await_task(env.inner, env.inner.api.delete(path), 120.0)

    _undo_at_end(env, f"the image {volid}", undo)


def remove_new_directories(env: Environment, directories: Sequence[str]) -> None:
    """Prepare the deletion of those directories that do not exist yet, once they are empty; the inner ones
    come last. Raises SshError."""
    listing = env.inner.run(["ls", "-d", "--", *directories], timeout=30)
    existing = frozenset(listing.stdout.splitlines())
    new = [directory for directory in reversed(directories) if directory not in existing]

    def remove() -> list[str]:
        env.inner.run(["rmdir", "--", *new], timeout=30)
        return []  # one that is not empty, or was never created, is no leftover

    if new:
        env.undo.append(remove)


# -- implementation -------------------------------------------------------------------------------


def _claim(env: Environment) -> None:
    """Create the run's pool and lease, by which leftovers of a crash are discovered, with or without a VM."""
    host = env.outer
    create_pool(host.api, env.run, env.settings, host_clock(host))
    env.keep_lease()


def _undo_at_end(env: Environment, what: str, undo: Callable[[], None]) -> None:
    def leftovers() -> list[str]:
        try:
            undo()
        except PveError as e:
            return [f"{what} on {env.outer.name}: {e}"]
        return []

    env.undo.append(leftovers)


def _report_at_end(env: Environment, what: str) -> None:
    def report() -> list[str]:
        env.remark(f"{env.outer.name} is not restored: {what}")
        return []

    env.undo.append(report)


def _checksums(env: Environment, files: Iterable[str]) -> dict[str, str]:
    output = env.inner.run(["sha256sum", "--", *files], timeout=30).stdout
    return {path: digest for digest, _, path in (line.partition("  ") for line in output.splitlines())}


def _mark(env: Environment) -> str:
    return f".npve-{env.run.id}"


def _run_script(env: Environment, script: str, *words: str) -> str:
    return env.inner.run(["sh", "-c", script, "sh", *words], timeout=60).check().stdout


def _save_files(env: Environment, files: Iterable[str]) -> None:
    _run_script(env, _SAVE, _mark(env), *files)


def _restore_files(env: Environment, files: Iterable[str]) -> None:
    _run_script(env, _RESTORE, _mark(env), *files)


def _remove_lines(env: Environment, pattern: str, file: str, *, existed: bool) -> None:
    _run_script(env, _REMOVE_LINES, pattern, "yes" if existed else "no", file)


def _existing(env: Environment, paths: Iterable[str]) -> frozenset[str]:
    script = 'for f; do if [ -e "$f" ] || [ -L "$f" ]; then printf "%s\\n" "$f"; fi; done'
    return frozenset(_run_script(env, script, *paths).splitlines())
