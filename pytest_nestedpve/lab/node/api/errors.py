"""Errors in PVE's words, with what each door makes of them: exit code, HTTP status."""

from __future__ import annotations

from collections.abc import Mapping

NOT_SUPPORTED = "not supported by the lab"


class PveFailure(Exception):
    """A call failed. `text` is PVE's words without the last newline; `rc` what the command exits with
    (PVE's exit codes are the errno of the moment: no meaning, but the recorded ones); `status` HTTP's."""

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
    """The caller gets no answer, by a fault rule: its connection ends."""


class BadParameters(PveFailure):
    """400, by parameter. Values may end in a newline where PVE's do."""

    def __init__(
        self, errors: Mapping[str, str], *, rc: int = 2, text: str = "Parameter verification failed."
    ) -> None:
        super().__init__(text, rc=rc, status=400)
        self.errors = dict(errors)

    def for_cli(self) -> str:
        lines = "".join(f"{name}: {self.errors[name]}\n" for name in sorted(self.errors))
        return f"400 {self.text}\n{lines}"


class NotAllowed(PveFailure):
    """403: "Permission check failed", with what was missing where."""

    def __init__(self, what: str = "", *, rc: int = 255) -> None:
        super().__init__("Permission check failed" + (f" ({what})" if what else ""), rc=rc, status=403)

    def for_cli(self) -> str:
        return f"403 {self.text}\n"


class NotImplementedHere(PveFailure):
    """The path has no such method."""

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Method '{method} {path}' not implemented", rc=1, status=501)


class Unsupported(PveFailure):
    """The real thing knows it, the lab does not: never a made-up success."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: {NOT_SUPPORTED}", rc=255, status=501)


def no_guest(node: str, vmid: int | str, *, rc: int = 2) -> PveFailure:
    """The words of most calls for a guest that is not there."""
    return PveFailure(f"Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist", rc=rc)


def no_guest_found(node: str, vmid: int | str, *, rc: int = 255) -> PveFailure:
    """The words of stop, shutdown, clone, reset, suspend, resume and wait."""
    return PveFailure(f"unable to find configuration file for VM {vmid} on node '{node}'", rc=rc)
