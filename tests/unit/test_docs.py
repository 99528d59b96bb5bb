"""The documentation is correct: examples are run, tables compared with the code, targets of links exist."""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_nestedpve import setup
from pytest_nestedpve.config import keys
from pytest_nestedpve.config.keys import KEYS
from pytest_nestedpve.config.settings import PROFILE_KEYS, Settings
from pytest_nestedpve.pve.identity import grants
from pytest_nestedpve.session import hookspecs
from pytest_nestedpve.session.nested_pve import NestedPve

ROOT = Path(__file__).parent.parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]

_ON_STANDIN = "<!-- host: stand-in -->"
_BLOCK = re.compile(r"<!-- (file|run)(?:: ?| )?(.*?) ?-->\n```\w*\n(.*?)```", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block after a comment: a file to write or a command to run."""

    kind: str
    argument: str
    text: str


def blocks(page: Path) -> Iterator[Block]:
    for kind, argument, text in _BLOCK.findall(page.read_text(encoding="utf-8")):
        yield Block(kind, argument.strip(), text)


def run(command: str, folder: Path, *, on_standin: bool) -> subprocess.CompletedProcess[str]:
    """Run a page's command; `on_standin`: with a stand-in for the host that the page names."""
    words = shlex.split(command)
    assert words[0] == "pytest", command
    ours = ("NESTED_PVE_", "PYTEST")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean |= {"COLUMNS": "200", "XDG_STATE_HOME": str(folder / ".state")}
    words += ["-p", "no:randomly"]
    if on_standin:
        clean["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "tests"), clean.get("PYTHONPATH")]))
        words += ["-p", "on_standin"]
    else:
        words += ["-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=clean,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def first_missing(expected: str, output: str) -> str | None:
    """The first line of `expected` that does not follow in `output`; `...` matches any text."""
    rest = output.splitlines()
    for line in expected.splitlines():
        if line.strip() in ("...", ""):
            continue
        pattern = ".*".join(re.escape(part) for part in line.rstrip().split("..."))
        place = next((n for n, row in enumerate(rest) if re.fullmatch(pattern, row.rstrip())), None)
        if place is None:
            return line
        rest = rest[place + 1 :]
    return None


@pytest.mark.thorough
@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page))], ids=lambda page: page.name)
def test_the_examples_have_the_output_of_the_page(page: Path, tmp_path: Path) -> None:
    on_standin = _ON_STANDIN in page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.kind == "file":
            (tmp_path / block.argument).write_text(block.text)
            continue
        status = int((re.search(r"status=(\d+)", block.argument) or [0, 0])[1])
        command, _, expected = block.text.removeprefix("$ ").partition("\n")
        done = run(command, tmp_path, on_standin=on_standin)
        output = done.stdout + done.stderr
        assert done.returncode == status, f"$ {command}\n{output}"
        missing = first_missing(expected, output)
        assert missing is None, f"$ {command}\nexpected the line {missing!r} in:\n{output}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_targets_of_links_between_pages_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        path = page.parent / target if target else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual viewers derive them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def settings_rows() -> list[str]:
    """The table of docs/settings.md, as the code would write it."""
    return [f"| `{key.name}` | {key.help}{' ◆' if key.profile else ''} |".replace("||", "|") for key in KEYS]


def test_every_setting_is_documented_with_its_help() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if re.match(r"\| `[a-z_0-9]+` \|", line)]
    assert rows == settings_rows(), "docs/settings.md should have:\n" + "\n".join(settings_rows())


def _options() -> dict[str, str]:
    """The command line options of the plugin, with their help."""
    options: dict[str, str] = {}

    class Group:
        def addoption(self, *names: str, help: str = "", **_: Any) -> None:
            if help != argparse.SUPPRESS:
                options.update(dict.fromkeys(names, help))

    class Parser:
        group = Group()

        def getgroup(self, *_: str) -> Group:
            return self.group

        def addini(self, *_: Any, **__: Any) -> None:
            return None

    parser: Any = Parser()
    keys.register(parser)
    return options


