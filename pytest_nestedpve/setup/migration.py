"""Calls for a nested VM that may be moved to another node of the cluster at any moment.

A call is sent to the node where the VM was last. If that node has no such VM, the cluster is queried, the VM
on the other node is proved to be the same by its SMBIOS uuid, the facts are updated and the call is retried.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import PreflightFacts, ProvisionFacts
from pytest_nestedpve.ownership.marker import uuid_of
from pytest_nestedpve.pve.api import Verbs
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import GuestNotFound
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.qemu import guest_config

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.ownership.create import Created
    from pytest_nestedpve.pve.api import Api

_GUEST = re.compile(r"/nodes/[^/]+/qemu/(?P<vmid>\d+)(?P<rest>/.+)\Z")


def host_of_vm(env: Environment) -> PveHost:
    """The outer host at the node that the nested VM is on, or will be created on. Raises PveError."""
    host = env.outer
    if not host.cluster.several:
        return host
    vm, preflight = ProvisionFacts.known(env.facts), PreflightFacts.known(env.facts)
    node = (vm and vm.node) or (preflight and preflight.node)
    return host.at(node or host.node).with_api(FollowingApi(env, host.api), entry=host)


def selected_host(env: Environment) -> PveHost:
    """The outer host at the node that preflight selected, where the image is. Raises PveError."""
    host = env.outer
    preflight = PreflightFacts.known(env.facts)
    return host if preflight is None or preflight.node is None else host.at(preflight.node)


class FollowingApi(Verbs):
    """The API; calls for the nested VM are sent to its current node."""

    def __init__(self, env: Environment, api: Api) -> None:
        self._env = env
        self._api = api

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        facts = ProvisionFacts.known(self._env.facts)
        guest = _GUEST.match(path)
        if guest is None or facts is None or int(guest["vmid"]) != facts.vmid:
            return getattr(self._api, verb)(path, **params)
        rest = guest["rest"]
        if verb != "get" and not rest.startswith("/agent/"):
            # First find the node: a task would start on the wrong node, and fail there.
            self._call("get", f"{path.removesuffix(rest)}/status/current", {})
        while True:
            vm = ProvisionFacts.of(self._env.facts).vm
            try:
                return getattr(self._api, verb)(f"/nodes/{vm.node}/qemu/{guest['vmid']}{rest}", **params)
            except GuestNotFound:
                if not self._has_moved(vm):
                    raise

    def _has_moved(self, vm: Created) -> bool:
        node = node_of(self._api, vm.vmid)
        if node is None or node == vm.node:
            return False
        if uuid_of(guest_config(self._api, node, vm.vmid)) != vm.uuid:
            return False
        self._env.remark(f"VM {vm.vmid} was moved from {vm.node} to {node}")
        replace(ProvisionFacts.of(self._env.facts), node=node).record(self._env.facts)
        return True
