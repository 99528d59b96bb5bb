"""All settings as a frozen value. Precedence: command line, environment, ini, host profile, default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.config import parsers
from pytest_nestedpve.config.keys import KEYS, Key
from pytest_nestedpve.config.parsers import Source, Text

if TYPE_CHECKING:
    import pytest

#: A host must not decide which programs the client runs or what it sends: other keys are refused.
PROFILE_KEYS = frozenset(key.name for key in KEYS if key.profile)
_DEFAULT = "default"


class SettingsError(Exception):
    """A setting, an option or a local file is not usable; the message names the source of the value."""


@dataclass(frozen=True)
class Settings:
    """The settings and options of a session. Sizes: memory MiB, disk GiB; times: seconds.

    `origins`: the source of each value, by key (ini name without nested_pve_). `typed`: the values of `-o`
    for keys other than the host, by ini name, as text.
    """

    host: str | None = None
    name_patterns: tuple[str, ...] = ("nested-pve*",)
    vmid_ranges: tuple[tuple[int, int], ...] = ((99900, 99999),)
    image: str | None = None
    template: str | None = None
    storage: str | None = None
    bridge: str | None = None
    ipconfig: str = "ip=dhcp"
    cores: int = 2
    memory: int = 8192
    disk: int = 64
    vm_options: Mapping[str, str] = field(default_factory=dict)
    leaf_image: str | None = None
    leaf_options: Mapping[str, str] = field(default_factory=dict)
    extra_vars: Mapping[str, Any] = field(default_factory=dict)
    playbook_dir: Path | None = None
    roles_path: tuple[Path, ...] = ()
    collections_path: tuple[Path, ...] = ()
    inventory_groups: tuple[str, ...] = ()
    sources: tuple[Source, ...] = ()
    sources_dest: str = "/opt/sources"
    secrets: tuple[Path, ...] = ()
    bootstrap: str | None = None
    token_path: str | None = None
    pool_parent: str | None = None
    mirror: str | None = None
    http_proxy: str | None = None
    pve_repository_url: str | None = None
    pve_repository_key_url: str | None = None
    pve_repository_key_sha256: str | None = None
    force_stop: bool = True
    redo: bool = False
    scope: str = "worker"
    timeout: float | None = None
    timeout_scale: float = 1.0
    lease: float = 1800.0
    keep_expiry: float = 28800.0
    run_dir: Path = Path(".nested-pve/runs")

    keep: str = "no"
    attach: str | None = None
    skip: tuple[str, ...] = ()
    destroy_only: bool = False
    dry_run: bool = False
    doctor: bool = False
    run_id: str | None = None
    yes: bool = False
    context_file: Path | None = None
    json_file: Path | None = None
    exec_command: str | None = None
    make_template: bool = False
    env_file: Path | None = None

    origins: Mapping[str, str] = field(default_factory=dict)
    typed: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def name_prefix(self) -> str:
        """The beginning of the names of this project's VMs: the literal part of the first pattern."""
        return parsers.name_prefix(self.name_patterns[0])

    @property
    def any_id(self) -> bool:
        """The range is `any`: only marked VMs are candidates."""
        return self.vmid_ranges == parsers.ANY_RANGE

    def origin(self, key: str) -> str:
        """The source of the value of `key`, in words; `default` without one."""
        return self.origins.get(key, _DEFAULT)

    def with_profile(self, profile: Mapping[str, str], *, where: str = "/etc/nested-pve.ini") -> Settings:
        """These settings, with the values of the outer host's profile for keys without another source.

        `profile` holds texts by key; `where` is its name in messages. Raises SettingsError, also for keys
        that a host may not set.
        """
        changes: dict[str, Any] = {}
        origins = dict(self.origins)
        for key in KEYS:
            text = profile.get(key.name, "").strip()
            if not key.profile or not text or key.name in self.origins:
                continue
            if (key.name == "image" and self.template) or (key.name == "template" and self.image):
                continue  # the user has configured the alternative
            changes[key.target] = _parse(key, Text(text, Path("/")), f"{key.name} in {where}")
            if key.name == "image" and changes[key.target].startswith("/"):
                raise SettingsError(
                    f"image in {where}: expected a volume, or a URL with its checksum; found {text!r}: a "
                    "file would be one of the machine that runs pytest"
                )
            origins[key.name] = where
        refused = sorted(set(profile) - PROFILE_KEYS)
        if refused:
            raise SettingsError(
                f"{where} sets {', '.join(refused)}; a host may only set {', '.join(sorted(PROFILE_KEYS))}"
            )
        return replace(self, **changes, origins=origins)


