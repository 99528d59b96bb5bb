"""Questions asked several at a time before they come up: each start of `pvesh` takes a second and more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.parallel import in_parallel
from pytest_nestedpve.setup.checks.storage import contents, usable

WIDTH = 4
Question = tuple[str, dict[str, Any]]


class Ahead:
    """An Api that only reads, and asks nothing twice: one look, one answer, an error too."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._known: dict[str, Any] = {}

    def ask(self, questions: Sequence[Question]) -> None:
        """Have the answers ready. Raises nothing of the host's: an error is given to who asks for it."""
        for (path, params), answer in zip(questions, in_parallel(self._one, questions, WIDTH), strict=True):
            self._known[_key(path, params)] = answer

    def _one(self, question: Question) -> Any:
        try:
            return self._api.get(question[0], **question[1])
        except PveError as e:
            return e

    def prepare(self, node: str) -> None:
        """Ask what every look at a node asks: first what there is, then what the storages hold."""
        path = f"/nodes/{node}/storage"
        self.ask(
            [
                (path, {"format": True}),
                ("/cluster/resources", {"type": "vm"}),
                (f"/nodes/{node}/status", {}),
                (f"/nodes/{node}/network", {}),
                (path, {}),
                ("/pools", {}),
            ]
        )
        listed = self._known[_key(path, {})]
        self.ask(
            [
                (f"{path}/{storage['storage']}/content", {"content": kind})
                for storage in (entries(listed) if isinstance(listed, list) else ())
                for kind in ("images", "import")
                if storage.get("storage") and kind in contents(storage) and usable(storage)
            ]
        )

    def get(self, path: str, /, **params: Any) -> Any:
        key = _key(path, params)
        if key not in self._known:
            self._known[key] = self._one((path, params))
        answer = self._known[key]
        if isinstance(answer, PveError):
            raise answer
        return answer

    def _refuse(self, path: str, /, **params: Any) -> Any:
        raise AssertionError(f"{path} ({', '.join(params)}): a look changes nothing")

    post = put = delete = _refuse

    @property
    def transport(self) -> str:
        return str(getattr(self._api, "transport", "its own"))


def _key(path: str, params: dict[str, Any]) -> str:
    return f"{path} {sorted(params.items())}"
