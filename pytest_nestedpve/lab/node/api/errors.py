"""Errors with PVE's messages, their exit codes and HTTP statuses."""

from __future__ import annotations

from collections.abc import Mapping

NOT_SUPPORTED = "not supported by the lab"


class PveFailure(Exception):
    """A call failed. `text` is PVE's message without the last newline, `rc` the command's exit code (an errno
    without meaning in PVE: the recorded one), `status` the HTTP status."""

    def __init__(self, text: str, *, rc: int = 255, status: int = 500) -> None:
        super().__init__(text)
        self.text = text
        self.rc = rc
        self.status = status
        self.errors: dict[str, str] = {}

    def for_cli(self) -> str:
        """The lines on stderr, last newline included."""
        return self.text + "\n"

    @property
    def message(self) -> str:
        return self.text


class NoReply(Exception):
    """No answer, by a fault rule: the caller's connection is closed."""


class BadParameters(PveFailure):
    """400, with errors by parameter, which may end in a newline as PVE's do."""

    def __init__(
        self, errors: Mapping[str, str], *, rc: int = 2, text: str = "Parameter verification failed."
    ) -> None:
        super().__init__(text, rc=rc, status=400)
        self.errors = dict(errors)

    def for_cli(self) -> str:
        lines = "".join(f"{name}: {self.errors[name]}\n" for name in sorted(self.errors))
        return f"400 {self.text}\n{lines}"


class NotAllowed(PveFailure):
    """403: "Permission check failed", with path and missing privilege."""

    def __init__(self, what: str = "", *, rc: int = 255) -> None:
        super().__init__("Permission check failed" + (f" ({what})" if what else ""), rc=rc, status=403)

    def for_cli(self) -> str:
        return f"403 {self.text}\n"


class NotImplementedHere(PveFailure):
    """501: the path has no such method."""

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Method '{method} {path}' not implemented", rc=1, status=501)


class Unsupported(PveFailure):
    """501: a feature of PVE that the lab does not have; a call of it never succeeds."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: {NOT_SUPPORTED}", rc=255, status=501)


def no_guest(node: str, vmid: int | str, *, rc: int = 2) -> PveFailure:
    """The error of most calls for a missing guest."""
    return PveFailure(f"Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist", rc=rc)


def no_guest_found(node: str, vmid: int | str, *, rc: int = 255) -> PveFailure:
    """The error of stop, shutdown, clone, reset, suspend, resume and wait for a missing guest."""
    return PveFailure(f"unable to find configuration file for VM {vmid} on node '{node}'", rc=rc)
