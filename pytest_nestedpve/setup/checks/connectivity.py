"""Ways to the host and through it: forwarding by its SSH server, and its API."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.https import PORT, NotDelivered
from pytest_nestedpve.pve.tokens import greet, trust_of
from pytest_nestedpve.setup.checks.finding import WARNING, Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen

_SSHD = "/etc/ssh/sshd_config.d/10-nested-pve.conf"


def forwarding(seen: Seen) -> Iterator[Finding]:
    """The nested PVE is reached through the host's SSH server, which can be told not to let that be."""
    asked = ["/usr/sbin/sshd", "-T", "-C", "user=root,host=localhost,addr=127.0.0.1"]
    answer = seen.host.run(asked, timeout=20)
    if not answer.ok:
        return  # what it allows cannot be read; a login at the nested PVE will tell
    said = dict(re.findall(r"(?m)^(allowtcpforwarding|disableforwarding) (\w+)", answer.stdout.lower()))
    allowed = said.get("allowtcpforwarding", "yes")
    if allowed in ("yes", "all", "local") and said.get("disableforwarding", "no") == "no":
        yield fine("forwarding", "the SSH server allows it")
        return
    found = (
        "DisableForwarding yes" if said.get("disableforwarding") == "yes" else f"AllowTcpForwarding {allowed}"
    )
    yield Finding(
        "forwarding", "the host's SSH server to forward to the nested PVE (AllowTcpForwarding yes or local)",
        found, "If sshd_config itself forbids it, change it there.",
        fix=(
            f'printf "AllowTcpForwarding local\\nDisableForwarding no\\n" > {_SSHD}',
            "systemctl reload ssh",
        ),
    )  # fmt: skip


def quorum(seen: Seen) -> Iterator[Finding]:
    """A cluster without quorum takes no change."""
    answer = entries(seen.host.api.get("/cluster/status"))
    cluster = next((each for each in answer if each.get("type") == "cluster"), None)
    if cluster is None:
        return
    nodes = [each for each in answer if each.get("type") == "node"]
    online = sum(str(each.get("online")) in ("1", "True") for each in nodes)
    shown = f"{cluster.get('name')}, {online} of {len(nodes)} nodes online"
    if str(cluster.get("quorate")) in ("1", "True"):
        yield fine("quorum", shown)
        return
    yield Finding(
        "quorum", "a cluster with quorum: without, /etc/pve is read-only and nothing can be made", shown,
        "Bring its nodes back.", fix=("pvecm status",),
    )  # fmt: skip


def transport(seen: Seen) -> Iterator[Finding]:
    """Whether port 8006 answers, with a certificate that can be checked: calls then go over HTTPS, by tokens
    that PVE holds to the run's pool.
    """
    if not seen.by_https:
        seen.choose(
            "what this host was given with", transport=str(getattr(seen.host.api, "transport", "API"))
        )
        return
    # Runs ask the node that the login ends on, for all of the cluster.
    ssh, mends = seen.host.entry.ssh, ("systemctl restart pveproxy", "systemctl status pveproxy")
    try:
        greet(ssh, trust_of(ssh))
    except PveError as e:
        seen.choose(f"port {PORT} cannot be used", transport="pvesh over SSH")
        yield Finding(
            "transport", f"the API on port {PORT} of the host, through SSH, with a certificate that holds",
            " ".join(str(e).split())[:200],
            "Without it root's pvesh does everything: slower, and PVE does not hold the run to its pool.",
            fix=mends if isinstance(e, NotDelivered) else ("pvecm updatecerts --force", *mends),
            level=WARNING,
        )  # fmt: skip
        return
    seen.choose(f"port {PORT} answers", transport="HTTPS through SSH, with tokens of the run")
    yield fine("transport", f"port {PORT} answers through SSH")


def leftovers(seen: Seen) -> Iterator[Finding]:
    """Runs that are there: others' are nobody's business, those that have lapsed can go."""
    from pytest_nestedpve.ownership.lease import parse_lease
    from pytest_nestedpve.ownership.pool import host_clock, run_of_pool

    now = host_clock(seen.host)
    live: list[str] = []
    lapsed: list[str] = []
    for entry in entries(seen.host.api.get("/pools")):
        run, lease = run_of_pool(entry.get("poolid")), parse_lease(entry.get("comment"))
        if run and lease:
            (lapsed if lease.expired(now) else live).append(f"{run} ({lease.owner}'s, {lease.state})")
    if not lapsed:
        yield fine("runs", ", ".join(live) if live else "none there")
        return
    yield Finding(
        "runs", "no run whose lease has lapsed", ", ".join(lapsed),
        "The next run sweeps them as far as they are proved ours; or do it now.",
        fix=(seen.pytest("--nested-destroy-only"),), here=True, level=WARNING,
    )  # fmt: skip
