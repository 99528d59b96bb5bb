#!/bin/sh
# takeover.sh NIC BRIDGE SECONDS [names]: switch from netplan and systemd-networkd to ifupdown2, without a terminal.
# Runs as a transient unit, because the SSH session that started it may be cut off. With `names` the servers of its
# own resolv.conf replace the existing ones.
# Its last action is a line in RESULT: "ok ADDRESS", or "failed REASON" after the old configuration is restored.
set -u
nic=$1 bridge=$2 limit=$3 names=${4:-}
state=/var/lib/nested-pve/network
result=$state/result
mkdir -p $state/netplan

address() { ip -4 -o addr show dev "$bridge" scope global 2>/dev/null | awk '{print $4; exit}'; }

was() { systemctl is-active --quiet "$1" && echo "$1"; }
networkd=$(was systemd-networkd.service)
resolved=$(was systemd-resolved.service)
networking=$(was networking.service)
manager=$(was NetworkManager.service)

restore() {
    echo "restoring the old configuration: $1"
    ifdown --force "$bridge" 2>/dev/null
    pkill -F "/run/dhclient.$bridge.pid" 2>/dev/null
    ip link del "$bridge" 2>/dev/null
    ip link set "$nic" nomaster up
    mv /etc/network/interfaces $state/interfaces.failed
    [ -e $state/interfaces.before ] && mv $state/interfaces.before /etc/network/interfaces
    for file in $state/netplan/*.yaml; do [ -e "$file" ] && mv "$file" /etc/netplan/; done
    if [ -L $state/resolv.conf.before ] || [ -e $state/resolv.conf.before ]; then
        rm -f /etc/resolv.conf
        mv $state/resolv.conf.before /etc/resolv.conf
    fi
    if [ -n "$networking" ]; then
        # ifupdown2 was in use before: interfaces that the reload took down come up again.
        systemctl restart networking.service
    else
        rm -f /etc/cloud/cloud.cfg.d/99-nested-pve-network.cfg
        systemctl disable networking.service
    fi
    [ -n "$resolved" ] && systemctl enable --now systemd-resolved.service
    if [ -n "$networkd" ]; then
        systemctl enable systemd-networkd.service
        command -v netplan >/dev/null && netplan generate
        systemctl restart systemd-networkd.service
    fi
    [ -n "$manager" ] && systemctl enable --now NetworkManager.service
    echo "failed $1" > $result
    exit 1
}

echo "running" > $result

# 1. Disable the other network managers permanently.
for file in /etc/netplan/*.yaml; do [ -e "$file" ] && mv "$file" $state/netplan/; done
rm -f /run/systemd/network/10-netplan-*
systemctl disable --now systemd-networkd.socket systemd-networkd.service systemd-networkd-wait-online.service
if systemctl cat NetworkManager.service >/dev/null 2>&1; then systemctl disable --now NetworkManager.service; fi

# 2. Names: resolved stores servers by link, and the link disappears. A plain file replaces it, which the DHCP
# client updates.
if [ -L /etc/resolv.conf ] || [ -n "$resolved$names" ]; then
    cp -P /etc/resolv.conf $state/resolv.conf.before
    rm -f /etc/resolv.conf
    cp $state/resolv.conf /etc/resolv.conf
fi
[ -z "$resolved" ] || systemctl disable --now systemd-resolved.service

# 3. Move the address from the card to the bridge. Foreign addresses of an existing bridge are removed.
[ -e /etc/network/interfaces ] && cp -p /etc/network/interfaces $state/interfaces.before
mv $state/interfaces.new /etc/network/interfaces
systemctl enable networking.service
ip addr flush dev "$nic" scope global
ip addr flush dev "$bridge" scope global 2>/dev/null
ip route flush dev "$nic"
# Through its service, because the DHCP client remains in the control group of the process that started it.
if systemctl is-active --quiet networking.service; then
    systemctl reload networking.service || ifreload -a || echo "ifreload ended with $?"
else
    systemctl restart networking.service || ifreload -a || echo "ifreload ended with $?"
fi

count=0
while [ -z "$(address)" ]; do
    count=$((count + 1))
    [ "$count" -le "$limit" ] || restore "the bridge $bridge got no address within $limit s: $(ifquery --running "$bridge" 2>&1 | tr '\n' ' ')"
    sleep 1
done
# Announce the new location of the address to the neighbours.
command -v arping >/dev/null && arping -c 1 -A -I "$bridge" "$(address | cut -d/ -f1)" >/dev/null 2>&1
# A later takeover that fails must restore the state before itself, not the state before this one.
replaced=$state/replaced.$(date +%s)
mkdir -p "$replaced"
for file in $state/netplan $state/*.before; do mv "$file" "$replaced/" 2>/dev/null; done
echo "ok $(address)" > $result
