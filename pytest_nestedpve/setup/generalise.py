"""Scripts that remove the identity of a nested PVE before it becomes a template, and give a clone its own.

The name of the node is in the database of pmxcfs; its address is in its certificate, in /etc/hosts and in
cloud-init's template of that file. The database is deleted: nothing of a run depends on it yet. At its first
boot a clone creates a new database under its own name, as after an installation. Two units of the template
configure the bridge and the hosts file before that.
"""

from __future__ import annotations

GUEST_SCRIPT = "/var/lib/nested-pve/first-boot"

# Run once by each of the clone's two units; standard library, and the yaml that cloud-init depends on.
FIRST_BOOT = r'''#!/usr/bin/python3
"""First boot of a clone: `network` before networking.service, `identity` before pmxcfs starts."""
import glob, os, re, shutil, socket, subprocess, sys, tempfile

INTERFACES, BRIDGE = "/etc/network/interfaces", "vmbr0"


def read(path):
    with open(path, encoding="utf-8") as opened:
        return opened.read()


def write(path, text):
    with open(path + ".new", "w", encoding="utf-8") as opened:
        opened.write(text)
    if os.path.exists(path):
        shutil.copymode(path, path + ".new")
    os.rename(path + ".new", path)


def configuration():
    """The network configuration of the cloud-init drive."""
    import yaml

    for path in glob.glob("/var/lib/cloud/seed/nocloud*/network-config"):
        return yaml.safe_load(read(path))
    subprocess.run(["udevadm", "settle", "--timeout=30"], check=False)
    for label in ("cidata", "CIDATA"):
        device = subprocess.run(["blkid", "-L", label], capture_output=True, text=True, check=False)
        if device.stdout.strip():
            with tempfile.TemporaryDirectory() as place:
                subprocess.run(["mount", "-o", "ro", device.stdout.strip(), place], check=True)
                try:
                    return yaml.safe_load(read(place + "/network-config"))
                finally:
                    subprocess.run(["umount", place], check=True)
    return {}


def network():
    entries = (configuration() or {}).get("config") or []
    cards = [entry for entry in entries if entry.get("type") == "physical"]
    if not cards or not os.path.exists(INTERFACES):
        return
    text, mac = read(INTERFACES), str(cards[0].get("mac_address", "")).lower()
    old = re.search(r"^[ \t]*bridge[-_]ports[ \t]+(\S+)", text, re.MULTILINE)
    names = [os.path.basename(os.path.dirname(path)) for path in glob.glob("/sys/class/net/*/address")
            if read(path).strip() == mac]
    if old and names:
        text = re.sub(r"(?<![\w.-])" + re.escape(old[1]) + r"(?![\w.-])", names[0], text)
        write("/etc/systemd/network/10-nested-pve-" + names[0] + ".link",
              "[Match]\nMACAddress=" + mac + "\nType=ether\n\n[Link]\nName=" + names[0] + "\n")
    known = ("static", "dhcp4", "dhcp")
    subnets = [net for net in cards[0].get("subnets") or () if net.get("type") in known]
    subnet = subnets[0] if subnets else None
    stanza = re.search(r"^iface " + BRIDGE + r" inet \S+\n(?:[ \t]+\S.*\n)*", text, re.MULTILINE)
    if subnet and stanza:
        replaced = ("address", "gateway", "netmask")
        keep = [line for line in stanza[0].splitlines()[1:] if line.split()[0] not in replaced]
        lines = ["iface " + BRIDGE + " inet dhcp"]
        if subnet["type"] == "static":
            import ipaddress

            address = str(subnet["address"])
            if "/" not in address:
                mask = str(subnet["netmask"])
                address = ipaddress.ip_interface(address + "/" + mask).with_prefixlen
            lines = ["iface " + BRIDGE + " inet static", "        address " + address]
            if subnet.get("gateway"):
                lines.append("        gateway " + str(subnet["gateway"]))
            resolvers = [entry for entry in entries if entry.get("type") == "nameserver"]
            servers = [server for entry in resolvers for server in entry.get("address") or ()]
            if servers:
                write("/etc/resolv.conf", "".join("nameserver " + str(server) + "\n" for server in servers))
        text = text[: stanza.start()] + "\n".join(lines + keep) + "\n" + text[stanza.end():]
    write(INTERFACES, text)


def identity():
    name = socket.gethostname().split(".")[0]
    output = subprocess.run(["ip", "-4", "-o", "addr", "show", "dev", BRIDGE, "scope", "global"],
                           capture_output=True, text=True, check=True).stdout.split()
    address = output[3].split("/")[0]
    template = "/etc/cloud/templates/hosts.debian.tmpl"
    if os.path.exists(template):
        write(template, re.sub(r"(?m)^\S+([ \t]+\{\{[ \t]*fqdn.*)$", address + r"\1", read(template)))
    lines = [line for line in read("/etc/hosts").splitlines() if name not in line.split("#")[0].split()[1:]]
    full = socket.getfqdn() if socket.getfqdn().startswith(name + ".") else ""
    write("/etc/hosts", "\n".join([*lines, " ".join(filter(None, (address, full, name)))]) + "\n")
    write("/etc/mailname", (full or name) + "\n")
    mail = "/etc/postfix/main.cf"
    old = re.search(r"(?m)^myhostname[ \t]*=[ \t]*(\S+)", read(mail)) if os.path.exists(mail) else None
    if old:
        write(mail, re.sub(r"(?<![\w.-])" + re.escape(old[1]) + r"(?![\w.-])", full or name, read(mail)))
    # For logins while pmxcfs is down: PVE moves the first of these files into pmxcfs.
    if os.path.exists("/root/.ssh/authorized_keys"):
        shutil.copy2("/root/.ssh/authorized_keys", "/root/.ssh/authorized_keys2")


{"network": network, "identity": identity}[sys.argv[1]]()
os.unlink(sys.argv[0] + "." + sys.argv[1])
'''

