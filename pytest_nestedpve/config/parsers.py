"""Parsers for the texts of settings; their ValueError has the expected form and the value found."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipaddress import IPv4Interface

RUN_ID = re.compile(r"(?:template-)?[0-9a-f]{12}\Z")
VMID_MIN, VMID_MAX = 100, 999_999_999
ANY_RANGE: tuple[tuple[int, int], ...] = ((VMID_MIN, VMID_MAX),)
WIDEST_RANGE = 1000
_LITERAL = re.compile(r"[A-Za-z0-9.-]*")
_PATTERN = re.compile(r"[A-Za-z0-9.*?\[\]!-]+\Z")
SHORTEST_LEASE = 10.0
"""Seconds."""
_RUN_SETS = "each run sets it, to identify its own VMs"
_PROTECTS = "a VM with this option is not destroyed, so it would be left over"
_NO_OPTION = "it is no part of a VM's configuration"
_RESERVED = {
    **dict.fromkeys(("name", "description", "smbios1", "tags", "pool", "vmid"), _RUN_SETS),
    **dict.fromkeys(("protection", "template", "lock"), _PROTECTS),
    **dict.fromkeys(
        ("delete", "revert", "digest", "force", "skiplock", "archive", "unique", "start"), _NO_OPTION
    ),
}
_SAMPLE_RUN = "0123456789ab"


@dataclass(frozen=True)
class Source:
    """A directory, or a git repository at a ref, that setup_repos copies onto the nested PVE.

    `location` is an absolute path, or a git URL; `ref` is None for the default branch, and for a path.
    """

    name: str
    location: str
    ref: str | None = None

    @property
    def is_git(self) -> bool:
        return not self.location.startswith("/")


@dataclass(frozen=True)
class Text:
    """The text of a setting, and the base directory of relative paths in it."""

    value: str
    base: Path


Parser = Callable[[Text], Any]


def split_items(text: str) -> list[str]:
    """The items of a text, separated by commas, blanks or line ends."""
    return [part for part in re.split(r"[,\s]+", text.strip()) if part]


def split_words(text: str) -> list[str]:
    """The words of a text, separated as in a shell. Raises ValueError for an open quote."""
    try:
        return shlex.split(text, comments=True)
    except ValueError as e:
        raise ValueError(f"quotes that do not close: {e}") from e


def name_prefix(pattern: str) -> str:
    """The literal beginning of a pattern, with which the names of this project's VMs start."""
    literal = _LITERAL.match(pattern)
    return (literal.group() if literal else "").rstrip("-.")


def name_patterns(text: Text) -> tuple[str, ...]:
    patterns = tuple(split_items(text.value))
    for pattern in patterns:
        if not _PATTERN.match(pattern):
            raise ValueError(
                f"expected a name pattern of letters, digits, '-', '.', '*', '?' and '[…]'; found {pattern!r}"
            )
        literal = _LITERAL.match(pattern)
        if literal is None or len(literal.group()) < 3:
            raise ValueError(
                f"the pattern {pattern!r} is too wide: expected at least three literal characters at its "
                "beginning, like 'nested-pve*'"
            )
    prefix = name_prefix(patterns[0])
    if len(prefix) > 44 or not re.match(r"[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?\Z", prefix):
        raise ValueError(
            f"the names of VMs begin with the literal part of the first pattern; {prefix!r} is invalid: "
            "expected letters, digits, '-' and '.', at most 44 of them"
        )
    for name in (f"{prefix}-{_SAMPLE_RUN}", f"{prefix}-leaf-{_SAMPLE_RUN}"):
        if not fnmatch.fnmatchcase(name, patterns[0]):
            raise ValueError(
                f"the first pattern, {patterns[0]!r}, does not match the names of VMs ({name}): "
                f"end it with '*', like {prefix + '*'!r}"
            )
    return patterns


def vmid_ranges(text: Text) -> tuple[tuple[int, int], ...]:
    parts = split_items(text.value)
    if parts == ["any"]:
        return ANY_RANGE
    ranges = []
    for part in parts:
        match = re.match(r"(\d{1,9})(?:-(\d{1,9}))?\Z", part)
        if not match:
            raise ValueError(
                f"expected VM ids like '99900-99999', a list of ranges, or 'any'; found {part!r}"
            )
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high:
            raise ValueError(f"the range {part!r} ends before it begins; reverse it")
        if low < VMID_MIN:
            raise ValueError(f"VM ids begin at {VMID_MIN}; found {part!r}")
        ranges.append((low, high))
    width = sum(high - low + 1 for low, high in ranges)
    if width > WIDEST_RANGE:
        raise ValueError(
            f"the range {text.value.strip()!r} holds {width} ids, more than {WIDEST_RANGE}: reduce it"
        )
    return tuple(ranges)


