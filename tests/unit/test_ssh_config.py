"""~/.ssh/config as people have it, against a real sshd: OpenSSH is given each text, too, and both agree."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest
from ssh_world import World, agent, both, ours, sign
from sshd import make_key

from pytest_nestedpve.pve.errors import SshError
from pytest_nestedpve.pve.ssh.config import read_ssh_config
from pytest_nestedpve.pve.ssh.target import SshTarget

RELAY = """\
import os, socket, sys, threading

there = socket.create_connection((sys.argv[1], int(sys.argv[2])))


def back():
    while data := there.recv(65536):
        os.write(1, data)


threading.Thread(target=back, daemon=True).start()
while data := os.read(0, 65536):
    there.sendall(data)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    for n in range(5):
        world.key(f"stranger{n}")
    world.key("rsa", kind="rsa", accepted=True)
    world.key("ecdsa", kind="ecdsa", accepted=True)
    world.key("locked", passphrase="word", accepted=True)
    world.key("open", accepted=True).chmod(0o644)
    world.key(f"named-{world.server.port}-127.0.0.1-h", accepted=True)
    world.key("certified")
    user = world.server.target().user
    sign(world.ca, world.folder / "certified", "-n", user)
    elsewhere = world.key("other-certified")
    sign(world.ca, elsewhere, "-n", user).rename(world.folder / "elsewhere.pub")
    world.write("hashed", world.server.known_hosts.read_text())
    subprocess.run(
        ["ssh-keygen", "-q", "-H", "-f", str(world.folder / "hashed")], check=True, capture_output=True
    )
    world.write("as-the-alias", f"the-alias {world.host_key}\n")
    world.write("with blank", f"{world.name} {world.host_key}\n")
    world.write("revoked-line", f"{world.name} {world.host_key}\n@revoked * {world.host_key}\n")
    world.write("revoked-list", world.host_key + "\n")
    krl = ["ssh-keygen", "-q", "-k", "-f", str(world.folder / "krl"), str(world.folder / "revoked-list")]
    subprocess.run(krl, check=True, capture_output=True)
    make_key(world.folder / "another")
    another = (world.folder / "another.pub").read_text()
    world.write("revoked-other", another)
    world.write("changed", f"{world.name} {another}")
    world.write("by-ca", f"@cert-authority [127.0.0.*]:* {(world.folder / 'ca.pub').read_text()}")
    world.write("by-other-ca", f"@cert-authority * {another}")
    world.write("more/here", "  IdentityFile {good}\n".replace("{good}", str(world.good)))
    world.write("more/nested", f"  Include {world.folder}/more/h*\n")
    world.write("relay.py", RELAY)
    world.server.start()
    yield world
    world.server.stop()


def login(*lines: str, host: str = "h", more: str = "") -> str:
    """A configuration with what each of them needs to connect, and no files of this machine's user."""
    usual = [
        "HostName 127.0.0.1",
        "Port {port}",
        "User {user}",
        "GlobalKnownHostsFile none",
        "StrictHostKeyChecking yes",
    ]
    said = " ".join(lines)
    if "IdentityFile" not in said and "Include" not in said:
        usual.append("IdentityFile {good}")
    if "KnownHostsFile" not in said:
        usual.append("UserKnownHostsFile {known}")
    if "IdentityAgent" not in said:
        usual.append("IdentityAgent none")
    return "\n    ".join((f"Host {host}", *lines, *usual)) + f"\n{more}"


