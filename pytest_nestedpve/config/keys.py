"""All settings and command line options: names, help texts, parsers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_nestedpve.config import parsers

if TYPE_CHECKING:
    import pytest


@dataclass(frozen=True)
class Key:
    """One setting: ini `nested_pve_<name>`, environment `NESTED_PVE_<NAME>`, field `field` of Settings.

    `profile`: the outer host may name it in /etc/nested-pve.ini.
    """

    name: str
    help: str
    parse: parsers.Parser
    profile: bool = False
    field: str = ""

    @property
    def ini(self) -> str:
        return f"nested_pve_{self.name}"

    @property
    def env(self) -> str:
        return f"NESTED_PVE_{self.name.upper()}"

    @property
    def target(self) -> str:
        return self.field or self.name


_STORAGE = parsers.one_of_kind("the id of a storage", r"[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]")
_MIB = {"": 1, "m": 1, "mb": 1, "mib": 1, "g": 1024, "gb": 1024, "gib": 1024}
_GIB = {"": 1, "g": 1, "gb": 1, "gib": 1, "t": 1024, "tb": 1024, "tib": 1024}

KEYS: tuple[Key, ...] = (
    Key("host", "outer PVE host: a destination of `ssh`, or lab, or lab:NAME; no default", parsers.host),
    Key(
        "name_pattern",
        "names of the VMs of runs: patterns, comma-separated; default nested-pve*",
        parsers.name_patterns,
        field="name_patterns",
    ),
    Key(
        "vmid_range",
        "ids of the VMs of runs: ranges, comma-separated, or any; default 99900-99999",
        parsers.vmid_ranges,
        field="vmid_ranges",
    ),
    Key(
        "image",
        "image of the nested VM: an import volume of the outer host (default: the only one), URL#sha256:…, "
        "or a local file",
        parsers.image,
        profile=True,
    ),
    Key(
        "template",
        "template on the outer host, by id or name, that the nested VM is cloned from",
        parsers.one_of_kind("the id or the name of a template", r"[A-Za-z0-9][A-Za-z0-9.-]*"),
        profile=True,
    ),
    Key("storage", "storage for the disk of the nested VM", _STORAGE, profile=True),
    Key(
        "bridge",
        "bridge of the outer host that the nested VM is on",
        parsers.one_of_kind("the name of a bridge", r"[A-Za-z][A-Za-z0-9_.-]{0,14}"),
        profile=True,
    ),
    Key(
        "ipconfig",
        "address of the nested VM, as qm's ipconfig0; default ip=dhcp",
        parsers.ipconfig,
        profile=True,
    ),
    Key("cores", "cores of the nested VM; default 2", parsers.count("a number of cores", 1, 512)),
    Key(
        "memory",
        "memory of the nested VM in MiB, or in GiB with G; default 8192",
        parsers.size("an amount of memory in MiB, like 8192 or 8G,", _MIB, 256, 16_777_216),
    ),
    Key(
        "disk",
        "disk of the nested VM in GiB; default 64",
        parsers.size("a size in GiB, like 64 or 64G,", _GIB, 1, 131_072),
    ),
    Key("vm_options", "further qm options for the nested VM: key=value, like kvm=0", parsers.options),
    Key(
        "leaf_image",
        "image of the VM inside the nested PVE: URL#sha256:…, a volume of the outer host, or a local file",
        parsers.image,
    ),
    Key("leaf_options", "further qm options for the VM inside: key=value", parsers.options),
    Key("extra_vars", "variables for every playbook: lines key=value, or a JSON object", parsers.variables),
    Key(
        "playbook_dir",
        "directory with playbooks that replace packaged ones of the same name",
        parsers.directory,
    ),
    Key("roles_path", "further directories with Ansible roles, colon-separated", parsers.directories),
    Key(
        "collections_path",
        "further directories with Ansible collections, colon-separated",
        parsers.directories,
    ),
    Key(
        "inventory_groups",
        "groups of the nested PVE in the inventory, comma-separated",
        parsers.groups,
    ),
    Key(
        "sources",
        "sources that setup_repos copies to the nested PVE: name=path, name=git-url@ref",
        parsers.sources,
    ),
    Key(
        "sources_dest",
        "directory on the nested PVE for the sources; default /opt/sources",
        parsers.one_of_kind("an absolute path", r"/[A-Za-z0-9._/-]+"),
    ),
    Key(
        "secrets",
        "files that setup_repos copies to the nested PVE, with mode 0600, never logged",
        parsers.files,
    ),
    Key(
        "bootstrap",
        "command that setup_repos runs in a synced source, as name:command",
        parsers.bootstrap,
    ),
    Key(
        "token_path",
        "destination of the API token in a synced source, as name:file.yaml:path.in.it",
        parsers.token_path,
    ),
    Key(
        "pool_parent",
        "parent of the resource pools of runs",
        parsers.one_of_kind(
            "the id of a pool, at most two deep (PVE nests three)", r"[A-Za-z0-9._-]+(?:/[A-Za-z0-9._-]+)?"
        ),
        profile=True,
    ),
    Key("mirror", "Debian mirror that the guests use", parsers.url, profile=True),
    Key("http_proxy", "HTTP proxy that the guests use", parsers.url, profile=True),
    Key("pve_repository_url", "repository that PVE is installed from", parsers.url, profile=True),
    Key("pve_repository_key_url", "address of that repository's signing key", parsers.url, profile=True),
    Key(
        "pve_repository_key_sha256",
        "SHA-256 of that key file",
        parsers.one_of_kind("a SHA-256 of 64 hexadecimal digits", r"[0-9a-fA-F]{64}"),
        profile=True,
    ),
    Key(
        "force_stop",
        "whether the teardown stops VMs that run; if not, it reports them as left over; default true",
        parsers.boolean,
    ),
    Key(
        "redo",
        "whether a selected step is repeated although its inputs have not changed; default false",
        parsers.boolean,
    ),
    Key(
        "scope",
        "with pytest-xdist: worker (a nested PVE per worker process) or run (one for all); default worker",
        parsers.one_of_kind("worker or run", r"worker|run"),
    ),
    Key("timeout", "time limit in seconds for the whole set-up; default: none", parsers.seconds),
    Key("timeout_scale", "factor for all time limits of this plugin; default 1", parsers.factor),
    Key(
        "lease",
        "seconds without renewal after which a run expires, 10s to 24h; default 30m",
        parsers.lease,
    ),
    Key(
        "keep_expiry",
        "seconds after which a kept environment may be destroyed, at most 24h; default 8h",
        parsers.within_a_day,
    ),
    Key(
        "run_dir",
        "directory for the state of runs; default .nested-pve/runs below the rootdir",
        parsers.creatable_directory,
    ),
)


def register(parser: pytest.Parser) -> None:
    """The plugin's pytest_addoption."""
    group = parser.getgroup("nestedpve", "nested Proxmox VE")
    group.addoption(
        "--pve-host",
        metavar="HOST",
        default=None,
        help="outer PVE host: a destination of `ssh`, or lab, or lab:NAME (ini nested_pve_host)",
    )
    group.addoption(
        "--nested-destroy-only",
        action="store_true",
        default=False,
        help="collect no tests; destroy leftovers of earlier runs, one item per VM",
    )
    group.addoption(
        "--nested-dry-run",
        action="store_true",
        default=False,
        help="print the steps (with --nested-destroy-only: the objects to destroy) and change nothing",
    )
    group.addoption(
        "--nested-doctor",
        action="store_true",
        default=False,
        help="collect no tests; print what a host has, what a run would use, what is missing; change nothing",
    )
    group.addoption(
        "--nested-keep",
        dest="nested_keep",
        action="store_const",
        const="always",
        default="no",
        help="keep the environment for later sessions, and print how to resume it",
    )
    # An optional value would consume a path that follows.
    group.addoption(
        "--nested-keep=on-failure",
        dest="nested_keep",
        action="store_const",
        const="on-failure",
        default="no",
        help="keep the environment only if a phase or a test failed",
    )
    group.addoption(
        "--nested-attach",
        metavar="HOST",
        default=None,
        help="use an existing PVE (named as for --pve-host) as the nested PVE; it is never destroyed",
    )
    group.addoption(
        "--nested-make-template",
        action="store_true",
        default=False,
        help="collect no tests; create a template of the nested VM after setup_network (nested_pve_template)",
    )
    group.addoption(
        "--nested-skip",
        metavar="PHASE",
        action="append",
        default=None,
        help="treat a phase as done, without a probe; can be repeated",
    )
    group.addoption(
        "--nested-run",
        metavar="ID",
        default=None,
        help="with --nested-destroy-only: only this run, also of another owner, or this template",
    )
    group.addoption(
        "--nested-yes",
        action="store_true",
        default=False,
        help="with --nested-destroy-only: do not ask before destroying VMs without a marker",
    )
    group.addoption(
        "--context-file",
        metavar="FILE",
        default=None,
        help="context file of earlier tools, read and updated; its VMs are candidates, proved like others",
    )
    group.addoption(
        "--nested-json",
        metavar="FILE",
        default=None,
        help="machine-readable result of --nested-destroy-only, --nested-dry-run or --nested-doctor",
    )
    group.addoption(
        "--nested-exec",
        metavar="COMMAND",
        default=None,
        help="collect no tests; run this shell command with the environment; pytest exits with its status",
    )
    group.addoption(
        "--nested-env-file",
        metavar="FILE",
        default=None,
        help="write the variables for other tools into this file (0600) while the environment is ready",
    )
    for key in KEYS:
        parser.addini(key.ini, f"{key.help} (environment {key.env})", type="string", default=None)
