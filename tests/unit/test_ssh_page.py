"""docs/ssh.md is true: its configurations log in, its tables are the code's."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ssh_world import World, both, sign

from pytest_nestedpve.pve.ssh import algorithms, config, config_options

PAGE = (Path(__file__).parents[2] / "docs" / "ssh.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- ssh: (\S+) -->\n```\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server that stands for every host of the page; `ssh` beside it for ~/.ssh."""
    made = World(tmp_path_factory.mktemp("world"))
    made.write("ssh/conf.d/more.conf", "# nothing yet\n")
    made.key("ssh/id_old")
    made.key("ssh/id_pve", accepted=True)
    sign(made.ca, made.key("ssh/id_certified"), "-n", made.server.target().user)
    made.write("ssh/known_hosts_lab", f"pve4-lab {made.host_key}\n")
    authority = Path(f"{made.ca}.pub").read_text()
    made.write("ssh/known_authorities", f"@cert-authority [127.0.0.1]:* {authority}")
    made.server.start()
    yield made
    made.server.stop()


@pytest.mark.parametrize("alias", list(EXAMPLES))
def test_the_configurations_of_the_page_log_in(world: World, alias: str) -> None:
    text = re.sub(r"(?m)^ +User \S+\n", "", EXAMPLES[alias])
    text = re.sub(r"HostName \S+", f"HostName 127.0.0.1\n    Port {world.server.port}", text)
    text = text.replace("~/.ssh/config", f"{world.folder}/config").replace("~/.ssh/", f"{world.folder}/ssh/")
    text = text.replace("Match host 10.0.0.*", "Match host 127.0.0.*")
    # A key for hosts about which the page says nothing; what it does name has to do.
    fallback = ["Host *", f"UserKnownHostsFile {world.server.known_hosts}", "IdentityAgent none"]
    if "IdentityFile" not in text:
        fallback.append(f"IdentityFile {world.good}")
    for gate in ("gate", "lab-gate"):
        text += f"Host {gate}\n    IdentityFile {world.good}\n"
    assert both(world.config(text + "\n    ".join(fallback) + "\n"), alias) == ("", "")


def rows(heading: str) -> list[list[str]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in section.splitlines()
        if "|" in line
    ]
    return [row for row in found if row[0].startswith("`")]


def test_the_page_names_every_option_that_is_passed_over_and_what_that_means() -> None:
    told = {row[0].strip("`"): row[1].rstrip(" |") for row in rows("Options without effect")}
    assert told == config_options.NOT_HONOURED


def test_the_page_names_every_option_that_is_honoured_and_no_other() -> None:
    source = Path(config.__file__).read_text(encoding="utf-8")
    read = {name.lower() for name in re.findall(r'(?:_one\(said|paths\(|_one\(_ask.*), ?"(\w+)"', source)}
    read |= {name.lower() for name in re.findall(r'paths\("(\w+)"\)', source)} | set(algorithms.OPTIONS)
    read |= set(re.findall(r'"(\w+knownhostsfile)"', source))
    told = {name.lower() for row in rows("Honoured options") for name in re.findall(r"`(\w+)`", row[0])}
    assert told == read - {"controlpath"}  # asked with a value of ours


def test_openssh_knows_every_option_that_the_page_names(tmp_path: Path) -> None:
    (tmp_path / "config").write_text("")
    argv = ["ssh", "-G", "-F", str(tmp_path / "config"), "h"]
    printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.lower()
    told = {name.lower() for row in rows("Honoured options") for name in re.findall(r"`(\w+)`", row[0])}
    unset = {"proxyjump", "proxycommand", "bindaddress", "certificatefile", "hostkeyalias"}
    unset |= {"identityagent", "revokedhostkeys"}
    assert {name for name in told - unset if not re.search(rf"(?m)^{name} ", printed)} == set()


def test_the_errors_that_the_page_explains_are_those_of_the_code() -> None:
    folder = Path(config.__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parents[1] / "config" / "hosts.py"]
    source = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in files))
    for row in rows("Troubleshooting"):
        assert row[0].strip("`") in source, row[0]
