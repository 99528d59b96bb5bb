"""pvecm: a node of its own has no cluster; certificates and keys are made here."""

from __future__ import annotations

import sys

from . import cli, cluster_fs
from .errors import PveFailure, Unsupported

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
    return cli.door(_main)


def _main(argv: list[str]) -> int:
    if not argv:
        sys.stderr.write("ERROR: no command specified\n" + USAGE)
        return 255
    word, rest = argv[0], argv[1:]
    if word in ("status", "nodes", "expected"):
        raise PveFailure(NO_COROSYNC, rc=2)
    if word == "updatecerts":
        own = {"force": cli.BOOLEAN, "silent": cli.BOOLEAN, "unmerge-known-hosts": cli.BOOLEAN}
        values = cli.parse(rest, cli.Command("", "", extra=own), "pvecm updatecerts  [OPTIONS]\n")
        force, silent = (str(values.get(name, "0")) == "1" for name in ("force", "silent"))
        cluster_fs.update_certificates(force=force, silent=silent)
        return 0
    if word == "apiver":
        print("1")
        return 0
    if word == "delnode" and rest:
        raise PveFailure(f"Node/IP: {rest[0]} is not a known host of the cluster.", rc=2)
    if word in ("add", "addnode", "create", "keygen", "mtunnel", "qdevice"):
        raise Unsupported(f"pvecm {word}")
    sys.stderr.write(f"ERROR: unknown command 'pvecm {word}'\n" + USAGE)
    return 255


if __name__ == "__main__":
    sys.exit(main())
