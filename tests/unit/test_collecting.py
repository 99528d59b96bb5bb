"""What is collected after a failure: within its limits, masked, and whatever hangs or breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_nestedpve.pve import deadline
from pytest_nestedpve.report import collect as collecting
from pytest_nestedpve.report.collect import Item, NotThere, collect
from pytest_nestedpve.run.masking import Masker


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """A limit of ten seconds is half a second here."""
    deadline.set_scale(0.05)
    yield
    deadline.set_scale(1.0)


def text(words: str, name: str = "one.txt") -> Item:
    return Item(name, f"the file {name}", "state", lambda: words)


def hanging(name: str) -> Item:
    def hang() -> str:
        threading.Event().wait(30)
        return "late"

    return Item(name, f"the file {name}", "state", hang)


def test_one_that_hangs_is_given_up_and_the_others_come(tmp_path: Path) -> None:
    started = time.monotonic()
    many = [hanging("a"), hanging("b"), hanging("c"), hanging("d"), text("here", "e"), text("there", "f")]
    found = collect(many, tmp_path / "x", str)
    assert [each.file for each in found.kept] == ["e", "f"]
    assert {each.why for each in found.missing} == {"it did not come within 0.5 s"}
    assert time.monotonic() - started < 1.5, "four that hang at once, and 30 s for everything, are 1.5 s here"


def test_everything_together_has_a_limit_too(tmp_path: Path) -> None:
    started = time.monotonic()
    found = collect([hanging(str(number)) for number in range(40)], tmp_path / "x", str)
    assert time.monotonic() - started < 2.5
    assert found.kept == ()
    assert len(found.missing) == 40
    assert "there was no time for it within 1.5 s" in {each.why for each in found.missing}


def test_what_comes_late_is_not_written(tmp_path: Path) -> None:
    gate, ended = threading.Event(), threading.Event()

    def late() -> str:
        gate.wait(20)
        ended.set()
        return "late"

    collect([Item("late.txt", "late", "state", late)], tmp_path / "x", str)
    gate.set()
    assert ended.wait(5)
    assert not (tmp_path / "x").exists()


def test_one_that_fails_fails_nothing_else(tmp_path: Path) -> None:
    def broken() -> str:
        raise KeyError("a fault")

    def ends_the_thread() -> str:
        raise SystemExit(3)

    def absent() -> str:
        raise NotThere("there is none")

    items = [Item(each.__name__, each.__name__, "state", each) for each in (broken, ends_the_thread, absent)]
    found = collect([*items, text("here")], tmp_path / "x", str)
    assert [each.words for each in found.kept] == ["here"]
    why = {each.what: each.why for each in found.missing}
    assert why["absent"] == "there is none"
    assert "a fault" in why["broken"]


def test_a_directory_that_cannot_be_made_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file")
    found = collect([text("here")], tmp_path / "x", str)
    assert found.kept == ()
    assert len(found.missing) == 1


def test_secrets_are_masked_before_a_text_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "TEXT_LIMIT", 100)
    masker = Masker()
    masker.add("hunter2-the-secret")
    # The cut would go through the middle of it.
    (kept,) = collect([text("x" * 200 + " hunter2-the-secret" + "y" * 90)], tmp_path, masker.mask).kept
    written = (tmp_path / kept.file).read_text()
    assert written == kept.words
    assert "characters before this are left out" in written
    assert "secret" not in written


def test_the_end_of_a_private_key_is_masked_though_its_beginning_was_cut_off(tmp_path: Path) -> None:
    words = "b3BlbnNzaC1rZXktdjEAAAAABG5vbmU\nAAAAAAAAA\n-----END OPENSSH PRIVATE KEY-----\nand then a line\n"
    (kept,) = collect([text(words)], tmp_path, Masker().mask).kept
    assert "b3Blbn" not in kept.words
    assert "and then a line" in kept.words


def test_a_picture_is_kept_as_it_is_and_only_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = b"P6\n2 1\n255\n\x00\xff\x00\x00\xff\xfe"
    items = [
        Item("screen.ppm", "screen", "picture", lambda: picture),
        Item("wide.ppm", "wide", "picture", lambda: picture * 100),
    ]
    monkeypatch.setattr(collecting, "DATA_LIMIT", 200)
    found = collect(items, tmp_path, Masker().mask)
    assert [each.file for each in found.kept] == ["screen.ppm"]
    assert (tmp_path / "screen.ppm").read_bytes() == picture
    assert found.kept[0].words == ""
    assert "at most 200 are kept" in found.missing[0].why


def test_all_files_together_have_a_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "TOTAL_LIMIT", 250)
    found = collect([text("x" * 100, str(number)) for number in range(5)], tmp_path, str)
    assert len(found.kept) == 2
    assert len(found.missing) == 3


def test_files_are_for_their_owner_only(tmp_path: Path) -> None:
    collect([text("here")], tmp_path / "x", str)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "x" / "one.txt").stat().st_mode & 0o777 == 0o600