SUCCEED = {
    "an alias": login(),
    "options before equals signs and in any case": login('identityfile="{good}"', "IDENTITIESONLY = yes"),
    "the second identity after the first was refused": login(
        "IdentityFile {dir}/stranger0", "IdentityFile {good}", "IdentitiesOnly yes"
    ),
    "an identity that is not there, then one that is": login(
        "IdentityFile {dir}/none", "IdentityFile {good}"
    ),
    "an RSA key": login("IdentityFile {dir}/rsa"),
    "an RSA key, SHA-2 with 256 bits only": login(
        "IdentityFile {dir}/rsa", "PubkeyAcceptedAlgorithms rsa-sha2-256"
    ),
    "an ECDSA key": login("IdentityFile {dir}/ecdsa"),
    "tokens in an identity": login("IdentityFile {dir}/named-%p-%h-%n"),
    "a certificate beside its key": login("IdentityFile {dir}/certified"),
    "a certificate that is named": login(
        "IdentityFile {dir}/other-certified", "CertificateFile {dir}/elsewhere.pub"
    ),
    "a certificate that is named after another key's": login(
        "IdentityFile {dir}/other-certified",
        "CertificateFile {dir}/certified-cert.pub",
        "CertificateFile {dir}/elsewhere.pub",
    ),
    "an Include with a pattern within a block": login("Include {dir}/more/h*"),
    "an Include that includes": login("Include {dir}/more/nested"),
    "a Match host": login(
        "IdentityFile {dir}/stranger0", more="Match host 127.0.0.1\n    IdentityFile {good}\n"
    ),
    "a Match originalhost and user": login(
        "IdentityFile {dir}/stranger0",
        more="Match originalhost h user {user}\n    IdentityFile {good}\n",
    ),
    "a Match exec": login(
        "IdentityFile {dir}/stranger0",
        more='Match exec "test %n = h -a %h = 127.0.0.1"\n    IdentityFile {good}\n',
    ),
    "a Match all": login("IdentityFile {dir}/stranger0", more="Match all\n    IdentityFile {good}\n"),
    "a Match final": login("IdentityFile {dir}/stranger0", more="Match final\n    IdentityFile {good}\n"),
    "a Match canonical": "CanonicalizeHostname always\n"
    + login("IdentityFile {dir}/stranger0", more="Match canonical\n    IdentityFile {good}\n"),
    "a negated pattern": login(host="h* !high"),
    "a hashed known_hosts": login("UserKnownHostsFile {dir}/hashed"),
    "several known_hosts": login("UserKnownHostsFile {dir}/none {dir}/as-the-alias {dir}/hashed"),
    "a known_hosts with a blank in its name": login('UserKnownHostsFile {dir}/none "{dir}/with blank"'),
    "a global known_hosts": "Host h\n    GlobalKnownHostsFile {dir}/hashed\n"
    + login("UserKnownHostsFile none"),
    "a HostKeyAlias": login("HostKeyAlias the-alias", "UserKnownHostsFile {dir}/as-the-alias"),
    "the alias in the name of known_hosts": login(
        "HostKeyAlias the-alias", "UserKnownHostsFile {dir}/none {dir}/as-%k"
    ),
    "a host certificate": login("UserKnownHostsFile {dir}/by-ca"),
    "a foreign authority, but the key itself": login("UserKnownHostsFile {dir}/by-other-ca {dir}/hashed"),
    "a revocation list without this key": login("RevokedHostKeys {dir}/revoked-other"),
    "chosen algorithms": login(
        "Ciphers aes256-ctr",
        "MACs hmac-sha2-256",
        "KexAlgorithms curve25519-sha256,ecdh-sha2-nistp256",
        "HostKeyAlgorithms ssh-ed25519",
    ),
    "only IPv4, from an address": login("AddressFamily inet", "BindAddress 127.0.0.1"),
    "a ProxyJump": login("ProxyJump j", more=login(host="j")),
    "a ProxyJump with user and port": "Host h\n    ProxyJump {user}@localhost:{port}\n"
    "Host localhost\n    HostName localhost\n    HostKeyAlias the-alias\n    Port 1\n    User nobody\n"
    + login("UserKnownHostsFile {known} {dir}/as-the-alias", host="h localhost"),
    "a ProxyJump as an address with a scheme": login(
        "ProxyJump ssh://{user}@j:{port}", more=login(host="j").replace("Port {port}", "Port 1")
    ),
    "a ProxyJump with tokens": login("ProxyJump j%r", more=login(host="j{user}")),
    "ProxyJump none before one for all": "Host h\n    ProxyJump none\n" + login("ProxyJump nowhere"),
    "a jump over two hosts": login("ProxyJump j,k", more=login(host="j k")),
    "a jump host that jumps": login("ProxyJump j", more=login("ProxyJump k", host="j") + login(host="k")),
    "a ProxyCommand with tokens": login(
        "ProxyCommand sh -c 'test %r-%n-%% = {user}-h-%% && exec python3 {dir}/relay.py %h %p'"
    ),
    "a ProxyCommand of ssh": login("ProxyCommand ssh -F {dir}/config -W [%h]:%p j", more=login(host="j")),
    "a first option wins": "Host h\n    IdentityFile {good}\n    Port {port}\n"
    + login().replace("{port}", "1"),
    "a port after a comment": "# Port 1\nHost h # the host\n    Port {port}\n" + login(),
}

