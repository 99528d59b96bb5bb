"""Options and settings that contradict each other: each alone is right, and together they are refused."""

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
        more = {
            "--nested-dry-run": settings.dry_run,
            "--nested-make-template": settings.make_template,
            "--nested-skip": bool(settings.skip),
            "--context-file": settings.context_file is not None,
        }
        why = "the doctor only looks, and makes, runs and destroys nothing"
        _check_alone(settings, config, "--nested-doctor", why, more)
    if settings.make_template:
        why = "the nested VM is made anew, becomes the template, and no test has it; leave one of them out"
        _check_alone(settings, config, "--nested-make-template", why)
    _check_other_tools(settings, config)
    if not settings.destroy_only:
        for given, name in ((settings.run_id, "--nested-run"), (settings.yes, "--nested-yes")):
            if given:
                raise SettingsError(
                    f"{name} only goes with --nested-destroy-only: add that, or leave {name} out"
                )
        if settings.json_file and not (settings.dry_run or settings.doctor):
            raise SettingsError(
                "--nested-json only goes with --nested-destroy-only, --nested-dry-run or --nested-doctor"
            )
    else:
        for name in ("collect-only", "setup-only", "setup-plan"):
            if getattr(config.option, name.replace("-", ""), False):
                raise SettingsError(
                    f"--nested-destroy-only and --{name} contradict each other; to see what would be "
                    "destroyed, use --nested-destroy-only --nested-dry-run"
                )
        if config.option.keyword and _typed(config, "-k"):
            raise SettingsError(
                "--nested-destroy-only collects no tests, so -k selects nothing; "
                "to choose one run, use --nested-run ID"
            )
    if settings.yes and settings.dry_run:
        raise SettingsError("--nested-yes and --nested-dry-run contradict each other: a dry run asks nothing")
    if settings.image and settings.template and not {"image", "template"} - set(settings.origins):
        raise SettingsError(
            f"an image ({settings.origin('image')}) and a template ({settings.origin('template')}) "
            "are both set; the nested VM is made from one: leave the other out"
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
    """Each has a place of its own on the nested PVE."""
    from pytest_nestedpve.config.settings import secret_destination

    where = settings.sources_dest
    taken = {os.path.join(where, source.name): f"the source {source.name}" for source in settings.sources}
    taken[os.path.join(where, ".nested-pve")] = "the record of what was copied"
    for path in dict.fromkeys(settings.secrets):
        destination = secret_destination(path, settings)
        if destination in taken:
            raise SettingsError(
                f"{settings.origin('secrets')}: expected a place for each file; found {path} and "
                f"{taken[destination]}, both for {destination}: give the file another name"
            )
        taken[destination] = str(path)


def _check_attach(settings: Settings, config: pytest.Config) -> None:
    """What does not go with a PVE that exists."""
    typed = "--pve-host" if config.getoption("--pve-host") is not None else None
    if typed is None and overrides(config).get("nested_pve_host", "").strip():
        typed = "-o nested_pve_host"
    if typed is not None:
        raise SettingsError(
            f"--nested-attach and {typed} contradict each other: the attached PVE is the nested "
            "one, and no outer host is used; leave one of them out"
        )
    if settings.destroy_only:
        raise SettingsError(
            "--nested-attach and --nested-destroy-only contradict each other; what runs left inside of that "
            f"PVE goes by `pytest --nested-destroy-only --pve-host {settings.attach}`"
        )
    if settings.keep != "no":
        raise SettingsError(
            "--nested-attach and --nested-keep contradict each other: the attached PVE stays as it is "
            "anyway, and what a run makes inside of it goes with the run; leave one of them out"
        )
    if settings.scope == "run" and getattr(config.option, "tx", None) and config.option.dist != "no":
        raise SettingsError(
            f"--nested-attach and nested_pve_scope = run ({settings.origin('scope')}) contradict each other: "
            "workers share the attached PVE anyway, each with a VM inside of its own; use "
            "-o nested_pve_scope=worker"
        )


def _check_alone(
    settings: Settings, config: pytest.Config, name: str, why: str, more: Mapping[str, bool] | None = None
) -> None:
    """What does not go with the option `name`, which collects no tests; `more` by the option's name."""
    option = config.option
    others = {
        "--nested-destroy-only": settings.destroy_only,
        "--nested-exec": settings.exec_command is not None,
        "--nested-env-file": settings.env_file is not None,
        "--nested-keep": settings.keep != "no",
        "--nested-attach": settings.attach is not None,
        **(more or {}),
        "--collect-only": getattr(option, "collectonly", False),
        "--setup-only": getattr(option, "setuponly", False),
        "--setup-plan": getattr(option, "setupplan", False),
    }
    given = [other for other, is_given in others.items() if is_given]
    if given:
        raise SettingsError(f"{name} and {', '.join(given)} contradict each other: {why}")
    if _typed(config, "-k"):
        raise SettingsError(f"{name} collects no tests, so -k selects nothing: leave it out")


def _check_other_tools(settings: Settings, config: pytest.Config) -> None:
    option = config.option
    if settings.destroy_only:
        for given, name in ((settings.exec_command, "exec"), (settings.env_file, "env-file")):
            if given is not None:
                raise SettingsError(
                    f"--nested-destroy-only and --nested-{name} contradict each other: nothing is set up"
                )
    if settings.exec_command is not None:
        for name in ("collect-only", "setup-only", "setup-plan"):
            if getattr(option, name.replace("-", ""), False):
                raise SettingsError(
                    f"--nested-exec and --{name} contradict each other; to see what would be done, use "
                    "--nested-exec with --nested-dry-run"
                )
        for flag, does in (("-k", "selects"), ("-n", "distributes"), ("--numprocesses", "distributes")):
            if _typed(config, flag):
                raise SettingsError(
                    f"--nested-exec collects no tests, so {flag} {does} nothing: leave it out"
                )
    elif settings.env_file is not None and getattr(option, "tx", None) and option.dist != "no":
        raise SettingsError(
            "--nested-env-file does not go with xdist: each worker would write it, for ports of its own; "
            "leave out -n, or use nested_pve.environ() in the tests"
        )


def _typed(config: pytest.Config, flag: str) -> bool:
    """Whether the flag was typed now, and does not just stand in a project's addopts."""
    return any(str(arg).startswith(flag) for arg in config.invocation_params.args)