def host(text: Text) -> str:
    value = text.value.strip()
    if value == "lab" or value.startswith("lab:"):
        if not re.match(r"lab(:[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?)?\Z", value):
            raise ValueError(
                "expected 'lab' or 'lab:NAME' (1 to 32 lower-case letters, digits, inner hyphens); "
                f"found {value!r}"
            )
        return value
    if not re.match(
        r"(?:[A-Za-z0-9._-]+@)?[A-Za-z0-9_:\[\]][A-Za-z0-9._:\[\]-]*\Z", value
    ) or value.startswith("-"):
        raise ValueError(
            "expected a destination of ssh (a name of ~/.ssh/config, an address, user@host), or 'lab'; "
            f"found {value!r}"
        )
    return value


def one_of_kind(what: str, pattern: str) -> Parser:
    """A parser for one word that matches `pattern`; `what` describes it in messages."""
    compiled = re.compile(pattern)

    def parse(text: Text) -> str:
        value = text.value.strip()
        if not compiled.fullmatch(value):
            raise ValueError(f"expected {what}; found {value!r}")
        return value

    return parse


def url(text: Text) -> str:
    value = text.value.strip()
    if not re.fullmatch(r"https?://[^\s/]+(?:/\S*)?", value):
        raise ValueError(
            f"expected an address that begins with http:// or https://; found {without_password(value)!r}"
        )
    return value.rstrip("/")


def without_password(value: str) -> str:
    """An address without user and password, which are between // and @."""
    return re.sub(r"(?<=//)[^/@\s]*@", "…@", value)


def ipconfig(text: Text) -> str:
    import ipaddress

    value = text.value.strip()
    for part in value.split(","):
        key, _, address = part.partition("=")
        try:
            if key == "ip" and address != "dhcp":
                if "/" not in address:
                    raise ValueError("no prefix length")
                ipaddress.IPv4Interface(address)
            elif key == "gw":
                ipaddress.IPv4Address(address)
            elif key == "ip6" and address not in ("dhcp", "auto"):
                ipaddress.IPv6Interface(address)
            elif key == "gw6":
                ipaddress.IPv6Address(address)
            elif key not in ("ip", "ip6"):
                raise ValueError(f"no such key: {key}")
        except ValueError as e:
            raise ValueError(
                f"expected a value of qm's ipconfig0, 'ip=dhcp' or 'ip=192.0.2.9/24,gw=192.0.2.1'; "
                f"found {part!r} ({e})"
            ) from e
    interface, gateway = static_address(value), re.search(r"(?:\A|,)gw=([^,]+)", value)
    if gateway is not None and (
        interface is None or ipaddress.IPv4Address(gateway[1]) not in interface.network
    ):
        raise ValueError(
            "expected a gateway in the network of the address, as in 'ip=192.0.2.9/24,gw=192.0.2.1'; "
            f"found {value!r}"
        )
    return value


def static_address(value: str) -> IPv4Interface | None:
    """The IPv4 address in an ipconfig; None with DHCP."""
    import ipaddress

    address = next((part[3:] for part in value.split(",") if part.startswith("ip=")), "dhcp")
    return None if address == "dhcp" else ipaddress.IPv4Interface(address)


_CHECKSUMS = {"md5": 32, "sha1": 40, "sha224": 56, "sha256": 64, "sha384": 96, "sha512": 128}


def image(text: Text) -> str:
    """A volume, `URL#algorithm:checksum`, or the absolute path of an existing file."""
    value = text.value.strip()
    if re.match(r"https?://", value):
        return _image_at(value)
    if re.fullmatch(r"[A-Za-z][\w.-]*:\S+", value):
        return value
    path = absolute(value, text.base)
    if not path.is_file():
        raise ValueError(
            "expected a volume like local:import/debian-13.qcow2, an address followed by its checksum "
            f"like https://…/debian-13.qcow2#sha256:…, or a file; found {value!r}, and no file {path}"
        )
    return str(path)


