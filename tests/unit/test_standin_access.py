"""Tokens, pools and ACLs on a stand-in node, over HTTPS: the rights of a run's token."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import pytest
from standin_support import Node, _node  # noqa: F401 (a fixture)

from pytest_nestedpve.lab.node.api import proxy
from pytest_nestedpve.lab.node.state import cluster_fs, store

POOL = "npve-1a2b3c4d5e6f"
TOKEN = f"root@pam!{POOL}"


@dataclass
class Client:
    """Strict HTTPS with an API token."""

    port: int
    context: ssl.SSLContext
    header: str = ""

    def call(self, verb: str, path: str, **params: Any) -> tuple[int, str, Any]:
        """(status, reason, decoded body or None)."""
        headers: dict[str, str] = {}
        body = None
        if params and verb in ("POST", "PUT"):
            body, headers["Content-Type"] = urlencode(params).encode(), "application/x-www-form-urlencoded"
        elif params:
            path += "?" + urlencode(params)
        return self._send(verb, path, body, headers)

    def _send(
        self, verb: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, str, Any]:
        connection = http.client.HTTPSConnection("localhost", self.port, context=self.context, timeout=20)
        if self.header:
            headers["Authorization"] = self.header
        connection.request(verb, "/api2/json" + path, body=body, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.reason, json.loads(data) if data else None

    def form(self, path: str, file: bytes, name: str, **fields: str) -> tuple[int, str, Any]:
        """POST a form with a file as its last field, as curl does."""
        parts = [f'name="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()]
        kind = b"Content-Type: application/octet-stream"
        parts.append(f'name="filename"; filename="{name}"\r\n'.encode() + kind + b"\r\n\r\n" + file)
        body = b"".join(b"--XyZ\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts)
        headers = {"Content-Type": "multipart/form-data; boundary=XyZ"}
        return self._send("POST", path, body + b"--XyZ--\r\n", headers)

    def data(self, verb: str, path: str, **params: Any) -> Any:
        status, reason, body = self.call(verb, path, **params)
        assert status == 200, (status, reason, body)
        return body["data"]

    def wait(self, upid: str) -> str:
        """The exit status of a task."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            status = self.data("GET", f"/nodes/father/tasks/{upid}/status")
            if status["status"] == "stopped":
                return str(status["exitstatus"])
        raise AssertionError(f"{upid} did not end")

    def as_token(self, value: str, name: str = TOKEN) -> Client:
        return Client(self.port, self.context, f"PVEAPIToken={name}={value}")


KEYS = (
    "var/lib/pve-cluster/fs/priv/pve-root-ca.key",
    "var/lib/pve-cluster/fs/nodes/father/pve-ssl.key",
    "root/.ssh/id_rsa",
    "root/.ssh/id_rsa.pub",
)
_cached_keys: dict[str, bytes] = {}


def create_certificates(node: Node) -> None:
    """`pvecm updatecerts`, with the keys of the previous test, because generating keys is slow."""
    for name, content in _cached_keys.items():
        file = node.file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        file.chmod(0o600)
    cluster_fs.update_certificates(silent=True)
    _cached_keys.update({name: node.file(name).read_bytes() for name in KEYS})


@pytest.fixture(name="https")
def _https(node: Node, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(proxy, "FAILED_DELAY", 0.0)
    create_certificates(node)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store.release()
    pid = os.fork()
    if pid == 0:
        try:
            proxy.serve(port)
        finally:
            os._exit(0)
    context = ssl.create_default_context(cafile=str(cluster_fs.fs() / "pve-root-ca.pem"))
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            continue
    yield Client(port, context)
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)


def new_token(node: Node, name: str = POOL, *options: str) -> str:
    answer = node.ok("pveum", "user", "token", "add", "root@pam", name, *options, "--output-format", "json")
    return str(json.loads(answer)["value"])


@pytest.fixture(name="run")
def _run(node: Node, https: Client) -> Client:
    """A run's token with its rights on its pool, storage and bridge."""
    value = new_token(node)
    node.ok("pveum", "pool", "add", POOL, "--comment", "lease")
    for path, role in (
        (f"/pool/{POOL}", "PVEVMAdmin"),
        (f"/pool/{POOL}", "PVEPoolAdmin"),
        ("/storage/local", "PVEDatastoreUser"),
        ("/sdn/zones/localnetwork/vmbr0", "PVESDNUser"),
    ):
        node.ok("pveum", "acl", "modify", path, "--tokens", TOKEN, "--roles", role)
    return https.as_token(value)


