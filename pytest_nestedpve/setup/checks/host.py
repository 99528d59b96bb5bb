"""The host itself: login, PVE, clock, profile, nested virtualisation, node."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.answers import mapping
from pytest_nestedpve.pve.errors import NoPve, PveError, SshError
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen

LEAST_VERSION = (8, 2)  # the first with content type `import`
CLOCK_LIMIT = 300  # seconds; beyond it certificates made on the host are not valid yet here
WITHOUT_KVM = "or do without (slow): `nested_pve_vm_options = kvm=0`."


def login(seen: Seen) -> Iterator[Finding]:
    """PVE's commands need root."""
    who = seen.host.run(["id", "-u"], timeout=20)
    if who.stdout.strip() == "0":
        yield fine("login", f"root on {seen.host.name}")
        return
    found = f"uid {who.stdout.strip()[:20]}" if who.ok else who.stderr.strip()[:200]
    yield Finding(
        "user", "root on the host (uid 0)", found,
        "Log in as root: `--pve-host root@HOST`, or User root in ~/.ssh/config; PVE's commands need it.",
        fix=_as_root(seen), here=True,
    )  # fmt: skip


def _as_root(seen: Seen) -> tuple[str, ...]:
    host = (seen.settings.host or "").rpartition("@")[2]
    return (shlex.join(["pytest", "--pve-host", f"root@{host}", "--nested-doctor"]),) if host else ()


def version(seen: Seen) -> Iterator[Finding]:
    """A Proxmox VE that is new enough."""
    try:
        answer = mapping(seen.host.api.get("/version"))
    except NoPve as e:
        yield Finding(
            "PVE", f"a Proxmox VE host at {seen.host.name}",
            f"no pvesh there ({e.text.splitlines()[0][:120]})", "Name a Proxmox VE host.",
        )  # fmt: skip
        return
    except SshError:
        raise
    except PveError as e:
        yield Finding(
            "PVE", "`pvesh get /version` to answer", str(e), "Mend the host's PVE services first.",
            fix=("systemctl restart pve-cluster pvedaemon",),
        )  # fmt: skip
        return
    found = str(answer.get("version", ""))
    numbers = re.match(r"(\d+)\.(\d+)", found)
    seen.choose(version=found)
    if numbers and (int(numbers[1]), int(numbers[2])) >= LEAST_VERSION:
        yield fine("PVE", found)
        return
    yield Finding(
        "version", f"PVE {'.'.join(map(str, LEAST_VERSION))} or newer", found or "no version",
        "Upgrade the host.", fix=("apt update && apt full-upgrade",),
    )  # fmt: skip


def clock(seen: Seen) -> Iterator[Finding]:
    """Leases and certificates are by the clock."""
    from pytest_nestedpve.ownership.pool import host_clock

    offset = round(host_clock(seen.host) - time.time())
    seen.choose(clock_offset=offset)
    apart = f"{abs(offset)} s {'ahead' if offset > 0 else 'behind'}"
    if abs(offset) <= CLOCK_LIMIT:
        yield fine("clock", apart if abs(offset) > 2 else "as here")
        return
    yield Finding(
        "clock", f"at most {CLOCK_LIMIT} s between the host's clock and this machine's", apart,
        "Set the clocks: leases and certificates need them.",
        fix=("timedatectl set-ntp true", "timedatectl status"),
    )  # fmt: skip


def profile(seen: Seen) -> Iterator[Finding]:
    """What the host's administrator has set for everybody."""
    from pytest_nestedpve.config.hosts import PROFILE, host_profile
    from pytest_nestedpve.config.settings import SettingsError
    from pytest_nestedpve.pve.errors import ProfileError

    where = f"{PROFILE} on {seen.host.name}"
    try:
        found = host_profile(seen.host)
        seen.settings = seen.settings.with_profile(found, where=where)
    except (ProfileError, SettingsError) as e:
        yield Finding(
            "profile", f"{where} to be readable and right", str(e), "Mend or remove that file.",
            fix=(f"editor {PROFILE}",),
        )  # fmt: skip
        return
    yield fine("profile", f"{PROFILE} sets {', '.join(sorted(found))}" if found else f"no {PROFILE}")


def virtualisation(seen: Seen) -> Iterator[Finding]:
    """The nested PVE runs VMs of its own."""
    what, host = "nested virtualisation", seen.host
    if seen.settings.vm_options.get("kvm") == "0":
        yield fine(what, f"not needed: kvm=0 ({seen.settings.origin('vm_options')})")
        return
    module = "kvm_intel"
    read = host.run(["cat", "/sys/module/kvm_intel/parameters/nested"], timeout=20)
    if not read.ok:
        module = "kvm_amd"
        read = host.run(["cat", "/sys/module/kvm_amd/parameters/nested"], timeout=20)
    state = read.stdout.strip()
    if not read.ok:
        yield Finding(
            what, "kvm_intel or kvm_amd loaded", "neither",
            "Switch virtualisation on in the firmware (of the VM's host, where this host is a VM itself: CPU "
            f"type host); {WITHOUT_KVM}", fix=("modprobe kvm_intel || modprobe kvm_amd",),
        )  # fmt: skip
    elif state not in ("Y", "1"):
        conf = f"options {module} nested=1"
        yield Finding(
            what, f"{module}'s parameter nested to be Y or 1", state[:20],
            f"Switch it on; the module can be loaded anew only while no VM runs, else reboot; {WITHOUT_KVM}",
            fix=(
                f'echo "{conf}" > /etc/modprobe.d/kvm-nested.conf',
                f"modprobe -r {module} && modprobe {module}",
            ),
        )  # fmt: skip
    elif not host.run(["test", "-e", "/dev/kvm"], timeout=20).ok:
        yield Finding(
            what, "/dev/kvm", "none", f"Switch it on in the firmware; {WITHOUT_KVM}",
            fix=(f"modprobe {module}",),
        )  # fmt: skip
    else:
        yield fine(what, f"{module}, nested={state}")
