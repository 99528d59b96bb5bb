"""The SSH chain from the controller over the outer host and the nested PVE to the leaf, keys checked."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import LeafAddressFacts, LeafProvisionFacts, ProvisionFacts, SshFacts
from pytest_nestedpve.pve.deadline import Deadline, scaled
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup.host_phases import KEY_FILE

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

_STRICT = ("-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=20")


class ChainBroken(PveError):
    """A hop of the SSH chain does not work, or ends elsewhere than it should."""


def verify_ssh_chain(env: Environment, timeout: float, *, direct: bool = False) -> dict[str, Any]:
    """Log in over every hop, with both SSH clients, and from the nested PVE to its leaf. Facts: hops.

    `direct`: the nested PVE is the outer host itself. Raises PveError.
    """
    deadline = Deadline(timeout)
    nested, leaf = ProvisionFacts.of(env.facts).name, LeafProvisionFacts.of(env.facts).name
    hops = []
    env.progress("by paramiko")
    outer_name = _name(env.outer.run(["uname", "-n"], timeout=30).check().stdout)
    for name, ssh in ((nested, env.inner.ssh), (leaf, env.leaf_ssh)):
        found = _name(ssh.run(["uname", "-n"], timeout=60).check().stdout)
        if found != name:
            raise ChainBroken(f"expected the login at {name} to end on {name}, it ended on {found!r}")
    way = f"controller → {nested}" if direct else f"controller → {outer_name} → {nested}"
    hops.append(f"{way} → {leaf} (paramiko)")
    env.progress("by ssh")
    config = env.write_ssh_config()
    for short, name in (("nested", nested), ("leaf", leaf)):
        found = _name(_openssh(["-F", str(config), *_STRICT, short, "uname -n"], deadline))
        if found != name:
            raise ChainBroken(f"expected `ssh -F {config} {short}` to end on {name}, it ended on {found!r}")
    hops.append(f"{way} → {leaf} (ssh -F {config.name} leaf)")
    env.progress("from the nested PVE")
    hops += _from_nested(env, nested, leaf)
    return {"hops": hops, "did": "; ".join(hops)}


def _from_nested(env: Environment, nested: str, leaf: str) -> list[str]:
    """With the run's key, as configured by name, and with the nested node's own key."""
    address = LeafAddressFacts.of(env.facts)
    ip = address.ip
    pin_on_nested(env, leaf, address.host_keys)
    to_leaf = ["-o", f"HostName={ip}", "-o", f"HostKeyAlias={leaf}", leaf, "uname -n"]
    hops = []
    ways = []
    login = SshFacts.known(env.facts) or SshFacts()
    if not login.own_key:
        ways.append(("the run's key", ["-i", KEY_FILE, "-o", "IdentitiesOnly=yes"]))
    if login.root_public_key:
        # -F none: the file of the set-up would offer the run's key as well, and prove nothing.
        own = ["-F", "none", "-l", "root", "-i", "/root/.ssh/id_rsa", "-o", "IdentitiesOnly=yes"]
        ways.append(("its own key", own))
    for which, options in ways:
        command = ["ssh", *_STRICT, *options, *to_leaf]
        result = env.inner.run(command, timeout=60)
        if not result.ok:
            raise ChainBroken(
                f"expected {nested} to log in at {leaf} ({ip}) with {which}: `{shlex.join(command)}` there "
                f"ended with {result.rc}: {result.stderr.strip()[-400:]}"
            )
        if _name(result.stdout) != leaf:
            raise ChainBroken(f"expected {leaf} at {ip}, found {_name(result.stdout)!r} there")
        hops.append(f"{nested} → {leaf} ({which})")
    return hops


def pin_on_nested(env: Environment, name: str, keys: Iterable[str]) -> None:
    """Make `keys` what the nested PVE's root knows `name` by. Raises CommandFailed."""
    script = (
        'umask 077; f=/root/.ssh/known_hosts; touch "$f"; t=$(mktemp "$f.XXXXXX") || exit; '
        '{ grep -v "^$1 " "$f"; cat; } >"$t"; mv -f "$t" "$f"'
    )
    lines = "".join(f"{name} {key}\n" for key in keys)
    env.inner.run(["sh", "-c", script, "sh", name], stdin=lines.encode(), timeout=30).check()


def _openssh(arguments: list[str], deadline: Deadline) -> str:
    command = ["ssh", *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=min(scaled(120), max(1.0, deadline.remaining())), check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise ChainBroken(f"`{shlex.join(command)}` did not end within {e.timeout:g} s") from e
    except FileNotFoundError as e:
        raise ChainBroken("expected the program ssh on this machine (Debian: openssh-client)") from e
    if done.returncode != 0:
        raise ChainBroken(
            f"`{shlex.join(command)}` ended with {done.returncode}, expected 0: {done.stderr.strip()[-600:]}"
        )
    return done.stdout


def _name(text: str) -> str:
    return text.strip().split(".")[0]