def _image_at(value: str) -> str:
    address, _, suffix = value.partition("#")
    algorithm, _, checksum = suffix.replace("=", ":", 1).partition(":")
    if not re.fullmatch(r"https?://[^\s/]+/\S+", address):
        raise ValueError(f"expected the address of a file, like https://…/debian-13.qcow2; found {address!r}")
    if not re.fullmatch(rf"[0-9a-fA-F]{{{_CHECKSUMS.get(algorithm, 1)}}}", checksum) or (
        algorithm not in _CHECKSUMS
    ):
        raise ValueError(
            f"expected a checksum after the address, as in {without_password(address)}#sha256:0123… "
            f"with all its digits ({', '.join(_CHECKSUMS)}); found {suffix or 'none'!r}"
        )
    return f"{address}#{algorithm}:{checksum.lower()}"


def count(what: str, low: int, high: int) -> Parser:
    def parse(text: Text) -> int:
        value = text.value.strip()
        if not re.fullmatch(r"\d{1,9}", value) or not low <= int(value) <= high:
            raise ValueError(f"expected {what}, a whole number from {low} to {high}; found {value!r}")
        return int(value)

    return parse


def size(what: str, units: dict[str, int], low: int, high: int) -> Parser:
    """A parser for a whole number with a unit; `units`: factors to the target unit, '' without a unit."""

    def parse(text: Text) -> int:
        value = text.value.strip()
        match = re.fullmatch(r"(\d{1,9})\s*([A-Za-z]*)", value)
        factor = units.get(match[2].lower()) if match else None
        if not match or factor is None or not low <= int(match[1]) * factor <= high:
            raise ValueError(f"expected {what} from {low} to {high}; found {value!r}")
        return int(match[1]) * factor

    return parse


def seconds(text: Text) -> float:
    value = text.value.strip()
    # Enough digits for years; a float of more digits might be infinite.
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(s|m|min|h)?", value)
    if not match or float(match[1]) <= 0:
        raise ValueError(f"expected a time above 0 in seconds, or with the unit m or h; found {value!r}")
    return float(match[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600}[match[2] or "s"]


def within_a_day(text: Text) -> float:
    duration = seconds(text)
    if duration > 24 * 3600:
        raise ValueError(f"expected at most 24h, when every run expires; found {text.value.strip()!r}")
    return duration


def lease(text: Text) -> float:
    duration = within_a_day(text)
    if duration < SHORTEST_LEASE:
        raise ValueError(
            f"expected at least {SHORTEST_LEASE:g} s, because a run renews its lease six times within it; "
            f"found {text.value.strip()!r}"
        )
    return duration


def factor(text: Text) -> float:
    value = text.value.strip()
    if not re.fullmatch(r"\d+(\.\d+)?", value) or not 0.01 <= float(value) <= 1000:
        raise ValueError(f"expected a number from 0.01 to 1000; found {value!r}")
    return float(value)


def boolean(text: Text) -> bool:
    value = text.value.strip().lower()
    if value in ("1", "true", "yes", "on"):
        return True
    if value in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"expected true or false; found {value!r}")


def options(text: Text) -> dict[str, str]:
    """Words `key=value` with options of qm."""
    result: dict[str, str] = {}
    for word in split_words(text.value):
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"expected key=value with an option of qm as key, like kvm=0; found {word!r}")
        option_name(key)
        if key in result:
            raise ValueError(f"the option {key!r} is set twice")
        result[key] = value
    return result


def option_name(name: object) -> str:
    """The name of an option of a VM that users may set. Raises ValueError."""
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
        raise ValueError(f"expected an option of qm, like kvm; found {name!r}")
    if why := _RESERVED.get(name):
        raise ValueError(f"the option {name!r} cannot be set: {why}")
    return name


def bootstrap(text: Text) -> str:
    """`name:command`."""
    name, colon, command = (part.strip() for part in text.value.strip().partition(":"))
    if not (name and colon and command):
        raise ValueError(f"expected a source's name, a colon and a command; found {text.value.strip()!r}")
    return text.value.strip()


_three_parts = one_of_kind(
    "name:file.yaml:path like site:secrets.yaml:api_tokens.{node}", r"[^:\s]+:[^:\s]+:\S+"
)


