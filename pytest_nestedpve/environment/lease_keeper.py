"""The lease of a live run, renewed by a thread until the end of the session's teardown."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership.lease import LeaseLost
from pytest_nestedpve.ownership.pool import host_clock, renew
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.run.audit_log import AuditLog
    from pytest_nestedpve.run.identity import Run

RENEWALS = 6  # per lease: five may fail in a row


class LeaseKeeper:
    """Extends the lease, six times in its length.

    `lost` is the reason why the lease is lost, None while it is not. Other sessions rely on the length of the
    lease, so no time scale applies to it.
    """

    def __init__(self, host: PveHost, run: Run, settings: Settings, audit: AuditLog) -> None:
        self._host, self._run, self._settings, self._audit = host, run, settings, audit
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="nested-pve-lease")
        self.lost: str | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; wait up to 10 seconds for a renewal under way."""
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(10)

    def check(self) -> None:
        """Raises LeaseLost when the lease is lost: then the run must not create anything more."""
        if self.lost is not None:
            raise LeaseLost(self.lost)

    def _keep(self) -> None:
        pause = self._settings.lease / RENEWALS
        while not self._end.wait(pause):
            pause = self._settings.lease / RENEWALS
            try:
                lease = renew(self._host.api, self._run, self._settings, host_clock(self._host))
            except LeaseLost as e:
                if not self._end.is_set():  # else the teardown removed the pool meanwhile
                    self.lost = str(e)
                    self._audit.write("lease", status="lost", cause=str(e))
                return
            except PveError as e:
                self._audit.write("lease", status="failed", cause=str(e))
                pause /= RENEWALS
            else:
                self._audit.write("lease", status="renewed", expires=lease.expires)
