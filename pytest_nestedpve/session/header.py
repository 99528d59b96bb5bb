"""The lines of `pytest_report_header`: the host, the run, and the VM to create."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nestedpve.session.state import SessionState


def lines(state: SessionState) -> list[str]:
    """The lines; none without a configured host, so the plugin is invisible in unrelated projects."""
    settings, option = state.settings, state.config.option
    if settings.host is None or option.collectonly:
        return []
    host = f"nested-pve: host {settings.host} ({settings.origin('host')})"
    if settings.destroy_only:
        target = f"run {settings.run_id}" if settings.run_id else "leftovers of earlier runs"
        return [host, f"nested-pve: {'would destroy' if settings.dry_run else 'destroys'} {target}; no tests"]
    if settings.dry_run:
        return [host, "nested-pve: dry run, nothing is created"]
    if settings.attach is not None:
        return [
            host,
            "nested-pve: attached: that PVE is used as the nested one and kept; a VM inside, if a test "
            "needs it, is destroyed at the end; nothing is created outside of it",
        ]
    size = f"{settings.cores} cores, {_gib(settings.memory)} memory, {settings.disk} GiB disk"
    several = bool(getattr(option, "tx", None)) and option.dist != "no"
    run = "RUN" if several else state.run_id
    workers = len(option.tx) if several else 1
    shared = settings.scope == "run"
    users = ""
    if several:
        users = " for all workers" if shared else f" for each of {workers} workers that needs one"
    ids = ", ".join(f"{low}-{high}" if low != high else str(low) for low, high in settings.vmid_ranges)
    if settings.any_id:
        ids = "any free id"
    command = settings.exec_command
    runs = [f"nested-pve: no tests; runs {command}"] if command is not None else []
    if settings.make_template:
        runs = ["nested-pve: no tests; creates a template"]
    from pytest_nestedpve.run.kept_runs import find_resumable

    if (kept := find_resumable(settings, state.config.rootpath)) is not None:
        return [
            host,
            *runs,
            f"nested-pve: resumes the kept run {kept.run}, if a test needs it; "
            + ("kept again" if settings.keep == "always" else "destroyed at the end unless it is kept again"),
        ]
    end = "kept at the end" if settings.keep == "always" else "destroyed at the end"
    if settings.keep == "on-failure":
        end += " unless something failed"
    if several and not shared:
        end += f"; up to {_gib(workers * settings.memory)} of the host's memory"
    return [
        host if several else f"{host}; run {run}",
        *runs,
        f"nested-pve: creates one VM {settings.name_prefix}-{run}{users} ({size}; id: {ids}) with a VM "
        f"inside, if a test needs it; {end}",
    ]


def _gib(mebibytes: int) -> str:
    return f"{mebibytes / 1024:g} GiB"
