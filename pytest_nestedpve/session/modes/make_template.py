"""--nested-make-template: one item instead of tests, which converts the nested VM to a template."""

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
    """PASSED if the template was created."""

    nested: NestedSession

    def runtest(self) -> None:
        from pytest_nestedpve.setup import make_template

        nested = self.nested
        assert nested.open_run is not None
        environment, audit = nested.open_run.environment, nested.open_run.runner.audit
        audit.write("template_start", phase="make_template")
        try:
            with nested.state.unlimited():
                template = make_template.create_template(environment)
        except PveError as error:
            audit.write("template_end", phase="make_template", status="failed", cause=str(error))
            raise Failed(f"nested-pve: {error}", pytrace=False) from error
        audit.write("template_end", phase="make_template", status="done", vmid=template.vmid)
        nested.state.remark(
            f"created the template {template.name} (VM {template.vmid}); to clone it in later sessions, set",
            f"    nested_pve_template = {template.name}",
            f"to delete it: {rerun_commands.command_to_destroy(nested.settings, template.template)}",
        )

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.config.rootpath / destroy_only.NODE, 0, self.name


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Create the item; collect and import no test. Raises pytest.UsageError if a phase for it is missing."""
    from pytest_nestedpve.setup.make_template import AFTER

    destroy_only.unregister_selecting_plugins(session.config)
    nested.state.last_phase(AFTER)

    def run(nested_pve: NestedPve) -> None:
        del nested_pve

    parent = exec.ItemParent.from_parent(session, name=destroy_only.NODE, nodeid=destroy_only.NODE)
    item: TemplateItem = TemplateItem.from_parent(parent, name="make-template", callobj=run)
    # A project's autouse fixtures are for its tests.
    item.fixturenames[:] = exec.FIXTURES
    item.add_marker(pytest.mark.nested_pve(upto=AFTER))
    item.nested = nested
    session.items = [item]
    session.testscollected = 1
