"""Configurations of ssh with a real sshd: this project and OpenSSH log in, or fail, with the same ones."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from ssh_host import SshHost, log_in, log_in_twice, run_agent, sign
from sshd import create_key

from pytest_nestedpve.pve.errors import SshError
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.target import SshTarget

RELAY = """\
import os, socket, sys, threading

connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))


def back():
    while data := connection.recv(65536):
        os.write(1, data)


threading.Thread(target=back, daemon=True).start()
while data := os.read(0, 65536):
    connection.sendall(data)
"""


@pytest.fixture(scope="module")
def ssh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    ssh_host = SshHost(tmp_path_factory.mktemp("world"))
    for n in range(5):
        ssh_host.create_key(f"stranger{n}")
    ssh_host.create_key("rsa", kind="rsa", accepted=True)
    ssh_host.create_key("ecdsa", kind="ecdsa", accepted=True)
    ssh_host.create_key("locked", passphrase="word", accepted=True)
    ssh_host.create_key("open", accepted=True).chmod(0o644)
    ssh_host.create_key(f"named-{ssh_host.server.port}-127.0.0.1-h", accepted=True)
    ssh_host.create_key("certified")
    user = ssh_host.server.target().user
    sign(ssh_host.ca, ssh_host.folder / "certified", "-n", user)
    elsewhere = ssh_host.create_key("other-certified")
    sign(ssh_host.ca, elsewhere, "-n", user).rename(ssh_host.folder / "elsewhere.pub")
    ssh_host.write("hashed", ssh_host.server.known_hosts.read_text())
    subprocess.run(
        ["ssh-keygen", "-q", "-H", "-f", str(ssh_host.folder / "hashed")], check=True, capture_output=True
    )
    ssh_host.write("as-the-alias", f"the-alias {ssh_host.host_key}\n")
    ssh_host.write("with blank", f"{ssh_host.name} {ssh_host.host_key}\n")
    ssh_host.write("revoked-line", f"{ssh_host.name} {ssh_host.host_key}\n@revoked * {ssh_host.host_key}\n")
    ssh_host.write("revoked-list", ssh_host.host_key + "\n")
    krl = [
        "ssh-keygen",
        "-q",
        "-k",
        "-f",
        str(ssh_host.folder / "krl"),
        str(ssh_host.folder / "revoked-list"),
    ]
    subprocess.run(krl, check=True, capture_output=True)
    create_key(ssh_host.folder / "another")
    another = (ssh_host.folder / "another.pub").read_text()
    ssh_host.write("revoked-other", another)
    ssh_host.write("changed", f"{ssh_host.name} {another}")
    ssh_host.write("by-ca", f"@cert-authority [127.0.0.*]:* {(ssh_host.folder / 'ca.pub').read_text()}")
    ssh_host.write("by-other-ca", f"@cert-authority * {another}")
    ssh_host.write("more/here", "  IdentityFile {good}\n".replace("{good}", str(ssh_host.good)))
    ssh_host.write("more/nested", f"  Include {ssh_host.folder}/more/h*\n")
    ssh_host.write("relay.py", RELAY)
    ssh_host.server.start()
    yield ssh_host
    ssh_host.server.stop()


def host_block(*lines: str, host: str = "h", blocks: str = "") -> str:
    """A Host block with `lines` and the options that a connection needs, without files of the user."""
    options = [
        "HostName 127.0.0.1",
        "Port {port}",
        "User {user}",
        "GlobalKnownHostsFile none",
        "StrictHostKeyChecking yes",
    ]
    text = " ".join(lines)
    if "IdentityFile" not in text and "Include" not in text:
        options.append("IdentityFile {good}")
    if "KnownHostsFile" not in text:
        options.append("UserKnownHostsFile {known}")
    if "IdentityAgent" not in text:
        options.append("IdentityAgent none")
    return "\n    ".join((f"Host {host}", *lines, *options)) + f"\n{blocks}"


SUCCEED = {
    "an alias": host_block(),
    "options before equals signs and in any case": host_block(
        'identityfile="{good}"', "IDENTITIESONLY = yes"
    ),
    "the second identity after the first was refused": host_block(
        "IdentityFile {dir}/stranger0", "IdentityFile {good}", "IdentitiesOnly yes"
    ),
    "a missing identity, then an existing one": host_block("IdentityFile {dir}/none", "IdentityFile {good}"),
    "an RSA key": host_block("IdentityFile {dir}/rsa"),
    "an RSA key, SHA-2 with 256 bits only": host_block(
        "IdentityFile {dir}/rsa", "PubkeyAcceptedAlgorithms rsa-sha2-256"
    ),
    "an ECDSA key": host_block("IdentityFile {dir}/ecdsa"),
    "tokens in an identity": host_block("IdentityFile {dir}/named-%p-%h-%n"),
    "a certificate beside its key": host_block("IdentityFile {dir}/certified"),
    "a certificate that is named": host_block(
        "IdentityFile {dir}/other-certified", "CertificateFile {dir}/elsewhere.pub"
    ),
    "a certificate behind that of another key": host_block(
        "IdentityFile {dir}/other-certified",
        "CertificateFile {dir}/certified-cert.pub",
        "CertificateFile {dir}/elsewhere.pub",
    ),
    "an Include with a pattern within a block": host_block("Include {dir}/more/h*"),
    "an Include that includes": host_block("Include {dir}/more/nested"),
    "a Match host": host_block(
        "IdentityFile {dir}/stranger0", blocks="Match host 127.0.0.1\n    IdentityFile {good}\n"
    ),
    "a Match originalhost and user": host_block(
        "IdentityFile {dir}/stranger0",
        blocks="Match originalhost h user {user}\n    IdentityFile {good}\n",
    ),
    "a Match exec": host_block(
        "IdentityFile {dir}/stranger0",
        blocks='Match exec "test %n = h -a %h = 127.0.0.1"\n    IdentityFile {good}\n',
    ),
    "a Match all": host_block("IdentityFile {dir}/stranger0", blocks="Match all\n    IdentityFile {good}\n"),
    "a Match final": host_block(
        "IdentityFile {dir}/stranger0", blocks="Match final\n    IdentityFile {good}\n"
    ),
    "a Match canonical": "CanonicalizeHostname always\n"
    + host_block("IdentityFile {dir}/stranger0", blocks="Match canonical\n    IdentityFile {good}\n"),
    "a negated pattern": host_block(host="h* !high"),
    "a hashed known_hosts": host_block("UserKnownHostsFile {dir}/hashed"),
    "several known_hosts": host_block("UserKnownHostsFile {dir}/none {dir}/as-the-alias {dir}/hashed"),
    "a known_hosts with a blank in its name": host_block('UserKnownHostsFile {dir}/none "{dir}/with blank"'),
    "a global known_hosts": "Host h\n    GlobalKnownHostsFile {dir}/hashed\n"
    + host_block("UserKnownHostsFile none"),
    "a HostKeyAlias": host_block("HostKeyAlias the-alias", "UserKnownHostsFile {dir}/as-the-alias"),
    "the alias in the name of known_hosts": host_block(
        "HostKeyAlias the-alias", "UserKnownHostsFile {dir}/none {dir}/as-%k"
    ),
    "a host certificate": host_block("UserKnownHostsFile {dir}/by-ca"),
    "a foreign authority, but the key itself": host_block(
        "UserKnownHostsFile {dir}/by-other-ca {dir}/hashed"
    ),
    "a revocation list without this key": host_block("RevokedHostKeys {dir}/revoked-other"),
    "configured algorithms": host_block(
        "Ciphers aes256-ctr",
        "MACs hmac-sha2-256",
        "KexAlgorithms curve25519-sha256,ecdh-sha2-nistp256",
        "HostKeyAlgorithms ssh-ed25519",
    ),
    "only IPv4, from an address": host_block("AddressFamily inet", "BindAddress 127.0.0.1"),
    "a ProxyJump": host_block("ProxyJump j", blocks=host_block(host="j")),
    "a ProxyJump with user and port": "Host h\n    ProxyJump {user}@localhost:{port}\n"
    "Host localhost\n    HostName localhost\n    HostKeyAlias the-alias\n    Port 1\n    User nobody\n"
    + host_block("UserKnownHostsFile {known} {dir}/as-the-alias", host="h localhost"),
    "a ProxyJump as an address with a scheme": host_block(
        "ProxyJump ssh://{user}@j:{port}", blocks=host_block(host="j").replace("Port {port}", "Port 1")
    ),
    "a ProxyJump with tokens": host_block("ProxyJump j%r", blocks=host_block(host="j{user}")),
    "ProxyJump none before one for all": "Host h\n    ProxyJump none\n" + host_block("ProxyJump nowhere"),
    "a jump over two hosts": host_block("ProxyJump j,k", blocks=host_block(host="j k")),
    "a jump host that jumps": host_block(
        "ProxyJump j", blocks=host_block("ProxyJump k", host="j") + host_block(host="k")
    ),
    "a ProxyCommand with tokens": host_block(
        "ProxyCommand sh -c 'test %r-%n-%% = {user}-h-%% && exec python3 {dir}/relay.py %h %p'"
    ),
    "a ProxyCommand of ssh": host_block(
        "ProxyCommand ssh -F {dir}/config -W [%h]:%p j", blocks=host_block(host="j")
    ),
    "the first value of an option counts": "Host h\n    IdentityFile {good}\n    Port {port}\n"
    + host_block().replace("{port}", "1"),
    "a port after a comment": "# Port 1\nHost h # the host\n    Port {port}\n" + host_block(),
}

FAIL = {
    "identities that are not authorized": (
        host_block("IdentityFile {dir}/stranger0", "IdentityFile {dir}/stranger1"),
        r"LoginRefused: .*accepted none of the keys offered: .*stranger0.*stranger1.*authorized_keys",
    ),
    "more identities than the host allows": (
        host_block(*(f"IdentityFile {{dir}}/stranger{n}" for n in range(5)), "IdentityFile {good}"),
        r"LoginRefused: .*ended the login after \d keys.*Name the right key with IdentityFile",
    ),
    "an encrypted identity without an agent": (
        host_block("IdentityFile {dir}/locked"),
        r"LoginRefused: .*locked is protected by a passphrase and not in the agent: `ssh-add .*locked` "
        r"\(and remove IdentityAgent none\)",
    ),
    "an identity that others can read": (
        host_block("IdentityFile {dir}/open"),
        r"LoginRefused: .*open can be read by others \(mode 0644\) and is not used: `chmod 600 .*open`",
    ),
    "an identity of a type that is not allowed": (
        host_block("IdentityFile {dir}/rsa", "PubkeyAcceptedAlgorithms ssh-ed25519"),
        r"LoginRefused: .*rsa: PubkeyAcceptedAlgorithms of the ssh configuration does not allow ssh-rsa",
    ),
    "a certificate of another key": (
        host_block("IdentityFile {dir}/stranger0", "CertificateFile {dir}/certified-cert.pub"),
        r"LoginRefused: .*stranger0",
    ),
    "an unknown host key": (
        host_block("UserKnownHostsFile {dir}/none"),
        r"HostKeyMismatch: the host key of \[127.0.0.1\]:\d+ is unknown: expected it in .*/none, found "
        r"ssh-ed25519 SHA256:\S+\. Compare it with `ssh-keygen -lf .*` on the host's console\. Then log in "
        r"once by hand with `ssh -F .*config -o StrictHostKeyChecking=ask h`, which adds it; or: "
        r"`ssh-keyscan -p \d+ -t ed25519 127.0.0.1 >>.*/none`",
    ),
    "a changed host key": (
        host_block("UserKnownHostsFile {dir}/changed"),
        r"HostKeyMismatch: the host key of \[127.0.0.1\]:\d+ CHANGED: expected ssh-ed25519 SHA256:\S+ "
        r"\(.*/changed, line 1\), found ssh-ed25519 .*`ssh-keygen -R '\[127.0.0.1\]:\d+' -f .*/changed`",
    ),
    "a revoked host key": (
        host_block("UserKnownHostsFile {dir}/revoked-line"),
        r"HostKeyMismatch: .* is revoked \(.*revoked-line, line 2\)",
    ),
    "a host key in a list of revoked keys": (
        host_block("RevokedHostKeys {dir}/revoked-list"),
        r"HostKeyMismatch: .* is revoked by RevokedHostKeys .*revoked-list",
    ),
    "a host key in a key revocation list": (
        host_block("RevokedHostKeys {dir}/krl"),
        r"HostKeyMismatch: .* is revoked by RevokedHostKeys .*krl",
    ),
    "a missing list of revoked keys": (
        host_block("RevokedHostKeys {dir}/none"),
        r"HostKeyMismatch: RevokedHostKeys .*/none cannot be read",
    ),
    "a host certificate of a foreign authority": (
        host_block("UserKnownHostsFile {dir}/by-other-ca"),
        r"HostKeyMismatch: .*is unknown.*its certificate is signed by SHA256:\S+, expected the "
        r"@cert-authority SHA256:\S+ \(.*by-other-ca, line 1\)",
    ),
    "a host certificate for another name": (
        host_block("UserKnownHostsFile {dir}/by-ca", "HostKeyAlias [127.0.0.1]:1"),
        r"HostKeyMismatch: .*by-ca, line 1, does not hold: it is for 127.0.0.1, .* \[127.0.0.1\]:1",
    ),
    "a HostKeyAlias that is not known": (
        host_block("HostKeyAlias none-such", "UserKnownHostsFile {known}"),
        r"HostKeyMismatch: the host key of none-such is unknown.*which adds it$",
    ),
    "a jump host whose key is not known": (
        host_block("ProxyJump j", blocks=host_block("UserKnownHostsFile {dir}/none", host="j")),
        r"HostKeyMismatch: the host key of .* is unknown.*`ssh -F .*config -o StrictHostKeyChecking=ask j`",
    ),
    "a ProxyCommand that fails": (
        host_block("ProxyCommand sh -c 'echo no way through >&2; exit 3'"),
        r"HostUnreachable: the ProxyCommand of h .* ended \(exit status 3: no way through\) before.*by hand",
    ),
    "a ProxyCommand that does not exist": (
        host_block("ProxyCommand none-such-program %h"),
        r"HostUnreachable: the ProxyCommand of h .* ended \(exit status 127: .*none-such-program.*not found",
    ),
    "an unknown token": (
        host_block("ProxyCommand nc %h %p %s"),
        r"SshError: ProxyCommand of the ssh configuration is .*expected only the tokens .*found %s",
    ),
    "a variable that is not set": (
        host_block("IdentityFile ${NONE_SUCH}/key"),
        r"SshError: IdentityFile of the ssh configuration is .*the environment has no NONE_SUCH",
    ),
    "only passwords": (
        host_block("PreferredAuthentications password"),
        r"SshError: .*PreferredAuthentications password: not supported, only keys are offered to log in",
    ),
    "no public keys": (
        host_block("PubkeyAuthentication no"),
        r"SshError: .*PubkeyAuthentication no: not supported, only keys are offered to log in",
    ),
    "an unknown option": (host_block("Identityfiel x"), r"SshError: .*config cannot be used for h: .*line 2"),
}


@pytest.mark.parametrize("what", list(SUCCEED))
def test_a_configuration_that_works_in_openssh_works_here(ssh_host: SshHost, what: str) -> None:
    assert log_in_twice(ssh_host.write_config(SUCCEED[what]), "h") == ("", "")


@pytest.mark.parametrize("what", list(FAIL))
def test_a_configuration_that_fails_in_openssh_fails_here_with_the_reason(
    ssh_host: SshHost, what: str
) -> None:
    text, reason = FAIL[what]
    error, openssh_error = log_in_twice(ssh_host.write_config(text), "h")
    assert openssh_error != "", "OpenSSH succeeds"
    assert re.search(reason, error), error


# -- agents -------------------------------------------------------------------------------------------


def test_the_agent_is_found_in_every_form_of_its_option(
    ssh_host: SshHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IdentityAgent as a path, SSH_AUTH_SOCK, $VARIABLE, ${VARIABLE}; without it SSH_AUTH_SOCK; none."""
    locked = ("IdentityFile {dir}/locked",)
    with run_agent(ssh_host.folder, ssh_host.folder / "locked") as sock:
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        monkeypatch.setenv("MY_AGENT", str(sock))
        for name in (str(sock), "$MY_AGENT", "${MY_AGENT}", "{dir}/agent.sock"):
            assert log_in_twice(ssh_host.write_config(host_block(f"IdentityAgent {name}", *locked)), "h") == (
                "",
                "",
            ), name
        for name in ("$NONE_SUCH", "none", "SSH_AUTH_SOCK"):
            error = log_in(ssh_host.write_config(host_block(f"IdentityAgent {name}", *locked)), "h")
            assert error.startswith("LoginRefused: "), name
            assert "locked is protected by a passphrase and not in the agent: `ssh-add " in error
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        default = host_block(*locked).replace("    IdentityAgent none\n", "")
        for text in (
            host_block("IdentityAgent SSH_AUTH_SOCK", *locked),
            default.replace("IdentityAgent none", ""),
        ):
            assert log_in_twice(ssh_host.write_config(text), "h") == ("", "")
        error, openssh_error = log_in_twice(
            ssh_host.write_config(host_block("IdentityAgent none", *locked)), "h"
        )
        assert "(and remove IdentityAgent none)" in error
        assert openssh_error


