"""Checks of values against their definitions: PVE's error message, or None for a valid value.

Messages of PVE's format checks end in a newline; those of types and limits do not.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from .errors import Unsupported

Definition = Mapping[str, Any]
DUPLICATE = "duplicate key in comma-separated list property: "
BOOLEANS = {"1": "1", "on": "1", "yes": "1", "true": "1", "0": "0", "off": "0", "no": "0", "false": "0"}
DNS = re.compile(r"([a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?)(\.[a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?)*")
CONFIG_ID = re.compile(r"[a-z][a-z0-9_-]+", re.IGNORECASE)
MAC = re.compile(r"[a-f0-9][02468ace](?::[a-f0-9]{2}){5}", re.IGNORECASE)
TAG = re.compile(r"[a-z0-9_][a-z0-9_\-+.]*", re.IGNORECASE)
DISK = r"ide[0-3]|sata[0-5]|scsi([12]?\d|30)|virtio(1[0-5]|\d)"
STORAGE = re.compile(r"[a-z][a-z0-9\-_.]*[a-z0-9]", re.IGNORECASE)

# The last number of each family `name[n]`. Disks: `resize` enumerates them; serial, parallel, usb: as the
# help of `qm create` [basic-101]; all others: PVE's limits.
LAST = {
    "ide": 3,
    "sata": 5,
    "scsi": 30,
    "virtio": 15,
    "unused": 255,
    "serial": 3,
    "parallel": 2,
    "usb": 14,
} | {"net": 31, "ipconfig": 31, "numa": 7, "hostpci": 15, "virtiofs": 9, "link": 7, "mp": 255, "dev": 255}


def family(name: str) -> str | None:
    """`scsi[n]` for scsi0 to scsi30; None for a name outside a family."""
    match = re.fullmatch(r"([a-z]+)(0|[1-9]\d*)", name)
    return f"{match[1]}[n]" if match and int(match[2]) <= LAST.get(match[1], -1) else None


# Property strings, of which the table has only the format's name.
IPCONFIG = {
    "ip": {"format": "ipv4-config", "optional": 1, "type": "string"},
    "gw": {"format": "ipv4", "optional": 1, "type": "string", "requires": "ip"},
    "ip6": {"format": "ipv6-config", "optional": 1, "type": "string"},
    "gw6": {"format": "ipv6", "optional": 1, "type": "string", "requires": "ip6"},
}
_VOLUME = {"format": "pve-volume-id", "optional": 1, "type": "string"}
CICUSTOM = dict.fromkeys(("meta", "network", "user", "vendor"), _VOLUME)
_TEXT = {"type": "string", "optional": 1}
SMBIOS1: dict[str, Any] = dict.fromkeys(
    ("version", "serial", "manufacturer", "product", "sku", "family"), _TEXT
)
SMBIOS1 |= {
    "uuid": {
        "type": "string",
        "optional": 1,
        "pattern": "[a-fA-F0-9]{8}(?:-[a-fA-F0-9]{4}){3}-[a-fA-F0-9]{12}",
    },
    "base64": {"type": "boolean", "optional": 1},
}
_COUNT = {"type": "integer", "optional": 1, "minimum": 0}
PRUNE: dict[str, Any] = {"keep-all": {"type": "boolean", "optional": 1}}
PRUNE |= {f"keep-{period}": _COUNT for period in ("last", "hourly", "daily", "weekly", "monthly", "yearly")}
BOOT = {
    "legacy": {"type": "string", "optional": 1, "default_key": 1, "pattern": "[acdn]{1,4}"},
    "order": {"type": "string", "optional": 1, "format": "pve-qm-bootdev-list"},
}
# The forms and enumerations of these are in the help of `qm create` [basic-101].
RNG = {
    "source": {
        "type": "string",
        "default_key": 1,
        "enum": ["/dev/urandom", "/dev/random", "/dev/hwrng"],
    },
    "max_bytes": {"type": "integer", "optional": 1},
    "period": {"type": "integer", "optional": 1},
}
WATCHDOG = {
    "model": {"type": "string", "optional": 1, "default_key": 1, "enum": ["i6300esb", "ib700"]},
    "action": {
        "type": "string",
        "optional": 1,
        "enum": ["reset", "shutdown", "poweroff", "pause", "debug", "none"],
    },
}
CPU: dict[str, Any] = {
    "cputype": {"type": "string", "optional": 1, "default_key": 1},
    "flags": {"type": "string", "optional": 1, "pattern": r"[+-][\w\-.]+(;[+-][\w\-.]+)*"},
    "guest-phys-bits": {"type": "integer", "optional": 1, "minimum": 32, "maximum": 64},
    "hidden": {"type": "boolean", "optional": 1},
    "hv-vendor-id": {"type": "string", "optional": 1, "pattern": "[a-zA-Z0-9]{1,12}"},
    "level": {"type": "integer", "optional": 1, "minimum": 0, "maximum": 4294967295},
    "phys-bits": {"type": "string", "optional": 1, "pattern": "[89]|[1-5][0-9]|6[0-4]|host"},
    "reported-model": {"type": "string", "optional": 1},
}
# As `/nodes/N/capabilities/qemu/cpu` lists them [basic-041].
CPU_MODELS = """
    486 athlon Broadwell Broadwell-IBRS Broadwell-noTSX Broadwell-noTSX-IBRS Cascadelake-Server
    Cascadelake-Server-noTSX Cascadelake-Server-v2 Cascadelake-Server-v4 Cascadelake-Server-v5
    ClearwaterForest Conroe Cooperlake Cooperlake-v2 core2duo coreduo EPYC EPYC-Genoa EPYC-Genoa-v2
    EPYC-IBPB EPYC-Milan EPYC-Milan-v2 EPYC-Milan-v3 EPYC-Rome EPYC-Rome-v2 EPYC-Rome-v3 EPYC-Rome-v4
    EPYC-Rome-v5 EPYC-Turin EPYC-v3 EPYC-v4 EPYC-v5 GraniteRapids GraniteRapids-v2 GraniteRapids-v3
    Haswell Haswell-IBRS Haswell-noTSX Haswell-noTSX-IBRS host Icelake-Client Icelake-Client-noTSX
    Icelake-Server Icelake-Server-noTSX Icelake-Server-v3 Icelake-Server-v4 Icelake-Server-v5
    Icelake-Server-v6 Icelake-Server-v7 IvyBridge IvyBridge-IBRS KnightsMill kvm32 kvm64 max Nehalem
    Nehalem-IBRS Opteron_G1 Opteron_G2 Opteron_G3 Opteron_G4 Opteron_G5 Penryn pentium pentium2 pentium3
    phenom qemu32 qemu64 SandyBridge SandyBridge-IBRS SapphireRapids SapphireRapids-v2 SapphireRapids-v3
    SapphireRapids-v4 SierraForest SierraForest-v2 SierraForest-v3 Skylake-Client Skylake-Client-IBRS
    Skylake-Client-noTSX-IBRS Skylake-Client-v4 Skylake-Server Skylake-Server-IBRS
    Skylake-Server-noTSX-IBRS Skylake-Server-v4 Skylake-Server-v5 Westmere Westmere-IBRS x86-64-v2
    x86-64-v2-AES x86-64-v3 x86-64-v4