def test_the_certificate_is_the_nodes_and_calls_without_a_token_are_refused(https: Client) -> None:
    assert https.call("GET", "/version")[:2] == (401, "No ticket")
    assert https.as_token("00000000-0000-0000-0000-000000000000").call("GET", "/version") == (
        401,
        "Authentication failed!",
        None,
    )


def test_a_pool_token_may_create_run_and_destroy_a_vm(node: Node, run: Client) -> None:
    upid = run.data("POST", "/nodes/father/qemu", vmid=101, pool=POOL, kvm=0, name="a1", description="mark")
    assert upid.endswith(f":qmcreate:101:{TOKEN}:")
    assert run.wait(upid) == "OK"
    assert run.data("GET", "/nodes/father/qemu/101/config")["description"] == "mark"
    assert run.data("PUT", "/nodes/father/qemu/101/config", tags="npve;run") is None
    config = "/nodes/father/qemu/101/config"
    upid = run.data("POST", config, scsi0="local:1,format=qcow2", net0="virtio,bridge=vmbr0")
    assert run.wait(upid) == "OK"
    for verb, path, params in (
        ("POST", "/snapshot", {"snapname": "s1"}),
        ("POST", "/snapshot/s1/rollback", {}),
        ("POST", "/status/start", {}),
        ("POST", "/status/stop", {}),
    ):
        assert run.wait(run.data(verb, "/nodes/father/qemu/101" + path, **params)) == "OK"
    assert run.data("GET", "/pools", poolid=POOL)[0]["members"][0]["vmid"] == 101
    assert run.wait(run.data("DELETE", "/nodes/father/qemu/101")) == "OK"
    assert node.ok("qm", "list") == ""
    assert run.data("PUT", "/pools", poolid=POOL, comment="renewed") is None
    assert run.data("DELETE", "/pools", poolid=POOL) is None


def test_tags_at_create_fail_for_a_pool_token_without_leftovers(node: Node, run: Client) -> None:
    upid = run.data("POST", "/nodes/father/qemu", vmid=101, pool=POOL, kvm=0, tags="npve")
    words = "unable to create VM 101 - 403 Permission check failed (/vms/101, VM.Config.Options)"
    assert run.wait(upid) == words
    assert node.ok("qm", "list") == ""


def test_a_pool_token_has_no_rights_on_a_foreign_vm(node: Node, run: Client) -> None:
    node.ok("qm", "create", "101", "--name", "foreign", "--kvm", "0")
    vm = "/nodes/father/qemu/101"
    for verb, path, privilege in (
        ("GET", vm + "/config", "VM.Audit"),
        ("GET", vm + "/status/current", "VM.Audit"),
        ("POST", vm + "/status/stop", "VM.PowerMgmt"),
        ("DELETE", vm, "VM.Allocate"),
    ):
        assert run.call(verb, path)[:2] == (403, f"Permission check failed (/vms/101, {privilege})")
    assert run.call("GET", vm)[0] == 200
    assert run.data("GET", "/nodes/father/qemu") == []
    assert run.call("PUT", "/pools", poolid=POOL, vms=101)[:2] == (
        500,
        "update pools failed: 403 Permission check failed (/vms/101, Permissions.Modify|VM.Allocate)",
    )
    assert run.call("POST", "/nodes/father/qemu", vmid=102, kvm=0)[:2] == (403, "Permission check failed")
    assert run.call("GET", "/nodes/father/status")[:2] == (
        403,
        "Permission check failed (/nodes/father, Sys.Audit)",
    )


def test_only_root_without_a_token_sets_args_locks_and_skiplock(node: Node, https: Client) -> None:
    helper = https.as_token(new_token(node, "helper", "--privsep", "0"), "root@pam!helper")
    node.ok("qm", "create", "101", "--kvm", "0")
    config = "/nodes/father/qemu/101/config"
    assert helper.call("PUT", config, args="-S")[:2] == (500, "only root can set 'args' config")
    assert helper.call("PUT", config, delete="lock")[:2] == (500, "only root can set 'lock' config")
    status, _, body = helper.call("DELETE", "/nodes/father/qemu/101", skiplock=1)
    assert (status, body["errors"]) == (400, {"skiplock": "Only root may use this option."})
    assert helper.call("POST", "/nodes/father/qemu", vmid=5)[2]["errors"] == {
        "vmid": "invalid format - value does not look like a valid VM ID\n"
    }