def test_the_error_names_an_agent_that_cannot_be_used(ssh_host: SshHost) -> None:
    text = host_block("IdentityAgent {dir}/no-agent", "IdentityFile {dir}/locked")
    error, openssh_error = log_in_twice(ssh_host.write_config(text), "h")
    assert re.search(r"the SSH agent at .*/no-agent cannot be used: No such file", error)
    assert openssh_error


def test_of_an_agent_with_many_keys_only_the_configured_ones_are_offered(ssh_host: SshHost) -> None:
    """The private key is only in the agent; IdentityFile is its .pub, or the path without .pub."""
    folder = ssh_host.folder
    key = ssh_host.create_key("away", accepted=True)
    strangers = [folder / f"stranger{n}" for n in range(5)]
    with run_agent(folder, *strangers, key) as sock:
        key.rename(folder / "put-away")
        for identity in ("away.pub", "away"):
            options = (f"IdentityAgent {sock}", f"IdentityFile {{dir}}/{identity}")
            assert log_in_twice(ssh_host.write_config(host_block(*options, "IdentitiesOnly yes")), "h") == (
                "",
                "",
            ), identity
            # The configured key is offered before the others of the agent.
            assert log_in_twice(ssh_host.write_config(host_block(*options)), "h") == ("", ""), identity
        others = host_block(f"IdentityAgent {sock}", "IdentityFile {dir}/stranger0", "IdentitiesOnly yes")
        error, openssh_error = log_in_twice(ssh_host.write_config(others), "h")
        assert re.search(r"accepted none of the keys offered: stranger0 \(agent\)\. ", error)
        assert openssh_error
        many = host_block(f"IdentityAgent {sock}", "IdentityFile {dir}/none")
        error, openssh_error = log_in_twice(ssh_host.write_config(many), "h")
        assert re.search(r"ended the login after \d keys .*IdentitiesOnly yes", error)
        assert openssh_error


