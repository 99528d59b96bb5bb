"""A VM of a lab for who uses the playbooks alone: made by `qm`, played on by `ansible-playbook`."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.lab.lifecycle import LabInfo
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.setup import vendor_data

PLAYBOOKS = Path(__file__).parents[2] / "playbooks"
IMAGE = "local:import/debian-13-genericcloud-amd64.raw"
RECAP = re.compile(r"^\S+ +: ok=(\d+) +changed=(\d+) +unreachable=(\d+) +failed=(\d+)", re.MULTILINE)


class NodeError(Exception):
    """A command ended otherwise than expected; the text has all that it said."""


def run(
    command: list[str], *, data: str | None = None, limit: float = 120.0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=data, capture_output=True, text=True, check=False, timeout=limit)


def said(done: subprocess.CompletedProcess[str], what: str) -> str:
    if done.returncode != 0:
        raise NodeError(f"{what} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Played:
    """How a playbook ended: Ansible's exit status, all it printed, and its recap."""

    rc: int
    output: str

    @property
    def changed(self) -> int:
        return self._recap()[1]

    @property
    def unreachable(self) -> int:
        return self._recap()[2]

    def _recap(self) -> tuple[int, ...]:
        rows = RECAP.findall(self.output)
        if len(rows) != 1:
            raise NodeError(f"expected one host in the recap, found {len(rows)}:\n{self.output}")
        return tuple(int(count) for count in rows[0])

    def told_changes(self) -> list[str]:
        """The names of the tasks that changed something."""
        found, task = [], ""
        for line in self.output.splitlines():
            if line.startswith("TASK ["):
                task = line[6:].partition("]")[0]
            elif line.startswith("changed:") and task not in found:
                found.append(task)
        return found


