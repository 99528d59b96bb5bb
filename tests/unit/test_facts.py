"""The facts of phases: typed for the package, and the same JSON form for files, log and projects."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from pytest_nestedpve.environment.facts import (
    AddressFacts,
    LeafProvisionFacts,
    NetworkFacts,
    NotReady,
    ProvisionFacts,
    PveFacts,
    SshFacts,
    nested_address,
)
from pytest_nestedpve.pve.errors import PveError

VM = {"vmid": 99901, "node": "father", "uuid": "u", "name": "nested-pve-x", "pool": "npve-x"}


def test_keys_of_a_project_remain_when_a_fact_is_written() -> None:
    facts: dict[str, dict[str, Any]] = {"provision": {**VM, "did": "created", "rack": {"row": 3}}}
    vm = ProvisionFacts.of(facts)
    assert vm.recorded["rack"] == {"row": 3}
    replace(vm, node="father2").record(facts)
    assert facts == {"provision": {**VM, "node": "father2", "did": "created", "rack": {"row": 3}}}


def test_a_fact_that_was_recorded_without_a_value_is_written_as_null() -> None:
    vm = ProvisionFacts.read({**VM, "storage": None})
    assert vm.storage is None
    assert vm.values() == {**VM, "storage": None}


def test_facts_without_a_value_are_not_written() -> None:
    assert ProvisionFacts(name="pve1", node="pve1").values() == {"node": "pve1", "name": "pve1"}
    assert SshFacts(None).values() == {"root_public_key": None}
    assert AddressFacts("192.0.2.1", ("ssh-rsa A",)).values() == {
        "ip": "192.0.2.1", "host_keys": ["ssh-rsa A"],
    }  # fmt: skip


@pytest.mark.parametrize("facts", [{}, {"leaf_provision": {}}, {"leaf_provision": {"vmid": 7}}])
def test_a_required_fact_that_is_not_recorded_names_phase_and_key(facts: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(NotReady, match="the phase leaf_provision to be done and to record its name"):
        LeafProvisionFacts.of(facts)


def test_an_attached_pve_has_no_vm() -> None:
    attached = ProvisionFacts.read({"name": "pve1", "node": "pve1"})
    with pytest.raises(NotReady, match="record its vmid, found: name, node"):
        _ = attached.vm_id
    with pytest.raises(NotReady, match="record its mac"):
        _ = attached.card


def test_a_value_of_another_type_is_an_error_that_names_phase_and_key() -> None:
    with pytest.raises(PveError, match=r"the phase provision to record its vmid as int .*found 'seven'"):
        ProvisionFacts.read({"vmid": "seven"})


def test_the_address_is_that_of_the_latest_phase_which_has_one() -> None:
    facts: dict[str, dict[str, Any]] = {}
    assert nested_address(facts) is None
    for number, phase in enumerate((AddressFacts.phase, PveFacts.phase, NetworkFacts.phase), start=1):
        facts[phase] = {"ip": f"192.0.2.{number}"}
        assert nested_address(facts) == f"192.0.2.{number}"
    facts[NetworkFacts.phase] = {"mode": "dhcp"}
    assert nested_address(facts) == "192.0.2.2"
