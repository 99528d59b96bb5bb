"""Settings: precedence of their sources, invalid values, and the source of a value in errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_nestedpve.config import conflicts, keys, parsers
from pytest_nestedpve.config.settings import PROFILE_KEYS, Settings, SettingsError, load
from pytest_nestedpve.run import rerun_commands


def read_settings(
    pytester: pytest.Pytester, *args: str, ini: str = "", env: dict[str, str] | None = None
) -> Settings:
    pytester.makeini("[pytest]\n" + ini)
    config = pytester.parseconfig(*args)
    settings = load(config, env or {})
    conflicts.check(settings, config)
    return settings


def test_without_configuration_the_documented_defaults_are_used(pytester: pytest.Pytester) -> None:
    settings = read_settings(pytester)
    assert settings.host is None
    assert (settings.cores, settings.memory, settings.disk) == (2, 8192, 64)
    assert settings.name_patterns == ("nested-pve*",)
    assert settings.vmid_ranges == ((99900, 99999),)
    assert settings.run_dir == pytester.path / ".nested-pve" / "runs"
    assert settings.lease == 1800


def test_precedence_is_command_line_environment_ini_profile(pytester: pytest.Pytester) -> None:
    ini = "nested_pve_storage = from-ini\nnested_pve_bridge = vmbr7\nnested_pve_cores = 3\n"
    env = {"NESTED_PVE_STORAGE": "from-env", "NESTED_PVE_CORES": "4"}
    settings = read_settings(pytester, "-o", "nested_pve_storage=from-line", ini=ini, env=env)
    settings = settings.with_profile(
        {"bridge": "vmbr9", "image": "local:import/x.raw", "storage": "from-host"}
    )
    assert settings.storage == "from-line"
    assert settings.cores == 4
    assert settings.bridge == "vmbr7"
    assert settings.image == "local:import/x.raw"
    assert settings.origin("storage") == "-o nested_pve_storage"
    assert settings.origin("cores") == "environment variable NESTED_PVE_CORES"
    assert settings.origin("bridge").startswith("nested_pve_bridge in ")
    assert settings.origin("image") == "/etc/nested-pve.ini"


def test_pve_host_on_the_command_line_has_precedence_over_the_environment(pytester: pytest.Pytester) -> None:
    settings = read_settings(
        pytester, "--pve-host", "father", ini="nested_pve_host = lab", env={"NESTED_PVE_HOST": "x"}
    )
    assert settings.host == "father"
    assert settings.origin("host") == "--pve-host"


@pytest.mark.parametrize(
    ("names", "other"),
    [("a/token b/token", "a/token"), ("a/site", "the source site"), ("a/.nested-pve", "the record")],
)
def test_two_files_with_the_same_destination_on_the_nested_pve_are_refused(
    pytester: pytest.Pytester, names: str, other: str
) -> None:
    for name in ("a/token", "b/token", "a/site", "a/.nested-pve", "project/token"):
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    ini = "nested_pve_sources = site=project\nnested_pve_secrets = "
    # the same file twice, and a file inside a source
    assert read_settings(pytester, ini=f"{ini}a/token a/token project/token").secrets
    with pytest.raises(SettingsError, match=f"nested_pve_secrets in .*{other}.*, both for /opt/sources/"):
        read_settings(pytester, ini=ini + names)


def test_an_empty_value_is_ignored(pytester: pytest.Pytester) -> None:
    settings = read_settings(pytester, ini="nested_pve_host = father", env={"NESTED_PVE_HOST": ""})
    assert settings.host == "father"
    assert read_settings(pytester, "-o", "nested_pve_host=", ini="nested_pve_host = father").host is None


def test_a_profile_with_any_other_key_is_refused(pytester: pytest.Pytester) -> None:
    settings = read_settings(pytester)
    for key in {key.name for key in keys.KEYS} - PROFILE_KEYS:
        with pytest.raises(SettingsError, match=key):
            settings.with_profile({key: "x"})


def test_the_profile_does_not_add_an_image_to_a_configured_template(pytester: pytest.Pytester) -> None:
    settings = read_settings(pytester, ini="nested_pve_template = 9000")
    assert settings.with_profile({"image": "local:import/x.raw"}).image is None


def test_the_error_for_an_invalid_profile_value_names_the_profile(pytester: pytest.Pytester) -> None:
    with pytest.raises(SettingsError, match=r"mirror in /etc/nested-pve\.ini: expected an address"):
        read_settings(pytester).with_profile({"mirror": "ftp://x"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name_pattern", "*", "three literal characters"),
        ("name_pattern", "ne*", "three literal characters"),
        ("name_pattern", "nested pve!*;", "found"),
        ("name_pattern", "nested-pve", "does not match the names"),
        ("name_pattern", "nested-pve-??", "does not match the names"),
        ("vmid_range", "99999-99900", "ends before it begins"),
        ("vmid_range", "1-50", "begin at 100"),
        ("vmid_range", "90000-99999", "holds 10000 ids"),
        ("vmid_range", "1000-1600,3000-3600", "holds 1202 ids"),
        ("vmid_range", "abc", "expected VM ids"),
        ("vmid_range", "100-200-300", "expected VM ids"),
        ("host", "-oProxyCommand=x", "expected a destination of ssh"),
        ("host", "a b", "expected a destination of ssh"),
        ("host", "lab:../x", "expected 'lab' or 'lab:NAME'"),
        ("cores", "0", "from 1 to 512"),
        ("cores", "two", "from 1 to 512"),
        ("memory", "8X", "amount of memory"),
        ("disk", "64M", "size in GiB"),
        ("ipconfig", "ip=10.0.0.5", "ip=dhcp"),
        ("ipconfig", "ip=10.0.0.300/24", "ip=dhcp"),
        ("ipconfig", "ip=10.0.0.5/24,gw=10.0.1.1", "gateway in the network"),
        ("ipconfig", "address=1", "ip=dhcp"),
        ("vm_options", "kvm", "key=value"),
        ("vm_options", "kvm=0 kvm=1", "set twice"),
        ("vm_options", "description=ours", "to identify its own VMs"),
        ("vm_options", "kvm=0 protection=1", "would be left over"),
        ("leaf_options", "name=ci-box", "to identify its own VMs"),
        ("leaf_options", "delete=net0", "no part of a VM's configuration"),
        ("vm_options", 'args="-cpu', "do not close"),
        ("extra_vars", "{", "JSON object"),
        ("extra_vars", "a-b=1", "variable name"),
        ("sources", "nameonly", "name=path"),
        ("sources", "a=/does/not/exist", "no directory"),
        ("secrets", "missing.txt", "can be read"),
        ("playbook_dir", "missing", "directory that exists"),
        ("run_dir", "/etc/passwd/runs", "/etc/passwd is none"),
        ("run_dir", "/tmp/" + "a" * 300, "File name too long"),
        ("run_dir", "~nobody-of-that-name/runs", "a directory, or one that can be created"),
        ("roles_path", "missing", "directory that exists"),
        ("bootstrap", "nowhere:make", "name of a source"),
        ("token_path", "nowhere:x.yaml:a.b", "name of a source"),
        ("token_path", "x", "name:file.yaml:path"),
        ("token_path", "x:a.yaml:b..c", "keys joined by dots"),
        ("token_path", "x:../../etc/a.yaml:b", "below the source's directory"),
        ("token_path", "x:/etc/a.yaml:b", "below the source's directory"),
        ("bootstrap", "x", "a colon and a command"),
        ("bootstrap", "x: ", "a colon and a command"),
        ("mirror", "debian", "http://"),
        ("pve_repository_key_sha256", "abc", "64 hexadecimal"),
        ("force_stop", "maybe", "true or false"),
        ("timeout_scale", "0", "from 0.01"),
        ("timeout_scale", "nan", "from 0.01"),
        ("lease", "-1", "above 0"),
        ("lease", "9" * 400, "a time above 0"),
        ("lease", "9.9", "at least 10 s"),
        ("lease", "25h", "at most 24h"),
        ("storage", "../etc", "id of a storage"),
        ("bridge", "vmbr0;id", "name of a bridge"),
        ("pool_parent", "a b", "id of a pool"),
        ("pool_parent", "a/b/c", "at most two deep"),
        ("host", "lab:Upper", "lower-case"),
        ("host", "lab:under_score", "lower-case"),
    ],
)
@pytest.mark.parametrize("source", ["ini", "environment", "command line"])
def test_an_invalid_value_is_refused_with_its_source_in_the_error(
    pytester: pytest.Pytester, key: str, value: str, message: str, source: str
) -> None:
    ini, env, args, origin = "", {}, [], ""
    if source == "ini":
        ini, origin = f"nested_pve_{key} = {value}\n", f"nested_pve_{key} in {pytester.path}/tox.ini"
    elif source == "environment":
        env, origin = {f"NESTED_PVE_{key.upper()}": value}, f"environment variable NESTED_PVE_{key.upper()}"
    else:
        args, origin = ["-o", f"nested_pve_{key}={value}"], f"-o nested_pve_{key}"
    with pytest.raises(SettingsError) as caught:
        read_settings(pytester, *args, ini=ini, env=env)
    assert str(caught.value).startswith(origin + ": ")
    assert message in str(caught.value)


def test_any_is_a_valid_range(pytester: pytest.Pytester) -> None:
    settings = read_settings(pytester, ini="nested_pve_vmid_range = any")
    assert settings.any_id
    assert not read_settings(pytester).any_id


def test_patterns_and_ranges_can_be_lists(pytester: pytest.Pytester) -> None:
    settings = read_settings(
        pytester,
        ini="nested_pve_name_pattern = nested-pve*,child-pve*\nnested_pve_vmid_range = 99800-99999, 500",
    )
    assert settings.name_patterns == ("nested-pve*", "child-pve*")
    assert settings.vmid_ranges == ((99800, 99999), (500, 500))
    assert settings.name_prefix == "nested-pve"


def test_sources_are_paths_or_git_addresses(pytester: pytest.Pytester) -> None:
    pytester.mkdir("site")
    settings = read_settings(
        pytester,
        ini="nested_pve_sources =\n    site=site\n    a=https://git.example/x/y.git@feature/z\n"
        "    b=git@git.example:x/y.git@v1\n    c=ssh://git@git.example/x.git\n",
    )
    assert settings.sources == (
        parsers.Source("site", str(pytester.path / "site")),
        parsers.Source("a", "https://git.example/x/y.git", "feature/z"),
        parsers.Source("b", "git@git.example:x/y.git", "v1"),
        parsers.Source("c", "ssh://git@git.example/x.git"),
    )
    assert [source.is_git for source in settings.sources] == [False, True, True, True]


def test_relative_paths_start_from_the_ini_file_or_the_working_directory(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pytester.mkdir("sub") / "secret").write_text("x")
    (pytester.path / "secret").write_text("x")
    assert read_settings(pytester, ini="nested_pve_secrets = secret").secrets == (pytester.path / "secret",)
    monkeypatch.chdir(pytester.path / "sub")
    config = pytester.parseconfig("-o", "nested_pve_secrets=secret", "-c", "../tox.ini")
    assert load(config, {}).secrets == (Path(config.invocation_params.dir) / "secret",)


def test_variables_keep_their_types(pytester: pytest.Pytester) -> None:
    settings = read_settings(
        pytester, ini="nested_pve_extra_vars =\n    a=true\n    b=1\n    c=text\n    d=[1, 2]\n"
    )
    assert settings.extra_vars == {"a": True, "b": 1, "c": "text", "d": [1, 2]}
    settings = read_settings(pytester, env={"NESTED_PVE_EXTRA_VARS": '{"a": {"b": null}}'})
    assert settings.extra_vars == {"a": {"b": None}}


def test_a_password_in_an_address_is_not_in_the_error(pytester: pytest.Pytester) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(pytester, env={"NESTED_PVE_HTTP_PROXY": "socks://alice:hunter2@proxy"})
    assert "hunter2" not in str(caught.value)


def test_an_advised_command_has_the_options_of_the_session_and_no_secret(pytester: pytest.Pytester) -> None:
    typed = {
        "vmid_range": "200-210",
        "http_proxy": "http://alice:hunter2@proxy:3128",
        "mirror": "https://hunter2@mirror/debian",
        "sources": "mine=https://alice:hunter2@git.example/mine@main",
        "extra_vars": "key=hunter2",
        "vm_options": "kvm=0,cipassword=hunter2",
    }
    args = [word for name, value in typed.items() for word in ("-o", f"nested_pve_{name}={value}")]
    settings = read_settings(pytester, "--pve-host", "father", "-o", "log_level=INFO", *args)
    command = rerun_commands.command_to_repeat(settings)
    assert "hunter2" not in command
    # A clean-up reads only some of the settings, none with a masked value.
    clean = "pytest --pve-host father -o nested_pve_vmid_range=200-210"
    assert rerun_commands.command_to_destroy(settings, None) == f"{clean} --nested-destroy-only"
    assert (
        rerun_commands.command_to_destroy(settings, "ab12")
        == f"{clean} --nested-destroy-only --nested-run ab12"
    )
    assert command.startswith("pytest --pve-host father -o nested_pve_vmid_range=200-210 -o ")
    for name in typed:
        assert f"nested_pve_{name}=" in command
    assert "kvm=0" in command
    assert "log_level" not in command


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nested-run", "abc", "--nested-destroy-only"], "12 hexadecimal"),
        (["--nested-run", "0123456789ab"], "is valid only with --nested-destroy-only"),
        (["--nested-yes"], "is valid only with --nested-destroy-only"),
        (["--nested-json", "x.json"], "is valid only with"),
        (["--nested-json", "no/such/x.json", "--nested-dry-run"], "there is no directory"),
        (["--context-file", "no/such/x.json"], "there is no directory"),
        (["--nested-destroy-only", "--nested-dry-run", "--nested-yes"], "contradict"),
        (["--nested-destroy-only", "--collect-only"], "contradict"),
        (["--nested-destroy-only", "-k", "x"], "-k selects nothing"),
    ],
)
def test_contradicting_options_are_refused(pytester: pytest.Pytester, args: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(pytester, *args)


def test_an_image_and_a_template_contradict_each_other(pytester: pytest.Pytester) -> None:
    with pytest.raises(SettingsError, match="both set"):
        read_settings(pytester, ini="nested_pve_image = local:import/x.raw\nnested_pve_template = 9000")


def test_every_key_is_a_field_and_has_a_help_text() -> None:
    for key in keys.KEYS:
        assert hasattr(Settings(), key.target), key
        assert len(key.help) > 15


def test_a_hosts_profile_may_set_these_keys_and_no_others() -> None:
    """None of them decides which programs this machine runs, or what it sends."""
    assert {
        "bridge",
        "http_proxy",
        "image",
        "ipconfig",
        "mirror",
        "pool_parent",
        "pve_repository_key_sha256",
        "pve_repository_key_url",
        "pve_repository_url",
        "storage",
        "template",
    } == PROFILE_KEYS
