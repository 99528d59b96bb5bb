"""Collecting artifacts: within limits, masked, and in spite of items that hang or fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_nestedpve.pve import deadline
from pytest_nestedpve.report import collect as collecting
from pytest_nestedpve.report.collect import Item, NotAvailable, collect
from pytest_nestedpve.run.masking import Masker


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Scale a limit of ten seconds to half a second."""
    deadline.set_scale(0.05)
    yield
    deadline.set_scale(1.0)


def text(content: str, name: str = "one.txt") -> Item:
    return Item(name, f"the file {name}", "state", lambda: content)


def hanging(name: str) -> Item:
    def hang() -> str:
        threading.Event().wait(30)
        return "late"

    return Item(name, f"the file {name}", "state", hang)


def test_an_item_that_hangs_is_abandoned_and_the_others_are_written(tmp_path: Path) -> None:
    started = time.monotonic()
    items = [hanging("a"), hanging("b"), hanging("c"), hanging("d"), text("here", "e"), text("there", "f")]
    collection = collect(items, tmp_path / "x", str)
    assert [file.file for file in collection.kept] == ["e", "f"]
    assert {item.reason for item in collection.missing} == {"not fetched within 0.5 s"}
    assert time.monotonic() - started < 1.5, "four that hang at once, and 30 s for everything, are 1.5 s here"


def test_all_items_together_have_a_limit_too(tmp_path: Path) -> None:
    started = time.monotonic()
    collection = collect([hanging(str(number)) for number in range(40)], tmp_path / "x", str)
    assert time.monotonic() - started < 2.5
    assert collection.kept == ()
    assert len(collection.missing) == 40
    assert "not fetched within the 1.5 s for all files" in {item.reason for item in collection.missing}


def test_a_late_result_is_not_written(tmp_path: Path) -> None:
    gate, ended = threading.Event(), threading.Event()

    def late() -> str:
        gate.wait(20)
        ended.set()
        return "late"

    collect([Item("late.txt", "late", "state", late)], tmp_path / "x", str)
    gate.set()
    assert ended.wait(5)
    assert not (tmp_path / "x").exists()


def test_an_item_that_fails_does_not_affect_the_others(tmp_path: Path) -> None:
    def broken() -> str:
        raise KeyError("a fault")

    def ends_the_thread() -> str:
        raise SystemExit(3)

    def absent() -> str:
        raise NotAvailable("there is none")

    items = [
        Item(fetch.__name__, fetch.__name__, "state", fetch) for fetch in (broken, ends_the_thread, absent)
    ]
    collection = collect([*items, text("here")], tmp_path / "x", str)
    assert [file.text for file in collection.kept] == ["here"]
    reasons = {item.description: item.reason for item in collection.missing}
    assert reasons["absent"] == "there is none"
    assert "a fault" in reasons["broken"]


def test_a_directory_that_cannot_be_created_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    collection = collect([text("here")], tmp_path / "x", str)
    assert collection.kept == ()
    assert len(collection.missing) == 1


def test_secrets_are_masked_before_a_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "TEXT_LIMIT", 100)
    masker = Masker()
    masker.add("hunter2-the-secret")
    # The text is cut in the middle of the secret.
    (kept,) = collect([text("x" * 200 + " hunter2-the-secret" + "y" * 90)], tmp_path, masker.mask).kept
    written = (tmp_path / kept.file).read_text()
    assert written == kept.text
    assert "characters before this are omitted" in written
    assert "secret" not in written


def test_the_rest_of_a_private_key_is_masked_although_its_beginning_was_cut_off(tmp_path: Path) -> None:
    content = (
        "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU\nAAAAAAAAA\n-----END OPENSSH PRIVATE KEY-----\nand then a line\n"
    )
    (kept,) = collect([text(content)], tmp_path, Masker().mask).kept
    assert "b3Blbn" not in kept.text
    assert "and then a line" in kept.text


def test_a_picture_is_written_unchanged_and_only_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = b"P6\n2 1\n255\n\x00\xff\x00\x00\xff\xfe"
    items = [
        Item("screen.ppm", "screen", "picture", lambda: picture),
        Item("wide.ppm", "wide", "picture", lambda: picture * 100),
    ]
    monkeypatch.setattr(collecting, "DATA_LIMIT", 200)
    collection = collect(items, tmp_path, Masker().mask)
    assert [file.file for file in collection.kept] == ["screen.ppm"]
    assert (tmp_path / "screen.ppm").read_bytes() == picture
    assert collection.kept[0].text == ""
    assert "expected at most 200" in collection.missing[0].reason


def test_all_files_together_have_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "TOTAL_LIMIT", 250)
    collection = collect([text("x" * 100, str(number)) for number in range(5)], tmp_path, str)
    assert len(collection.kept) == 2
    assert len(collection.missing) == 3


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    collect([text("here")], tmp_path / "x", str)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "x" / "one.txt").stat().st_mode & 0o777 == 0o600
