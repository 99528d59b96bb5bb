#!/usr/bin/python3
"""Tell as JSON which card is meant, what the bridge has, and what resolves names. Changes nothing."""

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
        f"{each['local']}/{each['prefixlen']}"
        for link in ip("-4", "addr", "show", "dev", name)
        for each in link.get("addr_info", [])
        if each.get("scope") == "global"
    ]


def name_servers():
    found = []
    for path in ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"):
        try:
            lines = open(path, encoding="utf-8", errors="replace").read().splitlines()
        except OSError:
            continue
        servers = [line.split()[1] for line in lines if line.startswith("nameserver ") and len(line.split()) > 1]
        found += [each for each in servers if not each.startswith("127.") and each not in found]
    return found


def reaches(address, gateway):
    try:
        return ipaddress.ip_address(gateway) in ipaddress.ip_interface(address).network
    except ValueError:
        return False


def choose(links, nic, mac, bridge):
    """The card's name, or an empty text: an explicit name, a MAC, the default route, in this order."""
    if nic:
        return nic if nic in links else ""
    if mac:
        # A bridge carries its port's address, and so do VLANs on it: only what hangs on nothing counts.
        fitting = [
            name
            for name, link in links.items()
            if link.get("address") == mac and not os.path.isdir(f"/sys/class/net/{name}/bridge")
            and not link.get("link_index_is_upper") and link.get("linkinfo", {}).get("info_kind") != "vlan"
        ]
        return fitting[0] if fitting else ""
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
    bridge, nic, mac, wanted = sys.argv[1:5]
    links = {link["ifname"].split("@")[0]: link for link in ip("-d", "link", "show") if link["ifname"] != "lo"}
    card = choose(links, nic, mac, bridge)
    on_bridge = addresses(bridge) if bridge in links else []
    here = on_bridge or (addresses(card) if card else [])
    # A default route by another card stays as it is.
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
            "gateway_stays": not gateway or reaches(wanted, gateway),
            "dns": name_servers(),
            # A bridge with the address that is wanted is left alone, whoever made it.
            "done": enslaved and bool(on_bridge) and (not wanted or wanted in on_bridge),
        },
        sys.stdout,
    )


main()
