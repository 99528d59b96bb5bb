"""A template made by the tool, and clones of it: on a lab, by whole sessions, in the order of a first use."""

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
# What must not be the template's own: each is printed, by a line of its name.
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
    """A project on a lab, one session after the other."""

    path: Path
    lab: HandLab

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        shape = [f"nested_pve_vmid_range={RANGE}", "nested_pve_memory=1024", "nested_pve_disk=8"]
        return subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-v", "-p", "no:randomly", "-rsfE"),
                *("--pve-host", f"lab:{self.lab.name}"),
                *(word for each in shape for word in ("-o", each)),
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
        """How the phases of a run ended, and what they did."""
        log = self.path / ".nested-pve" / "runs" / run / "audit.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        ended = [line for line in lines if line["event"] == "phase_end"]
        return {line["phase"]: f"{line['status']}: {line['facts'].get('did')}" for line in ended}

    def identity(self, run: str) -> dict[str, str]:
        config = self.path / ".nested-pve" / "runs" / run / "ssh_config"
        done = subprocess.run(
            ["ssh", "-F", config, "nested", IDENTITY], capture_output=True, text=True, check=True
        )
        pairs = (line.partition(" ") for line in done.stdout.splitlines())
        return {name: value for name, _, value in pairs}

    def runs(self) -> set[str]:
        return {each.name for each in self.path.glob(".nested-pve/runs/*") if (each / "ssh_config").exists()}


@dataclass(frozen=True)
class Story:
    """What was seen, in the order in which it happened."""

    template: str
    made: str
    ready: dict[str, str]
    vmid: str
    first: dict[str, str]
    second: dict[str, str]
    first_phases: dict[str, str]
    second_phases: dict[str, str]
    swept: str
    there_after: str
    removed: str
    left: list[str]


@pytest.fixture(scope="module")
def story(hand_lab: HandLab, tmp_path_factory: pytest.TempPathFactory) -> Story:
    project = Sessions(tmp_path_factory.mktemp("templates"), hand_lab)
    (project.path / "pytest.ini").write_text("[pytest]\n")
    (project.path / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
    network = hand_lab.ask("ip -4 -o addr show dev vmbr0 | awk '{print $4}'").strip()
    prefix = network.rpartition(".")[0]

    done = project.run("--nested-make-template")
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"nested_pve_template = (nested-pve-(template-[0-9a-f]{12}))", done.stdout)
    assert match is not None, done.stdout
    name, template = match[1], match[2]
    vmid = re.search(r"VM (\d+)\)", done.stdout)
    assert vmid is not None
    ready = dict(line.partition(": ")[::2] for line in hand_lab.ask(f"qm config {vmid[1]}").splitlines())

    def clone(*more: str) -> tuple[dict[str, str], dict[str, str]]:
        before = project.runs()
        done = project.run("--nested-keep", "-o", f"nested_pve_template={name}", *more)
        assert done.returncode == 0, done.stdout + done.stderr
        runs = project.runs() - before
        assert len(runs) == 1, done.stdout
        (run,) = runs
        seen = project.identity(run)
        told = hand_lab.ask(f"qm list | awk '/ nested-pve-{run} / {{print $1}}' | xargs qm config")
        (seen["disk"],) = re.findall(r"^scsi0: local:(\S+?),", told, re.MULTILINE)
        phases = project.phases(run)
        kept = project.run("--nested-destroy-only", "--nested-run", run)
        assert kept.returncode == 0, kept.stdout
        return seen, phases

    first, first_phases = clone()
    static = f"nested_pve_ipconfig=ip={prefix}.251/24,gw={prefix}.1"
    second, second_phases = clone("-k", "setup_network", "-o", static, "-o", "nested_pve_memory=1100")
    swept = project.run("--nested-destroy-only", "--nested-yes").stdout
    there_after = hand_lab.ask(f"qm config {vmid[1]}")
    removed = project.run("--nested-destroy-only", "--nested-run", template).stdout
    low, high = (int(each) for each in RANGE.split("-"))
    return Story(
        template, done.stdout, ready, vmid[1], first, second, first_phases, second_phases, swept, there_after,
        removed, hand_lab.left(low, high, [template]),
    )  # fmt: skip


@pytest.mark.thorough
def test_making_a_template_leaves_it_and_nothing_else(story: Story) -> None:
    assert "1 passed" in story.made
    assert "and nothing is left" in story.made
    assert story.ready["template"] == "1"
    assert story.ready["name"] == f"nested-pve-{story.template}"
    assert not {"cicustom", "sshkeys"} & set(story.ready)


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_clone_is_a_healthy_node_under_its_own_name_and_address(story: Story, which: str) -> None:
    seen: dict[str, str] = getattr(story, which)
    name, node = seen["name"].split()
    assert name == node
    assert seen["hosts"] == seen["address"]
    assert f"IP Address:{seen['address']}" in seen["certificate"]
    assert f"DNS:{name}" in seen["certificate"]
    # The run's own key, and PVE's for its nodes; setup_repos brings that of the host.
    assert seen["logins"] == f"{3 if which == 'first' else 2} /etc/pve/priv/authorized_keys"
    assert seen["failed"] == ""
    assert name in seen["mail"].split(", ")


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_clone_is_a_linked_one_where_the_storage_can(story: Story, which: str) -> None:
    assert getattr(story, which)["disk"].startswith(f"{story.vmid}/base-{story.vmid}-disk-0.qcow2/")


@pytest.mark.thorough
def test_clones_have_nothing_in_common_that_is_a_nodes_own(story: Story) -> None:
    for each in ("name", "address", "machine", "hostkey", "authority", "rootkey"):
        assert story.first[each] != story.second[each], each


@pytest.mark.thorough
def test_what_came_with_the_template_is_proved_and_not_done_again(story: Story) -> None:
    for phases in (story.first_phases, story.second_phases):
        assert phases["ensure_pve"].endswith("is there and well")
        assert phases["setup_network"].endswith(" already")


@pytest.mark.thorough
def test_every_step_is_done_on_a_clone(story: Story) -> None:
    assert list(story.first_phases) == [phase.name for phase in default_phases()]


@pytest.mark.thorough
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_clone_has_the_mirror_that_the_template_was_given(story: Story, which: str) -> None:
    assert getattr(story, which)["mirror"] == "http://mirror.nested-pve.test/debian"


@pytest.mark.thorough
def test_a_clone_takes_the_address_that_its_run_wants_at_its_first_boot(story: Story) -> None:
    assert story.first["interfaces"] == "iface vmbr0 inet dhcp"
    assert story.second["interfaces"] == "iface vmbr0 inet static"
    assert story.second["address"].endswith(".251")


@pytest.mark.thorough
def test_a_template_stays_until_it_is_named(story: Story) -> None:
    assert f"--nested-run {story.template}" in story.swept
    assert "template: 1" in story.there_after
    assert "1 passed" in story.removed
    assert story.left == []