"""
CPU_FLAGS = """
    nested-virt md-clear pcid spec-ctrl ssbd ibpb virt-ssbd amd-ssbd amd-no-ssb pdpe1gb hv-tlbflush
    hv-evmcs aes
"""
PROPERTY_STRINGS: dict[str, Mapping[str, Any]] = {
    "prune-backups": PRUNE,
    "pve-qm-boot": BOOT,
    "pve-qm-rng": RNG,
    "pve-qm-watchdog": WATCHDOG,
    "pve-vm-cpu-conf": CPU,
    "pve-qm-ipconfig": IPCONFIG,
    "pve-qm-cicustom": CICUSTOM,
    "pve-qm-smbios1": SMBIOS1,
}


def as_boolean(value: Any) -> str:
    return BOOLEANS.get(str(value).lower(), str(value))


def value(definition: Definition, content: Any, name: str = "") -> str | None:
    """The error of a value of an option, None for a valid one."""
    if definition.get("type") == "array":
        for item in content if isinstance(content, list) else [content]:
            if error := value(definition.get("items", {"type": "string"}), item, name):
                return error
        return None
    text = content if isinstance(content, str) else str(content)
    kind = definition.get("type", "string")
    if kind == "boolean" and text.lower() not in BOOLEANS:
        return f"type check ('boolean') failed - got '{text}'"
    if kind == "integer" and not re.fullmatch(r"[+-]?\d+", text):
        return f"type check ('integer') failed - got '{text}'"
    if kind == "number" and not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
        return f"type check ('number') failed - got '{text}'"
    if (form := definition.get("format")) and (error := format_error(form, text, name)):
        return f"invalid format - {error}"
    pattern = definition.get("pattern")
    if pattern is not None and not re.fullmatch(str(pattern).replace("(?^:", "(?:"), text):
        return "value does not match the regex pattern"
    if kind in ("integer", "number"):
        number = float(text)
        if (low := definition.get("minimum")) is not None and number < float(low):
            return f"value must have a minimum value of {low}"
        if (high := definition.get("maximum")) is not None and number > float(high):
            return f"value must have a maximum value of {high}"
    if (most := definition.get("maxLength")) and len(text) > int(most):
        return f"value may only be {most} characters long"
    if (least := definition.get("minLength")) and len(text) < int(least):
        return f"value must be at least {least} characters long"
    enum = definition.get("enum")
    if enum and text not in [str(item) for item in enum]:
        return f"value '{text}' does not have a value in the enumeration '{', '.join(map(str, enum))}'"
    return None


def format_error(form: Any, text: str, name: str = "") -> str | None:
    """The error of the format of `text`, ending in a newline; None for a valid one."""
    if isinstance(form, Mapping):
        _, errors = parse(form, text, name)
        return _property_errors(errors)
    if form in PROPERTY_STRINGS:
        parts, errors = parse(PROPERTY_STRINGS[form], text, name)
        return _property_errors(errors) or (_cpu(parts) if form == "pve-vm-cpu-conf" else None)
    items = [text]
    if form.endswith("-list"):
        form, items = form.removesuffix("-list"), list(filter(None, re.split(r"[;,\s\0]+", text)))
    elif form.endswith("-opt"):
        form, items = form.removesuffix("-opt"), list(filter(None, items))
    for item in items:
        if form not in FORMATS:
            raise Unsupported(f"'{item}' as {form}")
        if error := FORMATS[form](item):
            return error + "\n"
    return None


def _property_errors(errors: Mapping[str, str]) -> str | None:
    if not errors:
        return None
    if "" in errors:  # not parsed to its end
        return errors[""] + "\n"
    return "format error\n" + "".join(f"{name}: {text}\n" for name, text in sorted(errors.items()))


def split(form: Mapping[str, Any], text: str) -> dict[str, str]:
    """The parts of a property string; alias keys (`virtio=MAC`) become `model` and `macaddr`."""
    return parse(form, text, "")[0]


def parse(form: Mapping[str, Any], text: str, name: str) -> tuple[dict[str, str], dict[str, str]]:
    """(parts, errors by `name.part`) of a property string."""
    prefix = f"{name}." if name else ""
    parts: dict[str, str] = {}
    errors: dict[str, str] = {}
    default = next((key for key, d in form.items() if d.get("default_key")), None)
    for part in text.split(","):
        if not part.strip():
            continue
        key, equals, content = part.partition("=")
        if not equals or (key not in form and default is not None and default not in parts):
            if default is None or default in parts:
                errors[""] = (
                    "value without key, but schema does not define a default key"
                    if default is None
                    else DUPLICATE + default
                )
                continue
            key, content = default, part
        definition = form.get(key)
        if definition is None:
            errors[prefix + key] = (
                "property is not defined in schema and the schema does not allow additional properties"
            )
            continue
        if "keyAlias" in definition:
            parts[definition["keyAlias"]] = key
            key = definition["alias"]
            definition = form[key]
        elif "alias" in definition:
            key = definition["alias"]
            definition = form.get(key, {"type": "string"})
        if key in parts:
            errors[""] = DUPLICATE + key
        parts[key] = content
        if error := value(definition, content, key):
            errors[prefix + key] = error
    for key, definition in form.items():
        if definition.get("type") and not definition.get("optional") and key not in parts:
            errors[prefix + key] = "property is missing and it is not optional"
        if key in parts and (required := definition.get("requires")) and required not in parts:
            errors[prefix + required] = f"missing property required by '{key}'"
    return parts, errors


def size(text: str) -> int | None:
    """The bytes of `64M`, `1.5G`, `4096`; None for a text that is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])?", text)
    if match is None:
        return None
    return int(float(match[1]) * 1024 ** (" KMGT".index(match[2]) if match[2] else 0))


