"""Attached PVE, without one: selection of steps, ssh configuration, the scripts that undo changes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from standin_environment import environments
from standin_host import StandinHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.attached import StepNotSelected, steps_by_name
from pytest_nestedpve.environment.phases import ATTACHED, Phase
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.pve.ssh.target import SshTarget
from pytest_nestedpve.run.directory import ssh_block
from pytest_nestedpve.setup import attached, attached_undo
from pytest_nestedpve.setup.attached_needs import awaited_results
from pytest_nestedpve.setup.attached_phases import attached_phases, permitted
from pytest_nestedpve.setup.checks.finding import Finding
from pytest_nestedpve.setup.clean_state import CleanState, NoSnapshots
from pytest_nestedpve.setup.phases import default_phases

NAMES = ("ensure_pve", "setup_network", "setup_ssh", "setup_repos")


@pytest.mark.parametrize(
    ("keyword", "selected"),
    [
        ("", set()),
        ("setup_network", {"setup_network"}),
        ("SETUP_network", {"setup_network"}),
        ("setup_network or my_test", {"setup_network"}),
        ("setup", {"setup_network", "setup_ssh", "setup_repos"}),
        ("setup and not network", {"setup_ssh", "setup_repos"}),
        ("test_setup_ssh", {"setup_ssh"}),
        ("not slow", set()),
        ("not setup_network", set()),
        ("not slow or setup_network", set()),
        ("test", set()),
        ("test_", set()),
        ("round_trip", set()),
        ("   ", set()),
    ],
)
def test_only_an_expression_that_names_a_step_selects_it(keyword: str, selected: set[str]) -> None:
    assert steps_by_name(NAMES, "test_", keyword, ["tests"]) == selected


@pytest.mark.parametrize(
    ("argument", "selected"),
    [
        ("test_steps.py::test_setup_ssh", {"setup_ssh"}),
        ("a/test_steps.py::test_setup_ssh", {"setup_ssh"}),
        ("test_setup_ssh", set()),
        ("test_setup_ssh.py", set()),
        ("test_steps.py::test_setup", set()),
        ("test_steps.py", set()),
    ],
)
def test_of_all_arguments_only_a_node_id_selects_a_step(argument: str, selected: set[str]) -> None:
    assert steps_by_name(NAMES, "test_", "", [argument]) == selected


def test_a_step_that_is_not_collected_is_not_selected() -> None:
    assert steps_by_name(["setup_ssh"], "test_", "setup", []) == {"setup_ssh"}


def test_a_projects_phase_without_a_probe_runs_only_if_selected() -> None:
    agent = Phase("our_agent", "install our agent", lambda _env: None)
    (phase,) = permitted([agent], "pve1", frozenset({"our_agent"}))
    assert phase.guard is not None
    phase.guard.check("our_agent", None, probed=False)
    (phase,) = permitted([agent], "pve1", frozenset())
    assert phase.guard is not None
    with pytest.raises(StepNotSelected, match="found: it has no probe, so its state is unknown"):
        phase.guard.check("our_agent", None, probed=False)


def test_every_phase_is_described_harmless_or_guarded_on_an_attached_pve() -> None:
    phases = permitted(attached_phases(), "pve1", frozenset({"setup_ssh"}))
    assert [phase.name for phase in phases] == [phase.name for phase in default_phases()]
    assert {phase.name for phase in phases if phase.outcome == ATTACHED} == {
        "provision",
        "start_vm",
        "wait_ip",
    }
    guarded = {phase.name: phase.guard.selected for phase in phases if phase.guard is not None}
    assert guarded == {name: name == "setup_ssh" for name in NAMES}


def test_a_project_cannot_replace_the_phases_that_describe_an_attached_pve() -> None:
    def create(_env: Any) -> None:
        raise AssertionError("the attached PVE exists")

    phases = [Phase("provision", "create it", create, probe=create, timeout=7.0)]
    (phase,) = permitted(phases, "pve1", frozenset({"provision"}))
    assert (phase.timeout, phase.probe, phase.outcome) == (7.0, None, ATTACHED)
    assert phase.do is attached_phases()[1].do


IMAGE_AWAITED = {"image": "setup_repos"}


def findings(*names: str) -> list[Finding]:
    return [Finding(name, "it", "none") for name in names]


@pytest.mark.parametrize(
    ("settings", "content", "selected", "missing", "awaited"),
    [
        ({}, "images", {"ensure_pve"}, ["PVE", "bridge"], {"PVE": "ensure_pve"}),
        ({}, "images", {"setup_network"}, ["bridge", "snippets"], {"bridge": "setup_network"}),
        ({"bridge": "vmbr0"}, "images", {"setup_network"}, ["bridge"], {"bridge": "setup_network"}),
        ({"bridge": "vmbr1"}, "images", {"setup_network"}, ["bridge"], {}),
        ({}, "images", {"setup_repos"}, ["snippets", "bridge"], {"snippets": "setup_repos"}),
        ({}, "images,import", {"setup_repos"}, ["image"], {}),
        (
            {},
            "iso",
            {"setup_repos"},
            ["storage", "image"],
            dict.fromkeys(("image", "storage"), "setup_repos"),
        ),
        ({"storage": "fast"}, "iso", {"setup_repos"}, ["storage"], {}),
        ({"image": "tank:import/debian-13.qcow2"}, "iso", {"setup_repos"}, ["image"], {}),
        ({"image": "local-lvm:vm-9-disk-0"}, "iso", {"setup_repos"}, ["image"], {}),
        ({"image": "local:iso/debian-13.img"}, "iso", {"setup_repos"}, ["image"], {}),
        ({"image": "local:import/debian-13.qcow2"}, "iso", {"setup_repos"}, ["image"], IMAGE_AWAITED),
        ({"image": "https://a.example/d.qcow2#sha256:00"}, "iso", {"setup_repos"}, ["image"], IMAGE_AWAITED),
        ({"image": "/srv/debian-13.qcow2"}, "iso", {"setup_repos"}, ["image"], IMAGE_AWAITED),
        ({}, "iso", set(), ["storage", "snippets", "image", "bridge", "PVE"], {}),
        ({}, "iso", {"ensure_pve", "setup_network", "setup_repos"}, ["version", "space", "VM id"], {}),
    ],
)
def test_what_a_selected_step_provides_is_awaited_and_nothing_else(
    settings: dict[str, str],
    content: str,
    selected: set[str],
    missing: list[str],
    awaited: dict[str, str],
) -> None:
    context: Any = SimpleNamespace(
        settings=Settings(**settings),  # type: ignore[arg-type]
        storages=[{"storage": "local", "content": content, "active": 1, "enabled": 1}],
    )
    assert awaited_results(context, frozenset(selected), findings(*missing)) == awaited
    context.storages[0]["active"] = 0
    assert "setup_repos" not in awaited_results(context, frozenset(selected), findings(*missing)).values()


@pytest.mark.parametrize(
    ("installed", "text", "state", "change"),
    [
        (True, "ipcc_send_rec[1] failed: Connection refused", "does not answer", "repaired it"),
        (False, "sh: 1: pvesh: not found", "is absent", "installed PVE"),
    ],
    ids=["broken", "plain"],
)
def test_a_broken_pve_is_not_reported_as_absent(
    host: StandinHost, tmp_path: Path, installed: bool, text: str, state: str, change: str
) -> None:
    host.login(installed=installed)
    host.fault("GET", "/version", text=text, times=99)
    with environments(host, tmp_path) as make:
        env = make(attach="pve1", host="pve1")
        env.facts["preflight"] = attached.preflight(env, frozenset({"ensure_pve"}))
        assert env.facts["preflight"]["awaited"] == {"PVE": "ensure_pve"}
        assert f"(PVE {state})" in env.facts["preflight"]["did"]
        attached_undo.before_pve(env)
        assert env.undo.pop()() == []
        assert env.remarks[-1] == f"father is not restored: ensure_pve {change}"


def plain_host(address: str) -> Any:
    """The environment of a plain Debian whose sshd accepted the login at that address."""
    answer = CommandResult("", 0, f"{address}\n".encode(), b"", 0.1)
    return SimpleNamespace(
        facts={"preflight": {"awaited": {"PVE": "ensure_pve"}}},
        outer=SimpleNamespace(name="plain", run=lambda *_, **__: answer),
    )


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "127.8.0.1", "0.0.0.0", "::1", "fe80::1%eth0", "2001:db8::7", ""]
)
def test_an_address_that_other_hosts_cannot_use_is_refused(address: str) -> None:
    with pytest.raises(PveError, match=r"expected the login at plain .* give --nested-attach") as failed:
        attached._address(plain_host(address))
    assert f"found {address!r};" in str(failed.value)


def test_the_address_of_a_plain_debian_is_the_one_of_the_ssh_login() -> None:
    assert attached._address(plain_host("192.0.2.9")) == "192.0.2.9"


def ssh_options(config: Path, name: str) -> dict[str, list[str]]:
    """The options of ssh for a host name with that configuration file, as `ssh -G` prints them."""
    printed = subprocess.run(
        ["ssh", "-G", "-F", config, name], capture_output=True, text=True, check=True
    ).stdout
    options: dict[str, list[str]] = {}
    for line in printed.splitlines():
        key, _, value = line.partition(" ")
        options.setdefault(key, []).append(value)
    return options


def test_ssh_reaches_the_attached_pve_as_the_user_does(tmp_path: Path) -> None:
    target = SshTarget(
        host="10.0.0.5", port=2222, user="root", alias="pve1",
        identity_files=(tmp_path / "my key",), identities_only=True,
        known_hosts=(tmp_path / "known",), host_key_alias="pve1.example",
        jump=SshTarget("10.0.0.1", alias="gate"),
    )  # fmt: skip
    config = tmp_path / "config"
    config.write_text("\n".join(ssh_block(target, "father", "10.0.0.5", tmp_path / "own")))
    for name in ("nested", "father"):
        options = ssh_options(config, name)
        assert options["hostname"] == ["10.0.0.5"]
        assert options["port"] == ["2222"]
        assert options["identityfile"] == [str(tmp_path / "my key")]
        assert options["hostkeyalias"] == ["pve1.example"]
        assert options["userknownhostsfile"] == [str(tmp_path / "known")]
        assert options["proxyjump"] == ["gate"]
        assert options["stricthostkeychecking"] == ["true"]


def test_a_proxy_command_is_not_expanded_twice(tmp_path: Path) -> None:
    config = tmp_path / "config"
    target = SshTarget("10.0.0.5", alias="pve1", proxy_command="nc 10.0.0.5 22 100%")
    config.write_text("\n".join(ssh_block(target, "father", "10.0.0.5", tmp_path / "own")))
    assert ssh_options(config, "nested")["proxycommand"] == ["nc 10.0.0.5 22 100%%"]


def test_a_host_name_of_the_users_ssh_configuration_is_not_replaced(tmp_path: Path) -> None:
    block = ssh_block(SshTarget("10.0.0.5", alias="father"), "father", "10.0.0.5", tmp_path)
    assert block[0] == "Host nested"


# -- the clean state -------------------------------------------------------------------------------


def test_a_clean_state_is_proved_or_refused_and_never_rolled_back(
    host: StandinHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_of_pve = {"guests": "as before"}
    monkeypatch.setattr(CleanState, "_fingerprint", lambda _self: dict(state_of_pve))
    with environments(host, tmp_path) as make:
        env = make(attach="pve1", host="pve1")
        assert env.inner is env.outer
        state = CleanState(env)
        state.record(fresh=True)
        state.restore()
        assert state.result == "proved unchanged"
        state_of_pve["guests"] = "others"
        with pytest.raises(
            NoSnapshots, match=r"the attached PVE was changed \(guests\), and an attached PVE"
        ):
            state.restore()
    assert not [call for call in host.calls() if not call.startswith("GET")]


# -- undoing: the scripts of the package, on local files ------------------------------------------------


def run(script: str, *words: str) -> int:
    return subprocess.run(["sh", "-c", script, "sh", *words], check=False).returncode


def test_a_line_is_removed_from_the_target_of_a_link_and_the_link_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "priv" / "authorized_keys"
    target.parent.mkdir()
    target.write_text(
        "ssh-ed25519 AAAAmine alice\nssh-ed25519 AAAAthe+run/key nested-pve run\nssh-rsa AAAAb bob\n"
    )
    link = tmp_path / "authorized_keys"
    link.symlink_to(target)
    assert run(attached_undo._REMOVE_LINES, "AAAAthe+run/key", "yes", str(link)) == 0
    assert link.is_symlink()
    assert target.read_text() == "ssh-ed25519 AAAAmine alice\nssh-rsa AAAAb bob\n"
    assert [path.name for path in target.parent.iterdir()] == ["authorized_keys"]


@pytest.mark.parametrize(("existed", "kept"), [("yes", True), ("no", False)])
def test_an_emptied_file_is_removed_if_it_did_not_exist_before(
    tmp_path: Path, existed: str, kept: bool
) -> None:
    file = tmp_path / "known_hosts"
    file.write_text("leaf ssh-ed25519 AAAA\n")
    assert run(attached_undo._REMOVE_LINES, "^leaf ", existed, str(file)) == 0
    assert file.exists() == kept


def test_a_file_that_existed_is_restored_and_a_new_one_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("as before")
    old.chmod(0o640)
    files = [str(old), str(new)]
    assert run(attached_undo._SAVE, ".npve-x", *files) == 0
    old.write_text("ours")
    new.write_text("ours")
    assert run(attached_undo._RESTORE, ".npve-x", *files) == 0
    assert old.read_text() == "as before"
    assert old.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
