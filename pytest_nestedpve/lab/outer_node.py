"""The files of a lab's outer PVE hosts, father and father2: layers of their root, and each lab's own part.

Three layers, each rebuilt only when its recipe changes: the image (a minute), Debian packages and the lab's
services (seconds), the stand-in packages (seconds). On top of them are the files that differ between labs.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import programs
from .build import image, repository
from .names import (
    DOMAIN,
    FATHER,
    IMAGE_FILE,
    MIRROR_HOST,
    MIRROR_URL,
    NODE_LIBRARY,
    PVE_HOST,
    PVE_KEY_URL,
    PVE_URL,
    SECOND_NODE,
    SUITE,
    Subnets,
    cache_dir,
)
from .node.packages import DebSpec
from .node.state import members

_PACKAGES = [
    "bridge-utils",
    "chrony",
    "dnsmasq-base",
    "dnsmasq-utils",
    "isc-dhcp-client",
    "open-iscsi",
    "postfix",
    "rsync",
    "squashfs-tools",
]

_DNS_UNIT = """\
[Unit]
Description=DHCP and DNS of the lab
After=networking.service
Wants=networking.service

[Service]
ExecStart=/usr/sbin/dnsmasq --conf-file=/etc/nestedpve-lab-dnsmasq.conf --keep-in-foreground
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""

_WEB_UNIT = f"""\
[Unit]
Description=Package repositories of the lab
After=network.target

[Service]
Environment=PYTHONPATH={NODE_LIBRARY}
ExecStart=/usr/bin/python3 -m nestedpve_node.webserver /srv/www
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
"""

_FILES = {
    "etc/systemd/system/nestedpve-lab-dns.service": _DNS_UNIT,
    "etc/systemd/system/nestedpve-lab-web.service": _WEB_UNIT,
    "etc/cloud/cloud-init.disabled": "",
}

_SYSTEM_SCRIPT = f"""
signed='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
echo "deb $signed file:/run/share/{MIRROR_HOST}/debian {SUITE} main" >/tmp/lab.list
echo 'postfix postfix/main_mailer_type select Local only' | debconf-set-selections
echo 'postfix postfix/mailname string {FATHER}.{DOMAIN}' | debconf-set-selections
options='-o Dir::Etc::SourceList=/tmp/lab.list -o Dir::Etc::SourceParts=/dev/null -o APT::Sandbox::User=root'
apt-get $options update
apt-get $options install -y --no-install-recommends {" ".join(_PACKAGES)} /run/share/pmx/ifupdown2_*.deb
rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin
systemctl mask -q systemd-networkd.service systemd-networkd.socket systemd-resolved.service
systemctl enable -q nestedpve-lab-dns.service nestedpve-lab-web.service
rm -f /etc/resolv.conf /etc/hostname /etc/netplan/*
mkdir -p /srv/www/{MIRROR_HOST} /srv/www/{PVE_HOST} /var/lib/vz
"""

# dpkg, not apt: the set of packages is complete, and dpkg orders it itself.
_STANDIN_SCRIPT = f"""
dpkg -i /run/share/{PVE_HOST}/debian/pve/pool/*.deb || dpkg --configure -a
dpkg --audit
"""

_RECIPE = 1


@dataclass(frozen=True)
class NodeFiles:
    """Files of any outer node: the image, layers above it (topmost first), the two parts of the web site."""

    image: Path
    layers: tuple[Path, ...]
    mirror_site: Path
    pve_site: Path


def system_dir() -> Path:
    """The layer with Debian packages and the lab's services."""
    script = _layer_script().read_text()
    recipe = repr((_RECIPE, repository.mirror_key(), _PACKAGES, _FILES, _SYSTEM_SCRIPT, script))
    return cache_dir() / "layers" / f"system-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"


def standin_dir(specs: Sequence[DebSpec]) -> Path:
    """The layer with the stand-in packages."""
    recipe = repr((system_dir().name, repository.standins_key(specs), _STANDIN_SCRIPT))
    return cache_dir() / "layers" / f"pve-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}"


