"""The time limits of playbooks are multiplied by the common factor, like all others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from jinja2 import Environment as Jinja
from ruamel.yaml import YAML

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve import deadline
from pytest_nestedpve.setup.ansible import playbooks
from pytest_nestedpve.setup.ansible.runner import PlaybookResult

ROLES = Path(__file__).parents[2] / "playbooks" / "roles"
LIMITS = {
    name: str(value)
    for file in ROLES.glob("*/defaults/main.yml")
    for name, value in YAML(typ="safe").load(file.read_text()).items()
    if name.endswith("_timeout")
}


@pytest.fixture
def doubled() -> Iterator[None]:
    before = deadline.scale()
    deadline.set_scale(2.0)
    yield
    deadline.set_scale(before)


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_a_limit_of_a_role_is_multiplied_by_the_factor(name: str) -> None:
    template = Jinja(autoescape=False).from_string(LIMITS[name])
    plain = int(template.render())
    assert plain > 0
    assert template.render(nested_pve_timeout_scale=2.0) == str(2 * plain)
    assert int(template.render(nested_pve_timeout_scale=0.001)) >= 1, "0 would be no limit, or none left"


@pytest.mark.usefixtures("doubled")
def test_a_playbook_gets_the_factor_as_a_variable_that_may_be_overridden(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: list[dict[str, object]] = []

    def record(_env: Environment, playbook: Path, **options: object) -> PlaybookResult:
        received.append(dict(options["variables"]))  # type: ignore[call-overload]
        return PlaybookResult(playbook.name, 0, {}, (), (), playbook)

    monkeypatch.setattr(playbooks, "run_playbook", record)
    env.facts = {"provision": {"vmid": 7, "name": "n1"}, "wait_ip": {"ip": "192.0.2.1"}}
    playbooks.run(env, Path("some.yml"), {"a": 1}, timeout=5)
    playbooks.run(env, Path("some.yml"), {"nested_pve_timeout_scale": 3}, timeout=5)
    assert received == [{"nested_pve_timeout_scale": 2.0, "a": 1}, {"nested_pve_timeout_scale": 3}]