def test_every_option_is_documented_and_no_page_names_one_that_does_not_exist() -> None:
    known = _options()
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for name in known:
        assert f"| `{name}" in page, f"docs/settings.md does not document {name}"
    for other in PAGES:
        text = other.read_text(encoding="utf-8")
        for name in re.findall(r"--(?:nested-[a-z-]+|pve-host|context-file)", text):
            assert name in known, f"{other.name} names {name}, which does not exist"


def test_no_page_names_a_setting_that_does_not_exist() -> None:
    known = {key.ini for key in KEYS} | {key.env for key in KEYS}
    fixtures = {"nested_pve_phases", "nested_pve_run", "nested_pve_version", "nested_pve_clean"}
    environment = {"NESTED_PVE_CACHE"}
    variables = {"nested_pve_ip", "nested_pve_vmid", "nested_pve_host", "nested_pve_leaf_ip"}  # of playbooks
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:nested_pve_[a-z0-9_]+|NESTED_PVE_[A-Z0-9_]+)\b", text):
            assert name in known | fixtures | environment | variables, f"{page.name} names {name}"


def test_the_profile_is_documented_with_exactly_its_keys() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    marked = {line.split("`")[1] for line in page.splitlines() if line.rstrip().endswith("◆ |")}
    assert marked == set(PROFILE_KEYS)


def test_the_defaults_in_the_page_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    defaults = Settings()
    assert f"default {defaults.memory}" in page
    assert f"default {defaults.disk}" in page
    assert f"default {defaults.name_patterns[0]}" in page
    low, high = defaults.vmid_ranges[0]
    assert f"default {low}-{high}" in page


def test_the_phases_are_documented_in_their_order() -> None:
    page = (ROOT / "docs" / "phases.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z_]+)` \|", page, re.MULTILINE) == [p.name for p in setup.default_phases()]


def test_every_playbook_is_documented() -> None:
    page = (ROOT / "docs" / "phases.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "playbooks").glob("*.yml")):
        assert f"| `{path.name}` |" in page


def test_exactly_the_attributes_of_the_fixture_are_documented() -> None:
    page = (ROOT / "docs" / "using-it.md").read_text(encoding="utf-8")
    table = page.partition("Attributes and methods of the fixture:")[2].partition("\n\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)[^`]*`", row)}
    assert documented == {name for name in vars(NestedPve) if not name.startswith("_")}


def test_every_hook_is_documented_with_its_arguments_and_no_other() -> None:
    page = (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(pytest_nestedpve_\w+)\(([^)]*)\)` \|", page, re.MULTILINE)
    known = {
        name: list(inspect.signature(hook).parameters)
        for name, hook in vars(hookspecs).items()
        if name.startswith("pytest_nestedpve_")
    }
    assert {name: arguments.split(", ") for name, arguments in documented} == known


def test_objects_of_a_run_and_rights_of_its_token_are_in_the_table() -> None:
    page = (ROOT / "docs" / "real-hosts.md").read_text(encoding="utf-8")
    table = page.partition("## What a run creates")[2].partition("## ")[0]
    clone = "/nodes/father/qemu/9000/clone", {"pool": "npve-x", "storage": "fast", "net0": "virtio,bridge=b"}
    for path in ("/pool/npve-x", *(grant.path for grant in grants(*clone))):
        assert f"/{path.split('/')[1]}/" in table, path
    # Written by root without the API: the image, the vendor file, and files sent from one node to another.
    for written in ("`import/", "`import` and `snippets`", "`npve-RUN-….yaml`", "`/var/tmp/.nestedpve-…`"):
        assert written in table


def test_contributing_names_code_that_exists() -> None:
    """Each `path.py:name` is a definition of that module, or a method of a class in it."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    assert len(places) > 30
    for file, name in places:
        path = ROOT / "pytest_nestedpve" / file
        assert path.is_file(), file
        body: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
        for part in name.split("."):
            named = {
                target: node
                for node in body
                for target in (
                    [node.name]
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                    else [node.target.id]
                    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                    else [target.id for target in node.targets if isinstance(target, ast.Name)]
                    if isinstance(node, ast.Assign)
                    else []
                )
            }
            assert part in named, f"{file}:{name}"
            inner = named[part]
            body = inner.body if isinstance(inner, ast.ClassDef) else []
    for file in re.findall(r"`((?:tests|docs)/[\w/.-]+)`", text):
        if "*" not in file:
            assert (ROOT / file).exists(), file
