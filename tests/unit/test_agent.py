"""Commands that a guest's agent runs: started once, awaited to their end."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_nestedpve.pve import agent
from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.errors import AgentUnavailable, CommandTimeout, UnreadableAnswer

BASE = "/nodes/father/qemu/120/agent"
GONE = AgentUnavailable("QEMU guest agent is not running")


class Agent:
    """Answers the calls of exec and of exec-status in their order; the last answer is repeated."""

    def __init__(self, started: list[Any], ended: list[Any]) -> None:
        self._answers = {"post": started, "get": ended}
        self.calls: list[tuple[str, str, dict[str, Any]]] = []

    def get(self, path: str, /, **params: Any) -> Any:
        return self._call("get", path, params)

    def post(self, path: str, /, **params: Any) -> Any:
        return self._call("post", path, params)

    def put(self, path: str, /, **params: Any) -> Any:
        raise NotImplementedError

    def delete(self, path: str, /, **params: Any) -> Any:
        raise NotImplementedError

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        self.calls.append((verb, path, params))
        answers = self._answers[verb]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, BaseException):
            raise answer
        return answer


def execute(api: Agent, *, retry: bool = False, limit: float = 5.0) -> agent.Execution:
    return agent.execute(api, "father", 120, ["id", "-u"], deadline=Deadline(limit), what="`id`", retry=retry)


def test_a_command_is_started_once_and_polled_to_its_end() -> None:
    end = {"exited": 1, "exitcode": 7, "out-data": "out", "err-data": "err"}
    api = Agent([{"pid": 17}], [{"exited": 0}, {"exited": 0}, end])
    assert execute(api) == agent.Execution(7, "out", "err")
    assert api.calls == [
        ("post", f"{BASE}/exec", {"command": ["id", "-u"]}),
        *[("get", f"{BASE}/exec-status", {"pid": 17})] * 3,
    ]


def test_answers_wrapped_by_pvesh_are_the_same() -> None:
    api = Agent([{"result": {"pid": "17"}}], [{"result": {"exited": True, "exitcode": 0}}])
    assert execute(api) == agent.Execution(0, "", "")


def test_a_command_ended_by_a_signal_has_no_exit_status() -> None:
    ended = execute(Agent([{"pid": 17}], [{"exited": 1, "signal": 9, "out-data": "x", "out-truncated": 1}]))
    assert ended == agent.Execution(-1, "x", "", signal=9, truncated=True)


def test_an_unavailable_agent_is_polled_only_on_request() -> None:
    end = {"exited": 1, "exitcode": 0}
    assert execute(Agent([GONE, {"pid": 17}], [GONE, end]), retry=True).rc == 0
    for started, ended in (([GONE], [end]), ([{"pid": 17}], [GONE])):
        with pytest.raises(AgentUnavailable):
            execute(Agent(started, ended))


@pytest.mark.parametrize("odd", [None, [], {}, {"pid": "x"}, {"result": None}], ids=str)
def test_an_answer_without_a_pid_is_an_error_and_the_command_is_not_started_again(odd: object) -> None:
    api = Agent([odd], [{"exited": 1}])
    with pytest.raises(UnreadableAnswer):
        execute(api, retry=True)
    assert len(api.calls) == 1


def test_a_command_that_does_not_end_is_named_with_its_vm() -> None:
    with pytest.raises(CommandTimeout, match="the end of `id` in VM 120"):
        execute(Agent([{"pid": 17}], [{"exited": 0}]), limit=0.01)
