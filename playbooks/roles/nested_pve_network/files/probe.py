#!/usr/bin/python3
"""Print the network card, the addresses of the bridge and the name servers as JSON. Changes nothing."""

import ipaddress
import json
import os
import subprocess
import sys


def ip(*arguments):
    done = subprocess.run(["ip", "-j", *arguments], capture_output=True, text=True, check=False)
    return json.loads(done.stdout or "[]") if done.returncode == 0 else []


def addresses(name):
    return [
        f"{entry['local']}/{entry['prefixlen']}"
        for link in ip("-4", "addr", "show", "dev", name)
        for entry in link.get("addr_info", [])
        if entry.get("scope") == "global"
    ]


def name_servers():
    servers = []
    for path in ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"):
        try:
            lines = open(path, encoding="utf-8", errors="replace").read().splitlines()
        except OSError:
            continue
        entries = [line.split()[1] for line in lines if line.startswith("nameserver ") and len(line.split()) > 1]
        servers += [entry for entry in entries if not entry.startswith("127.") and entry not in servers]
    return servers


def reaches(address, gateway):
    try:
        return ipaddress.ip_address(gateway) in ipaddress.ip_interface(address).network
    except ValueError:
        return False


def select_card(links, nic, mac, bridge):
    """The card's name, or an empty text. Sources in this order: an explicit name, a MAC, the default route."""
    if nic:
        return nic if nic in links else ""
    if mac:
        # A bridge has the same MAC address as its port, and so have VLANs on it: only real cards are candidates.
        cards = [
            name
            for name, link in links.items()
            if link.get("address") == mac and not os.path.isdir(f"/sys/class/net/{name}/bridge")
            and not link.get("link_index_is_upper") and link.get("linkinfo", {}).get("info_kind") != "vlan"
        ]
        return cards[0] if cards else ""
    for route in ip("-4", "route", "show", "default"):
        device = route.get("dev", "")
        if device == bridge:
            ports = [name for name, link in links.items() if link.get("master") == bridge]
            cards = [name for name in ports if not name.startswith(("tap", "veth", "fwpr", "fwln"))]
            return cards[0] if cards else ""
        if device:
            return device
    return ""


def main():
    bridge, nic, mac, address = sys.argv[1:5]
    links = {link["ifname"].split("@")[0]: link for link in ip("-d", "link", "show") if link["ifname"] != "lo"}
    card = select_card(links, nic, mac, bridge)
    on_bridge = addresses(bridge) if bridge in links else []
    here = on_bridge or (addresses(card) if card else [])
    # A default route through another card is not changed.
    gateways = [
        route["gateway"]
        for route in ip("-4", "route", "show", "default")
        if "gateway" in route and route.get("dev") in (card, bridge)
    ]
    gateway = gateways[0] if gateways else ""
    enslaved = bool(card) and links[card].get("master") == bridge
    json.dump(
        {
            "nic": card,
            "nics": sorted(links),
            "mac": links[card].get("address", "") if card else "",
            "address": here[0] if here else "",
            "gateway": gateway,
            "gateway_reachable": not gateway or reaches(address, gateway),
            "dns": name_servers(),
            # A bridge with the requested address is not changed, whatever created it.
            "done": enslaved and bool(on_bridge) and (not address or address in on_bridge),
        },
        sys.stdout,
    )


main()
