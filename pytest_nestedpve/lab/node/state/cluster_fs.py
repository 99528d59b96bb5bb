"""/etc/pve, the cluster file system. Its files are rendered for readers (and hold certificates and keys); the
state is in the database. While pve-cluster.service is down, /etc/pve is an empty directory.

Like pmxcfs it does not start while the node's own name resolves to a loopback address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import uuid
from pathlib import Path

from ..api.errors import PveFailure
from ..machine.alive import holding
from . import members, paths, reported


def fs() -> Path:
    """The directory with the files; bind-mounted on /etc/pve while the service runs."""
    return paths.cluster_dir() / "fs"


def show(name: str, text: str, mode: int = 0o640) -> None:
    """Write a file below /etc/pve; atomic."""
    file = fs() / name
    if paths.in_process():
        _overwrite(file, text, mode)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{paths.node()}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    temporary.chmod(mode)
    temporary.rename(file)


def _overwrite(file: Path, text: str, mode: int) -> None:
    """Write without a rename, which makes some file systems wait for the disk; not atomic."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    except FileNotFoundError:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    with open(descriptor, "w") as opened:
        opened.write(text)
        opened.truncate()


def hide(name: str) -> None:
    (fs() / name).unlink(missing_ok=True)


def pid_file() -> Path:
    return paths.at("/run/pve-cluster.pid")


def is_up() -> bool:
    try:
        os.kill(int(pid_file().read_text()), 0)
    except PermissionError:
        return True
    except (OSError, ValueError):
        return False
    return True


def require() -> None:
    """Raise PveFailure with the error of every command while pmxcfs is down."""
    if not is_up():
        line = "ipcc_send_rec[{}] failed: Connection refused\n"
        raise PveFailure(
            "".join(line.format(n) for n in (1, 2, 3))
            + "Unable to load access control list: Connection refused",
            rc=111,
        )


def address() -> str | None:
    """The address that the node's name resolves to; None without one, or for a loopback address."""
    if (configured := reported.everything().get("address")) is not None:
        return str(configured)
    try:
        answers = socket.getaddrinfo(paths.node(), None, proto=socket.IPPROTO_TCP)
    except OSError:
        return None
    for entry in sorted(answers, key=lambda item: item[0] != socket.AF_INET):
        text = str(entry[4][0]).split("%")[0]
        ip = ipaddress.ip_address(text)
        if ip.is_loopback:
            return None  # the first answer decides, as for pmxcfs
        if not ip.is_link_local:
            return text
    return None


def prepare() -> None:
    """Create the directories and links of a node's file system.

    The nodes of a cluster share the directory: links that differ between them point to /run/pve-local.
    """
    node = paths.node()
    local = f"nodes/{node}"
    if members.several():
        local = str(paths.at("/run/pve-local"))
        _link(Path(local), f"/etc/pve/nodes/{node}")
    for name, mode in (("priv", 0o700), (f"nodes/{node}/qemu-server", 0o750), (f"nodes/{node}/lxc", 0o750)):
        (fs() / name).mkdir(parents=True, exist_ok=True)
        (fs() / name).chmod(mode)
    for link, target in (
        ("local", local),
        ("qemu-server", f"{local}/qemu-server"),
        ("lxc", f"{local}/lxc"),
    ):
        _link(fs() / link, target)


def _link(link: Path, target: str) -> None:
    if not link.is_symlink() or os.readlink(link) != target:
        temporary = link.with_name(f".{link.name}.{paths.node()}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        temporary.replace(link)


def serve() -> int:
    """pve-cluster.service."""
    if address() is None:
        print(
            f"[main] crit: Unable to resolve node name '{paths.node()}' to a non-loopback IP address"
            " - missing entry in '/etc/hosts' or DNS?",
            file=sys.stderr,
        )
        return 255
    prepare()
    target = paths.at("/etc/pve")
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["umount", "-l", str(target)], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["mount", "--bind", str(fs()), str(target)], check=True)
    pid_file().write_text(f"{os.getpid()}\n")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with holding(members.lock_file(paths.node())):
        _notify("READY=1")
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    pid_file().unlink(missing_ok=True)
    subprocess.run(["umount", "-l", str(target)], check=False)
    return 0