def build(report: Callable[[str], None]) -> NodeFiles:
    """Build missing repositories and layers (seconds) on an existing image. LabError when a program fails."""
    specs = repository.standins()
    mirror = repository.build_mirror(report)
    pve = repository.build_pve(specs, report)
    base = image.base_dir() / "base.squashfs"
    system = system_dir()
    if not system.exists():
        report("father: Debian packages and services")
        _layer(system, base, (), mirror, _SYSTEM_SCRIPT, _FILES)
    standin = standin_dir(specs)
    if not standin.exists():
        report("father: PVE")
        _layer(standin, base, (system,), pve, _STANDIN_SCRIPT, {})
    return NodeFiles(base, (standin, system), mirror / MIRROR_HOST, pve / PVE_HOST)


def stale_dirs() -> list[Path]:
    """Directories of older images, repositories and layers in the cache, of no present recipe."""
    specs = repository.standins()
    current = {
        image.base_dir(),
        repository.mirror_dir(),
        repository.pve_dir(specs),
        system_dir(),
        standin_dir(specs),
    }
    paths = [path for part in ("base", "repo", "layers") for path in (cache_dir() / part).glob("*")]
    building = ("build-", "build.")
    return [p for p in paths if p.is_dir() and p not in current and not p.name.startswith(building)]


def _layer_script() -> Path:
    return Path(__file__).parent / "build" / "layer.sh"


def _layer(
    target: Path, base: Path, lowers: tuple[Path, ...], share: Path, script: str, files: dict[str, str]
) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.parent / f"{target.name}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as scratch:
        upper = Path(scratch) / "upper"
        upper.mkdir(mode=0o755)
        for name, text in files.items():
            file = upper / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        environment = {
            "IMAGE": str(base),
            "LOWERS": ":".join(map(str, lowers)),
            "WORK": scratch,
            "UPPER": str(upper),
            "SHARE": str(share),
            "SCRIPT": script,
        }
        namespaces = ["unshare", "--mount", "--propagation", "private", "--uts", "--net", "--pid", "--fork"]
        command = [*namespaces, "--kill-child", "sh", _layer_script()]
        programs.run(command, what=f"building the layer {target.name}", env=environment, log=log)
        upper.rename(target)
    log.unlink()


def prepare(
    upper: Path,
    vz: Path,
    files: NodeFiles,
    subnets: Subnets,
    authorized: str,
    host_key: Path,
    *,
    second: bool = False,
) -> None:
    """Write this lab's own files of father (addresses, keys, profile) into `upper`, the top of its root, and
    `vz`, its /var/lib/vz. `second`: the lab has a second node."""
    address = subnets.bridge_address
    first, last = subnets.dhcp_range
    nodes = {FATHER: address} | ({SECOND_NODE: subnets.second_address} if second else {})
    _write(
        upper,
        _identity(FATHER, subnets, nodes)
        | {
            "etc/network/interfaces": _interfaces(subnets, ports="lan" if second else "none"),
            "etc/nestedpve-lab-dnsmasq.conf": f"""\
interface=vmbr0
bind-dynamic
except-interface=lo
no-resolv
no-hosts
local=/#/
domain={DOMAIN}
expand-hosts
dhcp-range={first},{last},255.255.255.0,2h
dhcp-option=option:router,{address}
dhcp-option=option:dns-server,{address}
dhcp-leasefile=/var/lib/misc/dnsmasq.leases
dhcp-authoritative
dhcp-broadcast
no-ping
host-record={PVE_HOST},{address}
host-record={MIRROR_HOST},{address}
"""
            + "".join(f"host-record={name}.{DOMAIN},{name},{ip}\n" for name, ip in nodes.items())
            + "user=root\n",
            "etc/nested-pve.ini": f"""\
[nested-pve]
image = local:import/{IMAGE_FILE}
storage = local
bridge = vmbr0
mirror = {MIRROR_URL}
pve_repository_url = {PVE_URL}
pve_repository_key_url = {PVE_KEY_URL}
pve_repository_key_sha256 = {repository.pve_key_sha256()}
""",
        },
    )
    (upper / "var/lib/misc").mkdir(parents=True, exist_ok=True)
    ssh = upper / "root/.ssh"
    ssh.mkdir(parents=True, mode=0o700)
    (upper / "root").chmod(0o700)
    (ssh / "authorized_keys").write_text(authorized)
    (ssh / "authorized_keys").chmod(0o600)
    _host_key(upper, host_key)
    _storage(vz, files)


