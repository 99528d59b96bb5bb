"""Reactions to calls that fail as recorded of PVE 9.2: retry, give up, use another id."""

from __future__ import annotations

import re

import pytest
from recorded import EVERY, Recorded, ended, log
from standin_host import StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.discover import Candidate, discover
from pytest_nestedpve.ownership.pool import read_pool
from pytest_nestedpve.ownership.proof import RunProver, prove
from pytest_nestedpve.pve import agent, errors, qemu
from pytest_nestedpve.pve.errors import ApiError, classify
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.teardown import teardown

pytestmark = pytest.mark.usefixtures("pool")


def fail(host: StandinHost, verb: str, path: str, text: str, *, in_task: bool, times: int) -> None:
    """Calls fail `times` times with this text: refused, or `in_task`: accepted, and the task fails."""
    if in_task:
        vmid = int(path.rpartition("/")[2])
        host.fault(task="qmdestroy", vmid=vmid, text=text.strip().splitlines()[-1], times=times)
    else:
        host.fault(verb, path, text=text, times=times)


def one_of_ours(env: Environment) -> Candidate:
    vmid = create_marked(env.outer, env.run, env.settings).vmid
    return next(vm for vm in discover(env.outer, env.settings, env.run.id) if vm.vmid == vmid)


def end(env: Environment, candidate: Candidate, budget: float = 0.6) -> Outcome:
    prover = RunProver(env.outer.api, env.settings, env.run.id)
    return destroy(env.outer, prover, [candidate], force_stop=True, budget=budget)[0]


def calls_from_delete_on(host: StandinHost, candidate: Candidate) -> list[str]:
    """The calls about the VM from its first delete on: `delete`, and the ends of paths of the others."""
    lines = [line for line in host.calls() if f"/qemu/{candidate.vmid}" in line]
    ends = ["delete" if line.startswith("DELETE") else line.split()[1].rpartition("/")[2] for line in lines]
    return ends[ends.index("delete") :] if "delete" in ends else []


PASSING = (
    ("concurrency-017", True), ("destroy-004", False), ("services-024", False), ("noquorum-029", True),
    ("nodedown-022", False), ("basic-030", False), ("lock-008", True), ("power-072", True),
)  # fmt: skip
LASTING = (("protection-003", False), ("clone-020", True), ("destroy-024", False), ("basic-065", False))


@pytest.mark.parametrize(("name", "in_task"), PASSING)
def test_a_destroy_that_failed_by_a_passing_error_is_retried_after_a_new_proof(
    env: Environment, host: StandinHost, name: str, in_task: bool
) -> None:
    mine = one_of_ours(env)
    text = EVERY[name]["stderr"]
    fail(host, "DELETE", f"/nodes/father/qemu/{mine.vmid}", text, in_task=in_task, times=1)
    assert end(env, mine, budget=20).result == "gone"
    calls = calls_from_delete_on(host, mine)
    assert calls.count("delete") == 2
    assert calls[calls.index("delete", 1) - 1] == "config"


@pytest.mark.parametrize(("name", "in_task"), LASTING)
def test_a_destroy_that_failed_by_a_lasting_error_is_given_up_with_pves_text(
    env: Environment, host: StandinHost, name: str, in_task: bool
) -> None:
    mine = one_of_ours(env)
    text = EVERY[name]["stderr"]
    fail(host, "DELETE", f"/nodes/father/qemu/{mine.vmid}", text, in_task=in_task, times=99)
    outcome = end(env, mine, budget=20)
    assert (outcome.result, outcome.reason) == ("left", classify(text).text)
    # Once, and once more after the other VMs, on which it may have depended.
    assert calls_from_delete_on(host, mine).count("delete") == 2


def test_a_destroy_that_always_fails_ends_with_its_budget_and_the_last_reason(
    env: Environment, host: StandinHost
) -> None:
    mine = one_of_ours(env)
    text = EVERY["services-024"]["stderr"]
    fail(host, "DELETE", f"/nodes/father/qemu/{mine.vmid}", text, in_task=False, times=99)
    outcome = end(env, mine)
    assert outcome.result == "left"
    assert outcome.reason.endswith("Unable to load access control list: Connection refused")


def test_a_vm_is_gone_when_the_host_lists_none_and_not_by_the_error_of_a_call(
    env: Environment, host: StandinHost
) -> None:
    mine = one_of_ours(env)
    text = f"Configuration file 'nodes/father/qemu-server/{mine.vmid}.conf' does not exist"
    fail(host, "DELETE", f"/nodes/father/qemu/{mine.vmid}", text, in_task=True, times=1)
    assert end(env, mine, budget=20).result == "gone"
    assert mine.vmid not in host.vms()