@dataclass
class Node:
    """A VM on father. `ip` is the last address that the guest agent told."""

    lab: LabInfo
    vmid: int
    name: str
    dir: Path
    ip: str = ""
    variables: dict[str, Any] = field(default_factory=dict)

    # -- father's side

    def father(self, command: str, *, data: str | None = None) -> str:
        """What father's root shell says to `command`."""
        return said(run(["ssh", "-F", self.lab.ssh_config, self.lab.host, command], data=data), command)

    def create(self) -> None:
        """From the lab's Debian image, with the vendor-data that brings the agent; not started."""
        profile = dict(
            line.split(" = ", 1)
            for line in self.father("cat /etc/nested-pve.ini").splitlines()
            if " = " in line
        )
        self.variables = {key: value for key, value in profile.items() if key.startswith("pve_repository_")}
        self.variables["nested_pve_mirror"] = profile["mirror"]
        said(run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)]), "ssh-keygen")
        snippet = f"playbooks-{self.vmid}.yaml"
        self.father(
            f"mkdir -p /var/lib/vz/snippets && cat > /var/lib/vz/snippets/{snippet}",
            data=vendor_data.user_data(Settings(mirror=profile["mirror"])),
        )
        self.father("cat > /root/playbooks.pub", data=self.key.with_suffix(".pub").read_text())
        self.father(
            f"qm create {self.vmid} --name {self.name} --memory 4096 --agent 1 --net0 virtio,bridge=vmbr0"
            f" --scsi0 local:0,import-from={IMAGE},format=qcow2 --boot order=scsi0 --ide2 local:cloudinit"
            f" --ciuser root --sshkeys /root/playbooks.pub --ipconfig0 ip=dhcp"
            f" --cicustom vendor=local:snippets/{snippet}"
        )

    def start(self) -> None:
        self.father(f"qm start {self.vmid}")
        self.arrive()

    def clone(self, vmid: int, name: str, snapshot: str) -> Node:
        """A full copy of a snapshot under another name, not started."""
        self.father(f"qm clone {self.vmid} {vmid} --name {name} --full 1 --snapname {snapshot}")
        return Node(self.lab, vmid, name, self.dir, variables=self.variables)

    def snapshot(self, name: str) -> None:
        self.father(f"qm snapshot {self.vmid} {name}")

    def arrive(self, seconds: float = 180.0) -> None:
        """Wait until the agent tells an IPv4 address, pin the host key that it tells, wait for cloud-init."""

        # The agent starts more than once at a first boot: by its package, by its unit.
        asked = (
            f"qm guest cmd {self.vmid} network-get-interfaces &&"
            f" pvesh get /nodes/$(hostname)/qemu/{self.vmid}/agent/file-read"
            " --file /etc/ssh/ssh_host_ed25519_key.pub --output-format json"
        )

        def told() -> tuple[str, str] | None:
            done = run(["ssh", "-F", self.lab.ssh_config, self.lab.host, asked])
            if done.returncode != 0:
                return None
            links, end = json.JSONDecoder().raw_decode(done.stdout)
            found = [
                each["ip-address"]
                for link in links
                if link["name"] != "lo"
                for each in link.get("ip-addresses", [])
                if each["ip-address-type"] == "ipv4"
            ]
            return (found[0], json.loads(done.stdout[end:])["content"]) if found else None

        self.ip, text = wait_until(
            told, deadline=Deadline(seconds), what=f"an address of {self.name}", interval=(0.2, 0.5)
        )
        kind, key = text.split()[:2]
        self.known_hosts.write_text(f"{self.name} {kind} {key}\n")
        self.ssh_config.write_text(
            Path(self.lab.ssh_config).read_text()
            + f"\nHost {self.name}\n  HostName {self.ip}\n  User root\n  IdentityFile {self.key}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n"
            f"  HostKeyAlias {self.name}\n  StrictHostKeyChecking yes\n  ProxyJump {self.lab.host}\n"
            "  ConnectTimeout 10\n  ControlMaster auto\n  ControlPersist 30\n"
            f"  ControlPath {self.dir}/{self.vmid}%C\n"
        )
        self.sh("cloud-init status --wait >/dev/null || [ $? -eq 2 ]")

    # -- the node's side

    def sh(self, command: str, *, data: str | None = None) -> str:
        """What the node's root shell says to `command`, without the line's end."""
        return said(self.ask(command, data=data), f"{self.name}: {command}").rstrip("\n")

    def ask(self, command: str, *, data: str | None = None) -> subprocess.CompletedProcess[str]:
        return run(["ssh", "-F", str(self.ssh_config), self.name, command], data=data)

    def true(self, command: str) -> bool:
        """Whether the node's root shell takes `command` for true."""
        return self.ask(command).returncode == 0

    def login(self, key: Path) -> str:
        """What ssh says of a login of its own with `key`, however it ends."""
        options = ["-v", "-i", str(key), "-o", "ControlPath=none", "-o", "BatchMode=yes"]
        return run(["ssh", "-F", str(self.ssh_config), *options, self.name, "true"]).stderr

    def await_answer(self, command: str, seconds: float = 90.0) -> None:
        """Until `command` is true on the node, which may be out of reach meanwhile."""
        wait_until(
            lambda: self.true(f"timeout 5 sh -c {shlex.quote(command)}"),
            deadline=Deadline(seconds), what=command, interval=(0.2, 0.5),
        )  # fmt: skip

    def reboot(self) -> None:
        """As its administrator does it; back when it is another boot."""
        before = self.sh("cat /proc/sys/kernel/random/boot_id")
        self.ask("systemctl reboot")
        run(["ssh", "-F", str(self.ssh_config), "-O", "exit", self.name])
        read = f"qm guest exec {self.vmid} -- cat /proc/sys/kernel/random/boot_id"

        def another() -> bool:
            done = run(["ssh", "-F", self.lab.ssh_config, self.lab.host, read])
            return done.returncode == 0 and before not in done.stdout

        wait_until(another, deadline=Deadline(180), what=f"{self.name} to boot", interval=(0.2, 0.5))
        self.arrive()
        self.ask("systemctl is-system-running --wait")

    # -- Ansible

    def play(self, playbook: str, *arguments: str, limit: float = 600.0, **variables: Any) -> Played:
        """Plain `ansible-playbook` on the node. Whether it failed is for the caller to see."""
        given = self.dir / f"variables-{self.vmid}.json"
        given.write_text(json.dumps(self.variables | variables))
        inventory = self.dir / f"inventory-{self.vmid}.yml"
        host = {"ansible_user": "root", "ansible_pipelining": True, "pve_hostname": self.name}
        host["ansible_ssh_common_args"] = f"-F {shlex.quote(str(self.ssh_config))}"
        inventory.write_text(json.dumps({"all": {"hosts": {self.name: host}}}))
        program = Path(sys.executable).with_name("ansible-playbook")
        environment = {
            "ANSIBLE_NOCOLOR": "1",
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_HOME": str(self.dir / "ansible"),
            # Elsewhere connections are shared by name: with a node of that name in another lab.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.dir / "cp"),
        }
        try:
            done = subprocess.run(
                [program, "-i", inventory, "-e", f"@{given}", *arguments, PLAYBOOKS / playbook],
                env={**os.environ, **environment},
                cwd=self.dir,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as e:
            so_far = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout
            raise NodeError(f"{playbook} on {self.name} did not end within {limit:g} s\n{so_far}") from e
        return Played(done.returncode, done.stdout)

    def done(self, playbook: str, *arguments: str, **variables: Any) -> Played:
        """`play` that has to succeed."""
        played = self.play(playbook, *arguments, **variables)
        if played.rc != 0:
            raise NodeError(f"{playbook} on {self.name} ended with {played.rc}\n{played.output}")
        return played

    # -- places

    @property
    def key(self) -> Path:
        return self.dir / "key"

    @property
    def known_hosts(self) -> Path:
        return self.dir / f"known_hosts-{self.vmid}"

    @property
    def ssh_config(self) -> Path:
        return self.dir / f"ssh_config-{self.vmid}"