def _cpu(parts: Mapping[str, str]) -> str | None:
    model = parts.get("cputype", "kvm64")
    if model.startswith("custom-"):
        return f"Custom cputype '{model.removeprefix('custom-')}' not found\n"
    if model not in CPU_MODELS.split():
        return f"Built-in cputype '{model}' is not defined (missing 'custom-' prefix?)\n"
    if "reported-model" in parts:
        return "Property 'reported-model' not allowed in VM-specific CPU config.\n"
    for flag in filter(None, parts.get("flags", "").split(";")):
        if flag[1:] not in CPU_FLAGS.split():
            raise Unsupported(f"CPU flag '{flag}'")
    return None


def _dns(text: str) -> str | None:
    return None if DNS.fullmatch(text) else "value does not look like a valid DNS name"


def _vmid(text: str) -> str | None:
    return None if re.fullmatch(r"[1-9][0-9]{2,8}", text) else "value does not look like a valid VM ID"


def _configid(text: str) -> str | None:
    return None if CONFIG_ID.fullmatch(text) else f"invalid configuration ID '{text}'"


def _volume(text: str) -> str | None:
    return (
        None
        if re.fullmatch(rf"(?:{STORAGE.pattern}):(\S+)", text, re.I)
        else f"unable to parse volume ID '{text}'"
    )


