"""State that the checks of a host share: answers of its API, and the choices so far. Reads only."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.parallel import in_parallel
from pytest_nestedpve.pve.storage import contents, usable
from pytest_nestedpve.setup.checks.choices import Choices

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.host import PveHost

WIDTH = 4
Request = tuple[str, dict[str, Any]]


class _Answers:
    """Answers of an API by request; an error is an answer too."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def once(self, key: str, send: Callable[[], Any]) -> Any:
        """The answer for `key`; `send` is called at most once. Raises PveError, the same one each time."""
        if key not in self.known:
            self.known[key] = _attempt(send)
        answer = self.known[key]
        if isinstance(answer, PveError):
            raise answer
        return answer


def _attempt(send: Callable[[], Any]) -> Any:
    try:
        return send()
    except PveError as e:
        return e


class Context:
    """What checks share: `settings` include the host's profile once it has been read.

    `boots`: the run creates the VM from an image or a template. `workers`: the number of nested PVEs at the
    same time; `begun`: the ids of their runs that have begun. `by_https`: runs try HTTPS at this host.
    """

    def __init__(
        self,
        host: PveHost,
        settings: Settings,
        *,
        boots: bool = True,
        workers: int = 1,
        begun: frozenset[str] = frozenset(),
        by_https: bool = False,
    ) -> None:
        self.host = host
        self.settings = settings
        self.boots = boots
        self.workers = workers
        self.begun = begun
        self.by_https = by_https
        self.choices = Choices()
        self._answers = _Answers()

    def choose(self, why: str = "", /, **chosen: Any) -> None:
        """Set values of `choices`, with the reason `why`."""
        reasons = {**self.choices.why, **dict.fromkeys(chosen, why)} if why else self.choices.why
        self.choices = replace(self.choices, **chosen, why=reasons)

    def elsewhere(self, node: str) -> Context:
        """A context for another node of the cluster, with its own choices. Raises PveError."""
        return Context(
            self.host.at(node), self.settings, boots=self.boots, workers=self.workers, begun=self.begun,
            by_https=self.by_https,
        )  # fmt: skip

    def go_to(self, node: str) -> None:
        """Make `node` the one that later checks are about. Raises PveError."""
        self.host = self.host.at(node)

    def pytest(self, *arguments: str) -> str:
        """A command line of pytest for this host, for a shell on this machine."""
        host = ["--pve-host", self.settings.host] if self.settings.host else []
        return shlex.join(["pytest", *host, *arguments])

    def _entries(self, path: str, **params: Any) -> list[dict[str, Any]]:
        return list(self._answers.once(path, lambda: entries(self.host.api.get(path, **params))))

    @property
    def status(self) -> dict[str, Any]:
        """The state of the node: cores, memory. Raises PveError."""
        path = f"/nodes/{self.host.node}/status"
        return dict(self._answers.once(path, lambda: entries([self.host.api.get(path)]))[0])

    @property
    def guests(self) -> list[dict[str, Any]]:
        """The guests of the whole cluster. Raises PveError."""
        return self._entries("/cluster/resources", type="vm")

    @property
    def storages(self) -> list[dict[str, Any]]:
        """The storages of the node, with the formats of each. Raises PveError."""
        return self._entries(f"/nodes/{self.host.node}/storage", format=True)


class ReadOnlyApi:
    """An Api that sends each request at most once, some in parallel beforehand, and refuses every change.

    Each start of `pvesh` takes a second or more.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self._answers = _Answers()

    def _prefetch(self, requests: Sequence[Request]) -> None:
        """Send `requests` in parallel. An error is raised only when the answer is read."""
        answers = in_parallel(
            lambda request: _attempt(lambda: self._api.get(request[0], **request[1])), requests, WIDTH
        )
        for (path, params), answer in zip(requests, answers, strict=True):
            self._answers.known[_key(path, params)] = answer

    def prepare(self, node: str) -> None:
        """Prefetch the answers that all checks of a node use, then the contents of its storages."""
        path = f"/nodes/{node}/storage"
        self._prefetch(
            [
                (path, {"format": True}),
                ("/cluster/resources", {"type": "vm"}),
                (f"/nodes/{node}/status", {}),
                (f"/nodes/{node}/network", {}),
                (path, {}),
                ("/pools", {}),
            ]
        )
        storages = self._answers.known[_key(path, {})]
        self._prefetch(
            [
                (f"{path}/{storage['storage']}/content", {"content": kind})
                for storage in (entries(storages) if isinstance(storages, list) else ())
                for kind in ("images", "import")
                if storage.get("storage") and kind in contents(storage) and usable(storage)
            ]
        )

    def get(self, path: str, /, **params: Any) -> Any:
        return self._answers.once(_key(path, params), lambda: self._api.get(path, **params))

    def _refuse(self, path: str, /, **params: Any) -> Any:
        raise AssertionError(f"{path} ({', '.join(params)}): checks change nothing on the host")

    post = put = delete = _refuse

    @property
    def transport(self) -> str:
        return str(getattr(self._api, "transport", "its own"))


def _key(path: str, params: dict[str, Any]) -> str:
    return f"{path} {sorted(params.items())}"
