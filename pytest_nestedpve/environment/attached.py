"""An existing PVE as the nested one (`--nested-attach`): the guard of its phases, and the steps by name.

A phase that would change the attached PVE is probed; its action runs only when its step was selected by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pytest_nestedpve.pve.errors import PveError


class StepNotSelected(PveError):
    """The attached PVE lacks the result of a phase whose step was not selected by name."""


class NotOurs(PveError):
    """The request needs a VM or a host that the run created, and the nested PVE is only attached."""


@dataclass(frozen=True)
class Guard:
    """Permission of one phase to change the attached PVE `host`.

    `selected`: the phase's step was selected by name. `several`: workers of xdist share the PVE; then
    no step is selected.
    """

    host: str
    selected: bool
    several: bool = False

    def check(self, name: str, missing: str | None, *, probed: bool) -> None:
        """Raises StepNotSelected unless the action of the phase `name` may run.

        `missing`: the reason of its probe; `probed`: whether the phase has a probe.
        """
        if self.selected:
            return
        state = missing or ("its probe failed" if probed else "it has no probe, so its state is unknown")
        if self.several:
            advice = (
                "Workers of xdist share the attached PVE and do not change it: select the step without -n."
            )
        else:
            command = shlex.join(["pytest", "--nested-attach", self.host, "-k", name])
            advice = (
                f"`{command}` runs that step, `-k '{name} or …'` also tests that need it; "
                f"`--nested-skip {name}` assumes that it is done."
            )
        raise StepNotSelected(
            f"expected {name} to be done on the attached PVE {self.host}, found: {state}. An attached PVE "
            f"is changed only by steps that were selected by -k or by node id. {advice}"
        )


def steps_by_name(
    names: Iterable[str], prefix: str, keyword: str, arguments: Iterable[str]
) -> frozenset[str]:
    """The phases among `names` whose steps pytest selected by their own name: by -k, or by node id.

    By id: an argument that ends with `::` and the step's name. By -k: an expression that matches the step's
    own name, and would not match a step of another name; so neither `not slow`, which matches nearly
    everything, nor a word of the file's name selects a step by name. Nor does any other way of selection
    (--lf, -m, --deselect, none at all).
    """
    ids = {argument.rpartition("::")[2] for argument in arguments if "::" in argument}
    return frozenset(name for name in names if prefix + name in ids or _matches_name(prefix, name, keyword))


def _matches_name(prefix: str, name: str, keyword: str) -> bool:
    if not keyword.strip():
        return False
    from _pytest.mark.expression import Expression

    expression = Expression.compile(keyword)

    def matches(text: str) -> bool:
        def contains(word: str, /, **_: Any) -> bool:
            return word.lower() in text

        return expression.evaluate(contains)

    return matches(prefix + name) and not matches(prefix)
