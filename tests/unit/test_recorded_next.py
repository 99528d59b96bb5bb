"""What is done next when a call fails as it was recorded of PVE 9.2."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from memory_host import MemoryApi, MemoryHost
from recorded import EVERY, Recorded, ended, log

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.discover import Candidate, discover
from pytest_nestedpve.ownership.pool import read_pool
from pytest_nestedpve.ownership.proof import RunProver, prove
from pytest_nestedpve.pve import agent, errors, qemu
from pytest_nestedpve.pve.errors import ApiError, classify
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.teardown import teardown

pytestmark = pytest.mark.usefixtures("pool")


class Spoilt(MemoryApi):
    """A host whose answers to some calls somebody else gives; None: the host's own."""

    def __init__(self, host: MemoryHost, instead: Callable[[str, str, dict[str, Any]], Any]) -> None:
        super().__init__(host)
        self.memory = host
        self.instead = instead

    def _call(self, method: str, path: str, params: dict[str, Any]) -> Any:
        given = self.instead(method, path, params)
        return super()._call(method, path, params) if given is None else given


def spoilt(memory: MemoryHost, instead: Callable[[str, str, dict[str, Any]], Any]) -> PveHost:
    connected = memory.connect()
    return PveHost(connected.name, connected.ssh, Spoilt(memory, instead), connected.node)


def failing(memory: MemoryHost, verb: str, path: str, words: str, *, behind: bool, times: int) -> PveHost:
    """A host on which some calls fail `times` times with these words: refused, or `behind` exit status 0."""
    left = [times]

    def instead(method: str, asked: str, _params: dict[str, Any]) -> Any:
        if method != verb or not re.fullmatch(path, asked) or left[0] == 0:
            return None
        left[0] -= 1
        with memory.open() as model:
            model.state["commands"].append(f"{method} {asked}")
            if not behind:
                raise classify(words, 255, f"{method} {asked}")
            effect = {"do": "fail", "node": "father", "params": {"text": words.strip().splitlines()[-1]}}
            return model.fork("qmdestroy", asked.rpartition("/")[2], effect)

    return spoilt(memory, instead)


def one_of_ours(env: Environment) -> Candidate:
    vmid = create_marked(env.outer, env.run, env.settings).vmid
    return next(each for each in discover(env.outer, env.settings, env.run.id) if each.vmid == vmid)


def end(env: Environment, host: PveHost, candidate: Candidate, budget: float = 0.6) -> Outcome:
    prover = RunProver(host.api, env.settings, env.run.id)
    return destroy(host, prover, [candidate], force_stop=True, budget=budget)[0]


def deletes(memory: MemoryHost, candidate: Candidate) -> list[str]:
    """What was asked about the VM, from its first delete on: `delete`, and what it was proved by."""
    with memory.open() as model:
        asked = [line for line in model.state["commands"] if f"/qemu/{candidate.vmid}" in line]
    words = ["delete" if line.startswith("DELETE") else line.split()[1].rpartition("/")[2] for line in asked]
    return words[words.index("delete") :] if "delete" in words else []


PASSES = (
    ("concurrency-017", True), ("destroy-004", False), ("services-024", False), ("noquorum-029", True),
    ("nodedown-022", False), ("basic-030", False), ("lock-008", True), ("power-072", True),
)  # fmt: skip
STAYS = (("protection-003", False), ("clone-020", True), ("destroy-024", False), ("basic-065", False))


@pytest.mark.parametrize(("name", "behind"), PASSES)
def test_a_destroy_that_failed_for_what_may_pass_is_tried_again_and_proved_before(
    env: Environment, memory: MemoryHost, name: str, behind: bool
) -> None:
    mine = one_of_ours(env)
    words = EVERY[name]["stderr"]
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=behind, times=1)
    assert end(env, host, mine, budget=20).result == "gone"
    asked = deletes(memory, mine)
    assert asked.count("delete") == 2
    assert asked[asked.index("delete", 1) - 1] == "config"


@pytest.mark.parametrize(("name", "behind"), STAYS)
def test_a_destroy_that_failed_for_what_stays_is_given_up_with_pves_words(
    env: Environment, memory: MemoryHost, name: str, behind: bool
) -> None:
    mine = one_of_ours(env)
    words = EVERY[name]["stderr"]
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=behind, times=99)
    outcome = end(env, host, mine, budget=20)
    assert (outcome.result, outcome.reason) == ("left", classify(words).text)
    # Once, and once more after the others, on which it may have hung.
    assert deletes(memory, mine).count("delete") == 2


def test_a_destroy_that_never_works_ends_with_its_budget_and_the_last_reason(
    env: Environment, memory: MemoryHost
) -> None:
    mine = one_of_ours(env)
    words = EVERY["services-024"]["stderr"]
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=False, times=99)
    outcome = end(env, host, mine)
    assert outcome.result == "left"
    assert outcome.reason.endswith("Unable to load access control list: Connection refused")


