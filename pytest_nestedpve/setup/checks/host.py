"""Checks of the host itself: login, PVE, clock, profile, nested virtualisation."""

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
    from pytest_nestedpve.setup.checks.context import Context

LEAST_VERSION = (8, 2)  # the first with content type `import`
CLOCK_LIMIT = 300  # seconds; beyond it a new certificate of the host may not be valid yet on this machine
WITHOUT_KVM = "or disable KVM (slow): `nested_pve_vm_options = kvm=0`."


def login(context: Context) -> Iterator[Finding]:
    """Check that the login is root's: PVE's commands need it."""
    answer = context.host.run(["id", "-u"], timeout=20)
    if answer.stdout.strip() == "0":
        yield fine("login", f"root on {context.host.name}")
        return
    user = f"uid {answer.stdout.strip()[:20]}" if answer.ok else answer.stderr.strip()[:200]
    yield Finding(
        "user", "root on the host (uid 0)", user,
        "Log in as root: `--pve-host root@HOST`, or User root in ~/.ssh/config; PVE's commands need it.",
        fix=_as_root(context), local_fix=True,
    )  # fmt: skip


def _as_root(context: Context) -> tuple[str, ...]:
    host = (context.settings.host or "").rpartition("@")[2]
    return (shlex.join(["pytest", "--pve-host", f"root@{host}", "--nested-doctor"]),) if host else ()


def version(context: Context) -> Iterator[Finding]:
    """Check that the host is a PVE of a supported version."""
    try:
        answer = mapping(context.host.api.get("/version"))
    except NoPve as e:
        yield Finding(
            "PVE", f"a Proxmox VE host at {context.host.name}",
            f"no pvesh on it ({e.text.splitlines()[0][:120]})", "Set --pve-host to a Proxmox VE host.",
        )  # fmt: skip
        return
    except SshError:
        raise
    except PveError as e:
        yield Finding(
            "PVE", "`pvesh get /version` to answer", str(e), "Repair the host's PVE services first.",
            fix=("systemctl restart pve-cluster pvedaemon",),
        )  # fmt: skip
        return
    release = str(answer.get("version", ""))
    numbers = re.match(r"(\d+)\.(\d+)", release)
    context.choose(version=release)
    if numbers and (int(numbers[1]), int(numbers[2])) >= LEAST_VERSION:
        yield fine("PVE", release)
        return
    yield Finding(
        "version", f"PVE {'.'.join(map(str, LEAST_VERSION))} or newer", release or "no version",
        "Upgrade the host.", fix=("apt update && apt full-upgrade",),
    )  # fmt: skip


def clock(context: Context) -> Iterator[Finding]:
    """Check that the host's clock is near this machine's: leases and certificates need it."""
    from pytest_nestedpve.ownership.pool import host_clock

    offset = round(host_clock(context.host) - time.time())
    context.choose(clock_offset=offset)
    difference = f"{abs(offset)} s {'ahead' if offset > 0 else 'behind'}"
    if abs(offset) <= CLOCK_LIMIT:
        yield fine("clock", difference if abs(offset) > 2 else "same as this machine's")
        return
    yield Finding(
        "clock", f"at most {CLOCK_LIMIT} s between the host's clock and this machine's", difference,
        "Set the clocks: leases and certificates need them.",
        fix=("timedatectl set-ntp true", "timedatectl status"),
    )  # fmt: skip


def profile(context: Context) -> Iterator[Finding]:
    """Read the administrator's profile of the host into the settings."""
    from pytest_nestedpve.config.hosts import PROFILE, host_profile
    from pytest_nestedpve.config.settings import SettingsError
    from pytest_nestedpve.pve.errors import ProfileError

    where = f"{PROFILE} on {context.host.name}"
    try:
        options = host_profile(context.host)
        context.settings = context.settings.with_profile(options, where=where)
    except (ProfileError, SettingsError) as e:
        yield Finding(
            "profile", f"{where} to be readable and valid", str(e), "Fix or remove that file.",
            fix=(f"editor {PROFILE}",),
        )  # fmt: skip
        return
    yield fine("profile", f"{PROFILE} sets {', '.join(sorted(options))}" if options else f"no {PROFILE}")


def virtualisation(context: Context) -> Iterator[Finding]:
    """Check that the host supports nested virtualisation."""
    what, host = "nested virtualisation", context.host
    if context.settings.vm_options.get("kvm") == "0":
        yield fine(what, f"not needed: kvm=0 ({context.settings.origin('vm_options')})")
        return
    module = "kvm_intel"
    parameter = host.run(["cat", "/sys/module/kvm_intel/parameters/nested"], timeout=20)
    if not parameter.ok:
        module = "kvm_amd"
        parameter = host.run(["cat", "/sys/module/kvm_amd/parameters/nested"], timeout=20)
    state = parameter.stdout.strip()
    if not parameter.ok:
        yield Finding(
            what, "kvm_intel or kvm_amd loaded", "neither",
            "Enable virtualisation in the firmware (if the host is itself a VM: CPU type host in its "
            f"configuration); {WITHOUT_KVM}", fix=("modprobe kvm_intel || modprobe kvm_amd",),
        )  # fmt: skip
    elif state not in ("Y", "1"):
        conf = f"options {module} nested=1"
        yield Finding(
            what, f"{module}'s parameter nested to be Y or 1", state[:20],
            f"Enable it; the module can be reloaded only while no VM runs, else reboot; {WITHOUT_KVM}",
            fix=(
                f'echo "{conf}" > /etc/modprobe.d/kvm-nested.conf',
                f"modprobe -r {module} && modprobe {module}",
            ),
        )  # fmt: skip
    elif not host.run(["test", "-e", "/dev/kvm"], timeout=20).ok:
        yield Finding(
            what, "/dev/kvm", "none", f"Enable virtualisation in the firmware; {WITHOUT_KVM}",
            fix=(f"modprobe {module}",),
        )  # fmt: skip
    else:
        yield fine(what, f"{module}, nested={state}")
