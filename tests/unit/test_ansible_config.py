"""A project's ansible.cfg and its directories apply, except options that would change the run's SSH."""

from __future__ import annotations

import os
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from standin_environment import Make, environments
from standin_host import StandinHost

from pytest_nestedpve.config.parsers import Text, variables
from pytest_nestedpve.setup.ansible import playbooks
from pytest_nestedpve.setup.ansible.ansible_cfg import AnsibleConfig, UnusableConfig, find, read
from pytest_nestedpve.setup.ansible.runner import (
    AnsibleArgs,
    Inventory,
    InventoryHost,
    nested_inventory,
    run_playbook,
)

LOCAL = Inventory(
    (InventoryHost("here", {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}),),
    {"proxmox": ("here",)},
)


@pytest.fixture
def environment(tmp_path: Path, host: StandinHost) -> Iterator[Make]:
    with environments(host, tmp_path) as make:
        yield make


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text).lstrip(), encoding="utf-8")
    return path


def config(directory: Path, text: str) -> AnsibleConfig:
    return read(write(directory / "ansible.cfg", text))


def play(directory: Path, tasks: str, head: str = "") -> Path:
    top = f"- name: A play\n  hosts: proxmox\n  gather_facts: false\n{textwrap.indent(head, '  ')}"
    return write(directory / "play.yml", top + "  tasks:\n" + textwrap.indent(textwrap.dedent(tasks), "    "))


def stats(directory: Path, playbook: Path, config: AnsibleConfig | None, **options: Any) -> Any:
    """The data that the playbook passed to set_stats."""
    run_dir = directory / "run"
    run_dir.mkdir(exist_ok=True)
    values = options.pop("variables", None)
    args = AnsibleArgs(run_dir, config=config, **options)
    return run_playbook(args, playbook, inventory=LOCAL, variables=values, timeout=60).stats


# -- which file ---------------------------------------------------------------------------------------------


def test_the_file_of_the_rootdir_is_used_and_the_one_of_ansible_config_comes_first(tmp_path: Path) -> None:
    assert find(tmp_path, {}) is None
    write(tmp_path / "ansible.cfg", "[defaults]\n")
    named = write(tmp_path / "etc" / "other.cfg", "[defaults]\n")
    configs = [find(tmp_path, {}), find(tmp_path, {"ANSIBLE_CONFIG": str(named)})]
    assert [config and config.path.name for config in configs] == ["ansible.cfg", "other.cfg"]
    write(tmp_path / "etc" / "ansible.cfg", "[defaults]\n")
    directory = find(tmp_path, {"ANSIBLE_CONFIG": str(tmp_path / "etc")})
    assert directory is not None
    assert directory.path == tmp_path / "etc" / "ansible.cfg"


def test_a_missing_or_unreadable_configured_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnusableConfig, match="ANSIBLE_CONFIG names"):
        find(tmp_path, {"ANSIBLE_CONFIG": str(tmp_path / "none.cfg")})
    write(tmp_path / "ansible.cfg", "forks = 5\n")
    with pytest.raises(UnusableConfig, match="cannot be read"):
        find(tmp_path, {})


def test_a_file_in_a_world_writable_directory_is_ignored(tmp_path: Path) -> None:
    write(tmp_path / "ansible.cfg", "[defaults]\n")
    tmp_path.chmod(0o777)
    assert find(tmp_path, {}) is None


def test_the_remark_has_each_option_that_does_not_apply_once_with_its_reason(tmp_path: Path) -> None:
    checking = "host_key_" + "checking"
    project = config(
        tmp_path,
        f"""
        [defaults]
        {checking} = no
        forks = 7
        private_key_file = ~/.ssh/id_rsa
        [ssh_connection]
        {checking} = off
        ssh_args = -o ControlMaster=no
        """,
    )
    assert project.remark() == (
        f"options of {tmp_path}/ansible.cfg that do not apply: {checking} (host keys are always checked); "
        "ssh_args (the connection to the nested PVE is the run's own); "
        "private_key_file (only the run's key is offered)"
    )
    assert config(tmp_path, f"[defaults]\n{checking} = yes\nforks = 7\n").remark() is None


# -- options that apply --------------------------------------------------------------------------------------


