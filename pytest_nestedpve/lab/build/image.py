"""The image: a root that behaves like Debian's cloud image and boots as a container, as one squashfs.

It has no guest agent, as Debian's has none. The Debian packages of the lab's repository are downloaded in the
same run, so that their versions match.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from .. import programs
from ..names import SUITE, cache_dir
from ..node.packages import DebSpec
from .debs import build_deb

# The packages of Debian's generic cloud image that matter to the set-up of PVE, and those that nodes need.
# fmt: off
PACKAGES = [
    "apt-utils", "ca-certificates", "cloud-init", "curl", "dbus", "debian-archive-keyring", "gpg",
    "iproute2", "iputils-ping", "less", "libpam-systemd", "netbase", "netplan.io",
    "openssh-client", "openssh-server", "perl", "procps", "python3", "python3-apt", "sudo",
    "systemd-resolved", "systemd-sysv", "tzdata", "udev", "util-linux", "vim-tiny", "xz-utils",
]
# fmt: on

# Further packages of the lab's Debian mirror; their dependencies are added.
# fmt: off
MIRRORED = [
    "bridge-utils", "chrony", "dnsmasq-base", "dnsmasq-utils", "git", "gnupg", "ifupdown2",
    "isc-dhcp-client", "openssl", "open-iscsi", "postfix", "python3-yaml", "qemu-guest-agent",
    "rsync", "squashfs-tools", "sqlite3", "jq", "unzip", "zstd",
]
# fmt: on

# Units that would act on the machine's kernel, or wait for devices that a container does not have.
# fmt: off
MASKED = [
    "systemd-udevd.service", "systemd-udevd-kernel.socket", "systemd-udevd-control.socket",
    "systemd-udev-trigger.service", "systemd-udev-settle.service", "systemd-sysctl.service",
    "systemd-pstore.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "sys-kernel-config.mount", "getty@tty1.service", "console-getty.service", "apt-daily.timer",
    "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "e2scrub_all.timer",
    "systemd-networkd-wait-online.service", "iscsid.socket",
]
# fmt: on

AGENT_UNIT = """\
[Unit]
Description=QEMU Guest Agent
# A container has a socket in place of the virtio port; the package comes later, or never.
ConditionPathExists=/usr/sbin/qemu-ga
ConditionPathExists=/dev/virtio-ports/org.qemu.guest_agent.0

[Service]
RuntimeDirectory=qga
ExecStart=/usr/sbin/qemu-ga -m unix-listen -p /run/qga/qga.sock
Restart=always
RestartSec=0

[Install]
WantedBy=multi-user.target
"""

# netplan's files match on the permanent address, which a veth does not have.
NETWORKD_DROPIN = """\
[Service]
ExecStartPre=+/bin/sh -c 'sed -i s/^PermanentMACAddress=/MACAddress=/ \
/run/systemd/network/*.network 2>/dev/null; :'
"""

# The clock is the machine's: chronyd runs, but does not set it (-x).
CHRONY_DROPIN = """\
[Unit]
ConditionCapability=
ConditionVirtualization=

[Service]
ExecStart=
ExecStart=!/usr/sbin/chronyd -x $DAEMON_OPTS
"""

CLOUD_CFG = """\
apt:
  generate_mirrorlists: true
datasource_list: [ NoCloud, None ]
system_info:
  default_user:
    name: debian
    sudo: ["ALL=(ALL) NOPASSWD:ALL"]
    shell: /bin/bash
    lock_passwd: True
    gecos: Debian
    groups: [adm, audio, cdrom, dialout, dip, floppy, plugdev, sudo, video]
"""

SOURCES = """\
Types: deb
URIs: mirror+file:///etc/apt/mirrors/debian.list
Suites: trixie trixie-updates trixie-backports
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: mirror+file:///etc/apt/mirrors/debian-security.list
Suites: trixie-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""

FILES = {
    "etc/systemd/system/qemu-guest-agent.service": AGENT_UNIT,
    "etc/systemd/system/systemd-networkd.service.d/veth.conf": NETWORKD_DROPIN,
    "etc/systemd/system/chrony.service.d/container.conf": CHRONY_DROPIN,
    "etc/cloud/cloud.cfg.d/01_debian_cloud.cfg": CLOUD_CFG,
    "etc/apt/sources.list.d/debian.sources": SOURCES,
    "etc/apt/mirrors/debian.list": "",
    "etc/apt/mirrors/debian-security.list": "",
    "etc/machine-id": "",
    "etc/hostname": "localhost\n",
}

DUMMIES = (
    DebSpec("linux-image-amd64", "6.12.48-1", description="Linux for 64-bit PCs (stands in for the kernel)"),
    DebSpec("os-prober", "1.83", description="utility to detect other OSes (stands in)"),
)

_RECIPE = 1


def base_key() -> str:
    """A hash of the image's recipe."""
    recipe = [
        _RECIPE,
        PACKAGES,
        MIRRORED,
        MASKED,
        FILES,
        [(deb.name, deb.version, deb.description) for deb in DUMMIES],
    ]
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def base_dir() -> Path:
    """The directory of the image, `base.squashfs`, and of the mirrored packages, `debs/`."""
    return cache_dir() / "base" / base_key()