def _notify(text: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.send(text.encode())


# -- certificates and keys (pvecm updatecerts)


def update_certificates(*, force: bool = False, silent: bool = False) -> None:
    """Create missing CA, node certificate and root's keys; with `force` a new node certificate."""
    require()
    if force and not silent:
        print("(re)generate node files")
    with holding(paths.cluster_dir() / ".updatecerts.lock"):
        _create_missing(force=force, silent=silent)


def _create_missing(*, force: bool, silent: bool) -> None:
    prepare()
    ca, key = fs() / "pve-root-ca.pem", fs() / "priv/pve-root-ca.key"
    if not ca.exists() or not key.exists():
        _create_ca(key)
    node_dir = fs() / "nodes" / paths.node()
    if force or not (node_dir / "pve-ssl.pem").exists():
        if force and not silent:
            print("generate new node certificate")
        _create_certificate(node_dir / "pve-ssl.pem", node_dir / "pve-ssl.key", ca, key)
    _root_keys()
    if members.several():
        _known_hosts()


def _openssl(*arguments: str) -> None:
    process = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if process.returncode:
        raise PveFailure(f"command 'openssl {arguments[0]}' failed: {process.stderr.strip()}")


def _new_key(file: Path, mode: int) -> None:
    if not file.exists():
        _openssl("genrsa", "-out", str(file), "2048")
    file.chmod(mode)


def _create_ca(key: Path) -> None:
    _new_key(key, 0o600)
    with tempfile.TemporaryDirectory() as work:
        config = Path(work) / "ca.cnf"
        config.write_text(
            "[req]\ndistinguished_name=dn\nprompt=no\nx509_extensions=ca\n[dn]\n"
            f"CN=Proxmox Virtual Environment\nOU={uuid.uuid4()}\nO=PVE Cluster Manager CA\n"
            "[ca]\nbasicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid:always\n"
        )
        certificate = Path(work) / "ca.pem"
        _openssl(
            *("req", "-new", "-x509", "-days", "3650", "-sha256", "-config", str(config)),
            *("-key", str(key), "-out", str(certificate)),
        )
        show("pve-root-ca.pem", certificate.read_text(), 0o644)


def _create_certificate(file: Path, own_key: Path, ca: Path, ca_key: Path) -> None:
    node = paths.node()
    names = ["IP:127.0.0.1", "IP:::1", "DNS:localhost"]
    if (ip := address()) is not None:
        names.append(f"IP:{ip}")
    names.append(f"DNS:{node}")
    full = socket.getfqdn(node)
    if full != node and not full.startswith("localhost"):
        names.append(f"DNS:{full}")
    _new_key(own_key, 0o640)
    with tempfile.TemporaryDirectory() as work:
        config, request, certificate = (Path(work) / name for name in ("x.cnf", "x.csr", "x.pem"))
        config.write_text(
            "[req]\ndistinguished_name=dn\nprompt=no\n[dn]\n"
            f"OU=PVE Cluster Node\nO=Proxmox Virtual Environment\nCN={full}\n"
            "[node]\nbasicConstraints=CA:FALSE\nextendedKeyUsage=serverAuth\n"
            "keyUsage=digitalSignature,keyEncipherment\nsubjectKeyIdentifier=hash\n"
            f"authorityKeyIdentifier=keyid:always\nsubjectAltName={','.join(names)}\n"
        )
        _openssl("req", "-new", "-config", str(config), "-key", str(own_key), "-out", str(request))
        _openssl(
            *("x509", "-req", "-in", str(request), "-days", "730", "-sha256", "-out", str(certificate)),
            *("-CA", str(ca), "-CAkey", str(ca_key), "-set_serial", str(uuid.uuid4().int >> 64)),
            *("-extfile", str(config), "-extensions", "node"),
        )
        show(str(file.relative_to(fs())), certificate.read_text(), 0o640)


def _root_keys() -> None:
    """Create root's key pair; turn authorized_keys into a link to the cluster's file, with all lines."""
    home = paths.at("/root/.ssh")
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = home / "id_rsa"
    if not key.exists():
        subprocess.run(
            [
                "ssh-keygen",
                "-q",
                "-t",
                "rsa",
                "-b",
                "2048",
                "-N",
                "",
                "-C",
                f"root@{paths.node()}",
                "-f",
                str(key),
            ],
            check=True,
        )
    authorized = fs() / "priv/authorized_keys"
    lines: list[str] = authorized.read_text().splitlines() if authorized.exists() else []
    link = home / "authorized_keys"
    if link.is_file() and not link.is_symlink():
        lines += link.read_text().splitlines()
    with contextlib.suppress(OSError):
        lines += (home / "id_rsa.pub").read_text().splitlines()
    unique = list(dict.fromkeys(line for line in lines if line.strip()))
    show("priv/authorized_keys", "".join(line + "\n" for line in unique), 0o600)
    if not link.is_symlink():
        temporary = home / ".authorized_keys.link"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to("/etc/pve/priv/authorized_keys")
        temporary.replace(link)


def _known_hosts() -> None:
    """Write this node's host keys under its name, for the other nodes."""
    lines = []
    for file in sorted(paths.at("/etc/ssh").glob("ssh_host_*_key.pub")):
        lines.append(f"{paths.node()} {' '.join(file.read_text().split()[:2])}\n")
    show(f"nodes/{paths.node()}/ssh_known_hosts", "".join(lines))


if __name__ == "__main__":
    sys.exit(serve())