def test_a_public_key_without_its_private_key_is_in_the_error(ssh_host: SshHost) -> None:
    error, openssh_error = log_in_twice(
        ssh_host.write_config(host_block("IdentityFile {dir}/stranger0.pub", "IdentitiesOnly yes")), "h"
    )
    assert "stranger0.pub is a public key, and the agent does not hold the private one" in error
    assert openssh_error


def test_a_certificate_is_used_with_a_key_in_the_agent(ssh_host: SshHost) -> None:
    """The certificate is beside the key, configured, or in the agent; the key has a passphrase."""
    user = ssh_host.server.target().user
    key = ssh_host.create_key("both", passphrase="word")
    with run_agent(ssh_host.folder, key) as sock:
        certificate = sign(ssh_host.ca, key, "-n", user)
        options = (f"IdentityAgent {sock}", "IdentityFile {dir}/both")
        assert log_in_twice(ssh_host.write_config(host_block(*options)), "h") == ("", "")
        certificate.rename(ssh_host.folder / "apart.pub")
        assert log_in_twice(
            ssh_host.write_config(host_block(*options, "CertificateFile {dir}/apart.pub")), "h"
        ) == ("", "")
        error, openssh_error = log_in_twice(ssh_host.write_config(host_block(*options)), "h")
        assert "accepted none" in error
        assert openssh_error
    rsa = ssh_host.create_key("rsa-both", kind="rsa")
    sign(ssh_host.ca, rsa, "-n", user)
    with run_agent(ssh_host.folder, rsa) as sock:  # ssh-add adds the certificate, too
        assert log_in_twice(
            ssh_host.write_config(host_block(f"IdentityAgent {sock}", "IdentityFile {dir}/none")), "h"
        ) == ("", "")
    assert log_in_twice(ssh_host.write_config(host_block("IdentityFile {dir}/rsa-both")), "h") == ("", "")


