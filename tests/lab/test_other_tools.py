"""Programs of other people against a nested PVE on a lab, under --nested-exec: the page's own examples."""

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

# Without the VM inside, which no example needs; with a password, which is asked for in Python alone.
CONFTEST = """
import pytest
from pytest_nestedpve.session.nested_pve import NestedPve
from pytest_nestedpve.environment.phases import Phase

DROPPED = ("download_image", "leaf_provision", "leaf_start", "leaf_wait_ip", "sync_repos", "verify_ssh_chain")

def pytest_nestedpve_phases(phases, config):
    phases[:] = [phase for phase in phases if phase.name not in DROPPED]
    phases.append(Phase("password", "a password", ask))

def ask(environment):
    with open("password", "w") as file:
        file.write(NestedPve(environment).root_password)
    return {}
"""

# Whether the password is the one that is set; what curl says without the nested PVE's authority.
SCRIPT = r"""
exec 2>&1
ssh -F "$NESTED_SSH_CONFIG" nested "cat >check.pl" <<'PERL'
my $typed = <STDIN>;
my $hash = (getpwnam "root")[1];
print crypt($typed, $hash) eq $hash ? "the password is set" : "it is another", "\n";
PERL
ssh -F "$NESTED_SSH_CONFIG" nested perl check.pl <password
CURL_CA_BUNDLE=/etc/ssl/certs/ca-certificates.crt curl -sS "$NESTED_API_URL" || echo "curl says $?"
curl -sS -o /dev/null -w '%{http_code}\n' -H "Authorization: PVEAPIToken=root@pam!nobody=x" \
    "$NESTED_API_URL/api2/json/version"
"""


def examples() -> list[str]:
    found = re.findall(r"<!-- lab -->\n```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) >= 6
    return found


@pytest.fixture
def project(hand_lab: HandLab, tmp_path: Path) -> Project:
    made = Project(tmp_path / "project", hand_lab, LOW, LOW + 9, tmp_path / "state")
    made.write()
    (made.path / "conftest.py").write_text(CONFTEST)
    for number, text in enumerate(examples()):
        (made.path / f"{number}.sh").write_text(text)
    (made.path / "more.sh").write_text(SCRIPT)
    return made


def test_the_examples_of_the_page_work_under_nested_exec(project: Project) -> None:
    names = [f"{number}.sh" for number in range(len(examples()))]
    each = (
        'for each in more.sh {}; do echo; echo "--- $each"; sh -eu $each || exit 9; done >said 2>&1; exit 42'
    )
    command = "cp nested.env copy; " + each.format(" ".join(names))
    # The examples' python3 is the one that has proxmoxer.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    arguments = ["-q", "--nested-exec", command, "--nested-env-file", "nested.env"]
    status = project.run(*arguments, env={"PATH": path})
    said = (project.path / "said").read_text() if (project.path / "said").exists() else ""
    assert status == 42, said + project.output()

    _, *told = re.split(r"^--- (\S+)\n", said, flags=re.MULTILINE)
    parts = dict(zip(told[::2], told[1::2], strict=True))
    more = parts["more.sh"]
    assert "the password is set" in more
    assert "curl says 60" in more, "the certificate is checked"
    assert more.rstrip().endswith("401")
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
    assert project.left() == []
