#!/bin/sh
# takeover.sh NIC BRIDGE SECONDS [names]: from netplan and systemd-networkd to ifupdown2, in one go, without a
# terminal. Runs as a transient unit, because the SSH session it was asked for in may not survive it. With `names`
# the servers of its own resolv.conf replace those that are there, whatever made them.
# Its last act is a line in RESULT: "ok ADDRESS", or "failed REASON" after the old set-up is back.
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
    echo "putting the old set-up back: $1"
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
        # ifupdown2 already: what was taken down by the reload comes up again
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

# 1. the other managers, off for good
for file in /etc/netplan/*.yaml; do [ -e "$file" ] && mv "$file" $state/netplan/; done
rm -f /run/systemd/network/10-netplan-*
systemctl disable --now systemd-networkd.socket systemd-networkd.service systemd-networkd-wait-online.service
if systemctl cat NetworkManager.service >/dev/null 2>&1; then systemctl disable --now NetworkManager.service; fi

# 2. names: resolved knows servers by link, and the link goes; so a plain file, and whoever gets a lease writes it
if [ -L /etc/resolv.conf ] || [ -n "$resolved$names" ]; then
    cp -P /etc/resolv.conf $state/resolv.conf.before
    rm -f /etc/resolv.conf
    cp $state/resolv.conf /etc/resolv.conf
fi
[ -z "$resolved" ] || systemctl disable --now systemd-resolved.service

# 3. the card gives its address up, the bridge takes it over; a bridge that is there gives up what others gave it
[ -e /etc/network/interfaces ] && cp -p /etc/network/interfaces $state/interfaces.before
mv $state/interfaces.new /etc/network/interfaces
systemctl enable networking.service
ip addr flush dev "$nic" scope global
ip addr flush dev "$bridge" scope global 2>/dev/null
ip route flush dev "$nic"
# Through its service, because the DHCP client stays in the control group of what started it.
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
# the neighbours learn at once where the address is now
command -v arping >/dev/null && arping -c 1 -A -I "$bridge" "$(address | cut -d/ -f1)" >/dev/null 2>&1
# A later takeover that fails puts back what it has found itself, not what was there before this one.
replaced=$state/replaced.$(date +%s)
mkdir -p "$replaced"
for file in $state/netplan $state/*.before; do mv "$file" "$replaced/" 2>/dev/null; done
echo "ok $(address)" > $result