def _volume_or_path(text: str) -> str | None:
    if text in ("none", "cdrom") or text.startswith("/"):
        return None
    return _volume(text)


def _urlencoded(text: str) -> str | None:
    bad = re.search(r"[^A-Za-z0-9\-_.!~*'()%/:@&=+$,;?#\[\]]", text) or re.search(
        r"%(?![0-9A-Fa-f]{2})", text
    )
    return f"invalid urlencoded string: {text}" if bad else None


def _pool(text: str) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9._\-/]+", text) or "//" in text or text.strip("/") != text:
        return f"pool name '{text}' contains invalid characters"
    if text.count("/") > 2:
        return f"pool name '{text}' nested too deeply (max levels = 3)"
    return None


def _address(version: int | None, *, message: str) -> Callable[[str], str | None]:
    def check(text: str) -> str | None:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return message
        return None if version in (None, address.version) else message

    return check


def _config_address(version: int, special: tuple[str, ...], message: str) -> Callable[[str], str | None]:
    def check(text: str) -> str | None:
        if text in special:
            return None
        try:
            network = ipaddress.ip_interface(text)
        except ValueError:
            return message
        return None if network.version == version and "/" in text else message

    return check


def _cidr(text: str) -> str | None:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return "value does not look like a valid CIDR network"
    return None if "/" in text else "value does not look like a valid CIDR network"


def _hostname(text: str) -> str | None:
    """The error of an `address`, which is an IP address or a DNS name."""
    if FORMATS["ip"](text) and _dns(text):
        return f"value does not look like a valid address: {text}"
    return None


_BOOTABLE = {f"{name}[n]" for name in ("ide", "sata", "scsi", "virtio", "net", "usb", "hostpci")}


def _bootdev(text: str) -> str | None:
    return None if family(text) in _BOOTABLE else f"invalid boot device '{text}'"


def _hotplug(text: str) -> str | None:
    for feature in filter(None, re.split(r"[;,\s\0]+", "" if text in ("0", "1") else text)):
        if feature not in ("network", "disk", "cpu", "memory", "usb", "cloudinit"):
            return f"invalid hotplug feature '{feature}'"
    return None


def _schedule(text: str) -> str | None:
    """The error of a calendar event; Unsupported for all but the usual forms."""
    if text in ("minutely", "hourly", "daily", "weekly", "monthly", "yearly", "quarterly", "semiannually"):
        return None
    if re.fullmatch(
        r"((mon|tue|wed|thu|fri|sat|sun)([,.]+(?=\w)|\b))*\s*(\d\d?|\*)((/\d\d?)|:(\d\d|\*)(/\d\d?)?)?", text
    ):
        return None
    raise Unsupported(f"'{text}' as pve-calendar-event")


def _startup(text: str) -> str | None:
    """The error of startup options, which are no property string [basic-101]."""
    parts = [part for part in text.split(",") if part.strip()]
    is_valid = all(re.fullmatch(r"((order|up|down)=)?\d+", part) for part in parts)
    return None if is_valid else "unable to parse startup options"