@pytest.mark.parametrize("name", ["create-049", "clone-012", "destroy-041"])
def test_a_create_whose_id_is_in_use_meanwhile_uses_another_id(
    env: Environment, host: StandinHost, name: str
) -> None:
    fail(host, "POST", "/nodes/father/qemu", EVERY[name]["stderr"], in_task=False, times=1)
    created = create_marked(env.outer, env.run, env.settings)
    assert prove(env.outer.api, env.settings, created, env.run).ok


def test_a_create_that_was_refused_for_good_is_not_retried(env: Environment, host: StandinHost) -> None:
    fail(host, "POST", "/nodes/father/qemu", EVERY["create-007"]["stderr"], in_task=False, times=9)
    with pytest.raises(errors.BadParameter, match="valid DNS name"):
        create_marked(env.outer, env.run, env.settings)
    assert host.vms() == []
    assert len([line for line in host.calls() if line.startswith("POST /nodes/father/qemu ")]) == 1


def test_a_create_whose_worker_was_killed_uses_another_id_and_the_teardown_removes_its_lock(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_nestedpve.ownership.create._SETTLE", 0.3)
    killed: list[str] = []

    def kill() -> None:
        killed.append(host.tasks("qmcreate")[0].upid)
        host.kill_task(killed[0])
        host.clear_faults()

    host.slow(qmcreate=60)
    host.before("GET", "/nodes/father/tasks/.*", kill)
    created = create_marked(env.outer, env.run, env.settings)
    assert prove(env.outer.api, env.settings, created, env.run).ok
    assert host.config(int(killed[0].split(":")[6])) == {"lock": "create"}
    env.audit.write("task", upid=killed[0])
    assert teardown(env).left == ()
    assert host.vms() == []


def test_a_guest_without_agent_is_polled_again_and_an_error_of_the_host_is_raised() -> None:
    for name in ("agent-005", "agent-012", "agent-018"):
        assert agent.ping(PveshApi(Recorded(EVERY[name])), "father", 104) is False
    for name, kind in (("services-024", errors.ClusterFilesystemDown), ("basic-137", errors.GuestNotFound)):
        with pytest.raises(kind):
            agent.ping(PveshApi(Recorded(EVERY[name])), "father", 104)


def test_a_start_that_failed_is_an_error_and_one_of_a_running_vm_is_none() -> None:
    for name, kind in (("power-034", errors.StartFailed), ("clone-023", errors.WrongState)):
        text = EVERY[name]["stderr"].strip()
        with pytest.raises(kind, match=re.escape(text)):
            qemu.start(PveshApi(Recorded(EVERY[name], ended(text), log())), "father", 101)
    text = EVERY["power-008"]["stderr"].strip()
    assert qemu.start(PveshApi(Recorded(EVERY["power-008"], ended(text), log())), "father", 103) is None


def test_a_guest_that_does_not_shut_down_in_time_is_an_error() -> None:
    record = EVERY["power-048"]
    with pytest.raises(errors.GuestTimeout, match="got timeout"):
        qemu.shutdown(
            PveshApi(Recorded(record, ended(record["stderr"].strip()), log())), "father", 103, timeout=5
        )


def test_a_pool_is_gone_by_pves_own_error_and_by_no_other() -> None:
    gone = "pool 'npve-1' does not exist"
    assert read_pool(PveshApi(Recorded((2, "", gone))), "npve-1") is None
    for answer in (
        (2, "", "no such resource '/pools'"),
        (255, "", EVERY["ownB-046"]["stderr"]),
        (0, "", ""),
        (0, "{}", ""),
        (0, "[]", ""),
        (0, '[{"poolid":"npve-2","comment":""}]', ""),
    ):
        with pytest.raises(ApiError):
            read_pool(PveshApi(Recorded(answer)), "npve-1")


@pytest.mark.parametrize("name", ["nodedown-022", "basic-079"])
def test_a_node_that_is_offline_delays_no_teardown_on_the_others(
    env: Environment, host: StandinHost, name: str
) -> None:
    mine = one_of_ours(env)
    row = {"type": "qemu", "vmid": 99_999, "node": "gone", "status": "unknown"}
    host.change_answers("GET", "/cluster/resources", lambda rows: [*rows, row])
    refused: list[str] = []

    def refuse() -> None:
        host.before("GET", "/nodes/gone/.*", refuse)
        refused.append(name)
        raise classify(EVERY[name]["stderr"], 255, "get /nodes/gone")

    host.before("GET", "/nodes/gone/.*", refuse)
    assert [vm.vmid for vm in discover(env.outer, env.settings, env.run.id)] == [mine.vmid]
    assert refused != []
