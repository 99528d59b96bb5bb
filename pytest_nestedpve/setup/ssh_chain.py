"""The SSH chain from this machine through outer host and nested PVE to the leaf, with checked host keys."""

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
    """A hop of the SSH chain fails, or ends on another machine than expected."""


def verify_ssh_chain(env: Environment, timeout: float, *, direct: bool = False) -> dict[str, Any]:
    """Log in over every hop, with both SSH clients, and from the nested PVE to its leaf. Facts: hops.

    `direct`: the nested PVE is the outer host itself. Raises PveError.
    """
    deadline = Deadline(timeout)
    nested, leaf = ProvisionFacts.of(env.facts).name, LeafProvisionFacts.of(env.facts).name
    hops = []
    env.progress("logging in by paramiko")
    outer_name = _name(env.outer.run(["uname", "-n"], timeout=30).check().stdout)
    for name, ssh in ((nested, env.inner.ssh), (leaf, env.leaf_ssh)):
        reached = _name(ssh.run(["uname", "-n"], timeout=60).check().stdout)
        if reached != name:
            raise ChainBroken(f"expected the login at {name} to end on {name}, found {reached!r}")
    path = f"controller → {nested}" if direct else f"controller → {outer_name} → {nested}"
    hops.append(f"{path} → {leaf} (paramiko)")
    env.progress("logging in by ssh")
    config = env.write_ssh_config()
    for short, name in (("nested", nested), ("leaf", leaf)):
        reached = _name(_openssh(["-F", str(config), *_STRICT, short, "uname -n"], deadline))
        if reached != name:
            raise ChainBroken(f"expected `ssh -F {config} {short}` to end on {name}, found {reached!r}")
    hops.append(f"{path} → {leaf} (ssh -F {config.name} leaf)")
    env.progress("logging in from the nested PVE")
    hops += _from_nested(env, nested, leaf)
    return {"hops": hops, "did": "; ".join(hops)}


def _from_nested(env: Environment, nested: str, leaf: str) -> list[str]:
    """Log in with the run's key, as root's ssh_config has it, and with the nested node's own key; hops."""
    address = LeafAddressFacts.of(env.facts)
    ip = address.ip
    pin_on_nested(env, leaf, address.host_keys)
    to_leaf = ["-o", f"HostName={ip}", "-o", f"HostKeyAlias={leaf}", leaf, "uname -n"]
    hops = []
    logins = []
    keys = SshFacts.known(env.facts) or SshFacts()
    if not keys.own_key:
        logins.append(("the run's key", ["-i", KEY_FILE, "-o", "IdentitiesOnly=yes"]))
    if keys.root_public_key:
        # -F none: root's ssh_config offers the run's key as well, and the login would prove nothing.
        options = ["-F", "none", "-l", "root", "-i", "/root/.ssh/id_rsa", "-o", "IdentitiesOnly=yes"]
        logins.append(("its own key", options))
    for key, options in logins:
        command = ["ssh", *_STRICT, *options, *to_leaf]
        result = env.inner.run(command, timeout=60)
        if not result.ok:
            raise ChainBroken(
                f"expected {nested} to log in at {leaf} ({ip}) with {key}: `{shlex.join(command)}` there "
                f"ended with exit status {result.rc}: {result.stderr.strip()[-400:]}"
            )
        if _name(result.stdout) != leaf:
            raise ChainBroken(f"expected {leaf} at {ip}, found {_name(result.stdout)!r}")
        hops.append(f"{nested} → {leaf} ({key})")
    return hops


def pin_on_nested(env: Environment, name: str, keys: Iterable[str]) -> None:
    """Replace the host keys of `name` in known_hosts of the nested PVE's root. Raises CommandFailed."""
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
            f"`{shlex.join(command)}` ended with exit status {done.returncode}, expected 0: "
            f"{done.stderr.strip()[-600:]}"
        )
    return done.stdout


def _name(text: str) -> str:
    return text.strip().split(".")[0]
