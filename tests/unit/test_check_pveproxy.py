"""check_pveproxy.py trusts the node's own authority, or the certificate that an administrator installed."""

from __future__ import annotations

import datetime
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from https_host import HttpsHost, create_certificate, serve_https_host

ROLES = Path(__file__).parents[2] / "playbooks" / "roles"
SCRIPT = ROLES / "nested_pve_identity" / "files" / "check_pveproxy.py"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HttpsHost]:
    (tmp_path / "host").mkdir()
    with serve_https_host(tmp_path / "host") as served:
        yield served


@pytest.fixture
def pve(tmp_path: Path) -> Path:
    """A directory in place of /etc/pve."""
    (tmp_path / "pve" / "local").mkdir(parents=True)
    return tmp_path / "pve"


def check(pve: Path, port: int, path: str = "/api2/json/version", token: str = "") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.read_text(), path, str(pve), str(port)],
        input=token, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr.strip()


def token(host: HttpsHost) -> str:
    return f"root@pam!consumer={host.new_token('consumer')}"


def nodes_own(pve: Path) -> tuple[str, str]:
    """A certificate of the node's authority, which has no key usage, as in old versions of PVE."""
    now = datetime.datetime.now(datetime.UTC)
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("PVE", "father")]

    def signed(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, ca: bool) -> str:
        built = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(names[0])
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            local = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
            built = built.add_extension(local, critical=False)
        return built.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()

    (pve / "pve-root-ca.pem").write_text(signed(names[0], authority.public_key(), ca=True))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return signed(names[1], key.public_key(), ca=False), private.decode()


def test_a_certificate_of_the_nodes_own_authority_is_trusted(host: HttpsHost, pve: Path) -> None:
    host.set_certificate(nodes_own(pve))
    assert check(pve, host.address[1], token=token(host)) == (0, "")


def test_an_administrators_certificate_needs_no_loopback_address(host: HttpsHost, pve: Path) -> None:
    nodes_own(pve)
    pem = create_certificate(names=["pve.example.org"])
    host.set_certificate(pem)
    # As installed: the chain of its authorities follows.
    (pve / "local" / "pveproxy-ssl.pem").write_text(pem[0] + create_certificate()[0])
    assert check(pve, host.address[1], token=token(host)) == (0, "")


@pytest.mark.parametrize("own", [True, False])
def test_any_other_certificate_is_refused(host: HttpsHost, pve: Path, own: bool) -> None:
    nodes_own(pve)
    if own:
        # The served certificate is in the chain, but is not the node's.
        chain = create_certificate(names=["pve.example.org"])[0] + host.read_pem
        (pve / "local" / "pveproxy-ssl.pem").write_text(chain)
    rc, error = check(pve, host.address[1], token=token(host))
    assert rc == 1
    assert "certificate verify failed" in error
    assert host.requests == []


@pytest.mark.parametrize("case", ["refused", "closed port", "no authority", "garbage"])
def test_an_error_is_printed_as_one_line(host: HttpsHost, pve: Path, case: str) -> None:
    host.set_certificate(nodes_own(pve))
    port = host.address[1]
    if case == "closed port":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    if case == "no authority":
        (pve / "pve-root-ca.pem").unlink()
    if case == "garbage":
        (pve / "local" / "pveproxy-ssl.pem").write_text("no certificate")
    rc, error = check(pve, port, token="root@pam!consumer=of-nobody")
    expected = {
        "refused": "expected 200, found 401", "closed port": "ConnectionRefusedError",
        "no authority": "FileNotFoundError", "garbage": "Error",
    }  # fmt: skip
    assert rc == 1
    assert expected[case] in error
    assert len(error.splitlines()) == 1


def test_every_file_of_the_playbooks_that_the_package_reads_exists() -> None:
    package = ROLES.parents[1] / "pytest_nestedpve"
    source = "".join(path.read_text(encoding="utf-8") for path in package.rglob("*.py"))
    names = re.findall(r'playbook_path\("([^"{]+)"\)', source)
    assert "roles/nested_pve_identity/files/check_pveproxy.py" in names
    assert [name for name in names if not (ROLES.parent / name).is_file()] == []
