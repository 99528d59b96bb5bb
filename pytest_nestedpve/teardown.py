"""The end of a run: from discovery, inner guests first, and a second discovery that must come back empty."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_nestedpve.audit import task_ids
from pytest_nestedpve.destroy import Outcome, destroy
from pytest_nestedpve.discovery import Candidate, discover
from pytest_nestedpve.ownership import pool_name, prove, read_pool
from pytest_nestedpve.pve.errors import NotFound, PveError
from pytest_nestedpve.pve.tasks import wait_task

if TYPE_CHECKING:
    from pytest_nestedpve.environment import Environment
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.settings import Settings


@dataclass(frozen=True)
class TeardownReport:
    """`left`: lines about what is ours and still there; `kept`: about what was not ours and is untouched."""

    destroyed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


def teardown(env: Environment) -> TeardownReport:
    """Remove everything of the run from the outer host. Raises PveError when the host cannot be asked."""
    audit, run, host = env.audit, env.run, env.outer
    with _phase(env, "discover", "what may be the run's is looked for"):
        candidates = discover(host, env.settings, run.id)
        for each in candidates:
            audit.write("teardown", phase="discover", status="found", vmid=each.vmid, cause=each.why)
    with _phase(env, "cleanup_inner", "guests inside the nested PVE go first"):
        _inner_first(env, candidates)
    with _phase(env, "destroy", "proved, stopped, proved, destroyed; then looked for again"):
        report = clear(env, host, candidates)
    for line in report.left:
        audit.write("leak", status="left", cause=line, host=host.name)
    audit.write("teardown", phase="destroy", status="left" if report.left else "clean", host=host.name)
    return report


@contextlib.contextmanager
def _phase(env: Environment, name: str, title: str) -> Iterator[None]:
    env.audit.write("phase_start", phase=name, title=title)
    started, status = time.monotonic(), "failed"
    try:
        yield
        status = "done"
    finally:
        took = round((time.monotonic() - started) * 1000, 1)
        env.audit.write("phase_end", phase=name, status=status, ms=took)


def clear(env: Environment, host: PveHost, candidates: list[Candidate]) -> TeardownReport:
    """Destroy, volumes and snippets and pool, then look a second time."""
    settings, run = env.settings, env.run

    def told(outcome: Outcome) -> None:
        env.audit.write(
            "teardown",
            phase="destroy",
            status=outcome.result,
            vmid=outcome.vmid,
            host=host.name,
            cause=outcome.reason or None,
        )

    ours = task_ids(run.directory.audit)
    outcomes = destroy(host, settings, run.id, candidates, ours=ours, told=told)
    left = [_line(each) for each in outcomes if each.result == "left"]
    left += clear_rest(host, settings, run.id)
    foreign = {each.vmid for each in outcomes if each.result == "foreign"}
    known = {each.vmid for each in outcomes if each.result == "left"}
    for each in discover(host, settings, run.id):
        if each.vmid not in foreign | known:
            left.append(f"VM {each.vmid} on {each.node}: found again after the teardown, {each.why}")
    return TeardownReport(
        tuple(f"VM {each.vmid}" for each in outcomes if each.result == "gone"),
        tuple(left),
        tuple(_line(each) for each in outcomes if each.result == "foreign"),
    )


def clear_rest(host: PveHost, settings: Settings, run_id: str) -> list[str]:
    """What a run has beside its VMs: snippet files, and the pool if it is empty. Lines about what stays."""
    return [*_snippets(host, run_id), *_pool(host, settings, run_id)]


def _line(outcome: Outcome) -> str:
    return f"VM {outcome.vmid} on {outcome.node}: {outcome.reason}"


def _inner_first(env: Environment, candidates: list[Candidate]) -> None:
    """Guests inside the nested PVE, best effort: they go with its disk anyway."""
    if "leaf_provision" not in env.facts and "download_image" not in env.facts:
        return
    if not any(prove(env.outer.api, env.settings, each, env.run).ok for each in candidates):
        return
    try:
        inside = discover(env.inner, env.settings, env.run.id)
        outcomes = destroy(env.inner, env.settings, env.run.id, inside)
        status = "left" if any(each.result == "left" for each in outcomes) else "clean"
        env.audit.write("teardown", phase="cleanup_inner", status=status, cause=None)
    except Exception as e:
        env.audit.write("teardown", phase="cleanup_inner", status="skipped", cause=f"{type(e).__name__}: {e}")


def _snippets(host: PveHost, run_id: str) -> list[str]:
    """The run's snippet files on every storage of the node; lines about those that stay."""
    left = []
    for storage in host.api.get(f"/nodes/{host.node}/storage") or ():
        if "snippets" not in str(storage.get("content", "")).split(","):
            continue
        path = f"/nodes/{host.node}/storage/{storage['storage']}/content"
        for each in host.api.get(path, content="snippets"):
            volid = str(each.get("volid", ""))
            if not volid.partition("/")[2].startswith(f"npve-{run_id}-"):
                continue
            try:
                upid = host.api.delete(f"{path}/{volid}")
                if isinstance(upid, str) and upid.startswith("UPID:"):
                    wait_task(host.api, upid, timeout=60)
            except NotFound:
                continue
            except PveError as e:
                left.append(f"snippet {volid}: {e}")
    return left


def _pool(host: PveHost, settings: Settings, run_id: str) -> list[str]:
    """The run's pool, if nothing is in it; a line if it stays."""
    name = pool_name(settings, run_id)
    pool = read_pool(host.api, name)
    if pool is None:
        return []
    if pool.members:
        inside = ", ".join(str(vmid) for vmid in sorted(pool.vmids))
        return [f"pool {name}: it still contains {inside}"]
    try:
        host.api.delete("/pools", poolid=name)
    except NotFound:
        return []
    except PveError as e:
        return [f"pool {name}: {e}"]
    return []
