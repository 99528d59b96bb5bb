"""The hosts file of a node after the identity role, run by Ansible itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TASKS = Path(__file__).parents[2] / "playbooks/roles/nested_pve_identity/tasks/hosts.yml"
BEFORE_AND_AFTER = {
    # comments are ignored, in lines of other hosts and in the line of the address
    "without": (
        "127.0.0.1 localhost nested # not nested\n::1 nested localhost\n"
        "10.9.9.9 nas  # used by nested\n10.0.0.5 other # not nested\n",
        "10.0.0.5 nested\n127.0.0.1 localhost # not nested\n::1 localhost\n"
        "10.9.9.9 nas  # used by nested\n10.0.0.5 other # not nested\n",
    ),
    "elsewhere": (
        "127.0.0.1 nested\n::1 nested# here\n"
        "127.0.1.1\tnested.example.org nested build # here\n10.0.0.50 nested2 my-nested nested.org\n",
        "10.0.0.5 nested\n10.0.0.5 nested# here\n"
        "10.0.0.5\tnested.example.org nested build # here\n10.0.0.50 nested2 my-nested nested.org\n",
    ),
    "right": ("127.0.0.1 localhost\n10.0.0.5 a nested#b\n", "127.0.0.1 localhost\n10.0.0.5 a nested#b\n"),
}


@pytest.mark.thorough
def test_the_name_is_listed_with_its_address_only_and_other_lines_are_kept(tmp_path: Path) -> None:
    text = (
        TASKS.read_text().replace(" /etc/hosts", ' "{{ hosts_file }}"').replace("/etc/cloud", str(tmp_path))
    )
    (tmp_path / "hosts.yml").write_text(text)
    variables = {"nested_pve_identity_name": "nested", "nested_pve_identity_address": "10.0.0.5"}
    play = {
        "hosts": "all", "connection": "local", "gather_facts": False, "vars": variables,
        "tasks": [{"import_tasks": "hosts.yml"}],
    }  # fmt: skip
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    files = {name: tmp_path / f"{name}.txt" for name in BEFORE_AND_AFTER}
    hosts = {name: {"hosts_file": str(path)} for name, path in files.items()}
    (tmp_path / "inventory.yml").write_text(json.dumps({"all": {"hosts": hosts}}))
    for name, path in files.items():
        path.write_text(BEFORE_AND_AFTER[name][0])
    recap = [_play(tmp_path).rpartition("PLAY RECAP")[2] for _ in range(2)]
    assert {name: path.read_text() for name, path in files.items()} == {
        name: after for name, (_, after) in BEFORE_AND_AFTER.items()
    }
    assert recap[0].count("changed=0") == 1, "the file that was correct"
    assert recap[1].count("changed=0") == len(files)


def _play(directory: Path) -> str:
    ansible = Path(sys.executable).with_name("ansible-playbook")
    done = subprocess.run(
        [str(ansible), "-i", "inventory.yml", "play.yml"], check=False, capture_output=True, text=True,
        cwd=directory,
        env={
            "PATH": os.environ["PATH"], "HOME": str(directory), "LC_ALL": "C.UTF-8", "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
