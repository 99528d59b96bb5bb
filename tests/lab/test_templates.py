"""A template created by --nested-make-template, and clones of it: whole sessions on a lab."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab.on_lab import HandLab

from pytest_nestedpve.setup.phases import default_phases

RANGE = "99600-99619"
# Properties that a clone must not share with the template, one line each: name and value.
IDENTITY = """\
set -e
echo name $(hostname) $(ls /etc/pve/nodes)
echo address $(ip -4 -o addr show dev vmbr0 | awk '{print $4}' | cut -d/ -f1)
echo hosts $(getent ahostsv4 "$(hostname)" | cut -d' ' -f1 | sort -u)
echo machine $(cat /etc/machine-id)
echo hostkey $(cat /etc/ssh/ssh_host_ed25519_key.pub | cut -d' ' -f2)
echo authority $(openssl x509 -in /etc/pve/pve-root-ca.pem -noout -fingerprint)
echo certificate $(openssl x509 -in /etc/pve/local/pve-ssl.pem -noout -ext subjectAltName | tail -1)
echo rootkey $(cut -d' ' -f2 /root/.ssh/id_rsa.pub)
echo logins $(wc -l < /root/.ssh/authorized_keys) $(readlink /root/.ssh/authorized_keys)
echo failed $(systemctl --failed --no-legend --plain | cut -d' ' -f1)
echo interfaces $(grep '^iface vmbr0' /etc/network/interfaces)
echo mirror $(cat /etc/apt/mirrors/debian.list)
echo mail $(postconf -h mydestination)
"""


@dataclass
class Sessions:
    """A project on a lab whose sessions run one after another."""

    path: Path
    lab: HandLab

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        options = [f"nested_pve_vmid_range={RANGE}", "nested_pve_memory=1024", "nested_pve_disk=8"]
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-v", "-p", "no:randomly", "-rsfE"),
                *("--pve-host", f"lab:{self.lab.name}"),
                *(word for option in options for word in ("-o", option)),
                *args,
            ],
            cwd=self.path,
            env={**clean, "XDG_STATE_HOME": str(self.path / "state"), "COLUMNS": "160"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def phases(self, run: str) -> dict[str, str]:
        """Status and summary of the phases of a run."""
        log = self.path / ".nested-pve" / "runs" / run / "audit.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        ends = [line for line in lines if line["event"] == "phase_end"]
        return {line["phase"]: f"{line['status']}: {line['facts'].get('did')}" for line in ends}

    def identity(self, run: str) -> dict[str, str]:
        config = self.path / ".nested-pve" / "runs" / run / "ssh_config"
        done = subprocess.run(
            ["ssh", "-F", config, "nested", IDENTITY], capture_output=True, text=True, check=True
        )
        pairs = (line.partition(" ") for line in done.stdout.splitlines())
        return {name: value for name, _, value in pairs}

    def runs(self) -> set[str]:
        return {path.parent.name for path in self.path.glob(".nested-pve/runs/*/ssh_config")}


@dataclass(frozen=True)
class History:
    """Outputs and states, in the order in which they happened."""

    template: str
    created: str
    config: dict[str, str]
    vmid: str
    first: dict[str, str]
    second: dict[str, str]
    first_phases: dict[str, str]
    second_phases: dict[str, str]
    destroy_all: str
    config_after: str
    removed: str
    leftovers: list[str]


@pytest.fixture(scope="module")
def history(hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory) -> History:
    project = Sessions(tmp_path_factory.mktemp("templates"), hand_lab)
    (project.path / "pytest.ini").write_text("[pytest]\n")
    (project.path / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
    network = hand_lab.run("ip -4 -o addr show dev vmbr0 | awk '{print $4}'").strip()
    prefix = network.rpartition(".")[0]

    done = project.run("--nested-make-template")
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"nested_pve_template = (nested-pve-(template-[0-9a-f]{12}))", done.stdout)
    assert match is not None, done.stdout
    name, template = match[1], match[2]
    vmid = re.search(r"VM (\d+)\)", done.stdout)
    assert vmid is not None
    config = dict(line.partition(": ")[::2] for line in hand_lab.run(f"qm config {vmid[1]}").splitlines())

    def clone(*args: str) -> tuple[dict[str, str], dict[str, str]]:
        before = project.runs()
        done = project.run("--nested-keep", "-o", f"nested_pve_template={name}", *args)
        assert done.returncode == 0, done.stdout + done.stderr
        runs = project.runs() - before
        assert len(runs) == 1, done.stdout
        (run,) = runs
        state = project.identity(run)
        config = hand_lab.run(f"qm list | awk '/ nested-pve-{run} / {{print $1}}' | xargs qm config")
        (state["disk"],) = re.findall(r"^scsi0: local:(\S+?),", config, re.MULTILINE)
        phases = project.phases(run)
        ended = project.run("--nested-destroy-only", "--nested-run", run)
        assert ended.returncode == 0, ended.stdout
        return state, phases

    first, first_phases = clone()
    static = f"nested_pve_ipconfig=ip={prefix}.251/24,gw={prefix}.1"
    second, second_phases = clone("-k", "setup_network", "-o", static, "-o", "nested_pve_memory=1100")
    destroy_all = project.run("--nested-destroy-only", "--nested-yes").stdout
    config_after = hand_lab.run(f"qm config {vmid[1]}")
    removed = project.run("--nested-destroy-only", "--nested-run", template).stdout
    low, high = (int(number) for number in RANGE.split("-"))
    return History(
        template, done.stdout, config, vmid[1], first, second, first_phases, second_phases, destroy_all,
        config_after, removed, hand_lab.leftovers(low, high, [template]),
    )  # fmt: skip


@pytest.mark.thorough
def test_creating_a_template_leaves_nothing_but_the_template(history: History) -> None:
    assert "1 passed" in history.created
    assert "no leftovers" in history.created
    assert history.config["template"] == "1"
    assert history.config["name"] == f"nested-pve-{history.template}"
    assert not {"cicustom", "sshkeys"} & set(history.config)


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_clone_is_a_healthy_node_under_its_own_name_and_address(history: History, which: str) -> None:
    state: dict[str, str] = getattr(history, which)
    name, node = state["name"].split()
    assert name == node
    assert state["hosts"] == state["address"]
    assert f"IP Address:{state['address']}" in state["certificate"]
    assert f"DNS:{name}" in state["certificate"]
    # The run's key and PVE's key for its nodes; setup_repos adds the host's key.
    assert state["logins"] == f"{3 if which == 'first' else 2} /etc/pve/priv/authorized_keys"
    assert state["failed"] == ""
    assert name in state["mail"].split(", ")


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_clone_is_linked_where_the_storage_supports_it(history: History, which: str) -> None:
    assert getattr(history, which)["disk"].startswith(f"{history.vmid}/base-{history.vmid}-disk-0.qcow2/")


@pytest.mark.thorough
def test_clones_do_not_share_names_addresses_and_keys(history: History) -> None:
    for key in ("name", "address", "machine", "hostkey", "authority", "rootkey"):
        assert history.first[key] != history.second[key], key


@pytest.mark.thorough
def test_phases_that_the_template_contains_are_proved_and_not_repeated(history: History) -> None:
    for phases in (history.first_phases, history.second_phases):
        assert phases["ensure_pve"].endswith("is installed and works")
        assert phases["setup_network"].endswith(" already")


@pytest.mark.thorough
def test_every_step_is_done_on_a_clone(history: History) -> None:
    assert list(history.first_phases) == [phase.name for phase in default_phases()]


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_clone_has_the_mirror_of_the_template(history: History, which: str) -> None:
    assert getattr(history, which)["mirror"] == "http://mirror.nested-pve.test/debian"


@pytest.mark.thorough
def test_a_clone_gets_the_configured_address_at_its_first_boot(history: History) -> None:
    assert history.first["interfaces"] == "iface vmbr0 inet dhcp"
    assert history.second["interfaces"] == "iface vmbr0 inet static"
    assert history.second["address"].endswith(".251")


@pytest.mark.thorough
def test_a_template_is_deleted_by_its_name_only(history: History) -> None:
    assert f"--nested-run {history.template}" in history.destroy_all
    assert "template: 1" in history.config_after
    assert "1 passed" in history.removed
    assert history.leftovers == []
