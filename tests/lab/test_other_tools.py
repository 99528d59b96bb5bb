"""Other tools against a nested PVE on a lab, under --nested-exec: the examples of docs/other-tools.md."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest
from lab.on_lab import HandLab, Project

PAGE = Path(__file__).parents[2] / "docs" / "other-tools.md"
LOW = 97000

# Without the VM inside, which no example needs; with a root password, which only Python code requests.
CONFTEST = """
import pytest
from pytest_nestedpve.session.nested_pve import NestedPve
from pytest_nestedpve.environment.phases import Phase

DROPPED = ("download_image", "leaf_provision", "leaf_start", "leaf_wait_ip", "sync_repos", "verify_ssh_chain")

def pytest_nestedpve_phases(phases, config):
    phases[:] = [phase for phase in phases if phase.name not in DROPPED]
    phases.append(Phase("password", "a password", save_password))

def save_password(environment):
    with open("password", "w") as file:
        file.write(NestedPve(environment).root_password)
    return {}
"""

# Checks the root password, and curl's error without the nested PVE's authority.
SCRIPT = r"""
exec 2>&1
ssh -F "$NESTED_SSH_CONFIG" nested "cat >check.pl" <<'PERL'
my $typed = <STDIN>;
my $hash = (getpwnam "root")[1];
print crypt($typed, $hash) eq $hash ? "the password is set" : "another password is set", "\n";
PERL
ssh -F "$NESTED_SSH_CONFIG" nested perl check.pl <password
CURL_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt curl -sS "$NESTED_API_URL" || echo "curl exited with $?"
curl -sS -o /dev/null -w '%{http_code}\n' -H "Authorization: PVEAPIToken=root@pam!nobody=x" \
    "$NESTED_API_URL/api2/json/version"
"""


def examples() -> list[str]:
    texts = re.findall(r"<!-- lab -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(texts) >= 6
    return texts


@pytest.fixture
def project(hand_lab: HandLab, tmp_path: Path) -> Project:
    project = Project(tmp_path / "project", hand_lab, LOW, LOW + 9, tmp_path / "state")
    project.create()
    (project.path / "conftest.py").write_text(CONFTEST)
    for number, text in enumerate(examples()):
        (project.path / f"{number}.sh").write_text(text)
    (project.path / "checks.sh").write_text(SCRIPT)
    return project


def test_the_examples_of_the_page_work_under_nested_exec(project: Project) -> None:
    names = [f"{number}.sh" for number in range(len(examples()))]
    loop = (
        'for file in checks.sh {}; do echo; echo "--- $file"; sh -eu $file || exit 9; done >log 2>&1; exit 42'
    )
    command = "cp nested.env copy; " + loop.format(" ".join(names))
    # The examples' python3 is the one that has proxmoxer.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    arguments = ["-q", "--nested-exec", command, "--nested-env-file", "nested.env"]
    status = project.run(*arguments, env={"PATH": path})
    log = (project.path / "log").read_text() if (project.path / "log").exists() else ""
    assert status == 42, log + project.output()

    _, *sections = re.split(r"^--- (\S+)\n", log, flags=re.MULTILINE)
    parts = dict(zip(sections[::2], sections[1::2], strict=True))
    checks = parts["checks.sh"]
    assert "the password is set" in checks
    assert "curl exited with 60" in checks, "the certificate is checked"
    assert checks.rstrip().endswith("401")
    curl, ssh, forward, python, proxmoxer, *_ = (parts[name] for name in names)
    assert json.loads(curl)["data"]["version"] == python.strip()
    assert ssh.startswith("pve-manager/")
    assert forward.splitlines()[-1] == ssh.splitlines()[-1]
    assert proxmoxer.strip() == "[]"

    copy = (project.path / "copy").read_text()
    (secret,) = re.findall(r"^PM_API_TOKEN_SECRET=(\S+)$", copy, re.MULTILINE)
    password = (project.path / "password").read_text()
    for file in (project.path / ".nested-pve" / "runs").rglob("*"):
        if file.is_file() and file.name not in ("api_token", "root_password"):
            data = file.read_bytes()
            assert secret.encode() not in data, file
            assert password.encode() not in data, file
    assert secret not in project.output()
    assert not (project.path / "nested.env").exists()
    assert project.leftovers() == []
