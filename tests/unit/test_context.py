"""The context file: VM ids are read from it, and other keys are preserved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_nestedpve.config.legacy_context import ContextError, ContextVm, forget, load, save, vmids

NESTED = ContextVm("nested-pve-3fa9c2d41b07", 99911, "10.0.0.9")
LEAF = ContextVm("nested-pve-leaf-3fa9c2d41b07", 99922)


def test_other_keys_are_preserved_by_save_and_forget(tmp_path: Path) -> None:
    path = tmp_path / "context.json"
    others = {"site": {"rack": [1, 2]}, "discovered_vms": [{"vmid": 105, "why": "x"}], "other_vm_id": 200}
    path.write_text(json.dumps(others))
    save(path, NESTED, LEAF)
    saved = load(path)
    assert saved["inner_ip"] == saved["node_ip"] == "10.0.0.9"
    assert saved["nested-pve_vm_id"] == 99911
    assert vmids(saved) >= {99911, 99922, 105, 200}
    assert others.items() <= saved.items()
    forget(path, NESTED, LEAF)
    context = load(path)
    assert others.items() <= context.items()
    assert vmids(context) == {105, 200}


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "[" * 100_000, "\x00"], ids=lambda text: repr(text[:4]))
def test_an_invalid_file_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "context.json"
    path.write_text(text)
    with pytest.raises(ContextError, match=r"context\.json.*JSON object|JSON object in .*context\.json"):
        load(path)


def test_a_missing_file_is_an_empty_context(tmp_path: Path) -> None:
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
def test_only_valid_vm_ids_are_read(context: dict[str, object]) -> None:
    assert all(type(vmid) is int and 100 <= vmid <= 999_999_999 for vmid in vmids(context))
