"""A PVE that exists as the nested one (`--nested-attach`): what the phases mean there, and what was chosen.

Three phases are taken as they are, seven are the run's own affair as ever, all others set the PVE up: they
are probed, and done only where a step of that name was chosen.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

TAKEN = ("provision", "start_vm", "wait_ip")
OWN = frozenset(
    {
        "preflight",
        "download_image",
        "leaf_provision",
        "leaf_start",
        "leaf_wait_ip",
        "sync_repos",
        "verify_ssh_chain",
    }
)
"""Phases that look only, or that work on the VM inside, which is the run's."""


class NotChosen(PveError):
    """The attached PVE lacks something of a phase that nobody chose to have done."""


class NotOurs(PveError):
    """Something was asked for that there is not, or must not be, of a PVE that is only attached."""


@dataclass(frozen=True)
class Attachment:
    """How a runner treats the phases of an attached PVE.

    `chosen` are the phases whose steps were chosen; `several`: xdist's workers share the PVE, so none is.
    `taken` gives the facts of a phase that is taken as it is.
    """

    host: str
    chosen: frozenset[str]
    taken: Callable[[Environment, str], Mapping[str, Any]]
    several: bool = False

    def takes(self, name: str) -> bool:
        return name in TAKEN

    def guards(self, name: str) -> bool:
        """Whether the phase would change what exists."""
        return name not in TAKEN and name not in OWN

    def allow(self, name: str, missing: str | None, *, probed: bool) -> None:
        """Raises NotChosen unless the phase may be done. `missing`: what its probe found lacking; `probed`:
        whether it has one."""
        if name in self.chosen:
            return
        found = missing or ("that its probe says no" if probed else "that it has no probe to tell")
        if self.several:
            advice = "Workers of xdist share the attached PVE and do none of it: choose that step without -n."
        else:
            command = shlex.join(["pytest", "--nested-attach", self.host, "-k", name])
            advice = (
                f"`{command}` does it, and `-k '{name} or …'` what needs it in the same session; "
                f"`--nested-skip {name}` takes it as done."
            )
        raise NotChosen(
            f"expected {name} to be done on the attached PVE {self.host}, found: {found}. A PVE that "
            f"exists is changed only by steps that were chosen by -k or by id. {advice}"
        )


def chosen_steps(names: Iterable[str], prefix: str, keyword: str, arguments: Iterable[str]) -> frozenset[str]:
    """Which of the phases `names`, whose steps are selected, were chosen: by -k or by node id.

    By id: an argument that ends with `::` and the step's name. By -k: an expression that takes the step by
    its own name, and would not take a step of another name; so `not slow`, which takes nearly everything,
    chooses nothing, nor does a word that is in the name of the file. What selects in other ways (--lf, -m,
    --deselect, nothing at all) chooses nothing.
    """
    ids = {argument.rpartition("::")[2] for argument in arguments if "::" in argument}
    return frozenset(name for name in names if prefix + name in ids or _named(prefix, name, keyword))


def _named(prefix: str, name: str, keyword: str) -> bool:
    if not keyword.strip():
        return False
    from _pytest.mark.expression import Expression

    expression = Expression.compile(keyword)

    def takes(text: str) -> bool:
        def matches(word: str, /, **_: Any) -> bool:
            return word.lower() in text

        return expression.evaluate(matches)

    return takes(prefix + name) and not takes(prefix)
