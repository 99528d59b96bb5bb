"""ansible.builtin.reboot, asking more often: its own pauses grow to 12 seconds, which are lost at the end."""

from __future__ import annotations

import threading
import time

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action.reboot import ActionModule as Reboot
from ansible.plugins.action.reboot import TimedOutException

SHORTEST, LONGEST, SHARE = 0.2, 0.3, 0.05


class ActionModule(Reboot):
    """Takes what ansible.builtin.reboot takes, and returns what it returns."""

    def do_until_success_or_timeout(
        self, action, reboot_timeout, action_desc, distribution, action_kwargs=None
    ):
        """Repeat `action` until it does not raise, at most `reboot_timeout` seconds."""
        began = time.monotonic()
        last = "nothing was tried"
        pause = threading.Event()
        while time.monotonic() - began < reboot_timeout:
            try:
                action(distribution=distribution, **(action_kwargs or {}))
            except Exception as e:
                last = str(e)
                if isinstance(e, AnsibleConnectionFailure):
                    try:
                        self._connection.reset()
                    except AnsibleConnectionFailure as again:
                        last = str(again)
            else:
                return
            waited = time.monotonic() - began
            pause.wait(min(LONGEST, max(SHORTEST, SHARE * waited)))
        raise TimedOutException(
            f"Timed out waiting for {action_desc} (timeout={reboot_timeout}); the last error: {last}"
        )
