"""The vocabulary of the project: plain nouns and verbs, and sentences whose subject is a thing.

The table names the words to use instead. Answers of hosts, programs and recordings are quotations: those
files are listed below.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

INSTEAD = {
    r"said|told|tells?|telling": "report, message, output, log",
    r"mend(?:s|ed|ing|able)?": "fix, repair",
    r"tak(?:e|es|en|ing) up again|took up again|go(?:es|ne|ing)? on with": "resume",
    r"tak(?:e|es|en|ing) away|took away": "delete, remove, destroy",
    r"laps(?:e|es|ed|ing)": "expired",
    r"(?:look|ask)(?:s|ed|ing)? again": "retry, poll",
    r"whoever|him|himself|his|he|uncle": "the caller, the session, the worker process, the second node",
    r"leav(?:e|es|ing) standing|left standing": "keep",
    r"says?": "report, print, name",
    r"stays?": "remains, exists, is kept",
    r"chosen|wanted|asked for": "requested, configured, selected",
}
OUT = re.compile(r"\b(?:" + "|".join(INSTEAD) + r")\b", re.IGNORECASE)
#: A sentence whose subject is a free relative clause: "What a killed session left goes".
RELATIVE_SUBJECT = re.compile(
    r"(?:\A|[.:;]\s+|\n\s*\n\s*|^\s*(?:[-*#]+\s+)?)"
    r"(?:What|Whatever|Who|Whoever|Which)\s+(?:[\w'`-]+\s+){1,6}?"
    r"(?:is|are|was|were|goes|go|stays|stay|stands|stand|remains|has|have|comes|does)\b[^?.\n|]*(?:\.|\Z|\n)",
    re.MULTILINE,
)
#: Names of values that name nothing.
NAMELESS = {"said", "told", "found", "taken", "each", "wanted", "whoever", "uncle", "mended"}

#: Files that quote others at length: recordings, the API's table, patterns of known symptoms.
QUOTED = ("tests/data/", "pytest_nestedpve/report/symptoms/", "LICENSE")


def tracked(*suffixes: str) -> list[str]:
    names = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    return [
        name
        for name in names.split("\0")
        if name.endswith(suffixes) and not name.startswith(QUOTED) and (ROOT / name).is_file()
    ]


def of_python(text: str) -> Iterator[tuple[int, str]]:
    """Comments and docstrings, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: ")
    for node in ast.walk(ast.parse(text)):
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value
        if isinstance(node, ast.Expr) and isinstance(docstring, str):
            yield node.lineno, docstring


def messages(text: str) -> Iterator[tuple[int, str]]:
    """Strings of the package that are sentences."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def of_page(text: str) -> Iterator[tuple[int, str]]:
    """The prose of a Markdown page: without code and without links' addresses."""
    without = re.sub(r"(?ms)^```.*?^```", lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(without.splitlines(), 1):
        yield number, re.sub(r"`[^`]*`|\]\([^)]*\)", " ", line)


def of_yaml(text: str) -> Iterator[tuple[int, str]]:
    """Comments and names of tasks."""
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.search(r"(?:^|\s)#\s*(.*)|^\s*-?\s*name:\s*(.*)", line):
            yield number, match[1] or match[2] or ""


def prose(name: str) -> Iterator[tuple[int, str]]:
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".py"):
        yield from of_python(text)
        if name.startswith(("pytest_nestedpve/", "benchmarks/")) and "/lab/node/" not in name:
            yield from messages(text)
    elif name.endswith(".md"):
        yield from of_page(text)
    else:
        yield from of_yaml(text)


PAGES = tracked(".py", ".md", ".yml", ".toml")


def findings(pattern: re.Pattern[str]) -> Iterator[tuple[str, re.Match[str]]]:
    """Place and match of each finding in the prose of the repository, this module excepted."""
    for name in PAGES:
        if name == "tests/unit/test_words.py":
            continue
        for line, text in prose(name):
            for match in pattern.finditer(text):
                yield f"{name}:{line + text[: match.start()].count(chr(10))}", match


def test_words_of_the_field_are_used() -> None:
    out = [
        f"{place}: {match[0]!r}; write: "
        + next(better for word, better in INSTEAD.items() if re.fullmatch(word, match[0], re.IGNORECASE))
        for place, match in findings(OUT)
    ]
    assert not out, "\n" + "\n".join(out)


def test_the_subject_of_a_sentence_is_a_thing() -> None:
    out = [f"{place}: {' '.join(match[0].split())[:90]}" for place, match in findings(RELATIVE_SUBJECT)]
    assert not out, "\n" + "\n".join(out)


def names_in(text: str) -> Iterator[tuple[int, str]]:
    """Names that a module gives to values, arguments, functions and classes."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def test_a_name_says_what_the_value_is() -> None:
    out = sorted(
        {
            f"{name}:{line}: {identifier}"
            for name in PAGES
            if name.endswith(".py")
            for line, identifier in names_in((ROOT / name).read_text(encoding="utf-8"))
            if identifier.strip("_") in NAMELESS
        }
    )
    assert not out, "\n" + "\n".join(out)


@pytest.mark.parametrize(
    "sentence",
    [
        "What a killed session left goes.",
        "Who holds the lock is alive.",
        "The volume is gone. What is left is listed.",
    ],
)
def test_a_relative_clause_as_subject_is_recognised(sentence: str) -> None:
    assert RELATIVE_SUBJECT.search(sentence)


@pytest.mark.parametrize(
    "sentence", ["What does a token cost?", "Leftovers of a killed session are deleted.", "See what is left."]
)
def test_a_plain_sentence_is_accepted(sentence: str) -> None:
    assert not RELATIVE_SUBJECT.search(sentence)
