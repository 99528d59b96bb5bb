"""docs/ssh.md is correct: its configurations log in, and its tables agree with the code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_host import SshHost, log_in_twice, sign

from pytest_nestedpve.pve.ssh import algorithms, config, config_options

PAGE = (Path(__file__).parents[2] / "docs" / "ssh.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- ssh: (\S+) -->\n```\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    """A server that represents every host of the page; its directory `ssh` represents ~/.ssh."""
    host = SshHost(tmp_path_factory.mktemp("world"))
    host.write("ssh/conf.d/more.conf", "# nothing yet\n")
    host.create_key("ssh/id_old")
    host.create_key("ssh/id_pve", accepted=True)
    sign(host.ca, host.create_key("ssh/id_certified"), "-n", host.server.target().user)
    host.write("ssh/known_hosts_lab", f"pve4-lab {host.host_key}\n")
    authority = Path(f"{host.ca}.pub").read_text()
    host.write("ssh/known_authorities", f"@cert-authority [127.0.0.1]:* {authority}")
    host.server.start()
    yield host
    host.server.stop()


@pytest.mark.parametrize("alias", list(EXAMPLES))
def test_the_configurations_of_the_page_log_in(ssh_host: SshHost, alias: str) -> None:
    text = re.sub(r"(?m)^ +User \S+\n", "", EXAMPLES[alias])
    text = re.sub(r"HostName \S+", f"HostName 127.0.0.1\n    Port {ssh_host.server.port}", text)
    text = text.replace("~/.ssh/config", f"{ssh_host.folder}/config").replace(
        "~/.ssh/", f"{ssh_host.folder}/ssh/"
    )
    text = text.replace("Match host 10.0.0.*", "Match host 127.0.0.*")
    # A key for hosts without one on the page; the keys on the page must work.
    fallback = ["Host *", f"UserKnownHostsFile {ssh_host.server.known_hosts}", "IdentityAgent none"]
    if "IdentityFile" not in text:
        fallback.append(f"IdentityFile {ssh_host.good}")
    for gate in ("gate", "lab-gate"):
        text += f"Host {gate}\n    IdentityFile {ssh_host.good}\n"
    assert log_in_twice(ssh_host.write_config(text + "\n    ".join(fallback) + "\n"), alias) == ("", "")


def read_table(heading: str) -> list[list[str]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if "|" in line
    ]
    return [row for row in cells if row[0].startswith("`")]


def test_the_page_lists_every_ignored_option_and_the_consequence() -> None:
    listed = {row[0].strip("`"): row[1].rstrip(" |") for row in read_table("Options without effect")}
    assert listed == config_options.NOT_HONOURED


def test_the_page_lists_exactly_the_honoured_options() -> None:
    source = Path(config.__file__).read_text(encoding="utf-8")
    read = {
        name.lower()
        for name in re.findall(r'(?:_first\(options|paths\(|_first\(_run_ssh_g.*), ?"(\w+)"', source)
    }
    read |= {name.lower() for name in re.findall(r'paths\("(\w+)"\)', source)} | set(algorithms.OPTIONS)
    read |= set(re.findall(r'"(\w+knownhostsfile)"', source))
    listed = {
        name.lower() for row in read_table("Honoured options") for name in re.findall(r"`(\w+)`", row[0])
    }
    assert listed == read - {"controlpath"}  # read with a value of the plugin


def test_every_option_of_the_page_exists_in_openssh(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    argv = ["ssh", "-G", "-F", str(tmp_path / "config"), "h"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.lower()
    listed = {
        name.lower() for row in read_table("Honoured options") for name in re.findall(r"`(\w+)`", row[0])
    }
    unset = {"proxyjump", "proxycommand", "bindaddress", "certificatefile", "hostkeyalias"}
    unset |= {"identityagent", "revokedhostkeys"}
    assert {name for name in listed - unset if not re.search(rf"(?m)^{name} ", printed)} == set()


def test_every_error_of_the_page_exists_in_the_code() -> None:
    folder = Path(config.__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parents[1] / "config" / "hosts.py"]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in files))
    for row in read_table("Troubleshooting"):
        assert row[0].strip("`") in source, row[0]