FAIL = {
    "identities that are not known there": (
        login("IdentityFile {dir}/stranger0", "IdentityFile {dir}/stranger1"),
        r"LoginRefused: .*accepted none of the keys offered: .*stranger0.*stranger1.*authorized_keys",
    ),
    "more identities than the host allows": (
        login(*(f"IdentityFile {{dir}}/stranger{n}" for n in range(5)), "IdentityFile {good}"),
        r"LoginRefused: .*ended the login after \d keys.*Name the right one with IdentityFile",
    ),
    "an encrypted identity without an agent": (
        login("IdentityFile {dir}/locked"),
        r"LoginRefused: .*locked is protected by a passphrase and not in the agent: `ssh-add .*locked` "
        r"\(and remove IdentityAgent none\)",
    ),
    "an identity that others can read": (
        login("IdentityFile {dir}/open"),
        r"LoginRefused: .*open can be read by others \(mode 0644\) and is not used: `chmod 600 .*open`",
    ),
    "an identity of a type that is left out": (
        login("IdentityFile {dir}/rsa", "PubkeyAcceptedAlgorithms ssh-ed25519"),
        r"LoginRefused: .*rsa: PubkeyAcceptedAlgorithms of the ssh configuration leaves out ssh-rsa",
    ),
    "a certificate of another key": (
        login("IdentityFile {dir}/stranger0", "CertificateFile {dir}/certified-cert.pub"),
        r"LoginRefused: .*stranger0",
    ),
    "an unknown host key": (
        login("UserKnownHostsFile {dir}/none"),
        r"HostKeyMismatch: the host key of \[127.0.0.1\]:\d+ is unknown: expected it in .*/none, found "
        r"ssh-ed25519 SHA256:\S+\. Compare it with `ssh-keygen -lf .*` on the host's console\. Then log in "
        r"once by hand with `ssh -F .*config -o StrictHostKeyChecking=ask h`, which adds it; or: "
        r"`ssh-keyscan -p \d+ -t ed25519 127.0.0.1 >>.*/none`",
    ),
    "a changed host key": (
        login("UserKnownHostsFile {dir}/changed"),
        r"HostKeyMismatch: the host key of \[127.0.0.1\]:\d+ CHANGED: expected ssh-ed25519 SHA256:\S+ "
        r"\(.*/changed, line 1\), found ssh-ed25519 .*`ssh-keygen -R '\[127.0.0.1\]:\d+' -f .*/changed`",
    ),
    "a revoked host key": (
        login("UserKnownHostsFile {dir}/revoked-line"),
        r"HostKeyMismatch: .* is revoked \(.*revoked-line, line 2\)",
    ),
    "a host key in a list of revoked ones": (
        login("RevokedHostKeys {dir}/revoked-list"),
        r"HostKeyMismatch: .* is revoked by RevokedHostKeys .*revoked-list",
    ),
    "a host key in a binary list of revoked ones": (
        login("RevokedHostKeys {dir}/krl"),
        r"HostKeyMismatch: .* is revoked by RevokedHostKeys .*krl",
    ),
    "a list of revoked ones that is not there": (
        login("RevokedHostKeys {dir}/none"),
        r"HostKeyMismatch: RevokedHostKeys .*/none cannot be read",
    ),
    "a host certificate of a foreign authority": (
        login("UserKnownHostsFile {dir}/by-other-ca"),
        r"HostKeyMismatch: .*is unknown.*its certificate is signed by SHA256:\S+, expected the "
        r"@cert-authority SHA256:\S+ \(.*by-other-ca, line 1\)",
    ),
    "a host certificate for another name": (
        login("UserKnownHostsFile {dir}/by-ca", "HostKeyAlias [127.0.0.1]:1"),
        r"HostKeyMismatch: .*by-ca, line 1, does not hold: it is made out to 127.0.0.1, .* \[127.0.0.1\]:1",
    ),
    "a HostKeyAlias that is not known": (
        login("HostKeyAlias none-such", "UserKnownHostsFile {known}"),
        r"HostKeyMismatch: the host key of none-such is unknown.*which adds it$",
    ),
    "a jump host whose key is not known": (
        login("ProxyJump j", more=login("UserKnownHostsFile {dir}/none", host="j")),
        r"HostKeyMismatch: the host key of .* is unknown.*`ssh -F .*config -o StrictHostKeyChecking=ask j`",
    ),
    "a ProxyCommand that fails": (
        login("ProxyCommand sh -c 'echo no way through >&2; exit 3'"),
        r"HostUnreachable: the ProxyCommand of h .* ended \(exit status 3: no way through\) before.*by hand",
    ),
    "a ProxyCommand that does not exist": (
        login("ProxyCommand none-such-program %h"),
        r"HostUnreachable: the ProxyCommand of h .* ended \(exit status 127: .*none-such-program.*not found",
    ),
    "a token that ssh does not know": (
        login("ProxyCommand nc %h %p %s"),
        r"SshError: ProxyCommand of the ssh configuration is .*expected of the tokens only .*found %s",
    ),
    "a variable that is not set": (
        login("IdentityFile ${NONE_SUCH}/key"),
        r"SshError: IdentityFile of the ssh configuration is .*the environment has no NONE_SUCH",
    ),
    "nothing but passwords wanted": (
        login("PreferredAuthentications password"),
        r"SshError: .*PreferredAuthentications password: not supported, only keys are offered to log in",
    ),
    "no keys wanted": (
        login("PubkeyAuthentication no"),
        r"SshError: .*PubkeyAuthentication no: not supported, only keys are offered to log in",
    ),
    "an unknown option": (login("Identityfiel x"), r"SshError: .*config cannot be used for h: .*line 2"),
}