def test_a_token_is_refused_at_once_after_expiry_or_removal(node: Node, run: Client) -> None:
    assert run.data("GET", "/version")["version"] == "9.2.11"
    node.ok("pveum", "user", "token", "modify", "root@pam", POOL, "--expire", str(int(time.time()) - 5))
    assert run.call("GET", "/version")[:2] == (401, "Authentication failed!")
    node.ok("pveum", "user", "token", "modify", "root@pam", POOL, "--expire", "0")
    assert run.call("GET", "/version")[0] == 200
    node.ok("pveum", "user", "token", "remove", "root@pam", POOL)
    assert run.call("GET", "/version")[:2] == (401, "Authentication failed!")
    warned = node.run("qm", "list")
    assert f"user config - ignore invalid acl token '{TOKEN}'" in warned.stderr


def test_a_token_stops_its_own_task_and_no_others(node: Node, run: Client, https: Client) -> None:
    other = https.as_token(new_token(node, "other"), "root@pam!other")
    upid = run.data("POST", "/nodes/father/qemu", vmid=101, pool=POOL, kvm=0)
    run.wait(upid)
    assert other.call("DELETE", f"/nodes/father/tasks/{upid}")[:2] == (
        403,
        "Permission check failed (/nodes/father, Sys.Modify)",
    )
    assert other.call("GET", f"/nodes/father/tasks/{upid}/status")[0] == 403
    listed = run.data("GET", "/nodes/father/tasks", vmid=101)
    assert (listed[0]["user"], listed[0]["tokenid"]) == ("root@pam", POOL)
    assert run.data("GET", "/nodes/father/tasks", userfilter=TOKEN) == []


def test_a_file_is_uploaded_to_a_storage_and_overwritten(node: Node, https: Client) -> None:
    """Recordings ownL-036 to ownL-041."""
    node.ok("pvesm", "set", "local", "--content", "images,iso,import")
    client = https.as_token(new_token(node, "helper", "--privsep", "0"), "root@pam!helper")
    upload = "/nodes/father/storage/local/upload"
    for content in (b"\x00\xff\r\n--not the end\r\n\r\n", b"other"):
        status, reason, body = client.form(upload, content, "a b.qcow2", content="import")
        assert (status, reason) == (200, "OK")
        assert body["data"].endswith(":imgcopy::root@pam!helper:")
        assert client.wait(body["data"]) == "OK"
        assert node.file("/var/lib/vz/import/a_b.qcow2").read_bytes() == content
    listed = client.data("GET", "/nodes/father/storage/local/content", content="import")
    assert [row["volid"] for row in listed] == ["local:import/a_b.qcow2"]
    assert client.form(upload, b"x", "a.yaml", content="snippets") == (
        400,
        "Parameter verification failed.",
        {
            "data": None,
            "errors": {
                "content": "value 'snippets' does not have a value in the enumeration 'iso, vztmpl, import'"
            },
            "message": "Parameter verification failed.\n",
        },
    )
    assert client.form(upload, b"x", "a.qcow2", content="iso")[2]["errors"] == {
        "filename": "wrong file extension"
    }
    early = client.form(
        upload,
        b"x",
        "up1.qcow2",
        **{"content": "import", "checksum": "0" * 64, "checksum-algorithm": "sha256"},
    )
    assert early == (400, "Bad Request", None)
    assert list(node.file("/var/tmp").glob("pveupload-*")) == []


def test_an_upload_needs_the_right_on_the_storage(node: Node, run: Client) -> None:
    status, reason, _ = run.form("/nodes/father/storage/local/upload", b"x", "a.iso", content="iso")
    assert (status, reason) == (
        403,
        "Permission check failed (/storage/local, Datastore.AllocateTemplate)",
    )
    assert list(node.file("/var/tmp").glob("pveupload-*")) == []


def test_the_lines_of_roots_authorized_keys_are_kept_behind_the_link(node: Node) -> None:
    home = node.file("/root/.ssh")
    home.mkdir(parents=True)
    (home / "authorized_keys").write_text("ssh-ed25519 AAAA admin\n")
    cluster_fs.update_certificates(silent=True)
    link = home / "authorized_keys"
    assert os.readlink(link) == "/etc/pve/priv/authorized_keys"
    lines = (cluster_fs.fs() / "priv/authorized_keys").read_text().splitlines()
    assert lines[0] == "ssh-ed25519 AAAA admin"
    assert lines[1] == (home / "id_rsa.pub").read_text().strip()


def test_a_node_whose_name_is_a_loopback_address_has_no_cluster_file_system(
    node: Node, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del node
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.1.1", 0))]
    )
    assert cluster_fs.serve() == 255
    assert "Unable to resolve node name 'father' to a non-loopback IP address" in capsys.readouterr().err
