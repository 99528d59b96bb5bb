"""The context file only adds candidates, and keeps what it does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nestedpve.config.legacy_context import ContextError, ContextVm, forget, load, save, vmids

NESTED = ContextVm("nested-pve-3fa9c2d41b07", 99911, "10.0.0.9")
LEAF = ContextVm("nested-pve-leaf-3fa9c2d41b07", 99922)


def test_unknown_keys_survive_a_save_and_a_clean_up(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    theirs = {"site": {"rack": [1, 2]}, "discovered_vms": [{"vmid": 105, "why": "x"}], "other_vm_id": 200}
    path.write_text(json.dumps(theirs))
    save(path, NESTED, LEAF)
    saved = load(path)
    assert saved["inner_ip"] == saved["node_ip"] == "10.0.0.9"
    assert saved["nested-pve_vm_id"] == 99911
    assert vmids(saved) >= {99911, 99922, 105, 200}
    assert theirs.items() <= saved.items()
    forget(path, NESTED, LEAF)
    left = load(path)
    assert theirs.items() <= left.items()
    assert vmids(left) == {105, 200}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, "\x00"], ids=lambda text: repr(text[:4]))
def test_a_malformed_file_is_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "context.json"
    path.write_text(text)
    with pytest.raises(ContextError, match=r"context\.json.*JSON object|JSON object in .*context\.json"):
        load(path)


def test_a_file_that_is_not_there_is_an_empty_context(tmp_path: Path) -> None:
    assert load(tmp_path / "none.json") == {}


@given(
    st.dictionaries(
        st.sampled_from(["a_vm_id", "provisioned_vms", "discovered_vms", "inner_ip"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("²"),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.just("vmid"), inner),
        ),
    )
)
def test_nothing_but_ids_ever_comes_out(context: dict[str, object]) -> None:
    assert all(type(vmid) is int and 100 <= vmid <= 999_999_999 for vmid in vmids(context))
