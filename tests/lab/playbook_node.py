"""A VM of a lab for the playbooks without the plugin: created by `qm`, set up by `ansible-playbook`."""

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
    """A command failed; the message has its whole output."""


def run(
    command: list[str], *, data: str | None = None, limit: float = 120.0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=data, capture_output=True, text=True, check=False, timeout=limit)


def checked_output(done: subprocess.CompletedProcess[str], what: str) -> str:
    if done.returncode != 0:
        raise NodeError(f"{what} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


@dataclass(frozen=True)
class Played:
    """The result of a playbook: Ansible's exit status, output and recap."""

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

    def changed_tasks(self) -> list[str]:
        """The names of the tasks that changed something."""
        names, task = [], ""
        for line in self.output.splitlines():
            if line.startswith("TASK ["):
                task = line[6:].partition("]")[0]
            elif line.startswith("changed:") and task not in names:
                names.append(task)
        return names


@dataclass
class Node:
    """A VM on father. `ip` is the last address that the guest agent reported."""

    lab: LabInfo
    vmid: int
    name: str
    dir: Path
    ip: str = ""
    variables: dict[str, Any] = field(default_factory=dict)

    # -- on father

    def father(self, command: str, *, data: str | None = None) -> str:
        """Run `command` in root's shell on father and return its output."""
        return checked_output(
            run(["ssh", "-F", self.lab.ssh_config, self.lab.host, command], data=data), command
        )

    def create(self) -> None:
        """Create the VM from the lab's Debian image, with the agent in its vendor-data; not started."""
        profile = dict(
            line.split(" = ", 1)
            for line in self.father("cat /etc/nested-pve.ini").splitlines()
            if " = " in line
        )
        self.variables = {key: value for key, value in profile.items() if key.startswith("pve_repository_")}
        self.variables["nested_pve_mirror"] = profile["mirror"]
        checked_output(
            run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)]), "ssh-keygen"
        )
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
        self.await_login()

    def clone(self, vmid: int, name: str, snapshot: str) -> Node:
        """Create a full clone of a snapshot under another name, not started."""
        self.father(f"qm clone {self.vmid} {vmid} --name {name} --full 1 --snapname {snapshot}")
        return Node(self.lab, vmid, name, self.dir, variables=self.variables)

    def snapshot(self, name: str) -> None:
        self.father(f"qm snapshot {self.vmid} {name}")

    def await_login(self, seconds: float = 180.0) -> None:
        """Wait for an IPv4 address from the agent, pin the host key from the agent, wait for cloud-init."""

        # The agent starts more than once at a first boot: by its package, by its unit.
        command = (
            f"qm guest cmd {self.vmid} network-get-interfaces &&"
            f" pvesh get /nodes/$(hostname)/qemu/{self.vmid}/agent/file-read"
            " --file /etc/ssh/ssh_host_ed25519_key.pub --output-format json"
        )

        def read_agent() -> tuple[str, str] | None:
            done = run(["ssh", "-F", self.lab.ssh_config, self.lab.host, command])
            if done.returncode != 0:
                return None
            links, end = json.JSONDecoder().raw_decode(done.stdout)
            ips = [
                address["ip-address"]
                for link in links
                if link["name"] != "lo"
                for address in link.get("ip-addresses", [])
                if address["ip-address-type"] == "ipv4"
            ]
            return (ips[0], json.loads(done.stdout[end:])["content"]) if ips else None

        self.ip, text = wait_until(
            read_agent, deadline=Deadline(seconds), what=f"an address of {self.name}", interval=(0.2, 0.5)
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

    # -- on the node

    def sh(self, command: str, *, data: str | None = None) -> str:
        """Run `command` in root's shell on the node and return its output without the final newline."""
        return checked_output(self.ssh(command, data=data), f"{self.name}: {command}").rstrip("\n")

    def ssh(self, command: str, *, data: str | None = None) -> subprocess.CompletedProcess[str]:
        return run(["ssh", "-F", str(self.ssh_config), self.name, command], data=data)

    def succeeds(self, command: str) -> bool:
        """Whether `command` in root's shell on the node exits with 0."""
        return self.ssh(command).returncode == 0

    def login(self, key: Path) -> str:
        """The messages of `ssh -v` for a separate login with `key`, successful or not."""
        options = ["-v", "-i", str(key), "-o", "ControlPath=none", "-o", "BatchMode=yes"]
        return run(["ssh", "-F", str(self.ssh_config), *options, self.name, "true"]).stderr

    def await_success(self, command: str, seconds: float = 90.0) -> None:
        """Wait until `command` succeeds on the node, which may be unreachable meanwhile."""
        wait_until(
            lambda: self.succeeds(f"timeout 5 sh -c {shlex.quote(command)}"),
            deadline=Deadline(seconds), what=command, interval=(0.2, 0.5),
        )  # fmt: skip

    def reboot(self) -> None:
        """Reboot the node by systemctl and wait until the new boot is complete."""
        before = self.sh("cat /proc/sys/kernel/random/boot_id")
        self.ssh("systemctl reboot")
        run(["ssh", "-F", str(self.ssh_config), "-O", "exit", self.name])
        read = f"qm guest exec {self.vmid} -- cat /proc/sys/kernel/random/boot_id"

        def is_another_boot() -> bool:
            done = run(["ssh", "-F", self.lab.ssh_config, self.lab.host, read])
            return done.returncode == 0 and before not in done.stdout

        wait_until(is_another_boot, deadline=Deadline(180), what=f"{self.name} to boot", interval=(0.2, 0.5))
        self.await_login()
        self.ssh("systemctl is-system-running --wait")

    # -- Ansible

    def play(self, playbook: str, *arguments: str, limit: float = 600.0, **variables: Any) -> Played:
        """Run a playbook on the node by plain `ansible-playbook`; it may fail."""
        file = self.dir / f"variables-{self.vmid}.json"
        file.write_text(json.dumps(self.variables | variables))
        inventory = self.dir / f"inventory-{self.vmid}.yml"
        host = {"ansible_user": "root", "ansible_pipelining": True, "pve_hostname": self.name}
        host["ansible_ssh_common_args"] = f"-F {shlex.quote(str(self.ssh_config))}"
        inventory.write_text(json.dumps({"all": {"hosts": {self.name: host}}}))
        program = Path(sys.executable).with_name("ansible-playbook")
        environment = {
            "ANSIBLE_NOCOLOR": "1",
            "LC_ALL": "C.UTF-8",
            "ANSIBLE_HOME": str(self.dir / "ansible"),
            # The default directory would share connections with a node of the same name in another lab.
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(self.dir / "cp"),
        }
        try:
            done = subprocess.run(
                [program, "-i", inventory, "-e", f"@{file}", *arguments, PLAYBOOKS / playbook],
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
            output = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout
            raise NodeError(f"{playbook} on {self.name} did not end within {limit:g} s\n{output}") from e
        return Played(done.returncode, done.stdout)

    def play_successfully(self, playbook: str, *arguments: str, **variables: Any) -> Played:
        """Run a playbook by `play`; NodeError if it fails."""
        played = self.play(playbook, *arguments, **variables)
        if played.rc != 0:
            raise NodeError(f"{playbook} on {self.name} ended with {played.rc}\n{played.output}")
        return played

    # -- paths

    @property
    def key(self) -> Path:
        return self.dir / "key"

    @property
    def known_hosts(self) -> Path:
        return self.dir / f"known_hosts-{self.vmid}"

    @property
    def ssh_config(self) -> Path:
        return self.dir / f"ssh_config-{self.vmid}"