CONTENT = ("images", "rootdir", "vztmpl", "iso", "backup", "snippets", "import", "none")
_matches: Callable[[str, str], Callable[[str], str | None]] = lambda pattern, message: (  # noqa: E731
    lambda text: None if re.fullmatch(pattern, text, re.I) else message.format(text)
)
FORMATS: dict[str, Callable[[str], str | None]] = {
    "dns-name": _dns,
    "pve-vmid": _vmid,
    "pve-configid": _configid,
    "pve-node": _matches(r"[a-z0-9]([a-z0-9\-]*[a-z0-9])?", "value does not look like a valid node name"),
    "pve-storage-id": _matches(STORAGE.pattern, "storage ID '{}' contains illegal characters"),
    "pve-volume-id": _volume,
    "pve-volume-id-or-qm-path": _volume_or_path,
    "pve-volume-id-or-absolute-path": _volume_or_path,
    "urlencoded": _urlencoded,
    "pve-poolid": _pool,
    "pve-tag": _matches(TAG.pattern, "invalid characters in tag"),
    "mac-addr": _matches(MAC.pattern, "value does not look like a valid unicast MAC address"),
    "pve-bridge-id": _matches(r"[-_.\w\d]+", "invalid bridge ID '{}'"),
    "pve-iface": _matches(r"[a-z][a-z0-9_]{1,20}([:.]\d+)?", "invalid network interface name '{}'"),
    "pve-storage-content": lambda text: None if text in CONTENT else f"invalid content type '{text}'",
    "ipv4": _address(4, message="value does not look like a valid IPv4 address"),
    "ipv6": _address(6, message="value does not look like a valid IPv6 address"),
    "ip": _address(None, message="value does not look like a valid IP address"),
    "ipv4-config": _config_address(
        4, ("dhcp",), "value does not look like a valid ipv4 network configuration"
    ),
    "ipv6-config": _config_address(
        6, ("dhcp", "auto"), "value does not look like a valid ipv6 network configuration"
    ),
    "CIDR": _cidr,
    "disk-size": lambda text: (
        None if size(text) is not None else "value does not look like a valid disk size"
    ),
    "pve-userid": _matches(
        r"[^\s:/]+@[A-Za-z][A-Za-z0-9.\-_]+", "value '{}' does not look like a valid user name"
    ),
    "pve-tokenid": _matches(
        r"[^\s:/]+@[A-Za-z][A-Za-z0-9.\-_]+![A-Za-z][A-Za-z0-9.\-_]+",
        "value '{}' does not look like a valid token ID",
    ),
    "address": _hostname,
    "pve-qm-bootdev": _bootdev,
    "pve-qm-bootdisk": _matches(DISK, "invalid boot disk '{}'"),
    "pve-hotplug-features": _hotplug,
    "pve-startup-order": _startup,
    "pve-cpuset": _matches(r"\d+(-\d+)?(,\d+(-\d+)?)*", "unable to parse cpuset option"),
    "pve-task-status-type": _matches("ok|error|warning|unknown", "invalid status '{}'"),
    "pve-calendar-event": _schedule,
    "pve-day-of-week": _matches("mon|tue|wed|thu|fri|sat|sun", "invalid day '{}'"),
    "email": _matches(r"[^\s@]+@[^\s@]+", "value does not look like a valid email address"),
    "email-or-username": _matches(r"[^\s@/:]+(@[^\s@]+)?", "value does not look like a valid email address"),
    "pve-groupid": _matches(r"[A-Za-z0-9._\-]+", "group name '{}' contains invalid characters"),
    "pve-realm": _matches(r"[A-Za-z][A-Za-z0-9._\-]+", "value does not look like a valid realm"),
    # Of storages that the lab does not have: the handler refuses their types, not their options.
    "pve-storage-server": lambda _: None,
    "pve-storage-portal-dns": lambda _: None,
    "pve-storage-vgname": lambda _: None,
    "pve-storage-zfs-blocksize": lambda _: None,
    "pve-priv": lambda _: None,  # the handler of roles checks the privilege
    "pve-ha-resource-or-vm-id": _matches(
        r"((vm|ct):)?[1-9][0-9]{2,8}", "value does not look like a valid HA resource ID or VM ID"
    ),
    "pve-storage-path": _matches(r"/[^;()]+", "value does not look like a valid absolute path"),
    "pve-roleid": _matches(r"[A-Za-z0-9.\-_]+", "role name '{}' contains invalid characters"),
}


def is_public_key(line: str) -> bool:
    """Whether the line has a public key with data of the named type (ssh-keygen checks more)."""
    match = re.search(r"((?:ssh|ecdsa|sk)-[\w@.\-]+)\s+([A-Za-z0-9+/]+=*)", line)
    if match is None:
        return False
    try:
        data = base64.b64decode(match[2], validate=True)
    except ValueError:
        return False
    kind = match[1].encode()
    return data.startswith(len(kind).to_bytes(4, "big") + kind)


def decode_keys(text: str) -> list[str]:
    """The public keys of an `sshkeys` value."""
    return [line for line in unquote(text).splitlines() if line.strip()]
