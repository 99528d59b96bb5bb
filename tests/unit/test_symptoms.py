"""The table of known symptoms: each is recognised in its own words, none in those of a healthy run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pytest_nestedpve import symptoms
from pytest_nestedpve.options import KEYS
from pytest_nestedpve.symptoms import KINDS, Recognised, Symptom, Text, recognise, table

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "tests" / "data"


def names(found: tuple[Recognised, ...]) -> list[str]:
    return [each.symptom.name for each in found]


def everywhere(words: str) -> list[Text]:
    """The same words in every kind of text."""
    return [Text(kind, kind, words) for kind in KINDS]


def test_the_table_is_large_and_its_names_are_its_own() -> None:
    known = [each.name for each in table()]
    assert len(known) >= 36
    assert len(known) == len(set(known))
    assert len({each.explanation for each in table()}) == len(known)


@pytest.mark.parametrize("symptom", table(), ids=lambda each: each.name)
def test_a_symptom_is_recognised_in_its_own_words_and_named_first(symptom: Symptom) -> None:
    phase = symptom.phases[0] if symptom.phases else "provision"
    for kind in symptom.kinds:
        found = recognise([Text(kind, "here", symptom.example)], phase)
        assert names(found)[:1] == [symptom.name], kind
        assert found[0].line
        assert found[0].where == "here"
        # Every placeholder of the pattern is filled in, or shown as what it is.
        assert "{" not in found[0].explanation + found[0].fix.replace("{print", "")
    assert names(recognise(everywhere(symptom.example), phase))[:1] == [symptom.name]
