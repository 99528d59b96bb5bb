"""--nested-make-template: in place of all tests one item, which makes a template of the nested VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve import commands, destroy_items, exec_items
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.nested import NestedPve
    from pytest_nestedpve.session import NestedSession


class TemplateItem(pytest.Function):
    """PASSED when the template is there."""

    nested: NestedSession

    def runtest(self) -> None:
        from pytest_nestedpve.builtin import template

        nested = self.nested
        environment, runner = nested.environment, nested.runner
        assert environment is not None
        assert runner is not None
        runner.audit.write("template_start", phase="make_template")
        try:
            with nested.unlimited():
                made = template.make(environment)
        except PveError as error:
            runner.audit.write("template_end", phase="make_template", status="failed", cause=str(error))
            raise Failed(f"nested-pve: {error}", pytrace=False) from error
        runner.audit.write("template_end", phase="make_template", status="done", vmid=made.vmid)
        nested.remarks += [
            f"made the template {made.name} (VM {made.vmid}); sessions that clone it set",
            f"    nested_pve_template = {made.name}",
            f"this removes it: {commands.finishing(nested.settings, made.template)}",
        ]

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.config.rootpath / destroy_items.NODE, 0, self.name


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Make the item; no test is collected or imported. Raises pytest.UsageError without the phases for it."""
    from pytest_nestedpve.builtin.template import AFTER

    destroy_items.set_aside(session.config)
    nested.target(AFTER)

    def run(nested_pve: NestedPve) -> None:
        del nested_pve

    place = exec_items.Place.from_parent(session, name=destroy_items.NODE, nodeid=destroy_items.NODE)
    item: TemplateItem = TemplateItem.from_parent(place, name="make-template", callobj=run)
    # A project's autouse fixtures are for its tests.
    item.fixturenames[:] = exec_items.FIXTURES
    item.add_marker(pytest.mark.nested_pve(upto=AFTER))
    item.nested = nested
    session.items = [item]
    session.testscollected = 1
