"""Variables, certificates, files and passwords for other programs; the command of --nested-exec."""

from __future__ import annotations

import os
import signal
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_nestedpve.config import env_file
from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment, NotReady
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.ssh.connection import CommandFailed, CommandResult
from pytest_nestedpve.pve.ssh.forward import Forward
from pytest_nestedpve.run.directory import BadHostKey, RunDirectory
from pytest_nestedpve.run.masking import Masker
from pytest_nestedpve.run.signals import Interrupted, SignalGuard
from pytest_nestedpve.session import certificate_bundle, tool_environment
from pytest_nestedpve.session.exit_status import Tally
from pytest_nestedpve.session.modes.command import Command
from pytest_nestedpve.session.nested_pve import NestedPve

TOKEN = "root@pam!nested=6f0f0f0f-1111-2222-3333-444455556666"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA"
ROOT = b"-----BEGIN CERTIFICATE-----\nsystem\n-----END CERTIFICATE-----\n"


class Ssh:
    """An SSH connection to both hosts that records its commands."""

    target = SimpleNamespace(alias="father")

    def __init__(self) -> None:
        self.commands: list[tuple[Any, bytes | None, bool]] = []
        self.forwards: list[tuple[str, int]] = []
        self.rc = 0

    def forward(self, host: str, port: int) -> Forward:
        self.forwards.append((host, port))
        return Forward(lambda: None)

    def run(
        self, command: Any, *, stdin: bytes | None = None, timeout: float = 0, secret: bool = False
    ) -> CommandResult:
        del timeout
        self.commands.append((command, stdin, secret))
        return CommandResult("chpasswd", self.rc, b"", b"chpasswd: no", 1.0, secret)


class Env:
    """The part of an environment that NestedPve uses."""

    attached = False

    def __init__(self, directory: Path) -> None:
        self.ssh = Ssh()
        self.directory = RunDirectory(directory)
        self.directory.create()
        self.run = SimpleNamespace(id="0123456789ab", dir=directory, directory=self.directory)
        self.ip = "10.77.7.50"
        self.outer = SimpleNamespace(ssh=self.ssh, name="father")
        self.inner = SimpleNamespace(run=self.ssh.run, node="nested-pve-1")
        self.masker = Masker()
        self.closing: list[Any] = []
        self.facts = {"provision": {"name": "nested-pve-1", "vmid": 99900}}

    def fact(self, phase: str, name: str) -> Any:
        return self.facts[phase][name]

    def hide(self, secret: str) -> None:
        self.masker.add(secret)

    def on_close(self, close: Any) -> None:
        self.closing.append(close)

    def write_ssh_config(self) -> Path:
        return self.directory.path / "ssh_config"


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Env]:
    env = Env(tmp_path / "run")
    directory = env.run.directory
    directory.write("api_token", TOKEN + "\n")
    directory.write("pve-root-ca.pem", ROOT.replace(b"system", b"nested"))
    directory.pin_host_keys("nested-pve-1", [KEY])
    yield env
    for close in env.closing:
        close()


@pytest.fixture
def nested(env: Env) -> NestedPve:
    return NestedPve(cast(Environment, env))


# -- variables --------------------------------------------------------------------------------------


def test_variables_have_the_names_that_the_consumer_reads(nested: NestedPve) -> None:
    url = nested.api_url
    host, port = nested.forward(8006)
    assert url == f"https://{host}:{port}"
    secret = TOKEN.partition("=")[2]
    bpg = nested.environ("bpg")
    assert (bpg["PROXMOX_VE_ENDPOINT"], bpg["PROXMOX_VE_API_TOKEN"]) == (url + "/", TOKEN)
    telmate = nested.environ("telmate")
    assert telmate["PM_API_URL"] == url + "/api2/json"
    assert (telmate["PM_API_TOKEN_ID"], telmate["PM_API_TOKEN_SECRET"]) == ("root@pam!nested", secret)
    ansible = nested.environ("ansible")
    assert (ansible["PROXMOX_HOST"], ansible["PROXMOX_PORT"]) == (host, str(port))
    assert ansible["PROXMOX_URL"] == url
    assert (ansible["PROXMOX_USER"], ansible["PROXMOX_TOKEN_ID"]) == ("root@pam", "nested")
    assert ansible["PROXMOX_TOKEN_SECRET"] == secret
    assert ansible["PROXMOX_VALIDATE_CERTS"] == "true"
    proxmoxer = nested.environ("proxmoxer")
    assert proxmoxer["PROXMOXER_HOST"] == f"{host}:{port}"
    assert nested.environ("bpg", "telmate") == {**bpg, **telmate}
    with pytest.raises(ValueError, match="expected one of bpg, telmate, ansible, proxmoxer; found 'pulumi'"):
        nested.environ("pulumi")


