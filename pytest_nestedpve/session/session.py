"""The session of one pytest process: it opens hosts and the run at first use, and ends both once."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve.run.signals import SignalGuard, write_now
from pytest_nestedpve.session.exit_status import NO_HOST, NoHostFailure, PhaseFailure
from pytest_nestedpve.session.state import SessionState

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.calls import CallLog
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session.open_run import OpenRun

KEY = pytest.StashKey["NestedSession"]()


class NestedSession:
    """Owner of the signal handlers, the outer hosts and the open run.

    `open_run` is None until a test needs the nested PVE; at the end of the session it is still there, ended.
    """

    def __init__(self, session: pytest.Session, settings: Settings) -> None:
        self._session = session
        self.guard = SignalGuard(stop=self._stop, report=self._print_now, give_up=self._give_up)
        self.state = SessionState(session.config, settings, self.guard)
        self.open_run: OpenRun | None = None
        self._hosts: list[PveHost] = []  # open; closed by close_hosts alone
        self._stderr = 2

    @property
    def config(self) -> pytest.Config:
        return self.state.config

    @property
    def settings(self) -> Settings:
        return self.state.settings

    # -- the start -------------------------------------------------------------------------------------

    def register_report(self) -> None:
        """Have the report's hooks take part in this session."""
        from pytest_nestedpve.report.hooks import SessionReport
        from pytest_nestedpve.run import rerun_commands

        if self.config.pluginmanager.hasplugin("nestedpve-report"):
            return
        report = SessionReport(
            self.config,
            self._run_directory,
            mask=self._mask,
            finishing_command=self.finishing_command,
            rerun_command=lambda: rerun_commands.command_to_repeat(self.settings),
        )
        self.config.pluginmanager.register(report, "nestedpve-report")

    def _run_directory(self) -> Path | None:
        return self.open_run.environment.run.dir if self.open_run is not None else None

    def _mask(self, text: str) -> str:
        return self.open_run.environment.audit.masker.mask(text) if self.open_run is not None else text

    # -- hosts -----------------------------------------------------------------------------------------

    def host_is_configured(self) -> bool:
        """Whether a setting names the outer host, or a hook of the project may return one."""
        hooks = self.config.hook.pytest_nestedpve_host.get_hookimpls()
        return self.settings.host is not None or len(hooks) > 1

    def connect(self) -> PveHost:
        """Open the outer host; `close_hosts` closes it. Raises PveError."""
        from pytest_nestedpve.pve.errors import PveError

        host = self.config.hook.pytest_nestedpve_host(config=self.config, settings=self.settings)
        if host is None:
            raise PveError(NO_HOST)
        self._hosts.append(host)
        return self._hosts[-1]

    def command_log(self) -> CallLog | None:
        """The record of commands on the outer host; None without an open run."""
        return self.open_run.environment.audit.calls() if self.open_run is not None else None

    # -- the run ---------------------------------------------------------------------------------------

    def open(self) -> OpenRun:
        """The open run. The first call creates it on this machine, and nothing on the host.

        Raises NoHostFailure without a host, PhaseFailure after the teardown, Failed for a PveError.
        """
        from pytest_nestedpve.environment.phases import Broken, PhaseBroken, PhaseListError
        from pytest_nestedpve.pve.errors import PveError

        if self.open_run is not None:
            if self.open_run.ended:
                broken = Broken("teardown", "the environment is torn down already")
                raise PhaseFailure(PhaseBroken(broken, requested=""))
            return self.open_run
        if not self.host_is_configured():
            raise NoHostFailure
        self.handle_signals()
        try:
            with self.state.unlimited():  # keys and imports do not count as the test's time
                from pytest_nestedpve.session import open_run

                self.open_run = open_run.create(self.state, self.connect)
        except (PveError, PhaseListError) as e:
            raise Failed(f"nested-pve: {e}", pytrace=False) from e
        self.register_report()
        return self.open_run

    # -- the end ---------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Tear down or keep the environment, once, and close the hosts. Never raises."""
        self.guard.stop_interrupting()
        if self.open_run is None or self.open_run.ended:
            return
        from pytest_nestedpve.session import end

        self.open_run.mark_ended()
        end.finish(self.open_run)
        self.close_hosts()

    def finishing_command(self) -> str:
        """The command that finishes an incomplete teardown."""
        from pytest_nestedpve.run import rerun_commands

        return rerun_commands.command_to_destroy(
            self.settings, self.state.run_id if self.open_run is not None else None
        )

    def close_hosts(self) -> None:
        """Close what `connect` opened, the latest first: connections, tokens, the lab's lease."""
        while self._hosts:
            with contextlib.suppress(Exception):
                self._hosts.pop().close()

    def close(self) -> None:
        """The last act of a session: restore the signal handlers, close every descriptor."""
        self.finish()
        self.close_hosts()  # a mode without tests has hosts, and no run
        if self.open_run is not None:
            self.open_run.environment.audit.close()
        self.guard.remove()
        if self._stderr != 2:
            os.close(self._stderr)
            self._stderr = 2

    # -- signals ---------------------------------------------------------------------------------------

    def handle_signals(self) -> None:
        """Have INT, TERM and HUP end the session from now on."""
        if not self.guard.installed:
            from pytest_nestedpve.session import pytest_compat

            with pytest_compat.uncaptured(self.config):
                self._stderr = os.dup(2)
            self.guard.install()

    def _stop(self, text: str) -> None:
        self._session.shouldstop = text

    def _print_now(self, text: str) -> None:
        write_now(self._stderr, text)

    def _give_up(self, signum: int) -> None:
        text = f"giving up on the teardown; this finishes it:\n    {self.finishing_command()}"
        write_now(self._stderr, text)
        os._exit(128 + signum)