def test_options_roles_collections_callbacks_and_the_vault_of_a_project_apply(tmp_path: Path) -> None:
    project = config(
        tmp_path,
        """
        [defaults]
        forks = 7
        timeout = 33
        roles_path = own/roles:~/nowhere
        collections_path = own/collections
        callback_plugins = own/callbacks
        callbacks_enabled = reports
        vault_password_file = own/password
        [privilege_escalation]
        become_method = su
        """,
    )
    write(tmp_path / "own/password", "open sesame\n")
    vaulted = tmp_path / "group_vars/proxmox.yml"
    write(vaulted, "hidden: treasure\n")
    vault = [sys.executable, "-m", "ansible.cli.vault", "encrypt", str(vaulted)]
    clean = {**os.environ, "ANSIBLE_VAULT_PASSWORD_FILE": str(tmp_path / "own/password")}
    assert os.spawnve(os.P_WAIT, vault[0], vault, clean) == 0
    role = "- name: Report the role\n  ansible.builtin.set_stats: {data: {role: here}}\n"
    write(tmp_path / "own/roles/mine/tasks/main.yml", role)
    in_collection = role.replace("role: here", "collected: here")
    write(tmp_path / "own/collections/ansible_collections/acme/pve/roles/two/tasks/main.yml", in_collection)
    write(
        tmp_path / "own/callbacks/reports.py",
        f"""
        from ansible.plugins.callback import CallbackBase

        class CallbackModule(CallbackBase):
            CALLBACK_VERSION = 2.0
            CALLBACK_NAME = "reports"
            CALLBACK_NEEDS_ENABLED = True

            def v2_playbook_on_stats(self, stats):
                with open({str(tmp_path / "report")!r}, "w") as out:
                    out.write("called")
        """,
    )
    playbook = play(
        tmp_path,
        """
        - name: Report options
          ansible.builtin.set_stats:
            data:
              settings: >-
                {{ lookup('ansible.builtin.config', 'DEFAULT_FORKS') }}
                {{ lookup('ansible.builtin.config', 'DEFAULT_TIMEOUT') }}
                {{ lookup('ansible.builtin.config', 'DEFAULT_BECOME_METHOD') }}
              hidden: "{{ hidden }}"
        """,
        "roles: [mine, acme.pve.two]\n",
    )
    assert stats(tmp_path, playbook, project) == {
        "settings": "7 33 su",
        "hidden": "treasure",
        "role": "here",
        "collected": "here",
    }
    assert (tmp_path / "report").read_text() == "called"


def test_directories_of_the_settings_come_before_those_of_the_file(tmp_path: Path) -> None:
    project = config(tmp_path, "[defaults]\nroles_path = theirs\ncollections_path = theirs\n")
    text = "- name: Report\n  ansible.builtin.set_stats: {data: {WHAT: WHERE}}\n"
    for place in ("theirs", "ours"):
        role = text.replace("WHAT", "role").replace("WHERE", place)
        write(tmp_path / place / "mine/tasks/main.yml", role)
        collected = text.replace("WHAT", "collected").replace("WHERE", place)
        write(tmp_path / place / "ansible_collections/acme/pve/roles/two/tasks/main.yml", collected)
    only = text.replace("WHAT", "only").replace("WHERE", "theirs")
    write(tmp_path / "theirs/only/tasks/main.yml", only)
    playbook = write(
        tmp_path / "play.yml",
        "- name: A play\n  hosts: all\n  gather_facts: false\n  roles: [mine, acme.pve.two, only]\n",
    )
    ours = (tmp_path / "ours",)
    roles = stats(tmp_path, playbook, project, roles_path=ours, collections_path=ours)
    assert roles == {"role": "ours", "collected": "ours", "only": "theirs"}


# -- options that do not ------------------------------------------------------------------------------------

OPTIONS = """
- name: Read the options of ssh
  vars: {kind: connection}
  ansible.builtin.set_stats:
    data:
      options:
        - "{{ lookup('ansible.builtin.config', 'host_key_checking', plugin_type=kind, plugin_name='ssh') }}"
        - "{{ lookup('ansible.builtin.config', 'ssh_args', plugin_type=kind, plugin_name='ssh') }}"
        - "{{ lookup('ansible.builtin.config', 'control_path_dir', plugin_type=kind, plugin_name='ssh') }}"
        - "{{ lookup('ansible.builtin.config', 'private_key_file', plugin_type=kind, plugin_name='ssh') }}"
        - "{{ lookup('ansible.builtin.config', 'DEFAULT_TRANSPORT') }}"
        - "{{ lookup('ansible.builtin.config', 'DEFAULT_LOG_PATH') }}"
"""


def test_no_option_of_the_file_changes_the_runs_ssh(tmp_path: Path) -> None:
    checking, strict = "host_key_" + "checking", "StrictHostKey" + "Checking"
    project = config(
        tmp_path,
        f"""
        [defaults]
        {checking} = False
        transport = paramiko
        private_key_file = /etc/theirs
        log_path = everything.log
        ask_pass = True
        [inventory]
        enable_plugins = ini
        [ssh_connection]
        {checking} = False
        ssh_args = -o {strict}=no
        ssh_common_args = -o {strict}=no
        control_path_dir = /theirs
        """,
    )
    checked, arguments, control, key, transport, log = stats(tmp_path, play(tmp_path, OPTIONS), project)[
        "options"
    ]
    assert checked is True
    assert f"{strict}=yes" in arguments
    assert f"{strict}=no" not in arguments
    assert "theirs" not in f"{control} {key}"
    assert transport == "ssh"
    assert "everything" not in log
    assert not (tmp_path / "everything.log").exists()