def test_variables_of_all_consumers_do_not_contradict_each_other(nested: NestedPve) -> None:
    everything = nested.environ()
    for name in tool_environment.CONSUMERS:
        assert nested.environ(name).items() <= everything.items()
    assert everything["NESTED_API_TOKEN"] == TOKEN
    assert everything["NESTED_NODE"] == "nested-pve-1"
    assert not any(name.startswith("NESTED_PVE_") for name in everything), "these are settings"
    assert not tool_environment.FOREIGN & set(everything)


@pytest.mark.parametrize(
    ("environ", "no_proxy"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "127.0.0.1"),
        ({"https_proxy": "http://proxy:3128", "NO_PROXY": ".lan, 10.0.0.1"}, ".lan,10.0.0.1,127.0.0.1"),
        ({"all_proxy": "socks5://proxy", "no_proxy": "127.0.0.1"}, "127.0.0.1"),
    ],
)
def test_forwards_are_excluded_from_the_proxy(environ: dict[str, str], no_proxy: str | None) -> None:
    roots = dict.fromkeys(tool_environment.ROOTS, Path("roots"))
    api = tool_environment.Api("127.0.0.1", 1, TOKEN, Path("ca"), roots)
    variables = tool_environment.variables(api, ("bpg",), environ)
    assert (variables.get("no_proxy"), variables.get("NO_PROXY")) == (no_proxy, no_proxy)


def test_the_error_for_a_missing_token_names_the_phase_that_creates_it(env: Env, nested: NestedPve) -> None:
    (env.run.dir / "api_token").unlink()
    with pytest.raises(NotReady, match="setup_repos"):
        nested.environ("bpg")


def test_no_repr_contains_the_token(env: Env, nested: NestedPve) -> None:
    api = tool_environment.Api("127.0.0.1", 1, TOKEN, Path("ca"), {})
    assert TOKEN.partition("=")[2] not in repr(api) + repr(nested) + repr(env.run)


def test_a_forward_is_opened_once_and_closed_with_the_environment(env: Env, nested: NestedPve) -> None:
    assert nested.forward(8006) == nested.forward(8006) != nested.forward(22)
    assert env.ssh.forwards == [("10.77.7.50", 8006), ("10.77.7.50", 22)]
    assert len(env.closing) == 2


def test_the_host_keys_are_pinned_for_the_address_of_the_forward(env: Env, nested: NestedPve) -> None:
    host, port = nested.forward(22)
    lines = nested.known_hosts.read_text().splitlines()
    assert lines == [f"nested-pve-1 {KEY}", f"[{host}]:{port} {KEY}"]
    with pytest.raises(BadHostKey, match="no host key to pin"):
        env.run.directory.pin_forward(("127.0.0.1", 1), "another")


# -- certificates -----------------------------------------------------------------------------------


def test_the_certificates_of_the_system_remain_trusted(nested: NestedPve) -> None:
    for variable in tool_environment.ROOTS:
        file = Path(nested.environ()[variable])
        assert file.read_bytes().endswith(b"-----BEGIN CERTIFICATE-----\nnested\n-----END CERTIFICATE-----\n")
        assert file.read_bytes().count(b"BEGIN CERTIFICATE") > 20
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Path(nested.environ()["NESTED_CA_FILE"]).read_bytes().count(b"BEGIN CERTIFICATE") == 1


def test_the_certificate_is_added_to_those_that_the_user_configured(tmp_path: Path) -> None:
    (tmp_path / "company.pem").write_bytes(ROOT)
    configured = {"SSL_CERT_FILE": str(tmp_path / "company.pem")}
    assert certificate_bundle.with_roots("SSL_CERT_FILE", b"ours\n", configured) == ROOT + b"ours\n"
    assert (
        certificate_bundle.with_roots("REQUESTS_CA_BUNDLE", b"ours\n", configured).count(b"BEGIN CERTIFICATE")
        > 20
    )


