"""Is a value what its definition says? In PVE's words, None if all is well.

Texts that PVE's format checks `die` with end in a newline; those of types and limits do not.
"""

from __future__ import annotations

import base64
import ipaddress
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

Definition = Mapping[str, Any]
BOOLEANS = {"1": "1", "on": "1", "yes": "1", "true": "1", "0": "0", "off": "0", "no": "0", "false": "0"}
DNS = re.compile(r"([a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?)(\.[a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?)*")
CONFIG_ID = re.compile(r"[a-z][a-z0-9_-]+", re.IGNORECASE)
MAC = re.compile(r"[a-f0-9][02468ace](?::[a-f0-9]{2}){5}", re.IGNORECASE)
TAG = re.compile(r"[a-z0-9_][a-z0-9_\-+.]*", re.IGNORECASE)
STORAGE = re.compile(r"[a-z][a-z0-9\-_.]*[a-z0-9]", re.IGNORECASE)

# Formats that are property strings, which the table only names.
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
STARTUP = {
    "order": {"type": "integer", "optional": 1, "default_key": 1, "minimum": 0},
    "up": {"type": "integer", "optional": 1, "minimum": 0},
    "down": {"type": "integer", "optional": 1, "minimum": 0},
}
PROPERTY_STRINGS: dict[str, Mapping[str, Any]] = {
    "pve-qm-ipconfig": IPCONFIG,
    "pve-qm-cicustom": CICUSTOM,
    "pve-qm-smbios1": SMBIOS1,
    "pve-startup-order": STARTUP,
}


def as_boolean(value: Any) -> str:
    return BOOLEANS.get(str(value).lower(), str(value))


def value(definition: Definition, given: Any, name: str = "") -> str | None:
    """What is wrong with `given`, None if nothing."""
    if definition.get("type") == "array":
        for item in given if isinstance(given, list) else [given]:
            if error := value(definition.get("items", {"type": "string"}), item, name):
                return error
        return None
    text = given if isinstance(given, str) else str(given)
    kind = definition.get("type", "string")
    if kind == "boolean" and text.lower() not in BOOLEANS:
        return f"type check ('boolean') failed - got '{text}'"
    if kind == "integer" and not re.fullmatch(r"[+-]?\d+", text):
        return f"type check ('integer') failed - got '{text}'"
    if kind == "number" and not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", text):
        return f"type check ('number') failed - got '{text}'"
    pattern = definition.get("pattern")
    if pattern is not None and not re.fullmatch(str(pattern).replace("(?^:", "(?:"), text):
        return "value does not match the regex pattern"
    if (form := definition.get("format")) and (error := format_error(form, text, name)):
        return f"invalid format - {error}"
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
    """What is wrong with the format of `text`; the answer ends in a newline."""
    if isinstance(form, Mapping):
        _, errors = parse(form, text, name)
        return _property_errors(errors)
    if form in PROPERTY_STRINGS:
        _, errors = parse(PROPERTY_STRINGS[form], text, name)
        return _property_errors(errors)
    if form.endswith("-list"):
        single = form.removesuffix("-list")
        separator = r"[;,\s\0]+"
        if single in FORMATS:
            for item in filter(None, re.split(separator, text)):
                if error := FORMATS[single](item):
                    return error + "\n"
        return None
    if form in FORMATS and (error := FORMATS[form](text)):
        return error + "\n"
    return None


def _property_errors(errors: Mapping[str, str]) -> str | None:
    if not errors:
        return None
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
    for piece in text.split(","):
        if not piece.strip():
            continue
        key, equals, content = piece.partition("=")
        if not equals or (key not in form and default is not None and default not in parts):
            if default is None or default in parts:
                errors[name or piece] = (
                    f"value without key, but schema does not define a default key: {piece}"
                    if default is None
                    else "duplicate key in comma-separated list property: " + default
                )
                continue
            key, content = default, piece
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
        parts[key] = content
        if error := value(definition, content, key):
            errors[prefix + key] = error
    for key, definition in form.items():
        required = definition.get("type") and not definition.get("optional") and "default" not in definition
        if required and key not in parts:
            errors[prefix + key] = "property is missing and it is not optional"
        if key in parts and (needed := definition.get("requires")) and needed not in parts:
            errors[prefix + needed] = f"missing property required by '{key}'"
    return parts, errors


def size(text: str) -> int | None:
    """Bytes of `64M`, `1.5G`, `4096`; None if it is no size."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT])?", text)
    if match is None:
        return None
    return int(float(match[1]) * 1024 ** (" KMGT".index(match[2]) if match[2] else 0))


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


def _address(version: int | None, *, words: str) -> Callable[[str], str | None]:
    def check(text: str) -> str | None:
        try:
            found = ipaddress.ip_address(text)
        except ValueError:
            return words
        return None if version in (None, found.version) else words

    return check


def _config_address(version: int, special: tuple[str, ...], words: str) -> Callable[[str], str | None]:
    def check(text: str) -> str | None:
        if text in special:
            return None
        try:
            network = ipaddress.ip_interface(text)
        except ValueError:
            return words
        return None if network.version == version and "/" in text else words

    return check


def _cidr(text: str) -> str | None:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return "value does not look like a valid CIDR network"
    return None if "/" in text else "value does not look like a valid CIDR network"


CONTENT = ("images", "rootdir", "vztmpl", "iso", "backup", "snippets", "import", "none")
_matches: Callable[[str, str], Callable[[str], str | None]] = lambda pattern, words: (  # noqa: E731
    lambda text: None if re.fullmatch(pattern, text, re.I) else words.format(text)
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
    "ipv4": _address(4, words="value does not look like a valid IPv4 address"),
    "ipv6": _address(6, words="value does not look like a valid IPv6 address"),
    "ip": _address(None, words="value does not look like a valid IP address"),
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
    "pve-roleid": _matches(r"[A-Za-z0-9.\-_]+", "role name '{}' contains invalid characters"),
}


def is_public_key(line: str) -> bool:
    """Whether the line holds a key whose data is of the type it names (ssh-keygen looks deeper)."""
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
