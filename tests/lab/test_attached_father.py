"""Attaching to a lab's father as the nested PVE: only selected steps change it, and changes are undone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.on_lab import HandLab, Project

LOW = 97000
REDO = ("-o", "nested_pve_redo=true")
USERS = """
import json, subprocess, urllib.request, ssl
import pytest
from pytest_nestedpve.environment.attached import NotOurs

def test_uses_it(nested_pve):
    assert nested_pve.ssh("uname -n").stdout.strip() == nested_pve.name == nested_pve.node == "father"
    inside = nested_pve.leaf.run("uname -n").stdout.strip()
    for short, name in (("nested", "father"), ("father", "father"), ("leaf", inside)):
        command = ["ssh", "-F", nested_pve.ssh_config, "-o", "BatchMode=yes", short, "uname -n"]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == name
    context = ssl.create_default_context(cafile=nested_pve.ca_file)
    request = urllib.request.Request(nested_pve.api_url + "/api2/json/version")
    request.add_header("Authorization", "PVEAPIToken=" + nested_pve.api_token)
    with urllib.request.urlopen(request, context=context) as answer:
        assert json.load(answer)["data"]["version"]
    assert nested_pve.environ()["NESTED_SSH_PORT"]
    assert nested_pve.run_playbook("name.yml").ok
    for what in ("vmid", "host", "root_password"):
        with pytest.raises(NotOurs):
            getattr(nested_pve, what)
"""
PLAYBOOK = """
- hosts: all
  gather_facts: false
  tasks:
    - ansible.builtin.command: uname -n
      register: answer
    - ansible.builtin.assert:
        that: answer.stdout == pve_hostname
"""
# Everything that a set-up phase changes, and all directories of a run's files.
STATE = r"""
qm list; pvesh get /pools --output-format json; pvesh get /access/acl --output-format json
pveum user token list root@pam --output-format json; pvesh get /storage/local --output-format json
find /root /opt /srv /etc/pve/priv /etc/network /etc/cloud /var/lib/vz -not -path '*/.cache*' | sort
cd /root; cat /etc/hosts /etc/network/interfaces .ssh/* /etc/pve/local/pve-ssl.pem | sha256sum
ip -4 -br addr show vmbr0
"""
# A custom certificate, as of a public authority: it names neither 127.0.0.1 nor the node.
CUSTOM_CERTIFICATE = """
openssl req -x509 -newkey rsa:2048 -nodes -days 5 -subj /CN=pve.example.org \
  -addext subjectAltName=DNS:pve.example.org \
  -keyout /etc/pve/local/pveproxy-ssl.key -out /etc/pve/local/pveproxy-ssl.pem && systemctl restart pveproxy
"""
DEFAULT_CERTIFICATE = "rm -f /etc/pve/local/pveproxy-ssl.*; systemctl restart pveproxy"


@dataclass(frozen=True)
class Session:
    """Exit status and output of a session, and father's state before and after it."""

    ret: int
    output: str
    before: str
    after: str

    @property
    def run(self) -> str:
        (run_id,) = re.findall(r"^run ([0-9a-f]{12}):", self.output, re.MULTILINE)
        return str(run_id)


@dataclass(frozen=True)
class AttachingProject:
    """A project whose sessions attach to the father of a lab."""

    path: Path
    lab: HandLab

    def run(self, *args: str) -> Session:
        before = self.lab.run(STATE)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        attach = ["--nested-attach", f"lab:{self.lab.name}", "-o", f"nested_pve_vmid_range={LOW}-{LOW + 9}"]
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-v",
                "-p",
                "no:randomly",
                "-p",
                "no:cacheprovider",
                *attach,
                *args,
            ],
            cwd=self.path,
            env={**clean, "XDG_STATE_HOME": str(self.path / "state"), "COLUMNS": "160"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        return Session(done.returncode, done.stdout + done.stderr, before, self.lab.run(STATE))


@pytest.fixture(scope="module")
def attaching(hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory) -> AttachingProject:
    path = tmp_path_factory.mktemp("project")
    (path / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
    (path / "test_users.py").write_text(USERS)
    (path / "name.yml").write_text(PLAYBOOK)
    (path / "mine").mkdir()
    (path / "mine" / "file").write_text("of the project\n")
    (path / "secret").write_text("a secret\n")
    (path / "pytest.ini").write_text(
        "[pytest]\nnested_pve_host = unused.invalid\nnested_pve_sources = mine=mine\n"
        "nested_pve_secrets = secret\n"
    )
    hand_lab.run(f"qm create {LOW + 3} --name nested-pve-of-somebody --net0 virtio,bridge=vmbr0")
    return AttachingProject(path, hand_lab)


def test_without_selected_steps_father_is_checked_and_not_changed(attaching: AttachingProject) -> None:
    done = attaching.run("test_steps.py")
    assert done.ret == 1, done.output
    for name in ("ensure_pve", "setup_network", "setup_ssh"):
        assert f"test_{name} PASSED" in done.output, done.output
    assert "expected setup_repos to be done on the attached PVE" in done.output
    assert "absent from /opt/sources, or not up to date: mine" in done.output
    assert done.after == done.before


def test_a_selected_set_up_is_undone_and_the_vm_inside_destroyed(attaching: AttachingProject) -> None:
    done = attaching.run("-k", "setup_repos or leaf or sync or chain or uses_it")
    assert done.ret == 0, done.output
    assert done.output.count("PASSED") == 7, done.output
    assert "no leftovers" in done.output
    assert done.after == done.before


def test_the_runs_key_is_added_by_selection_and_removed(attaching: AttachingProject) -> None:
    done = attaching.run("-k", "setup_ssh or leaf or verify", *REDO, "--nested-skip", "setup_repos")
    assert done.ret == 0, done.output
    log = next((attaching.path / ".nested-pve" / "runs").glob(f"{done.run}/audit.jsonl")).read_text()
    assert "(the run's key)" in log
    assert done.after == done.before


@pytest.mark.thorough
def test_a_custom_certificate_is_accepted_and_the_default_one_not_renewed(
    attaching: AttachingProject,
) -> None:
    attaching.lab.run(CUSTOM_CERTIFICATE)
    try:
        done = attaching.run("-k", "ensure_pve or setup_repos", *REDO)
        served = attaching.lab.run(
            "openssl s_client -connect 127.0.0.1:8006 </dev/null 2>&1 | grep -c CN.*pve.example.org"
        )
    finally:
        attaching.lab.run(DEFAULT_CERTIFICATE)
    assert int(served) > 0
    assert done.ret == 0, done.output
    assert "2 passed" in done.output
    assert done.after == done.before


@pytest.mark.thorough
def test_leftovers_of_a_killed_session_on_an_attached_host_are_deleted_by_destroy_only(
    attaching: AttachingProject, tmp_path: Path
) -> None:
    before = attaching.lab.run(STATE)
    project = Project(tmp_path / "project", attaching.lab, LOW, LOW + 9, tmp_path / "state")
    project.create()
    process = project.start_with(
        ["--nested-attach", f"lab:{attaching.lab.name}"], "--nested-skip", "setup_repos", "-k", "leaf_wait_ip"
    )
    project.wait_for_line(process, lambda line: line.get("phase") == "leaf_wait_ip")
    process.kill()
    process.wait()
    assert project.leftovers() != []
    assert project.run("--nested-destroy-only") in (
        0,
        1,
    )  # 1: the foreign VM with a similar name is not confirmed
    # A read-only token may remain until it expires after ten minutes.
    assert re.sub(r'\{[^}]*"npve-see-[^}]*\}', "", attaching.lab.run(STATE)) == before
