"""A value is set in a user's YAML, and nothing else is changed."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nestedpve.config.yaml_path import YamlPathError, parse_path, set_in_file, set_value

USERS = """\
# secrets of the site
---
api_tokens:            # one per node
    father: "root@pam!x=1"   # the old one
    other: 'single'
users:
    - name: a
      groups: [x, y]
long: "a line that is longer than eighty characters and tempts a YAML library to fold it, which it must not"
"""


def test_a_value_is_added_and_other_lines_are_unchanged() -> None:
    result = set_value(USERS, ["api_tokens", "nested"], "root@pam!npve=2")
    kept = [line for line in result.splitlines() if "nested" not in line]
    assert kept == USERS.splitlines()
    assert "    nested: root@pam!npve=2" in result.splitlines()


def test_an_existing_value_changes_nothing() -> None:
    once = set_value(USERS, ["api_tokens", "nested"], "t")
    assert set_value(once, ["api_tokens", "nested"], "t") == once


def test_an_old_value_is_replaced_and_its_comment_preserved() -> None:
    result = set_value(USERS, ["api_tokens", "father"], "new")
    assert "# the old one" in result
    assert "root@pam!x=1" not in result


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "a: 1\n", "api_tokens:\n", "---\n"])
def test_missing_maps_are_created(text: str) -> None:
    from ruamel.yaml import YAML

    result = set_value(text, ["api_tokens", "nested"], "t")
    assert YAML(typ="safe").load(result)["api_tokens"] == {"nested": "t"}
    assert text.strip("-\n") in result


@pytest.mark.parametrize("text", ["api_tokens: text\n", "api_tokens: [a]\n", "- a\n"])
def test_a_value_that_is_no_map_is_not_overwritten(text: str) -> None:
    with pytest.raises(YamlPathError, match="expected a map"):
        set_value(text, ["api_tokens", "nested"], "t")


@pytest.mark.parametrize(
    "text", ["a: [hunter2\n", "a: b: hunter2\n", "a: 1\n---\nb: hunter2\n", "a: {hunter2\n"]
)
def test_invalid_yaml_is_refused_without_its_content_in_the_error(text: str) -> None:
    with pytest.raises(YamlPathError) as caught:
        set_value(text, ["x"], "t")
    assert "hunter2" not in str(caught.value)


def test_an_existing_number_as_key_is_used() -> None:
    assert set_value("vms:\n  101: old\n", ["vms", "101"], "new") == "vms:\n  101: new\n"


def test_a_path_is_split_before_the_node_is_replaced() -> None:
    assert parse_path("api_tokens.{node}", "a.b") == ("api_tokens", "a.b")
    for invalid in ("", "a..b", "a.", "."):
        with pytest.raises(YamlPathError):
            parse_path(invalid)


def test_the_mode_of_a_file_and_a_link_to_it_are_preserved(tmp_path: Path) -> None:
    path = tmp_path / "real.yaml"
    path.write_text(USERS, encoding="utf-8")
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to("real.yaml")
    assert set_in_file(link, ["api_tokens", "nested"], "t")
    assert not set_in_file(link, ["api_tokens", "nested"], "t")
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["link.yaml", "real.yaml"]


def test_a_new_file_is_private(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    assert set_in_file(path, ["a", "b"], "t")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_line_ends_of_windows_are_preserved() -> None:
    assert set_value("a: 1\r\nb: 2\r\n", ["c"], "t") == "a: 1\r\nb: 2\r\nc: t\r\n"


@given(
    st.dictionaries(
        st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=8),
        st.one_of(st.text(max_size=12), st.integers(), st.lists(st.integers(), max_size=3), st.none()),
        max_size=5,
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=30),
)
def test_only_one_value_of_any_file_changes(data: dict[str, object], value: str) -> None:
    from io import StringIO

    from ruamel.yaml import YAML

    out = StringIO()
    YAML().dump(data, out)
    text = out.getvalue() if data else ""
    before = YAML(typ="safe").load(text) or {}
    after = YAML(typ="safe").load(set_value(text, ["zz_tokens", "node"], value))
    assert after == {**before, "zz_tokens": {"node": value}}
