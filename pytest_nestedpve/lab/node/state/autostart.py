"""pve-guests.service: guests with `onboot` start with the node, and all are shut down with it."""

from __future__ import annotations

import sys

from ..api import access, tree
from ..api.errors import PveFailure
from ..machine import machine
from . import guests


def main() -> int:
    action = sys.argv[1] if len(sys.argv) > 1 else "start"
    for guest in guests.every():
        if action == "stop":
            machine.stop(guest.vmid)
        elif guest.conf.get("onboot") == "1" and not guest.template and not guests.running(guest.vmid):
            try:
                tree.call("POST", f"/nodes/localhost/qemu/{guest.vmid}/status/start", {}, access.ROOT)
            except PveFailure as e:
                print(f"start of VM {guest.vmid} failed: {e.text}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
