"""Valid options and settings that contradict each other: the combination is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_nestedpve.config.settings import Settings, SettingsError, overrides

if TYPE_CHECKING:
    import pytest


def check(settings: Settings, config: pytest.Config) -> None:
    """Raises SettingsError for options and settings that contradict each other."""
    if settings.attach is not None:
        _check_attach(settings, config)
    if settings.doctor:
        further = {
            "--nested-dry-run": settings.dry_run,
            "--nested-make-template": settings.make_template,
            "--nested-skip": bool(settings.skip),
            "--context-file": settings.context_file is not None,
        }
        why = "the doctor only reads, and creates, runs and destroys nothing"
        _check_alone(settings, config, "--nested-doctor", why, further)
    if settings.make_template:
        why = "a new nested VM becomes the template, and no test uses it; remove one of the options"
        _check_alone(settings, config, "--nested-make-template", why)
    _check_other_tools(settings, config)
    if not settings.destroy_only:
        for value, name in ((settings.run_id, "--nested-run"), (settings.yes, "--nested-yes")):
            if value:
                raise SettingsError(
                    f"{name} is valid only with --nested-destroy-only: add that option, or remove {name}"
                )
        if settings.json_file and not (settings.dry_run or settings.doctor):
            raise SettingsError(
                "--nested-json is valid only with --nested-destroy-only, --nested-dry-run or --nested-doctor"
            )
    else:
        for name in ("collect-only", "setup-only", "setup-plan"):
            if getattr(config.option, name.replace("-", ""), False):
                raise SettingsError(
                    f"--nested-destroy-only and --{name} contradict each other; to see what would be "
                    "destroyed, use --nested-destroy-only --nested-dry-run"
                )
        if config.option.keyword and _is_typed(config, "-k"):
            raise SettingsError(
                "--nested-destroy-only collects no tests, so -k selects nothing; "
                "to select one run, use --nested-run ID"
            )
    if settings.yes and settings.dry_run:
        raise SettingsError(
            "--nested-yes and --nested-dry-run contradict each other: a dry run asks no question"
        )
    if settings.image and settings.template and not {"image", "template"} - set(settings.origins):
        raise SettingsError(
            f"an image ({settings.origin('image')}) and a template ({settings.origin('template')}) "
            "are both set; the nested VM is created from one: remove the other"
        )
    names = {source.name for source in settings.sources}
    listed = ", ".join(sorted(names)) or "none is set"
    for key, value in (("bootstrap", settings.bootstrap), ("token_path", settings.token_path)):
        source = value.partition(":")[0] if value else None
        if source is not None and source not in names:
            raise SettingsError(
                f"{settings.origin(key)}: expected the name of a source ({listed}) before the colon; "
                f"found {source!r}"
            )
    if settings.secrets:
        _check_secrets(settings)


def _check_secrets(settings: Settings) -> None:
    """Raises SettingsError when a secret has the same destination as another one, or a reserved one."""
    from pytest_nestedpve.config.settings import secret_destination

    folder = settings.sources_dest
    reserved = {os.path.join(folder, source.name): f"the source {source.name}" for source in settings.sources}
    reserved[os.path.join(folder, ".nested-pve")] = "the record of what was copied"
    for path in dict.fromkeys(settings.secrets):
        destination = secret_destination(path, settings)
        if destination in reserved:
            raise SettingsError(
                f"{settings.origin('secrets')}: expected a destination for each file; found {path} and "
                f"{reserved[destination]}, both for {destination}: rename the file"
            )
        reserved[destination] = str(path)


def _check_attach(settings: Settings, config: pytest.Config) -> None:
    """Raises SettingsError for options that cannot be used with an attached PVE."""
    typed = "--pve-host" if config.getoption("--pve-host") is not None else None
    if typed is None and overrides(config).get("nested_pve_host", "").strip():
        typed = "-o nested_pve_host"
    if typed is not None:
        raise SettingsError(
            f"--nested-attach and {typed} contradict each other: the attached PVE is the nested "
            "one, and no outer host is used; remove one of the options"
        )
    if settings.destroy_only:
        raise SettingsError(
            "--nested-attach and --nested-destroy-only contradict each other; to destroy leftovers of runs "
            f"inside that PVE, use `pytest --nested-destroy-only --pve-host {settings.attach}`"
        )
    if settings.keep != "no":
        raise SettingsError(
            "--nested-attach and --nested-keep contradict each other: the attached PVE is never "
            "destroyed, and the VMs of a run inside it are destroyed with the run; remove one of the options"
        )
    if settings.scope == "run" and getattr(config.option, "tx", None) and config.option.dist != "no":
        raise SettingsError(
            f"--nested-attach and nested_pve_scope = run ({settings.origin('scope')}) contradict each other: "
            "the worker processes share the attached PVE in any case, each with its own VM inside; use "
            "-o nested_pve_scope=worker"
        )


def _check_alone(
    settings: Settings, config: pytest.Config, name: str, why: str, further: Mapping[str, bool] | None = None
) -> None:
    """Raises SettingsError for options that cannot be used with `name`, which collects no tests.

    `further`: options that only this mode excludes, and whether they are set.
    """
    option = config.option
    others = {
        "--nested-destroy-only": settings.destroy_only,
        "--nested-exec": settings.exec_command is not None,
        "--nested-env-file": settings.env_file is not None,
        "--nested-keep": settings.keep != "no",
        "--nested-attach": settings.attach is not None,
        **(further or {}),
        "--collect-only": getattr(option, "collectonly", False),
        "--setup-only": getattr(option, "setuponly", False),
        "--setup-plan": getattr(option, "setupplan", False),
    }
    conflicting = [other for other, is_set in others.items() if is_set]
    if conflicting:
        raise SettingsError(f"{name} and {', '.join(conflicting)} contradict each other: {why}")
    if _is_typed(config, "-k"):
        raise SettingsError(f"{name} collects no tests, so -k selects nothing: remove it")


def _check_other_tools(settings: Settings, config: pytest.Config) -> None:
    option = config.option
    if settings.destroy_only:
        for value, name in ((settings.exec_command, "exec"), (settings.env_file, "env-file")):
            if value is not None:
                raise SettingsError(
                    f"--nested-destroy-only and --nested-{name} contradict each other: nothing is set up"
                )
    if settings.exec_command is not None:
        for name in ("collect-only", "setup-only", "setup-plan"):
            if getattr(option, name.replace("-", ""), False):
                raise SettingsError(
                    f"--nested-exec and --{name} contradict each other; to see the steps, use "
                    "--nested-exec with --nested-dry-run"
                )
        for flag, verb in (("-k", "selects"), ("-n", "distributes"), ("--numprocesses", "distributes")):
            if _is_typed(config, flag):
                raise SettingsError(f"--nested-exec collects no tests, so {flag} {verb} nothing: remove it")
    elif settings.env_file is not None and getattr(option, "tx", None) and option.dist != "no":
        raise SettingsError(
            "--nested-env-file cannot be used with xdist: each worker would write it, for its own ports; "
            "remove -n, or use nested_pve.environ() in the tests"
        )


def _is_typed(config: pytest.Config, flag: str) -> bool:
    """Whether the flag is on the command line, and not only in addopts."""
    return any(str(arg).startswith(flag) for arg in config.invocation_params.args)
