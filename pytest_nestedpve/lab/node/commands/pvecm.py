"""pvecm: status and nodes of a cluster; creation of certificates and keys."""

from __future__ import annotations

import sys
import time

from ..api.errors import PveFailure, Unsupported
from ..state import cluster_fs, members
from . import frame

NO_COROSYNC = (
    "Error: Corosync config '/etc/pve/corosync.conf' does not exist - is this node part of a cluster?"
)
USAGE = """USAGE: pvecm <COMMAND> [ARGS] [OPTIONS]

       pvecm qdevice remove 
       pvecm qdevice setup <address> [OPTIONS]

       pvecm addnode <node> [OPTIONS]
       pvecm apiver 
       pvecm create <clustername> [OPTIONS]
       pvecm delnode <node>

       pvecm add <hostname> [OPTIONS]
       pvecm expected <expected>
       pvecm keygen <filename>
       pvecm mtunnel [<extra-args>] [OPTIONS]
       pvecm nodes 
       pvecm status 
       pvecm updatecerts  [OPTIONS]

       pvecm help [<extra-args>] [OPTIONS]
"""  # noqa: W291 (as it is printed)


def main() -> int:
    return frame.main_of(_main)


def _main(argv: list[str]) -> int:
    if not argv:
        sys.stderr.write("ERROR: no command specified\n" + USAGE)
        return 255
    word, rest = argv[0], argv[1:]
    if word in ("status", "nodes", "expected"):
        if members.cluster() is None:
            raise PveFailure(NO_COROSYNC, rc=2)
        if word != "expected":
            sys.stdout.write(_status() if word == "status" else _nodes())
        return 0
    if word == "updatecerts":
        options = {"force": frame.BOOLEAN, "silent": frame.BOOLEAN, "unmerge-known-hosts": frame.BOOLEAN}
        values = frame.parse(rest, frame.Command("", "", extra=options), "pvecm updatecerts  [OPTIONS]\n")
        force, silent = (str(values.get(name, "0")) == "1" for name in ("force", "silent"))
        cluster_fs.update_certificates(force=force, silent=silent)
        return 0
    if word == "apiver":
        print("1")
        return 0
    if word == "delnode" and rest:
        raise PveFailure(f"Node/IP: {rest[0]} is not a known host of the cluster.", rc=2)
    if word in ("add", "addnode", "create", "keygen", "mtunnel", "qdevice", "help"):
        raise Unsupported(f"pvecm {word}")
    sys.stderr.write(f"ERROR: unknown command 'pvecm {word}'\n" + USAGE)
    return 255


def _status() -> str:
    """As [cluster-014], or after `pvecm expected 1` with an offline node [nodedown-001]: always quorate."""
    nodes = sorted(members.every(), key=lambda node: node.number)
    online = [node for node in nodes if node.online]
    local = next(node.number for node in nodes if node.local)
    listed = "".join(f"0x{node.number:08x}          1 {node.address}{_mark(node)}\n" for node in online)
    count = len(online)
    return (
        "Cluster information\n-------------------\n"
        f"Name:             {members.cluster()}\nConfig Version:   {len(nodes)}\n"
        "Transport:        knet\nSecure auth:      on\n\n"
        "Quorum information\n------------------\n"
        f"Date:             {time.strftime('%a %b %e %H:%M:%S %Y')}\n"
        f"Quorum provider:  corosync_votequorum\nNodes:            {count}\n"
        f"Node ID:          0x{local:08x}\nRing ID:          1.{count:x}\nQuorate:          Yes\n\n"
        "Votequorum information\n----------------------\n"
        f"Expected votes:   {count}\nHighest expected: {count}\nTotal votes:      {count}\n"
        f"Quorum:           {count // 2 + 1}  \nFlags:            Quorate \n\n"
        f"{_MEMBERSHIP}    Nodeid      Votes Name\n{listed}"
    )


def _nodes() -> str:
    nodes = sorted(members.every(), key=lambda node: node.number)
    listed = "".join(
        f"{node.number:>10}          1 {node.name}{_mark(node)}\n" for node in nodes if node.online
    )
    return f"\n{_MEMBERSHIP}    Nodeid      Votes Name\n{listed}"


def _mark(member: members.Member) -> str:
    return " (local)" if member.local else ""


_MEMBERSHIP = "Membership information\n----------------------\n"


if __name__ == "__main__":
    sys.exit(main())
