"""The cloud-init drive: user-data, meta-data, network-config and vendor-data as PVE writes them."""

from __future__ import annotations

import hashlib
import ipaddress
import subprocess

from ..api import validation
from ..api.errors import PveFailure
from ..state import paths, volumes
from ..state.guests import NETS, Guest

OPTIONS = ("cicustom", "cipassword", "citype", "ciuser", "ciupgrade", "nameserver", "searchdomain", "sshkeys")


def drive(guest: Guest) -> str | None:
    """The option that holds the cloud-init drive."""
    for key, value in guest.drives().items():
        if "cloudinit" in value.split(",")[0]:
            return key
    return None


def seed(guest: Guest) -> dict[str, str]:
    """The files of the drive, snippets of `cicustom` in their places."""
    files = {
        "user-data": _custom(guest, "user") or user_data(guest),
        "network-config": _custom(guest, "network") or network_config(guest),
        "vendor-data": _custom(guest, "vendor") or "",
    }
    files["meta-data"] = _custom(guest, "meta") or meta_data(files["user-data"], files["network-config"])
    return files


def dump(guest: Guest, kind: str) -> str:
    """The output of `qm cloudinit dump`: the generated text, regardless of `cicustom` (facts 71)."""
    if kind == "user":
        return user_data(guest)
    if kind == "network":
        return network_config(guest)
    return meta_data(user_data(guest), network_config(guest))


def _custom(guest: Guest, kind: str) -> str | None:
    volid = validation.split(validation.CICUSTOM, guest.conf.get("cicustom", "")).get(kind)
    if not volid:
        return None
    file = volumes.path(volid)
    if not file.is_file():
        raise PveFailure(f"volume '{volid}' does not exist")
    return file.read_text()


def _name(guest: Guest) -> tuple[str, str]:
    """(host name, full name)."""
    name = guest.conf.get("name") or f"VM{guest.vmid}"
    host = name.split(".")[0]
    if "." not in name and guest.conf.get("searchdomain"):
        return host, f"{name}.{guest.conf['searchdomain'].split()[0]}"
    return host, name


def host_name(guest: Guest) -> str:
    """The host name of a guest from its first boot on, as in the user-data."""
    return _name(guest)[0]


def user_data(guest: Guest) -> str:
    host, full = _name(guest)
    conf = guest.conf
    lines = ["#cloud-config", f"hostname: {host}", "manage_etc_hosts: true", f"fqdn: {full}"]
    user = conf.get("ciuser")
    if user:
        lines.append(f"user: {user}")
        if user == "root":
            lines.append("disable_root: False")
    if conf.get("cipassword"):
        lines.append(f"password: {_hashed(conf['cipassword'])}")
    if conf.get("sshkeys"):
        lines.append("ssh_authorized_keys:")
        lines += [f"  - {key}" for key in validation.decode_keys(conf["sshkeys"])]
    lines += ["chpasswd:", "  expire: False"]
    if user != "root":
        lines += ["users:", "  - default"]
    if conf.get("ciupgrade", "1") != "0":
        lines.append("package_upgrade: true")
    return "\n".join(lines) + "\n"


def _hashed(password: str) -> str:
    if password.startswith("$"):
        return password
    process = subprocess.run(
        ["openssl", "passwd", "-5", "-stdin"], input=password, capture_output=True, text=True, check=True
    )
    return process.stdout.strip()


def meta_data(user: str, network: str) -> str:
    return f"instance-id: {hashlib.sha1((user + network).encode()).hexdigest()}\n"


def network_config(guest: Guest) -> str:
    lines = ["version: 1", "config:"]
    for key in sorted((k for k in guest.conf if NETS.fullmatch(k)), key=lambda k: int(k[3:])):
        mac = mac_of(guest.conf[key]).lower()
        lines += ["    - type: physical", f"      name: eth{key[3:]}", f"      mac_address: '{mac}'"]
        address = validation.split(validation.IPCONFIG, guest.conf.get(f"ipconfig{key[3:]}", ""))
        if address:
            lines.append("      subnets:")
            lines += _subnet4(address) + _subnet6(address)
    lines.append("    - type: nameserver")
    servers = guest.conf.get("nameserver", "").replace(",", " ").split() or _host_resolver("nameserver")
    if servers:
        lines += ["      address:", *(f"      - '{server}'" for server in servers)]
    search = guest.conf.get("searchdomain", "").split() or _host_resolver("search")
    if search:
        lines += ["      search:", *(f"      - '{domain}'" for domain in search)]
    return "\n".join(lines) + "\n"


def _subnet4(address: dict[str, str]) -> list[str]:
    text = address.get("ip")
    if not text:
        return []
    if text == "dhcp":
        return ["      - type: dhcp4"]
    interface = ipaddress.ip_interface(text)
    lines = [
        "      - type: static",
        f"        address: '{interface.ip}'",
        f"        netmask: '{interface.network.netmask}'",
    ]
    return lines + ([f"        gateway: '{address['gw']}'"] if address.get("gw") else [])


def _subnet6(address: dict[str, str]) -> list[str]:
    text = address.get("ip6")
    if not text:
        return []
    if text in ("dhcp", "auto"):
        return [f"      - type: {'dhcp6' if text == 'dhcp' else 'ipv6_slaac'}"]
    lines = ["      - type: static6", f"        address: '{text}'"]
    return lines + ([f"        gateway: '{address['gw6']}'"] if address.get("gw6") else [])


def mac_of(net: str) -> str:
    for part in net.split(","):
        key, _, value = part.partition("=")
        if validation.MAC.fullmatch(value) and key in NET_MODELS | {"macaddr"}:
            return value
    return ""


NET_MODELS = {
    *("e1000", "e1000-82540em", "e1000-82544gc", "e1000-82545em", "e1000e", "i82551", "i82557b"),
    *("i82559er", "ne2k_isa", "ne2k_pci", "pcnet", "rtl8139", "virtio", "vmxnet3"),
}


def _host_resolver(what: str) -> list[str]:
    """The host's values of `what` in resolv.conf: the defaults of a guest."""
    try:
        lines = paths.at("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        return []
    entries = [words[1:] for words in (line.split() for line in lines) if words and words[0] == what]
    values = [word for words in entries for word in words]
    return [value for value in values if not (what == "search" and value == ".")]
