"""The stand-ins as Debian packages, under the real packages' names and versions.

`lab/build/repository.py` builds and signs them. Postfix, chrony and open-iscsi are Debian's packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HOME = "/usr/share/nestedpve-lab"
VERSIONS = {
    "proxmox-ve": "9.2.0",
    "pve-manager": "9.2.11",
    "pve-cluster": "9.1.6",
    "qemu-server": "9.2.6",
    "libpve-storage-perl": "9.1.7",
    "libpve-access-control": "9.1.1",
    "proxmox-default-kernel": "2.1.0",
    "proxmox-kernel-6.17": "6.17.2-1",
    "proxmox-archive-keyring": "4.0",
    "nestedpve-lab-node": "9.2.11",
}


@dataclass(frozen=True)
class DebSpec:
    """A package to build. `files`: absolute path → (content, mode); `depends`, `provides` as in a control
    file; `conffiles` are those of `files` that dpkg treats as configuration."""

    name: str
    version: str
    depends: str = ""
    files: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    postinst: str = ""
    prerm: str = ""
    provides: str = ""
    conffiles: tuple[str, ...] = ()
    architecture: str = "all"
    description: str = "Stand-in of the nestedpve lab"


def _script(module: str) -> tuple[bytes, int]:
    """A command: a script that calls `main` of a module of the package."""
    text = (
        "#!/usr/bin/python3\n"
        "import sys\n\n"
        f"sys.path.insert(0, {HOME!r})\n"
        f"from nestedpve_node.{module} import main\n\n"
        "sys.exit(main())\n"
    )
    return text.encode(), 0o755


def _unit(description: str, service: str, *, after: str = "", wants: str = "") -> tuple[bytes, int]:
    text = f"[Unit]\nDescription={description}\n"
    text += f"After={after}\n" if after else ""
    text += f"Wants={wants}\n" if wants else ""
    text += f"\n[Service]\n{service}\n\n[Install]\nWantedBy=multi-user.target\n"
    return text.encode(), 0o644


def _enable(*units: str, then: str = "") -> str:
    """A postinst that enables and starts units where systemd runs (not while an image is built)."""
    lines = ["#!/bin/sh", "set -e", 'if [ "$1" = configure ]; then']
    lines += [f"    deb-systemd-helper enable {unit} >/dev/null || true" for unit in units]
    lines += ["    if [ -d /run/systemd/system ]; then", "        systemctl daemon-reload"]
    lines += [f"        deb-systemd-invoke restart {unit} || true" for unit in units]
    if then:
        lines.append(f"        {then}")
    return "\n".join([*lines, "    fi", "fi", "exit 0", ""])


def _disable(*units: str) -> str:
    lines = ["#!/bin/sh", "set -e", 'if [ "$1" = remove ] && [ -d /run/systemd/system ]; then']
    return "\n".join([*lines, *(f"    systemctl stop {unit} || true" for unit in units), "fi", "exit 0", ""])


def code_files() -> Iterator[tuple[str, tuple[bytes, int]]]:
    """The files of this package, by their paths on a node."""
    here = Path(__file__).parent
    for file in sorted(here.rglob("*")):
        if file.suffix in (".py", ".json", ".sh") and "__pycache__" not in file.parts:
            yield f"{HOME}/nestedpve_node/{file.relative_to(here)}", (file.read_bytes(), 0o644)


_ENTERPRISE = b"""Types: deb
URIs: https://enterprise.proxmox.com/debian/pve
Suites: trixie
Components: pve-enterprise
Signed-By: /usr/share/keyrings/proxmox-archive-keyring.gpg
"""
_PYTHON = "/usr/bin/python3 -m nestedpve_node"
_ENVIRONMENT = f"Environment=PYTHONPATH={HOME}"


def standin_packages(keyring: bytes = b"") -> list[DebSpec]:
    """All stand-ins. `keyring`: the lab repository's public key in binary form, installed as Proxmox's."""

    def spec(name: str, depends: str = "", **options: object) -> DebSpec:
        return DebSpec(name, VERSIONS[name], depends, **options)  # type: ignore[arg-type]

    node = spec(
        "nestedpve-lab-node",
        "python3 (>= 3.11), openssl, openssh-client, iproute2, util-linux, mount",
        files=dict(code_files()),
        description="The lab's API, tasks and machines behind the stand-in commands",
    )
    cluster = spec(
        "pve-cluster",
        "nestedpve-lab-node, libpve-access-control",
        files={
            "/usr/bin/pvecm": _script("commands.pvecm"),
            "/usr/lib/systemd/system/pve-cluster.service": _unit(
                "The Proxmox VE cluster filesystem",
                f"Type=notify\n{_ENVIRONMENT}\nExecStart={_PYTHON}.state.cluster_fs\n"
                "ExecStartPost=-/usr/bin/pvecm updatecerts --silent\nTimeoutStopSec=10",
                after="network-online.target local-fs.target",
                wants="network-online.target",
            ),
        },
        postinst=_enable("pve-cluster.service"),
        prerm=_disable("pve-cluster.service"),
    )
    manager = spec(
        "pve-manager",
        "pve-cluster, qemu-server, libpve-storage-perl, libpve-access-control, proxmox-archive-keyring",
        files={
            "/usr/bin/pvesh": _script("commands.pvesh"),
            "/usr/bin/pveversion": _script("commands.pveversion"),
            "/etc/apt/sources.list.d/pve-enterprise.sources": (_ENTERPRISE, 0o644),
            "/usr/lib/systemd/system/pveproxy.service": _unit(
                "PVE API Proxy Server",
                f"Type=simple\n{_ENVIRONMENT}\nExecStartPre=-/usr/bin/pvecm updatecerts --silent\n"
                f"ExecStart={_PYTHON}.api.proxy\nExecReload=/bin/kill -HUP $MAINPID\nKillMode=mixed\n"
                "Restart=on-failure\nRestartSec=1",
                after="pve-cluster.service network.target ssh.service pvedaemon.service",
                wants="pve-cluster.service pvedaemon.service",
            ),
            # pveproxy runs the API itself; the unit exists because callers query it.
            "/usr/lib/systemd/system/pvedaemon.service": _unit(
                "PVE API Daemon",
                "Type=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true",
                after="pve-cluster.service",
            ),
            "/usr/lib/systemd/system/pvestatd.service": _unit(
                "PVE Status Daemon",
                f"Type=simple\n{_ENVIRONMENT}\nExecStart={_PYTHON}.state.broadcast\nRestart=on-failure\nRestartSec=1",
                after="pve-cluster.service",
                wants="pve-cluster.service",
            ),
        },
        conffiles=("/etc/apt/sources.list.d/pve-enterprise.sources",),
        # Without a running cluster file system the package cannot be configured, as with the real one.
        postinst=_enable(
            "pvedaemon.service",
            "pvestatd.service",
            "pveproxy.service",
            then="/usr/bin/pvecm updatecerts --silent",
        ),
        prerm=_disable("pveproxy.service", "pvestatd.service", "pvedaemon.service"),
    )
    server = spec(
        "qemu-server",
        "nestedpve-lab-node, pve-cluster, libpve-storage-perl",
        files={
            "/usr/sbin/qm": _script("commands.qm"),
            "/usr/lib/systemd/system/pve-guests.service": _unit(
                "PVE guests",
                f"Type=oneshot\nRemainAfterExit=yes\n{_ENVIRONMENT}\n"
                f"ExecStart={_PYTHON}.state.autostart start\nExecStop={_PYTHON}.state.autostart stop",
                after="pve-cluster.service pvestatd.service",
                wants="pve-cluster.service",
            ),
        },
        postinst=_enable("pve-guests.service"),
        prerm=_disable("pve-guests.service"),
    )
    storage = spec(
        "libpve-storage-perl", "nestedpve-lab-node", files={"/usr/sbin/pvesm": _script("commands.pvesm")}
    )
    access = spec(
        "libpve-access-control", "nestedpve-lab-node", files={"/usr/sbin/pveum": _script("commands.pveum")}
    )
    keys = spec(
        "proxmox-archive-keyring",
        files={"/usr/share/keyrings/proxmox-archive-keyring.gpg": (keyring, 0o644)} if keyring else {},
    )
    return [
        node,
        cluster,
        manager,
        server,
        storage,
        access,
        keys,
        spec("proxmox-kernel-6.17"),
        spec("proxmox-default-kernel", "proxmox-kernel-6.17"),
        spec(
            "proxmox-ve",
            "pve-manager, qemu-server, pve-cluster, proxmox-default-kernel, proxmox-archive-keyring",
        ),
    ]
