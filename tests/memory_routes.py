"""What a MemoryHost answers: the API's paths, each with what it reads or changes in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memory_model import BROADCAST, Model, State, fail

Route = Callable[..., Any]
"""Takes the model, the parameters, and the parts of the path."""


def _resources(model: Model, params: State) -> list[State]:
    found = []
    for key, vm in model.state["vms"].items():
        vmid, config = int(key), vm["config"]
        entry: State = {"id": f"{vm['kind']}/{vmid}", "vmid": vmid, "node": vm["node"], "type": vm["kind"]}
        entry["status"] = "running" if vm["running"] else "stopped"
        for name in ("lock", "tags"):
            if config.get(name):
                entry[name] = config[name]
        if model.pool_of(vmid):
            entry["pool"] = model.pool_of(vmid)
        ghost = model.state["ghosts"].get(key)
        if vm.get("born", 0) + BROADCAST > model.now:
            entry["status"] = "unknown"
            if ghost and ghost["until"] > model.now:
                entry["name"] = ghost["name"]
        else:
            entry |= {"name": config.get("name", f"VM {vmid}"), "template": int(config.get("template", 0))}
        found.append(entry)
    if params.get("type") == "vm":
        return found
    return [{"id": f"node/{model.node}", "node": model.node, "type": "node", "status": "online"}, *found]


def _node_status(model: Model, _params: State, _node: str) -> State:
    memory = {"total": 64 << 30, "available": 48 << 30, "free": 40 << 30, "used": 16 << 30}
    cpus = {"cpus": model.state.get("cpus", 16)}
    return {"memory": memory | model.state.get("memory", {}), "cpuinfo": cpus}


def _version(model: Model, _params: State) -> State:
    return {"release": "9.2", "version": model.state.get("version", "9.2.11"), "repoid": "14a22df35955d97d"}


def _cluster(model: Model, _params: State) -> list[State]:
    others = model.state.get("others", {})
    named = {"type": "cluster", "name": "lab", "nodes": len(others) + 1, "quorate": 1, "version": 2}
    nodes = [
        {"type": "node", "name": name, "local": 0, "online": int(each["online"]), "ip": each["ip"]}
        for name, each in others.items()
    ]
    return [
        *model.state.get("cluster", []),
        *([named] if others else []),
        *nodes,
        {"type": "node", "name": model.node, "local": 1, "online": 1, "ip": "10.77.7.10"},
    ]


def _nodes(model: Model, _params: State) -> list[State]:
    own = {"node": model.node, "status": "online", "maxmem": 64 << 30, "mem": 16 << 30}
    found = [own | model.state.get("own", {})]
    for name, each in model.state.get("others", {}).items():
        shown = {"node": name, "status": "online" if each["online"] else "offline", "maxmem": each["maxmem"]}
        found.append(shown | ({"mem": each["mem"]} if each["online"] else {}))
    return found


def _pools(model: Model, params: State) -> list[State]:
    pools = model.state["pools"]
    wanted = params.get("poolid")
    if wanted is None:
        return [{"poolid": name, "comment": pool["comment"]} for name, pool in pools.items()]
    if wanted not in pools:
        raise fail(f"pool '{wanted}' does not exist", 2)
    members = [
        {"type": vm["kind"], "vmid": vmid, "node": vm["node"], "id": f"{vm['kind']}/{vmid}"}
        for vmid in pools[wanted]["vms"]
        if (vm := model.state["vms"].get(str(vmid)))
    ]
    return [{"poolid": wanted, "comment": pools[wanted]["comment"], "members": members}]


def _make_pool(model: Model, params: State) -> None:
    name = params["poolid"]
    parent = name.rpartition("/")[0]
    if parent and parent not in model.state["pools"]:
        raise fail(f"parent '{parent}' of pool '{name}' does not exist", 2)
    if name in model.state["pools"]:
        raise fail(f"create pool failed: pool '{name}' already exists")
    model.state["pools"][name] = {"comment": params.get("comment", ""), "vms": []}


def _set_pool(model: Model, params: State) -> None:
    if params["poolid"] not in model.state["pools"]:
        raise fail(f"pool '{params['poolid']}' does not exist", 2)
    if "comment" in params:
        model.state["pools"][params["poolid"]]["comment"] = params["comment"]
    for vmid in map(int, filter(None, str(params.get("vms", "")).split(","))):
        now = model.pool_of(vmid)
        if now == params["poolid"]:
            raise fail(f"update pools failed: VM {vmid} is already a pool member")
        if now is not None and str(params.get("allow-move")) == "1":
            model.state["pools"][now]["vms"].remove(vmid)
        elif now is not None:
            where = f"belongs already to pool '{now}' and 'allow-move' is not set"
            raise fail(f"update pools failed: VM {vmid} {where}")
        model.state["pools"][params["poolid"]]["vms"].append(vmid)


def _drop_pool(model: Model, params: State) -> None:
    name = params["poolid"]
    if name not in model.state["pools"]:
        raise fail(f"pool '{name}' does not exist", 2)
    if model.state["pools"][name]["vms"]:
        inside = model.state["pools"][name]["vms"][0]
        raise fail(f"delete pool failed: pool '{name}' is not empty (contains VM {inside})")
    del model.state["pools"][name]


def _tokens(model: Model, _params: State) -> list[State]:
    return [{"tokenid": name, "privsep": 1, "expire": 0} for name in model.state.get("tokens", [])]


def _drop_token(model: Model, _params: State, name: str) -> None:
    if name not in model.state.get("tokens", []):
        raise fail(f"no such token '{name}' for user 'root@pam'")
    model.state["tokens"].remove(name)


def _acl(model: Model, _params: State) -> list[State]:
    return list(model.state.get("acl", []))


def _set_acl(model: Model, params: State) -> None:
    kept = [
        line
        for line in model.state["acl"]
        if (line["path"], line["ugid"]) != (params["path"], params["tokens"])
        or line["roleid"] not in params["roles"].split(",")
    ]
    model.state["acl"] = kept


def _create(model: Model, params: State, node: str) -> str:
    vmid = model.begin_create(node, params)
    effect = {"do": "create", "vmid": vmid, "node": node, "params": params}
    return model.fork("qmcreate", str(vmid), effect)


def _destroy(model: Model, params: State, node: str, vmid: str) -> str:
    if not params.get("skiplock"):
        model.begin_destroy(node, int(vmid), params)
    effect = {"do": "destroy", "vmid": int(vmid), "node": node, "params": params}
    return model.fork("qmdestroy", vmid, effect)


def _status(model: Model, _params: State, node: str, vmid: str) -> State:
    vm = model.vm(node, int(vmid))
    managed = int(f"vm:{vmid}" in model.state["ha"])
    shown: State = {"vmid": int(vmid), "status": "running" if vm["running"] else "stopped"}
    shown |= {"qmpstatus": "paused" if vm["paused"] else shown["status"], "ha": {"managed": managed}}
    for name in ("name", "lock", "template"):
        if vm["config"].get(name):
            shown[name] = vm["config"][name]
    return shown


def _task(do: str) -> Route:
    def route(model: Model, params: State, node: str, vmid: str) -> str:
        effect = {"do": do, "vmid": int(vmid), "node": node, "params": params}
        return model.fork(f"qm{do}", vmid, effect)

    return route


def _named(do: str) -> Route:
    """A task on a snapshot that the path names."""

    def route(model: Model, params: State, node: str, vmid: str, name: str) -> str:
        effect = {"do": do, "vmid": int(vmid), "node": node, "params": {**params, "snapname": name}}
        return model.fork(f"qm{do}", vmid, effect)

    return route


def _put_config(model: Model, params: State, node: str, vmid: str) -> None:
    model.update(node, int(vmid), params)


def _config(model: Model, _params: State, node: str, vmid: str) -> State:
    return model.config(node, int(vmid))


def _snapshots(model: Model, _params: State, node: str, vmid: str) -> list[State]:
    taken = model.vm(node, int(vmid)).get("snapshots", {})
    listed = [{"name": name, "snaptime": each.get("snaptime", 0)} for name, each in taken.items()]
    return [*listed, {"name": "current", "digest": model.digest(int(vmid))}]


def _feature(model: Model, params: State, node: str, vmid: str) -> State:
    model.vm(node, int(vmid))
    said = model.state.get("features", {}).get(vmid, {})
    if params["feature"] not in said and params["feature"] != "copy":
        raise fail("No 'GET' handler defined for this")
    return {"hasFeature": said.get(params["feature"], 1), "nodes": said.get("nodes", [node])}


def _shown_task(task: State) -> State:
    shown = {"upid": task["upid"], "type": task["type"], "id": task["id"], "starttime": int(task["start"])}
    if task["end"] is not None:
        shown |= {"endtime": int(task["end"]) or 1, "status": task["exit"]}
    return shown


def _tasks(model: Model, params: State, node: str = "") -> list[State]:
    wanted = str(params.get("vmid", ""))
    found = [each for each in model.state["tasks"] if not wanted or each["id"] == wanted]
    found = [each for each in found if not node or each["upid"].split(":")[1] == node]
    if params.get("source") == "active":
        found = [each for each in found if each["end"] is None]
    return [_shown_task(each) for each in reversed(found)]


def _find_task(model: Model, upid: str) -> State:
    for each in model.state["tasks"]:
        if each["upid"] == upid:
            return dict(each)
    raise fail(f"no such task '{upid}'")


def _task_status(model: Model, _params: State, _node: str, upid: str) -> State:
    task = _find_task(model, upid)
    if task["end"] is None:
        return {"upid": upid, "status": "running"}
    return {"upid": upid, "status": "stopped", "exitstatus": task["exit"]}


def _stop_task(model: Model, _params: State, _node: str, upid: str) -> None:
    for each in model.state["tasks"]:
        if each["upid"] == upid and each["end"] is None:
            model.abort(each)


def _storages(model: Model, _params: State, node: str = "") -> list[State]:
    return [
        {"storage": name, "active": 1, "enabled": 1, "used": 0, **entry}
        for name, entry in model.site(node or model.node)["storages"].items()
    ]


def _content(model: Model, params: State, node: str, storage: str) -> list[State]:
    found = [
        {"volid": volid, **entry}
        for volid, entry in model.volumes(node, f"{storage}:").items()
        if volid.startswith(f"{storage}:")
    ]
    base = str(model.site(node)["storages"][storage].get("path", ""))
    for path in model.site(node)["files"]:
        if path.startswith(f"{base}/snippets/"):
            volid = f"{storage}:{path.removeprefix(base + '/')}"
            found.append(
                {"volid": volid, "content": "snippets", "format": "snippet", "size": 1, "vmid": None}
            )
    if params.get("content"):
        found = [each for each in found if each["content"] == params["content"]]
    if params.get("vmid"):
        found = [each for each in found if each["vmid"] == int(params["vmid"])]
    return [{key: value for key, value in each.items() if value is not None} for each in found]


def _list(model: Model, _params: State, node: str) -> list[State]:
    found = []
    for vmid, vm in model.state["vms"].items():
        if vm["node"] != node:
            continue
        entry = {"vmid": int(vmid), "name": vm["config"].get("name", f"VM {vmid}")}
        entry["status"] = "running" if vm["running"] else "stopped"
        found.append(entry | ({"template": 1} if vm["config"].get("template") else {}))
    return found


def _storage(model: Model, _params: State, storage: str) -> State:
    for site in (model.state, *model.state.get("others", {}).values()):
        if storage in site["storages"]:
            return {"storage": storage, **site["storages"][storage]}
    raise fail(f"storage '{storage}' does not exist", 2)


def _network(model: Model, _params: State, node: str) -> list[State]:
    bridges = [
        {"iface": name, "type": "bridge", "cidr": cidr, "active": 1}
        for name, cidr in model.site(node)["bridges"].items()
    ]
    return [{"iface": "eno1", "type": "eth", "active": 1}, *bridges]


def _resize(model: Model, params: State, _node: str, vmid: str) -> None:
    disk = model.state["vms"][vmid]["config"][params["disk"]].split(",")
    kept = [part for part in disk if not part.startswith("size=")]
    model.state["vms"][vmid]["config"][params["disk"]] = ",".join([*kept, f"size={params['size']}"])


def _drop_volume(model: Model, _params: State, node: str, storage: str, volid: str) -> str:
    model.site(node)["files"].pop(model.path_of(volid), None)
    if volid in model.state["sticky"]:
        return model.fork(
            "imgdel", storage, {"do": "fail", "node": node, "params": {"text": "unlink failed"}}
        )
    return model.fork("imgdel", storage, {"do": "imgdel", "node": node, "params": {"volid": volid}})


_VM = r"/nodes/([^/]+)/qemu/(\d+)"
ROUTES: tuple[tuple[str, str, Route], ...] = (
    ("GET", "/version", _version),
    ("GET", "/cluster/status", _cluster),
    ("GET", "/cluster/resources", _resources),
    ("GET", "/cluster/backup", lambda m, _p: m.state["backup"]),
    ("GET", "/cluster/replication", lambda m, _p: m.state["replication"]),
    ("GET", "/cluster/ha/resources", lambda m, _p: [{"sid": sid} for sid in m.state["ha"]]),
    ("GET", "/nodes", _nodes),
    ("GET", "/cluster/tasks", _tasks),
    ("GET", r"/nodes/([^/]+)/status", _node_status),
    ("GET", "/pools", _pools),
    ("POST", "/pools", _make_pool),
    ("PUT", "/pools", _set_pool),
    ("DELETE", "/pools", _drop_pool),
    ("GET", "/access/users/root@pam/token", _tokens),
    ("DELETE", r"/access/users/root@pam/token/([^/]+)", _drop_token),
    ("GET", "/access/acl", _acl),
    ("PUT", "/access/acl", _set_acl),
    ("GET", r"/nodes/([^/]+)/qemu", _list),
    ("POST", r"/nodes/([^/]+)/qemu", _create),
    ("GET", f"{_VM}/config", _config),
    ("PUT", f"{_VM}/config", _put_config),
    ("POST", f"{_VM}/config", _task("config")),
    ("GET", f"{_VM}/status/current", _status),
    ("POST", f"{_VM}/status/start", _task("start")),
    ("POST", f"{_VM}/status/stop", _task("stop")),
    ("POST", f"{_VM}/clone", _task("clone")),
    ("POST", f"{_VM}/template", _task("template")),
    ("GET", f"{_VM}/snapshot", _snapshots),
    ("GET", f"{_VM}/feature", _feature),
    ("POST", f"{_VM}/snapshot", _task("snapshot")),
    ("POST", f"{_VM}/snapshot/([^/]+)/rollback", _named("rollback")),
    ("DELETE", f"{_VM}/snapshot/([^/]+)", _named("delsnapshot")),
    ("DELETE", _VM, _destroy),
    ("GET", r"/nodes/([^/]+)/tasks", _tasks),
    ("GET", r"/nodes/([^/]+)/tasks/([^/]+)/status", _task_status),
    ("GET", r"/nodes/([^/]+)/tasks/([^/]+)/log", lambda _m, _p, _n, _u: [{"n": 1, "t": "no content"}]),
    ("DELETE", r"/nodes/([^/]+)/tasks/([^/]+)", _stop_task),
    ("GET", r"/nodes/([^/]+)/storage", _storages),
    ("GET", "/storage", _storages),
    ("GET", r"/storage/([^/]+)", _storage),
    ("GET", r"/nodes/([^/]+)/network", _network),
    ("PUT", f"{_VM}/resize", _resize),
    ("GET", r"/nodes/([^/]+)/storage/([^/]+)/content", _content),
    ("DELETE", r"/nodes/([^/]+)/storage/([^/]+)/content/(.+)", _drop_volume),
)