_UNITS = f"""\
cat >/etc/systemd/system/nested-pve-first-network.service <<'END'
[Unit]
Description=The bridge of a new clone
DefaultDependencies=no
ConditionPathExists={GUEST_SCRIPT}.network
After=local-fs.target systemd-udevd.service
Before=network-pre.target networking.service shutdown.target
Conflicts=shutdown.target
Wants=network-pre.target
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 {GUEST_SCRIPT} network
[Install]
WantedBy=multi-user.target
END
cat >/etc/systemd/system/nested-pve-first-identity.service <<'END'
[Unit]
Description=Name and address of a new clone
ConditionPathExists={GUEST_SCRIPT}.identity
After=networking.service cloud-init.service cloud-init-network.service
Before=pve-cluster.service postfix.service postfix@-.service
[Service]
Type=oneshot
ExecStart=/usr/bin/python3 {GUEST_SCRIPT} identity
[Install]
WantedBy=multi-user.target
END
"""

# Root's shell reads this from its input. All checks precede the first deletion: nothing after it may fail.
GENERALISE = f"""\
set -eu
test -x /usr/bin/pveversion
grep -q '^iface vmbr0 inet' /etc/network/interfaces
mkdir -p /var/lib/nested-pve
cat >{GUEST_SCRIPT} <<'END-OF-FIRST-BOOT'
{FIRST_BOOT}END-OF-FIRST-BOOT
chmod 0755 {GUEST_SCRIPT}
: >{GUEST_SCRIPT}.network
: >{GUEST_SCRIPT}.identity
{_UNITS}\
systemctl -q enable nested-pve-first-network.service nested-pve-first-identity.service
# cloud-init of a clone would rewrite apt's sources, without the mirror that this VM is configured with.
echo 'apt: {{preserve_sources_list: true, generate_mirrorlists: false}}' \\
    >/etc/cloud/cloud.cfg.d/99-nested-pve-apt.cfg
for unit in pve-guests pve-ha-lrm pve-ha-crm pvescheduler pvestatd pveproxy spiceproxy pvedaemon \\
        pvefw-logger pve-firewall pve-cluster rrdcached; do
    systemctl stop $unit.service 2>/dev/null || :
done
! mountpoint -q /etc/pve || {{ echo '/etc/pve is still mounted: pve-cluster did not stop' >&2; exit 1; }}
set +e
find /var/lib/pve-cluster /var/lib/rrdcached/db /var/lib/rrdcached/journal -mindepth 1 -delete
rm -rf /var/log/pve/tasks /var/lib/pve-manager/jobs/* /root/.config/nested-pve
mkdir -p -m 0755 /var/log/pve/tasks && chown www-data:www-data /var/log/pve/tasks
rm -f /root/.ssh/authorized_keys /root/.ssh/authorized_keys2 /root/.ssh/authorized_keys.org
rm -f /root/.ssh/id_* /root/.ssh/known_hosts* /etc/ssh/ssh_host_* /etc/ssh/ssh_known_hosts
rm -f /etc/systemd/network/10-nested-pve-*.link
rm -rf /var/lib/nested-pve/network
rm -f /var/lib/dhcp/* /run/dhclient* /var/lib/systemd/random-seed /var/lib/dbus/machine-id
# Empty, not deleted: without the file systemd treats a boot as the first, and enables disabled units.
: >/etc/machine-id
[ ! -e /etc/iscsi/initiatorname.iscsi ] || echo 'GenerateName=yes' >/etc/iscsi/initiatorname.iscsi
cloud-init clean --logs
journalctl -q --rotate --vacuum-time=1s
find /var/log/journal -mindepth 1 -delete
find /var/log -type f -exec truncate -s 0 {{}} +
rm -f /root/.bash_history /root/.lesshst /root/.wget-hsts
find /tmp /var/tmp -xdev -mindepth 1 -delete
apt-get -q clean
fstrim -a
sync
exit 0
"""
