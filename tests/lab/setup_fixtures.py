"""The node of `playbook_fixtures` with keys and a consumer's set-up, and its state after each run."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab.playbook_fixtures import Bridged
from lab.playbook_node import Node, Played, checked_output, run

from pytest_nestedpve.config.parsers import Source
from pytest_nestedpve.setup.ansible import sources

KEYS = "/root/.ssh/authorized_keys"
SITE = "/opt/sources/site"
STORE = "/root/.config/nested-pve/api-token"
# A user's file, indented and quoted as no YAML library writes it.
SECRETS = """\
# Of the site; git never saw it.
database:
    password: "correct-horse-41"   # until May
api_tokens:
    elsewhere: 'root@pam!x=1'
    playbooks: none yet # by the set-up
zones: [b, a]
# the end
"""
BY_HAND = "# credentials, kept elsewhere\nother: 0x1F\n"


def find_secrets(played: Played, *secrets: str) -> list[str]:
    """Those of `secrets` that a playbook's output contains, in plain text or in the base64 of its modules."""
    return [
        text
        for text in secrets
        if text in played.output or base64.b64encode(text.encode()).decode().rstrip("=")[:-1] in played.output
    ]


def create_key(path: Path) -> str:
    """Create a key pair at `path`; return the public key."""
    checked_output(
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", path.name, "-f", str(path)]), "ssh-keygen"
    )
    return path.with_suffix(".pub").read_text().strip()


def private_line(path: Path) -> str:
    """A line that only this private key has: the first lines are the format and the public key."""
    return path.read_text().splitlines()[4]


@dataclass(frozen=True)
class Keyed:
    """After two runs of nested-pve-ssh.yml."""

    node: Node
    variables: dict[str, Any]
    pair: Path
    first: Played
    second: Played
    leaked: list[str]
    link_before: str
    link: str
    keys_before: str
    keys: str
    root_key_before: str
    root_key: str
    placed: str
    config: str
    offered_to_leaf: str
    offered_elsewhere: str
    to_leaf: str
    login: str
    without_pmxcfs: str
    login_without_pmxcfs: str
    users_key: str


@pytest.fixture(scope="session")
def keyed(bridged: Bridged) -> Keyed:
    node = bridged.node
    pair, someone = node.dir / "run-key", create_key(node.dir / "someone")
    public = create_key(pair)
    variables = {
        "nested_pve_authorized_keys": [public, someone],
        "nested_pve_run_key": pair.read_text(),
        "nested_pve_run_public_key": public,
        "nested_pve_leaf_pattern": "playbooks-leaf-*",
    }
    checksums = "sha256sum /root/.ssh/id_rsa /root/.ssh/id_rsa.pub"
    # As people edit the file: the last line without a newline.
    node.sh(f"printf '# a line by hand' >> {KEYS}; echo 'Ciphers aes256-ctr' > /root/.ssh/config")
    before = {
        "link_before": node.sh(f"readlink {KEYS} || echo no link"),
        "keys_before": node.sh(f"cat {KEYS}"),
        "root_key_before": node.sh(checksums),
    }
    first = node.play_successfully("nested-pve-ssh.yml", "-vvv", "--diff", **variables)
    second = node.play_successfully("nested-pve-ssh.yml", **variables)
    node.sh('echo "leaf $(cut -d" " -f1,2 /etc/ssh/ssh_host_ed25519_key.pub)" > /root/leaf-hosts')
    state = {
        "link": node.sh(f"readlink {KEYS} || echo no link"),
        "keys": node.sh(f"cat {KEYS}"),
        "root_key": node.sh(checksums),
        "placed": node.sh("cd /root/.ssh; stat -c '%a %U %n' id_nestedpve; sha256sum < id_nestedpve || true"),
        "config": node.sh("cat /root/.ssh/config"),
        "offered_to_leaf": node.sh("ssh -G playbooks-leaf-1 | grep ^identityfile"),
        "offered_elsewhere": node.sh("ssh -G elsewhere | grep ^identityfile"),
        # The node itself is the leaf that accepts the run's key.
        "to_leaf": node.sh(
            "ssh -v -o BatchMode=yes -o HostName=127.0.0.1 -o HostKeyAlias=leaf"
            " -o UserKnownHostsFile=/root/leaf-hosts playbooks-leaf-1 true 2>&1 || true"
        ),
        "login": node.login(pair),
        "users_key": node.sh(
            "grep -rlF -f - /root /etc /opt /home /tmp || true", data=private_line(node.key)
        ),
    }
    node.sh("systemctl stop pve-cluster")
    try:
        down = {
            "without_pmxcfs": node.sh(f"test -e {KEYS} || echo leads nowhere"),
            "login_without_pmxcfs": node.login(pair),
        }
    finally:
        node.sh("systemctl start pve-cluster pveproxy")
    leaked = find_secrets(first, private_line(pair))
    return Keyed(
        node, variables, pair, first, second, leaked, **before, **state, **down
    )  # fmt: skip


