"""Checks of connections: forwarding by the host's SSH server, quorum, the API over HTTPS, other runs."""

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
    from pytest_nestedpve.setup.checks.context import Context

_SSHD = "/etc/ssh/sshd_config.d/10-nested-pve.conf"


def forwarding(context: Context) -> Iterator[Finding]:
    """Check that the host's SSH server allows forwarding, by which the nested PVE is reached."""
    command = ["/usr/sbin/sshd", "-T", "-C", "user=root,host=localhost,addr=127.0.0.1"]
    answer = context.host.run(command, timeout=20)
    if not answer.ok:
        return  # the options cannot be read; a login at the nested PVE fails if forwarding is forbidden
    options = dict(re.findall(r"(?m)^(allowtcpforwarding|disableforwarding) (\w+)", answer.stdout.lower()))
    allowed = options.get("allowtcpforwarding", "yes")
    if allowed in ("yes", "all", "local") and options.get("disableforwarding", "no") == "no":
        yield fine("forwarding", "the SSH server allows it")
        return
    disabled = options.get("disableforwarding") == "yes"
    yield Finding(
        "forwarding", "the host's SSH server to forward to the nested PVE (AllowTcpForwarding yes or local)",
        "DisableForwarding yes" if disabled else f"AllowTcpForwarding {allowed}",
        "If /etc/ssh/sshd_config forbids forwarding, change it there.",
        fix=(
            f'printf "AllowTcpForwarding local\\nDisableForwarding no\\n" > {_SSHD}',
            "systemctl reload ssh",
        ),
    )  # fmt: skip


def quorum(context: Context) -> Iterator[Finding]:
    """Check that a cluster has quorum."""
    answer = entries(context.host.api.get("/cluster/status"))
    cluster = next((entry for entry in answer if entry.get("type") == "cluster"), None)
    if cluster is None:
        return
    nodes = [entry for entry in answer if entry.get("type") == "node"]
    online = sum(str(node.get("online")) in ("1", "True") for node in nodes)
    state = f"{cluster.get('name')}, {online} of {len(nodes)} nodes online"
    if str(cluster.get("quorate")) in ("1", "True"):
        yield fine("quorum", state)
        return
    yield Finding(
        "quorum", "a cluster with quorum: without it /etc/pve is read-only and nothing can be created", state,
        "Start its offline nodes.", fix=("pvecm status",),
    )  # fmt: skip


def transport(context: Context) -> Iterator[Finding]:
    """Check that port 8006 answers with a valid certificate.

    Runs then use HTTPS and tokens, whose privileges PVE limits to the run's pool.
    """
    if not context.by_https:
        context.choose(
            "the API of the configured connection",
            transport=str(getattr(context.host.api, "transport", "API")),
        )
        return
    # Runs send all calls for a cluster to the node of the login.
    ssh, restarts = context.host.entry.ssh, ("systemctl restart pveproxy", "systemctl status pveproxy")
    try:
        greet(ssh, trust_of(ssh))
    except PveError as e:
        context.choose(f"port {PORT} cannot be used", transport="pvesh over SSH")
        yield Finding(
            "transport", f"the API on port {PORT} of the host, through SSH, with a valid certificate",
            " ".join(str(e).split())[:200],
            "Without it runs use root's pvesh: slower, and PVE does not limit the run to its pool.",
            fix=restarts if isinstance(e, NotDelivered) else ("pvecm updatecerts --force", *restarts),
            level=WARNING,
        )  # fmt: skip
        return
    context.choose(f"port {PORT} answers", transport="HTTPS through SSH, with tokens of the run")
    yield fine("transport", f"port {PORT} answers through SSH")


def leftovers(context: Context) -> Iterator[Finding]:
    """Report the runs on the host; those with an expired lease are a warning."""
    from pytest_nestedpve.ownership.lease import parse_lease
    from pytest_nestedpve.ownership.pool import host_clock, run_of_pool

    now = host_clock(context.host)
    live: list[str] = []
    expired: list[str] = []
    for entry in entries(context.host.api.get("/pools")):
        run, lease = run_of_pool(entry.get("poolid")), parse_lease(entry.get("comment"))
        if run and lease:
            (expired if lease.expired(now) else live).append(f"{run} ({lease.owner}'s, {lease.state})")
    if not expired:
        yield fine("runs", ", ".join(live) if live else "none")
        return
    yield Finding(
        "runs", "no run with an expired lease", ", ".join(expired),
        "The next run deletes what is proved to be theirs; or delete it now.",
        fix=(context.pytest("--nested-destroy-only"),), local_fix=True, level=WARNING,
    )  # fmt: skip