def prepare_second(upper: Path, vz: Path, files: NodeFiles, subnets: Subnets, host_key: Path) -> None:
    """The same for the second node, which uses father's DHCP, DNS and web server."""
    nodes = {FATHER: subnets.bridge_address, SECOND_NODE: subnets.second_address}
    interfaces = f"""\
auto lo
iface lo inet loopback

auto vmbr0
iface vmbr0 inet static
	address {subnets.second_address}/24
	hwaddress 02:4e:50:56:02:{subnets.number:02x}
	bridge-ports lan
	bridge-stp off
	bridge-fd 0
"""
    _write(upper, _identity(SECOND_NODE, subnets, nodes) | {"etc/network/interfaces": interfaces})
    units = upper / "etc/systemd/system"
    units.mkdir(parents=True)
    for unit in ("nestedpve-lab-dns.service", "nestedpve-lab-web.service"):
        (units / unit).symlink_to("/dev/null")
    _host_key(upper, host_key)
    _storage(vz, files)


def prepare_cluster(folder: Path, name: str, subnets: Subnets) -> None:
    """Write /var/lib/pve-cluster, which both nodes share: so far the configuration of their cluster."""
    (folder / "fs").mkdir(parents=True)
    nodes = {FATHER: subnets.bridge_address, SECOND_NODE: subnets.second_address}
    (folder / "fs/corosync.conf").write_text(members.config(name, nodes))


def _identity(node: str, subnets: Subnets, nodes: dict[str, str]) -> dict[str, str]:
    hosts = "".join(f"{address} {name}.{DOMAIN} {name}\n" for name, address in nodes.items())
    return {
        "etc/hostname": f"{node}\n",
        "etc/hosts": f"127.0.0.1 localhost\n{hosts}\n::1 ip6-localhost\n",
        "etc/resolv.conf": f"search {DOMAIN}\nnameserver {subnets.bridge_address}\n",
    }


def _write(upper: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = upper / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def _host_key(upper: Path, host_key: Path) -> None:
    (upper / "etc/ssh").mkdir(parents=True, exist_ok=True)
    for suffix, mode in (("", 0o600), (".pub", 0o644)):
        target = upper / f"etc/ssh/ssh_host_ed25519_key{suffix}"
        shutil.copyfile(f"{host_key}{suffix}", target)
        target.chmod(mode)


def _storage(vz: Path, files: NodeFiles) -> None:
    for folder in ("import", "images", "snippets", "template/iso", "dump"):
        (vz / folder).mkdir(parents=True, exist_ok=True)
    try:
        os.link(files.image, vz / "import" / IMAGE_FILE)
    except OSError:
        shutil.copyfile(files.image, vz / "import" / IMAGE_FILE)


def _interfaces(subnets: Subnets, *, ports: str) -> str:
    # Without a fixed MAC address a bridge changes it with its ports. No gateway: a lab has no way out.
    return f"""\
auto lo
iface lo inet loopback

auto eth0
iface eth0 inet static
	address {subnets.uplink_father}/30

auto vmbr0
iface vmbr0 inet static
	address {subnets.bridge_address}/24
	hwaddress 02:4e:50:56:00:{subnets.number:02x}
	bridge-ports {ports}
	bridge-stp off
	bridge-fd 0
	post-up echo 1 > /proc/sys/net/ipv4/ip_forward
"""