def test_a_vm_is_gone_when_the_host_shows_none_and_not_when_a_call_says_so(
    env: Environment, memory: MemoryHost
) -> None:
    mine = one_of_ours(env)
    words = f"Configuration file 'nodes/father/qemu-server/{mine.vmid}.conf' does not exist"
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=True, times=1)
    assert end(env, host, mine, budget=20).result == "gone"
    with memory.open() as model:
        assert str(mine.vmid) not in model.state["vms"]


@pytest.mark.parametrize("name", ["create-049", "clone-012", "destroy-041"])
def test_an_id_that_is_taken_meanwhile_is_passed_over(
    env: Environment, memory: MemoryHost, name: str
) -> None:
    host = failing(memory, "POST", "/nodes/father/qemu", EVERY[name]["stderr"], behind=False, times=1)
    made = create_marked(host, env.run, env.settings)
    assert prove(env.outer.api, env.settings, made, env.run).ok


def test_a_create_that_was_refused_for_good_is_given_up(env: Environment, memory: MemoryHost) -> None:
    host = failing(memory, "POST", "/nodes/father/qemu", EVERY["create-007"]["stderr"], behind=False, times=9)
    with pytest.raises(errors.BadParameter, match="valid DNS name"):
        create_marked(host, env.run, env.settings)
    with memory.open() as model:
        assert model.state["vms"] == {}
        assert [line for line in model.state["commands"] if line == "POST /nodes/father/qemu"] != []


def test_a_create_whose_worker_was_killed_takes_another_id_and_the_teardown_takes_the_rest(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_nestedpve.ownership.create._SETTLE", 0.3)
    killed: list[str] = []

    def instead(method: str, path: str, params: dict[str, Any]) -> Any:
        if (method, path) != ("POST", "/nodes/father/qemu") or killed:
            return None
        with memory.open() as model:
            model.begin_create("father", params)
            killed.append(model.fork("qmcreate", str(params["vmid"]), {"do": "wait", "node": "father"}))
            model.kill(model.state["tasks"][-1])
        return killed[0]

    made = create_marked(spoilt(memory, instead), env.run, env.settings)
    assert prove(env.outer.api, env.settings, made, env.run).ok
    env.audit.write("task", upid=killed[0])
    assert teardown(env).left == ()
    with memory.open() as model:
        assert model.state["vms"] == {}


def test_a_guest_whose_agent_or_itself_is_down_is_asked_again_and_a_host_in_trouble_is_told() -> None:
    for name in ("agent-005", "agent-012", "agent-018"):
        assert agent.ping(PveshApi(Recorded(EVERY[name])), "father", 104) is False
    for name, kind in (("services-024", errors.ClusterFilesystemDown), ("basic-137", errors.GuestNotFound)):
        with pytest.raises(kind):
            agent.ping(PveshApi(Recorded(EVERY[name])), "father", 104)


def test_a_start_that_failed_is_told_and_one_that_was_needless_is_done() -> None:
    for name, kind in (("power-034", errors.StartFailed), ("clone-023", errors.WrongState)):
        said = EVERY[name]["stderr"].strip()
        with pytest.raises(kind, match=re.escape(said)):
            qemu.start(PveshApi(Recorded(EVERY[name], ended(said), log())), "father", 101)
    said = EVERY["power-008"]["stderr"].strip()
    assert qemu.start(PveshApi(Recorded(EVERY["power-008"], ended(said), log())), "father", 103) is None


def test_a_guest_that_does_not_go_down_in_time_is_told() -> None:
    record = EVERY["power-048"]
    with pytest.raises(errors.GuestTimeout, match="got timeout"):
        qemu.shutdown(
            PveshApi(Recorded(record, ended(record["stderr"].strip()), log())), "father", 103, timeout=5
        )


def test_a_pool_is_gone_when_pve_says_that_and_not_for_other_words() -> None:
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
def test_a_node_that_is_off_holds_up_no_teardown_on_the_others(
    env: Environment, memory: MemoryHost, name: str
) -> None:
    mine = one_of_ours(env)
    listed = {"type": "qemu", "vmid": 99_999, "node": "gone", "status": "unknown"}

    def instead(_method: str, path: str, params: dict[str, Any]) -> Any:
        if path.startswith("/nodes/gone/"):
            raise classify(EVERY[name]["stderr"], 255, path)
        if path == "/cluster/resources":
            return [*MemoryApi(memory).get(path, **params), listed]
        return None

    host = spoilt(memory, instead)
    assert [each.vmid for each in discover(host, env.settings, env.run.id)] == [mine.vmid]