def test_no_variable_changes_the_runs_ssh(tmp_path: Path) -> None:
    """The test's ssh writes its arguments to a file."""
    strict = "StrictHostKey" + "Checking"
    ssh = write(tmp_path / "ssh", f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexit 255\n')
    ssh.chmod(0o755)
    write(
        tmp_path / "group_vars/all.yml",
        f"""
        ansible_ssh_executable: {ssh}
        ansible_ssh_args: -o {strict}=no
        ansible_ssh_common_args: -o {strict}=no
        ansible_ssh_extra_args: -o {strict}=no
        ansible_host_key_checking: false
        ansible_ssh_host_key_checking: false
        ansible_ssh_retries: 0
        """,
    )
    playbook = play(tmp_path, "- name: Ping\n  ansible.builtin.ping:\n")
    (tmp_path / "run").mkdir()
    inventory = nested_inventory("n1", address="192.0.2.1", groups=("proxmox",))
    extra = {"ansible_ssh_common_args": f"-o {strict}=no"}
    run_playbook(
        AnsibleArgs(tmp_path / "run"), playbook, inventory=inventory, variables=extra, timeout=60, check=False
    )
    called = (tmp_path / "called").read_text()
    assert f"{strict}=yes" in called
    assert f"{strict}=no" not in called
    assert " n1 " in called


# -- variables and groups -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        'count=3\nratio=1.5\nready=true\nnothing=null\nnames=["a", "b"]\n'
        'map={"x": {"y": 1}}\nword=plain words\nversion="3"',
        '{"count": 3, "ratio": 1.5, "ready": true, "nothing": null, "names": ["a", "b"], '
        '"map": {"x": {"y": 1}}, "word": "plain words", "version": "3"}',
    ],
)
def test_extra_variables_arrive_with_their_types(tmp_path: Path, text: str) -> None:
    names = ("count", "ratio", "ready", "nothing", "names", "map", "word", "version")
    kinds = "\n".join(f'      {name}: "{{{{ {name} | type_debug }}}}"' for name in names)
    playbook = play(tmp_path, f"- name: Report\n  ansible.builtin.set_stats:\n    data:\n{kinds}\n")
    types = stats(tmp_path, playbook, None, variables=variables(Text(text, tmp_path)))
    assert {name: kind.removeprefix("_Ansible") for name, kind in types.items()} == {
        "count": "int", "ratio": "float", "ready": "bool", "nothing": "NoneType", "names": "list",
        "map": "dict", "word": "str", "version": "str",
    }  # fmt: skip


def test_a_node_is_in_the_configured_groups_with_its_variables() -> None:
    data = nested_inventory(
        "n1", address="192.0.2.1", groups=("proxmox", "ceph"), extra={"nested_pve_vmid": 7}
    )
    everything = data.to_data()["all"]
    assert everything["hosts"]["n1"] == {
        "ansible_host": "n1", "ansible_user": "root", "pve_hostname": "n1", "nested_pve_ip": "192.0.2.1",
        "nested_pve_vmid": 7,
    }  # fmt: skip
    assert everything["children"] == {"proxmox": {"hosts": {"n1": {}}}, "ceph": {"hosts": {"n1": {}}}}


def test_options_that_do_not_apply_are_remarked_once_in_a_session(
    tmp_path: Path, environment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANSIBLE_CONFIG", raising=False)
    write(tmp_path / "ansible.cfg", "[ssh_connection]\nssh_args = -C\n")
    env = environment()
    for _ in range(2):
        playbooks.remark_overridden(env, {"ansible_ssh_extra_args": "-v", "other": 1})
    assert env.remarks == [
        f"options of {tmp_path}/ansible.cfg that do not apply: "
        "ssh_args (the connection to the nested PVE is the run's own)",
        "variables that do not apply: ansible_ssh_extra_args",
    ]


def test_the_page_lists_the_variables_of_a_playbook(environment: Make) -> None:
    env = environment(host="father")
    env.facts = {"provision": {"vmid": 7}, "leaf_wait_ip": {"ip": "192.0.2.2"}}
    (host,) = nested_inventory("n1", address="192.0.2.1", extra=playbooks.node_variables(env)).hosts
    page = Path(__file__).parents[2] / "docs" / "own-playbooks-and-phases.md"
    table = page.read_text().partition("with these variables:")[2].partition("\n\nExtra")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(host.variables)