def test_an_agent_that_declines_to_sign_does_not_end_the_host_block(
    ssh_host: SshHost,
) -> None:
    """As with a FIDO key that nobody touches: the next key is offered, else the error has the reason."""
    with run_agent(ssh_host.folder, ssh_host.folder / "locked", options=("-c",)) as sock:
        # This agent has no program in its environment to ask the user, so it declines.
        options = (f"IdentityAgent {sock}", "IdentityFile {dir}/locked")
        assert log_in_twice(ssh_host.write_config(host_block(*options, "IdentityFile {good}")), "h") == (
            "",
            "",
        )
        error, openssh_error = log_in_twice(ssh_host.write_config(host_block(*options)), "h")
        assert "locked: the SSH agent gave no signature: the agent refused" in error
        assert openssh_error


# -- reading a configuration, without a login ---------------------------------------------------------


def test_paths_are_expanded_as_in_openssh(ssh_host: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with ControlPath, which OpenSSH expands in its output."""
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("PLACE", "/some/place")
    for path in ("~/a", "%d/a", "${PLACE}/a", "/%C", "/%h-%i-%k-%L-%l-%n-%p-%r-%u-%%h"):
        for alias in ("h", "other@h", "ssh://other@h:2200"):
            text = "Host h\n    HostName far.example\n    HostKeyAlias named\n    User me\n    Port 2022\n"
            config = ssh_host.write_config(f"{text}    IdentityFile {path}\n    ControlPath {path}\n")
            argv = ["ssh", "-G", "-F", str(config), alias]
            printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            expected = re.findall(r"(?m)^controlpath (.*)$", printed)
            assert [
                str(path) for path in read_ssh_config(alias, config, None, None).identity_files
            ] == expected


def test_a_percent_sign_that_openssh_has_expanded_is_not_expanded_again(ssh_host: SshHost) -> None:
    config = ssh_host.write_config("Host h\n    UserKnownHostsFile /100%%h\n    IdentityAgent /a%%p\n")
    target = read_ssh_config("h", config, None, None)
    assert (str(target.known_hosts[0]), target.identity_agent) == ("/100%h", "/a%p")


@pytest.mark.parametrize(
    ("text", "hops"),
    [
        ("ProxyJump a,me@b:2,ssh://c:3", ["h:22", "c:3", "b:2", "a:22"]),
        ("ProxyJump [fe80::1]:2", ["h:22", "fe80::1:2"]),
        ("ProxyJump none", ["h:22"]),
        ("ProxyCommand x\n    ProxyJump a", ["h:22"]),
    ],
)
def test_the_hops_of_a_jump_are_those_of_openssh(ssh_host: SshHost, text: str, hops: list[str]) -> None:
    target = read_ssh_config("h", ssh_host.write_config(f"Host h\n    {text}\n"), None, None)
    addresses = []
    hop: SshTarget | None = target
    while hop is not None:
        addresses.append(f"{hop.host}:{hop.port}")
        hop = hop.jump
    assert addresses == hops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Host *\n    ProxyJump gate\n", r"jumphost loop via gate\. .*needs `ProxyJump none`"),
        (
            "Host h\n    ProxyJump gate\nHost gate\n    ProxyJump h\n",
            r"is a circle.*: h → gate → h\. .*needs `ProxyJump none`",
        ),
    ],
)
def test_a_circle_of_jump_hosts_is_refused_with_advice(ssh_host: SshHost, text: str, message: str) -> None:
    """OpenSSH starts processes for the second one without an end."""
    with pytest.raises(SshError, match=message):
        read_ssh_config("h", ssh_host.write_config(text), None, None)
