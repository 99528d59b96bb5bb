"""--nested-make-template: in place of all tests one item, which makes a template of the nested VM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run import rerun_commands
from pytest_nestedpve.session.modes import destroy_only, exec

if TYPE_CHECKING:
    from pytest_nestedpve.session.nested_pve import NestedPve
    from pytest_nestedpve.session.session import NestedSession


class TemplateItem(pytest.Function):
    """PASSED when the template is there."""

    nested: NestedSession

    def runtest(self) -> None:
        from pytest_nestedpve.setup import make_template

        nested = self.nested
        assert nested.open_run is not None
        environment, audit = nested.open_run.environment, nested.open_run.runner.audit
        audit.write("template_start", phase="make_template")
        try:
            with nested.state.unlimited():
                made = make_template.create_template(environment)
        except PveError as error:
            audit.write("template_end", phase="make_template", status="failed", cause=str(error))
            raise Failed(f"nested-pve: {error}", pytrace=False) from error
        audit.write("template_end", phase="make_template", status="done", vmid=made.vmid)
        nested.state.remark(
            f"made the template {made.name} (VM {made.vmid}); sessions that clone it set",
            f"    nested_pve_template = {made.name}",
            f"this removes it: {rerun_commands.command_to_destroy(nested.settings, made.template)}",
        )

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.config.rootpath / destroy_only.NODE, 0, self.name


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Make the item; no test is collected or imported. Raises pytest.UsageError without the phases for it."""
    from pytest_nestedpve.setup.make_template import AFTER

    destroy_only.set_aside(session.config)
    nested.state.last_phase(AFTER)

    def run(nested_pve: NestedPve) -> None:
        del nested_pve

    place = exec.Place.from_parent(session, name=destroy_only.NODE, nodeid=destroy_only.NODE)
    item: TemplateItem = TemplateItem.from_parent(place, name="make-template", callobj=run)
    # A project's autouse fixtures are for its tests.
    item.fixturenames[:] = exec.FIXTURES
    item.add_marker(pytest.mark.nested_pve(upto=AFTER))
    item.nested = nested
    session.items = [item]
    session.testscollected = 1