@dataclass(frozen=True)
class State:
    """The results of nested-pve-repos.yml, read from the node."""

    content: frozenset[str]
    token: str
    answers: str
    tokens: set[str]
    certificate: str
    pveproxy: str
    files: str
    modes: str
    secret: str
    credentials: str
    bootstrapped: str
    keys: str


# /storage/local is for administrators: a token without its user's rights gets a 403.
LOOK = {
    "content": "pvesh get /storage/local --output-format json",
    "token": f"cat {STORE}",
    "answers": (
        'curl -s -o /dev/null -w "%{http_code}" --cacert /etc/pve/pve-root-ca.pem'
        f' -H "Authorization: PVEAPIToken=$(cat {STORE})" https://127.0.0.1:8006/api2/json/storage/local'
    ),
    "tokens": "pvesh get /access/users/root@pam/token --output-format json",
    "certificate": "openssl x509 -in /etc/pve/local/pve-ssl.pem -noout -fingerprint -sha256",
    "pveproxy": "systemctl show pveproxy --property ActiveEnterTimestampMonotonic",
    "files": f"cd {SITE} && find . ! -type d -printf '%m %P %l\\n' | sort -k2",
    "modes": f"cd {SITE}/../.nested-pve; stat -c '%a %U %n' {STORE} {SITE}/secrets.yaml secrets secrets/*",
    "secret": f"cat {SITE}/secrets.yaml",
    "credentials": "cd; readlink credentials.yaml; stat -c '%a %U' target.yaml; cat target.yaml",
    "bootstrapped": "cat /root/bootstrapped",
    "keys": f"cat {KEYS}",
}


def read_state(node: Node) -> State:
    # By one login, as each login takes time; the text of a missing file is empty.
    separator = "-- next --"
    answer = node.sh(
        "".join(f"({command}) 2>/dev/null; echo; echo {separator}\n" for command in LOOK.values())
    )
    texts = [text.strip("\n") for text in answer.split(separator)[: len(LOOK)]]
    state: dict[str, Any] = dict(zip(LOOK, texts, strict=True))
    state["content"] = frozenset(json.loads(state["content"])["content"].split(","))
    state["tokens"] = {token["tokenid"] for token in json.loads(state["tokens"])}
    return State(**state)