def test_openssl_reads_all_certificates_of_the_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "roots.pem"
    bundle.write_bytes(certificate_bundle.with_roots("SSL_CERT_FILE", b"", {}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(bundle)
    assert len(context.get_ca_certs()) > 20


# -- the password -------------------------------------------------------------------------------------


def test_the_password_is_created_once_and_passed_by_standard_input(env: Env, nested: NestedPve) -> None:
    password = nested.root_password
    assert len(password) >= 24
    assert NestedPve(cast(Environment, env)).root_password == password
    # Set again: the nested PVE may have been reset to an earlier state.
    assert env.ssh.commands == [(["chpasswd"], f"root:{password}\n".encode(), True)] * 2
    assert env.masker.mask(f"it is {password}") == "it is ********"
    assert password not in repr(nested)
    assert stat.S_IMODE((env.run.dir / "root_password").stat().st_mode) == 0o600


def test_a_password_that_cannot_be_set_is_not_stored(env: Env, nested: NestedPve) -> None:
    env.ssh.rc = 1
    with pytest.raises(CommandFailed) as error:
        _ = nested.root_password
    (_, stdin, _), *_ = env.ssh.commands
    assert stdin is not None
    assert stdin.decode().strip().partition(":")[2] not in str(error.value)
    assert not (env.run.dir / "root_password").exists()


# -- the file -----------------------------------------------------------------------------------------

VALUES = {
    "PLAIN": TOKEN,
    "URL": "https://127.0.0.1:40123/api2/json",
    "BLANK": "/home/my project/ca.pem",
    "QUOTE": 'it\'s $HOME `id` "x" \\ #',
}


def test_a_shell_reads_the_values_unchanged(tmp_path: Path) -> None:
    file = tmp_path / "nested.env"
    env_file.write(file, env_file.text(VALUES, "0123456789ab"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    script = 'set -a; . "$0"; exec "$1" -c "import os, json; print(json.dumps(dict(os.environ)))"'
    command = ["sh", "-ec", script, str(file), sys.executable]
    output = subprocess.run(command, env={}, capture_output=True, check=True).stdout
    import json

    variables = json.loads(output)
    assert {name: variables[name] for name in VALUES} == VALUES


def test_only_values_with_special_characters_are_quoted() -> None:
    lines = env_file.text(VALUES, "0123456789ab").splitlines()
    assert f"PLAIN={TOKEN}" in lines
    assert "URL=https://127.0.0.1:40123/api2/json" in lines
    assert "BLANK='/home/my project/ca.pem'" in lines
    with pytest.raises(PveError, match="expected variables of one line"):
        env_file.text({"KEY": "a\nb"}, "0123456789ab")


def test_a_file_of_the_user_is_neither_replaced_nor_deleted(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("MINE=1\n")
    with pytest.raises(PveError, match="was not written by a session"):
        env_file.write(file, "x")
    env_file.remove(file, "0123456789ab")
    assert file.read_text() == "MINE=1\n"
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def test_a_file_is_deleted_only_by_its_run(tmp_path: Path) -> None:
    file = tmp_path / "nested.env"
    env_file.write(file, env_file.text({}, "0123456789ab"))
    env_file.remove(file, "ba9876543210")
    assert file.exists()
    env_file.write(file, env_file.text({}, "ba9876543210"))
    env_file.remove(file, "ba9876543210")
    assert not file.exists()


def test_a_directory_that_is_not_writable_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Replaced, because the tests may run as root.
    monkeypatch.setattr(os, "access", lambda _path, _mode: False)
    assert env_file.find_fault(tmp_path / "x") == f"the directory {tmp_path} is not writable"


# -- the command --------------------------------------------------------------------------------------


def run_command(text: str, folder: Path, before: Sequence[int] = ()) -> int:
    command = Command(text, folder=folder, environ=os.environ)
    for signum in before:
        command.deliver(signum)
    return command.run()


@pytest.mark.parametrize(("text", "status"), [("exit 0", 0), ("exit 200", 200), ("kill -USR1 $$", 138)])
def test_the_exit_status_is_that_of_a_shell(tmp_path: Path, text: str, status: int) -> None:
    assert run_command(text, tmp_path) == status


def test_a_command_that_is_interrupted_before_its_start_is_not_run(tmp_path: Path) -> None:
    assert run_command("touch ran", tmp_path, [signal.SIGTERM]) == 143
    assert not (tmp_path / "ran").exists()


def test_the_third_signal_kills_at_once(tmp_path: Path) -> None:
    command = Command(
        "trap '' TERM; echo up >up; while :; do sleep 0.05; done", folder=tmp_path, environ=os.environ
    )

    def send_signals() -> None:
        pause = threading.Event()
        while not (tmp_path / "up").exists():
            pause.wait(0.02)
        for _ in range(3):
            command.deliver(signal.SIGTERM)

    thread = threading.Thread(target=send_signals)
    thread.start()
    assert command.run() == 128 + signal.SIGKILL
    thread.join()


def test_diverted_signals_are_passed_on_and_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    guard = SignalGuard(stop=lambda _: None, report=lambda _: None, give_up=lambda _: received.append(-1))
    guard.install()
    try:
        with guard.diverted(received.append):
            for _ in range(3):
                signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT] * 3
        assert guard.received == [signal.SIGINT]
        monkeypatch.setattr(guard, "_first_at", 0.0)
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    finally:
        guard.remove()


@pytest.mark.parametrize(
    ("command", "left", "signum", "status"),
    [
        (None, False, None, 1),
        (0, False, None, 1),
        (5, False, None, 5),
        (3, True, None, 3),
        (3, False, 15, 143),
    ],
)
def test_the_session_exits_with_the_status_of_the_command_or_of_the_signal(
    command: int | None, left: bool, signum: int | None, status: int
) -> None:
    assert Tally(command=command, left=left, signum=signum).status(1, executes=True) == status


def test_leftovers_fail_the_session_after_a_successful_command() -> None:
    assert Tally(command=0, left=True).status(0, executes=True) == 1


def test_command_and_file_are_none_by_default() -> None:
    assert (Settings().exec_command, Settings().env_file) == (None, None)
