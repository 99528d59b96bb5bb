"""A look at a host: what it answered so far, and what was chosen by that. Only ever reads."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup.checks.choices import Choices

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost


class Seen:
    """What checks share. `settings` become those with the host's profile once that is read.

    `boots`: the run makes the VM itself, from an image or a template. `workers`: how many nested PVEs there
    will be at once; `own` are the runs among them that have begun. `by_https`: runs try HTTPS at this host.
    """

    def __init__(
        self,
        host: PveHost,
        settings: Settings,
        *,
        boots: bool = True,
        workers: int = 1,
        own: frozenset[str] = frozenset(),
        by_https: bool = False,
    ) -> None:
        self.host = host
        self.settings = settings
        self.boots = boots
        self.workers = workers
        self.own = own
        self.by_https = by_https
        self.choices = Choices()
        self._answers: dict[str, list[dict[str, Any]] | PveError] = {}

    def choose(self, why: str = "", /, **chosen: Any) -> None:
        """Take one value, for a reason."""
        reasons = {**self.choices.why, **dict.fromkeys(chosen, why)} if why else self.choices.why
        self.choices = replace(self.choices, **chosen, why=reasons)

    def elsewhere(self, node: str) -> Seen:
        """A look at another node of the cluster, with choices of its own. Raises PveError."""
        return Seen(
            self.host.at(node), self.settings, boots=self.boots, workers=self.workers, own=self.own,
            by_https=self.by_https,
        )  # fmt: skip

    def go_to(self, node: str) -> None:
        """Look at that node from now on. Raises PveError."""
        self.host = self.host.at(node)
        for name in ("status", "storages"):
            self._answers.pop(name, None)

    def pytest(self, *arguments: str) -> str:
        """A command line for this host, for a shell on this machine."""
        host = ["--pve-host", self.settings.host] if self.settings.host else []
        return shlex.join(["pytest", *host, *arguments])

    def _once(self, name: str, ask: Callable[[], Any]) -> list[dict[str, Any]]:
        """A list that the host gives; asked once, an error too. Raises PveError."""
        if name not in self._answers:
            try:
                self._answers[name] = entries(ask())
            except PveError as e:
                self._answers[name] = e
        answer = self._answers[name]
        if isinstance(answer, PveError):
            raise answer
        return answer

    @property
    def status(self) -> dict[str, Any]:
        """The state of the node: cores, memory. Raises PveError."""
        path = f"/nodes/{self.host.node}/status"
        return self._once("status", lambda: [self.host.api.get(path)])[0]

    @property
    def guests(self) -> list[dict[str, Any]]:
        """The guests of the whole cluster. Raises PveError."""
        return self._once("guests", lambda: self.host.api.get("/cluster/resources", type="vm"))

    @property
    def storages(self) -> list[dict[str, Any]]:
        """The storages of the node, with the formats of each. Raises PveError."""
        path = f"/nodes/{self.host.node}/storage"
        return self._once("storages", lambda: self.host.api.get(path, format=True))