def token_path(text: Text) -> str:
    """`name:file.yaml:path.in.it`, the file below the source."""
    from pytest_nestedpve.config.yaml_path import YamlPathError, parse_path

    value = str(_three_parts(text))
    _, file, path = value.split(":", 2)
    if file.startswith("/") or ".." in file.split("/"):
        raise ValueError(f"expected a file below the source's directory; found {file!r}")
    try:
        parse_path(path, "node")
    except YamlPathError as e:
        raise ValueError(str(e)) from e
    return value


def variables(text: Text) -> dict[str, Any]:
    """A JSON object, or lines `key=value`; a value that is JSON is decoded, any other is a string."""
    value = text.value.strip()
    if value.startswith("{"):
        try:
            decoded = json.loads(value)
        except ValueError as e:
            raise ValueError(f"expected a JSON object: {e}") from e
        result = dict(decoded)
    else:
        result = {}
        for line in filter(None, (line.strip() for line in value.splitlines())):
            key, equals, entry = (part.strip() for part in line.partition("="))
            if not equals:
                raise ValueError(f"expected lines key=value, or a JSON object; found {line!r}")
            try:
                result[key] = json.loads(entry)
            except ValueError:
                result[key] = entry
    for key in result:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise ValueError(f"expected a variable name of letters, digits and _; found {key!r}")
    return result


def groups(text: Text) -> tuple[str, ...]:
    names = tuple(split_items(text.value))
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"expected group names of letters, digits and _; found {name!r}")
    return names


def directory(text: Text) -> Path:
    path = absolute(text.value.strip(), text.base)
    if not path.is_dir():
        raise ValueError(f"expected a directory that exists; {path} is none")
    return path


def directories(text: Text) -> tuple[Path, ...]:
    return tuple(directory(Text(part, text.base)) for part in re.split(r"[:\n]", text.value) if part.strip())


def files(text: Text) -> tuple[Path, ...]:
    """Words that are paths of readable files."""
    paths = []
    for word in split_words(text.value):
        path = absolute(word, text.base)
        try:
            with path.open("rb"):
                pass
        except OSError as e:
            raise ValueError(f"expected a file that can be read; {path}: {e.strerror}") from e
        paths.append(path)
    return tuple(paths)


def creatable_directory(text: Text) -> Path:
    """A directory that exists or can be created."""
    try:
        path = absolute(text.value.strip(), text.base)
        existing = next(part for part in (path, *path.parents) if part.exists())
    except (OSError, RuntimeError) as e:  # no permission, too long a name, ~ of an unknown user
        raise ValueError(f"expected a directory, or one that can be created: {e}") from e
    if not existing.is_dir():
        raise ValueError(f"expected a directory, or one that can be created: {existing} is none")
    return path


def sources(text: Text) -> tuple[Source, ...]:
    """Words `name=path` or `name=git-url@ref`."""
    result: list[Source] = []
    for word in split_words(text.value):
        name, equals, location = word.partition("=")
        if not equals or not location or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"expected name=path or name=git-url@ref; found {word!r}")
        if any(name == source.name for source in result):
            raise ValueError(f"two sources are named {name!r}")
        result.append(_source(name, location, text.base))
    return tuple(result)


def _source(name: str, location: str, base: Path) -> Source:
    # A git URL is scheme://… or user@host:path; the ref is after the last @ of its path.
    match = re.fullmatch(r"((?:https?|ssh|git|file)://[^/]*/|[A-Za-z0-9._-]+@[A-Za-z0-9._-]+:)(.+)", location)
    if match:
        path, at, ref = match[2].rpartition("@")
        if at and (not path or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/+-]*", ref)):
            raise ValueError(
                f"expected a branch, tag or commit after the @; found {without_password(location)!r}"
            )
        return Source(name, match[1] + (path if at else ref), ref if at else None)
    if "://" in location:
        raise ValueError(
            f"expected a path or a git address (https, ssh, git, file); found {without_password(location)!r}"
        )
    path = absolute(location, base)
    if not path.is_dir():
        raise ValueError(f"the source {name!r} does not exist: {path} is no directory")
    return Source(name, str(path))


def absolute(value: str, base: Path) -> Path:
    """An absolute path: `~` is expanded, `base` prepended, `..` resolved; links are not followed."""
    import os

    return Path(os.path.normpath(base / Path(value).expanduser()))