def load(config: pytest.Config, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings of this session; needs no host. Raises SettingsError."""
    env = os.environ if environ is None else environ
    values: dict[str, Any] = {"run_dir": config.rootpath / ".nested-pve" / "runs"}
    origins: dict[str, str] = {}
    typed = overrides(config)
    for key in KEYS:
        source = _find(config, key, typed, env)
        if source is None:
            continue
        text, origin = source
        values[key.target] = _parse(key, text, origin)
        origins[key.name] = origin
    values.update(_actions(config))
    attach = config.getoption("--nested-attach")
    if attach is not None:
        # The attached PVE is the only host: all objects of the run are inside it.
        text = Text(attach, Path(config.invocation_params.dir))
        host = next(key for key in KEYS if key.name == "host")
        values["attach"] = values["host"] = _parse(host, text, "--nested-attach")
        origins["host"] = "--nested-attach"
    known = {field.name for field in fields(Settings)}
    assert set(values) <= known, sorted(set(values) - known)
    texts = {key.ini: typed[key.ini] for key in KEYS if key.ini in typed and key.name != "host"}
    return Settings(**values, origins=origins, typed=texts)


def overrides(config: pytest.Config) -> dict[str, str]:
    """The values of `-o key=value`: passed as ini by pytest, but with precedence over the environment."""
    pairs = (text.split("=", 1) for text in getattr(config.option, "override_ini", None) or ())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _find(
    config: pytest.Config, key: Key, overrides: Mapping[str, str], env: Mapping[str, str]
) -> tuple[Text, str] | None:
    cwd = Path(config.invocation_params.dir)
    if key.name == "host":
        value = config.getoption("--pve-host")
        if value is not None:
            return Text(value, cwd), "--pve-host"
    if overrides.get(key.ini, "").strip():
        return Text(overrides[key.ini], cwd), f"-o {key.ini}"
    if key.ini in overrides:
        return None
    if env.get(key.env, "").strip():
        return Text(env[key.env], cwd), f"environment variable {key.env}"
    file = config.inipath
    origin = f"{key.ini} in {file}"
    try:
        value = config.getini(key.ini)
    except Exception as e:  # pytest.toml: TypeError up to 9.1, UsageError since
        raise SettingsError(f"{origin}: expected a string: {e}") from e
    if isinstance(value, (list, tuple)):
        value = "\n".join(str(item) for item in value)
    text = "" if value is None else str(value)
    return (Text(text, file.parent if file else config.rootpath), origin) if text.strip() else None


def _parse(key: Key, text: Text, origin: str) -> Any:
    try:
        return key.parse(text)
    except ValueError as e:
        raise SettingsError(f"{origin}: {e}") from e


def _actions(config: pytest.Config) -> dict[str, Any]:
    cwd = Path(config.invocation_params.dir)
    option = config.getoption
    run_id = option("--nested-run")
    if run_id is not None and not parsers.RUN_ID.match(run_id):
        raise SettingsError(
            "--nested-run: expected a run id of 12 hexadecimal digits, or template- and such an id; "
            f"found {run_id!r}"
        )
    paths: dict[str, Path | None] = {}
    for dest, name in (("context_file", "--context-file"), ("json_file", "--nested-json")):
        value = option(name)
        if value is not None and not value.strip():
            raise SettingsError(f"{name}: expected the path of a file; found an empty value")
        path = parsers.absolute(value, cwd) if value is not None else None
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise SettingsError(
                f"{name}: {path} cannot be written: "
                + ("it is a directory" if path.is_dir() else f"there is no directory {path.parent}")
            )
        paths[dest] = path
    _check_context(paths["context_file"])
    command = option("--nested-exec")
    if command is not None and (not command.strip() or "\0" in command):
        raise SettingsError(f"--nested-exec: expected a shell command; found {command!r}")
    return {
        "keep": option("nested_keep"),
        "skip": tuple(option("--nested-skip") or ()),
        "destroy_only": option("--nested-destroy-only"),
        "dry_run": option("--nested-dry-run"),
        "doctor": option("--nested-doctor"),
        "make_template": option("--nested-make-template"),
        "yes": option("--nested-yes"),
        "run_id": run_id,
        "exec_command": command,
        "env_file": _env_file(option("--nested-env-file"), cwd),
        **paths,
    }


def _env_file(value: str | None, cwd: Path) -> Path | None:
    if value is None:
        return None
    if not value.strip():
        raise SettingsError("--nested-env-file: expected the path of a file; found an empty value")
    from pytest_nestedpve.config import env_file

    path = parsers.absolute(value, cwd)
    reason = env_file.find_fault(path)
    if reason:
        raise SettingsError(f"--nested-env-file: {reason}")
    return path


def _check_context(path: Path | None) -> None:
    """Raises SettingsError for a context file that exists and is no JSON object."""
    if path is None:
        return
    from pytest_nestedpve.config import legacy_context

    try:
        legacy_context.load(path)
    except legacy_context.ContextError as e:
        raise SettingsError(f"--context-file: {e}") from e


def secret_destination(path: Path, settings: Settings) -> str:
    """The destination of a secret: in its source, if it is inside one, else directly below sources_dest."""
    for source in settings.sources:
        if not source.is_git and path.is_relative_to(source.location):
            return os.path.join(settings.sources_dest, source.name, path.relative_to(source.location))
    return os.path.join(settings.sources_dest, path.name)