@pytest.mark.parametrize("what", list(SUCCEED))
def test_what_openssh_logs_in_with_logs_in_here(shared: World, what: str) -> None:
    assert both(shared.config(SUCCEED[what]), "h") == ("", "")


@pytest.mark.parametrize("what", list(FAIL))
def test_what_openssh_refuses_is_refused_here_and_the_error_says_why(shared: World, what: str) -> None:
    text, said = FAIL[what]
    mine, theirs = both(shared.config(text), "h")
    assert theirs != "", "OpenSSH succeeds"
    assert re.search(said, mine), mine


# -- agents -------------------------------------------------------------------------------------------


def test_the_agent_that_is_named_is_asked_however_it_is_named(
    shared: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IdentityAgent as a path, SSH_AUTH_SOCK, $VARIABLE, ${VARIABLE}; without it SSH_AUTH_SOCK; none."""
    locked = ("IdentityFile {dir}/locked",)
    with agent(shared.folder, shared.folder / "locked") as sock:
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        monkeypatch.setenv("MY_AGENT", str(sock))
        for name in (str(sock), "$MY_AGENT", "${MY_AGENT}", "{dir}/agent.sock"):
            assert both(shared.config(login(f"IdentityAgent {name}", *locked)), "h") == ("", ""), name
        for name in ("$NONE_SUCH", "none", "SSH_AUTH_SOCK"):
            mine = ours(shared.config(login(f"IdentityAgent {name}", *locked)), "h")
            assert mine.startswith("LoginRefused: "), name
            assert "locked is protected by a passphrase and not in the agent: `ssh-add " in mine
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        unsaid = login(*locked).replace("    IdentityAgent none\n", "")
        for text in (login("IdentityAgent SSH_AUTH_SOCK", *locked), unsaid.replace("IdentityAgent none", "")):
            assert both(shared.config(text), "h") == ("", "")
        mine, theirs = both(shared.config(login("IdentityAgent none", *locked)), "h")
        assert "(and remove IdentityAgent none)" in mine
        assert theirs


def test_an_agent_that_is_gone_is_named_in_the_error(shared: World) -> None:
    text = login("IdentityAgent {dir}/no-agent", "IdentityFile {dir}/locked")
    mine, theirs = both(shared.config(text), "h")
    assert re.search(r"the SSH agent at .*/no-agent cannot be used: No such file", mine)
    assert theirs


def test_of_an_agent_with_many_keys_only_the_named_ones_are_offered(shared: World) -> None:
    """The private key is only in the agent; the identity is its .pub, or the name that it would have."""
    folder = shared.folder
    away = shared.key("away", accepted=True)
    strangers = [folder / f"stranger{n}" for n in range(5)]
    with agent(folder, *strangers, away) as sock:
        away.rename(folder / "put-away")
        for identity in ("away.pub", "away"):
            named = (f"IdentityAgent {sock}", f"IdentityFile {{dir}}/{identity}")
            assert both(shared.config(login(*named, "IdentitiesOnly yes")), "h") == ("", ""), identity
            # The named one goes before the others of the agent.
            assert both(shared.config(login(*named)), "h") == ("", ""), identity
        others = login(f"IdentityAgent {sock}", "IdentityFile {dir}/stranger0", "IdentitiesOnly yes")
        mine, theirs = both(shared.config(others), "h")
        assert re.search(r"accepted none of the keys offered: stranger0 \(agent\)\. ", mine)
        assert theirs
        many = login(f"IdentityAgent {sock}", "IdentityFile {dir}/none")
        mine, theirs = both(shared.config(many), "h")
        assert re.search(r"ended the login after \d keys .*IdentitiesOnly yes", mine)
        assert theirs


def test_a_public_key_whose_private_one_is_nowhere_is_said(shared: World) -> None:
    mine, theirs = both(shared.config(login("IdentityFile {dir}/stranger0.pub", "IdentitiesOnly yes")), "h")
    assert "stranger0.pub is a public key, and the agent does not hold the private one" in mine
    assert theirs


def test_a_certificate_and_a_key_in_the_agent_belong_together(shared: World) -> None:
    """The certificate beside the key or named; the key with a passphrase, in the agent; or both there."""
    user = shared.server.target().user
    key = shared.key("both", passphrase="word")
    with agent(shared.folder, key) as sock:
        certificate = sign(shared.ca, key, "-n", user)
        asked = (f"IdentityAgent {sock}", "IdentityFile {dir}/both")
        assert both(shared.config(login(*asked)), "h") == ("", "")
        certificate.rename(shared.folder / "apart.pub")
        assert both(shared.config(login(*asked, "CertificateFile {dir}/apart.pub")), "h") == ("", "")
        mine, theirs = both(shared.config(login(*asked)), "h")
        assert "accepted none" in mine
        assert theirs
    rsa = shared.key("rsa-both", kind="rsa")
    sign(shared.ca, rsa, "-n", user)
    with agent(shared.folder, rsa) as sock:  # ssh-add takes the certificate along
        assert both(shared.config(login(f"IdentityAgent {sock}", "IdentityFile {dir}/none")), "h") == ("", "")
    assert both(shared.config(login("IdentityFile {dir}/rsa-both")), "h") == ("", "")


def test_an_agent_that_declines_to_sign_does_not_end_the_login(
    shared: World,
) -> None:
    """As with a FIDO key that nobody touches: the next key is offered, and the error would tell of it."""
    with agent(shared.folder, shared.folder / "locked", options=("-c",)) as sock:
        # The agent asks by the program of its own environment, which this one has not: it declines.
        asked = (f"IdentityAgent {sock}", "IdentityFile {dir}/locked")
        assert both(shared.config(login(*asked, "IdentityFile {good}")), "h") == ("", "")
        mine, theirs = both(shared.config(login(*asked)), "h")
        assert "locked: no signature came from the SSH agent: the agent refused" in mine
        assert theirs


# -- what is read, without a login --------------------------------------------------------------------


def test_paths_stand_for_what_openssh_makes_of_them(shared: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path as ControlPath, which OpenSSH expands before it prints it, and as an identity."""
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("PLACE", "/some/place")
    for path in ("~/a", "%d/a", "${PLACE}/a", "/%C", "/%h-%i-%k-%L-%l-%n-%p-%r-%u-%%h"):
        for alias in ("h", "other@h", "ssh://other@h:2200"):
            text = "Host h\n    HostName far.example\n    HostKeyAlias named\n    User me\n    Port 2022\n"
            config = shared.config(f"{text}    IdentityFile {path}\n    ControlPath {path}\n")
            argv = ["ssh", "-G", "-F", str(config), alias]
            printed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
            expected = re.findall(r"(?m)^controlpath (.*)$", printed)
            assert [
                str(each) for each in read_ssh_config(alias, config, None, None).identity_files
            ] == expected


def test_a_percent_sign_that_openssh_has_expanded_is_not_expanded_again(shared: World) -> None:
    config = shared.config("Host h\n    UserKnownHostsFile /100%%h\n    IdentityAgent /a%%p\n")
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
def test_the_hops_of_a_jump_are_those_of_openssh(shared: World, text: str, hops: list[str]) -> None:
    target = read_ssh_config("h", shared.config(f"Host h\n    {text}\n"), None, None)
    found = []
    hop: SshTarget | None = target
    while hop is not None:
        found.append(f"{hop.host}:{hop.port}")
        hop = hop.jump
    assert found == hops


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Host *\n    ProxyJump gate\n", r"jumphost loop via gate\. .*needs `ProxyJump none`"),
        (
            "Host h\n    ProxyJump gate\nHost gate\n    ProxyJump h\n",
            r"goes in a circle.*: h → gate → h\. .*needs `ProxyJump none`",
        ),
    ],
)
def test_a_jump_for_all_hosts_that_has_no_beginning_is_refused_with_the_cure(
    shared: World, text: str, said: str
) -> None:
    """The second is one that OpenSSH follows until the machine is full."""
    with pytest.raises(SshError, match=said):
        read_ssh_config("h", shared.config(text), None, None)