def base_ready() -> bool:
    """Whether `build_base` has finished for this recipe."""
    return (base_dir() / "ready").exists()


def build_base(archive_key: Path, report: Callable[[str], None]) -> None:
    """Build the image unless it exists: about a minute. `archive_key` is the public key that the image has as
    Debian's archive key. LabError when a program fails."""
    if base_ready():
        return
    target = base_dir()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as scratch:
        work = Path(scratch)
        root, debs, log = work / "root", work / "debs", target.parent / "build.log"
        log.unlink(missing_ok=True)
        (debs / "partial").mkdir(parents=True)
        report("Debian root and packages (mmdebstrap)")
        os.chmod(work, 0o755)
        programs.run(_mmdebstrap(root, debs), what="building the Debian root", log=log)
        shutil.rmtree(debs / "partial")
        (debs / "lock").unlink(missing_ok=True)
        report("image")
        _customize(root, archive_key, work, log)
        image = work / "base.squashfs"
        squash: list[str | Path] = ["mksquashfs", root, image, "-noappend", "-quiet", "-no-progress"]
        squash += ["-comp", "zstd", "-Xcompression-level", "3"]
        programs.run(squash, what="packing the image", log=log)
        final = work / "final"
        final.mkdir()
        image.rename(final / "base.squashfs")
        debs.rename(final / "debs")
        (final / "ready").touch()
        shutil.rmtree(target, ignore_errors=True)
        final.rename(target)


def _mmdebstrap(root: Path, debs: Path) -> list[str | Path]:
    # The hook runs apt with mmdebstrap's configuration, so that mirror and keys are the same.
    download = (
        'APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" apt-get install -y --no-install-recommends --download-only '
        f"-o Debug::NoLocking=1 -o Dir::Cache::archives={debs} {' '.join(MIRRORED)}"
    )
    excluded = ["/usr/share/man/*", "/usr/share/locale/*", "/usr/share/doc/*", "/usr/share/info/*"]
    command: list[str | Path] = ["mmdebstrap", "--variant=minbase", "--mode=root"]
    command += ['--aptopt=Acquire::Languages "none"', '--aptopt=APT::Install-Recommends "false"']
    command += [f"--dpkgopt=path-exclude={path}" for path in excluded]
    command += [f"--include={','.join(PACKAGES)}", f"--customize-hook={download}", SUITE, root]
    mirror = configured_mirror()
    return command if mirror is None else [*command, f"deb {mirror} {SUITE} main"]


def configured_mirror(etc: Path = Path("/etc/apt")) -> str | None:
    """The URL of the Debian mirror that this machine's apt uses; None if there is none (mmdebstrap then uses
    its default)."""
    parts = etc / "sources.list.d"
    for file in [*sorted(parts.glob("*.sources")), etc / "sources.list", *sorted(parts.glob("*.list"))]:
        if not file.is_file():
            continue
        for line in file.read_text(errors="replace").splitlines():
            words = line.split()
            if file.suffix == ".sources":
                urls = words[1:] if words[:1] == ["URIs:"] else []
            else:
                urls = [word for word in words if "://" in word] if words[:1] == ["deb"] else []
            for url in urls:
                if url.startswith(("http://", "https://")) and url.rstrip("/").endswith("/debian"):
                    return url
    return None


def _customize(root: Path, archive_key: Path, work: Path, log: Path) -> None:
    for deb in DUMMIES:
        package = build_deb(deb, work)
        copy = root / "var" / package.name
        shutil.copy(package, copy)
        command = ["chroot", root, "dpkg", "-i", f"/var/{package.name}"]
        programs.run(command, what=f"installing {deb.name}", log=log)
        copy.unlink()
    (root / "etc/apt/sources.list").unlink(missing_ok=True)
    for name, text in FILES.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    units = root / "etc/systemd/system"
    for unit in MASKED:
        _link(units / unit, "/dev/null")
    _link(units / "multi-user.target.wants/qemu-guest-agent.service", "../qemu-guest-agent.service")
    _link(root / "etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")
    # The lab's mirror is signed by the lab's key, which the image has in place of Debian's.
    shutil.copyfile(archive_key, root / "usr/share/keyrings/debian-archive-keyring.pgp")
    for file in (root / "etc/apt/trusted.gpg.d").glob("debian-archive-*"):
        file.unlink()
    shutil.copyfile(archive_key, root / "etc/apt/trusted.gpg.d/debian-archive-trixie-automatic.gpg")
    for file in [*(root / "etc/ssh").glob("ssh_host_*"), *(root / "var/lib/apt/lists").glob("*_*")]:
        file.unlink()
    for file in (root / "var/cache/apt").glob("*.bin"):
        file.unlink()
    (root / "var/lib/cloud/seed/nocloud").mkdir(parents=True, exist_ok=True)
    (root / "var/lib/vz").mkdir(exist_ok=True)


def _link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
