"""The vendor-data of the run's VMs: a snippet that installs the guest agent, which Debian's images lack.

The teardown discovers the snippet by its name, which begins with `npve-<run>-`.
"""

from __future__ import annotations

import json
import posixpath
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings

# Only without an agent: an image that has it needs no mirror. A package list that cannot be fetched (a
# security suite that the mirror does not have) must not prevent the use of the others.
_AGENT = """\
set -eu
if ! command -v qemu-ga >/dev/null; then
    apt-get -q update || echo 'some package lists could not be fetched; continuing' >&2
    DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \\
        --no-install-recommends install qemu-guest-agent
fi
systemctl start qemu-guest-agent
"""


def user_data(settings: Settings) -> str:
    """Vendor-data of the run's VMs: apt's mirror and proxy, and the guest agent."""
    data: dict[str, Any] = {}
    apt: dict[str, Any] = {}
    if settings.mirror:
        apt["primary"] = [{"arches": ["default"], "uri": settings.mirror}]
    if settings.http_proxy:
        apt["http_proxy"] = apt["https_proxy"] = settings.http_proxy
    if apt:
        data["apt"] = apt
    data["runcmd"] = [["sh", "-c", _AGENT]]
    # JSON is valid YAML, with simpler quoting.
    return "#cloud-config\n" + json.dumps(data, indent=1) + "\n"


def snippet_name(run_id: str) -> str:
    """The file name of the run's vendor-data."""
    return f"npve-{run_id}-vendor.yaml"


def storage_path(host: PveHost, storage: str) -> str:
    """The absolute path of a directory storage. Raises PveError for another type of storage."""
    answer = host.api.get(f"/storage/{storage}")
    path = answer.get("path") if isinstance(answer, dict) else None
    if not isinstance(path, str) or not path.startswith("/"):
        raise PveError(
            f"expected the storage {storage} of {host.name} to have a path, as directory storages have; "
            f"found {path!r}"
        )
    return path


def write_snippet(host: PveHost, storage: str, run_id: str, text: str) -> str:
    """Write the run's vendor-data on the host and return its volume id. Raises PveError.

    Written by root over SSH: the API can neither upload nor download snippets. Only `qm start` of root reads
    the file, so it has mode 0600: the URLs in it may contain passwords.
    """
    name = snippet_name(run_id)
    directory = posixpath.join(storage_path(host, storage), "snippets")
    host.run(["mkdir", "-p", directory]).check()
    host.ssh.put(text.encode(), posixpath.join(directory, name), mode=0o600)
    return f"{storage}:snippets/{name}"