class Site:
    """A consumer's project on this machine: tracked, untracked and ignored files, a secret."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name, text in {
            ".gitignore": "secrets.yaml\nbuild/\n",
            "README": "of the site\n",
            "old/deep/stale.yaml": "to be deleted\n",
            "bin/run": "#!/bin/sh\n",
            "build/result": "built\n",
            "secrets.yaml": SECRETS,
        }.items():
            self.write(name, text)
        (root / "bin/run").chmod(0o755)
        (root / "link").symlink_to("bin/run")
        for command in (["init", "-q"], ["add", "."]):
            checked_output(run(["git", "-C", str(root), *command]), "git")
        self.write("untracked", "of the site\n")

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def archive(self, target: Path) -> list[dict[str, str]]:
        """Pack the project as it is now, for `nested_pve_source_archives`."""
        packed = sources.pack(Source("site", str(self.root)), target)
        return [{"name": packed.name, "archive": str(packed.archive), "digest": packed.digest}]


@dataclass(frozen=True)
class Served:
    """After four runs of nested-pve-repos.yml, with the states before and after them."""

    node: Node
    variables: dict[str, Any]
    outer_key: str
    before: State
    first: Played
    after_first: State
    second: Played
    after_second: State
    # The token is deleted, the source changed, the bootstrap command fails.
    third: Played
    between: State
    after_third: State
    # The secret is changed, the token has another name and a linked file, the bootstrap command succeeds.
    fourth: Played
    after_fourth: State
    leaked: list[str]


@pytest.fixture(scope="session")
def served(keyed: Keyed, tmp_path_factory: pytest.TempPathFactory) -> Served:
    node = keyed.node
    site, packed = Site(tmp_path_factory.mktemp("site")), tmp_path_factory.mktemp("packed")
    outer_key = create_key(node.dir / "root-of-father")
    variables: dict[str, Any] = {
        "nested_pve_outer_public_keys": [outer_key],
        "nested_pve_source_archives": site.archive(packed),
        "nested_pve_secret_files": [{"src": str(site.root / "secrets.yaml"), "dest": f"{SITE}/secrets.yaml"}],
        "nested_pve_bootstrap": {
            "name": "site",
            "command": "test -e /root/allowed && pwd >> /root/bootstrapped",
        },
        "nested_pve_token_file": f"{SITE}/secrets.yaml",
        "nested_pve_token_keys": ["api_tokens", node.name],
    }
    playbook = "nested-pve-repos.yml"
    # One content type that the playbook does not add, and without some that it adds.
    node.sh("pvesm set local --content backup,rootdir; touch /root/allowed")
    node.sh(
        "cd /root; cat > target.yaml; chown daemon target.yaml; chmod 640 target.yaml;"
        " ln -s target.yaml credentials.yaml",
        data=BY_HAND,
    )
    before = read_state(node)
    first = node.play_successfully(playbook, "-vvv", "--diff", **variables)
    after_first = read_state(node)
    second = node.play_successfully(playbook, **variables)
    after_second = read_state(node)

    node.sh("pveum user token remove root@pam nested-pve; rm /root/allowed")
    node.sh(f"mkdir {SITE}/made; touch {SITE}/made/here; echo changed by hand >> {SITE}/README")
    between = read_state(node)
    node.sh(f"chmod 644 {SITE}/secrets.yaml")
    (site.root / "old/deep/stale.yaml").unlink()
    site.write("new/fresh.yaml", "to be added\n")
    variables["nested_pve_source_archives"] = site.archive(packed)
    third = node.play(playbook, "-v", **variables)
    after_third = read_state(node)

    node.sh("touch /root/allowed")
    site.write("secrets.yaml", SECRETS.replace("correct-horse-41", "battery-staple-17"))
    variables |= {"nested_pve_token_name": "another", "nested_pve_token_file": "/root/credentials.yaml"}
    fourth = node.play_successfully(playbook, "-v", **variables)
    after_fourth = read_state(node)

    texts = [
        text for state in (after_first, after_third, after_fourth) for text in (state.token, state.secret)
    ]
    values = [text.partition("=")[2] for text in texts if text.startswith("root@pam!")]
    values += [*texts, "correct-horse-41", "battery-staple-17"]
    leaked = [x for played in (first, second, third, fourth) for x in find_secrets(played, *values)]
    return Served(
        node, variables, outer_key, before, first, after_first, second, after_second, third, between,
        after_third, fourth, after_fourth, leaked,
    )  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """After nested-pve-setup.yml on a node that is already set up."""

    played: Played
    before: State
    after: State


@pytest.fixture(scope="session")
def finished(served: Served, keyed: Keyed) -> Finished:
    before = read_state(served.node)
    played = served.node.play_successfully("nested-pve-setup.yml", **keyed.variables, **served.variables)
    return Finished(played, before, read_state(served.node))
