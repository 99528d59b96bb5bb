"""Preflight says everything that is wrong with a host, at once, and what to do about each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from https_host import create_certificate, serve_https_host
from memory_host import MemoryHost
from standin_environment import Make, environments

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve.errors import HostUnreachable
from pytest_nestedpve.setup.checks.run_checks import Check
from pytest_nestedpve.setup.preflight import Finding, PreflightError, disk_format, preflight

NESTED = "/sys/module/kvm_intel/parameters/nested"
PROFILE = "/etc/nested-pve.ini"
GIB = 1024**3


@pytest.fixture
def environment(tmp_path: Path, host: MemoryHost) -> Iterator[Make]:
    with environments(host, tmp_path) as make:
        yield make


def findings(env: Environment) -> list[str]:
    with pytest.raises(PreflightError) as caught:
        preflight(env)
    return [str(each) for each in caught.value.findings]


def only(env: Environment, *words: str) -> str:
    found = findings(env)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]
    return found[0]


def test_a_host_as_it_should_be_names_what_will_be_used(environment: Make) -> None:
    env = environment()
    facts = preflight(env)
    assert facts["version"] == "9.2.11"
    assert facts["node"] == "father"
    assert facts["storage"] == facts["snippets"] == "local"
    assert facts["image"] == "local:import/debian-13-genericcloud-amd64.qcow2"
    assert facts["bridge"] == "vmbr0"
    assert facts["format"] == "qcow2"


def test_all_findings_are_told_at_once(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["bridges"] = {}
        model.state["volumes"] = {}
        model.state["files"][NESTED] = "N\n"
    found = findings(environment(storage="tank"))
    assert [each.partition(":")[0] for each in found] == [
        "nested virtualisation",
        "storage",
        "image",
        "bridge",
    ]


def test_an_unknown_storage_is_told_with_those_there_are(environment: Make) -> None:
    only(environment(storage="tank"), "'tank'", "with images: local", "nested_pve_storage")


def test_a_storage_without_images_is_told_with_the_command_that_mends_it(
    environment: Make, host: MemoryHost
) -> None:
    with host.open() as model:
        model.state["storages"]["local"]["content"] = "iso,import,snippets"
    only(
        environment(storage="local"), "content images", "pvesm set local --content images,import,iso,snippets"
    )


def test_a_disabled_storage_is_told(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["storages"]["other"] = {"type": "dir", "content": "images", "active": 0, "enabled": 0}
    only(environment(storage="other"), "not active", "pvesm status --storage other")


def test_a_host_without_snippets_is_told(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["storages"]["local"]["content"] = "images,import"
    only(environment(), "snippets", "pvesm set local --content images,import,snippets")


def test_too_little_space_is_told(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["storages"]["local"]["avail"] = GIB
    only(environment(), "8 GiB free on local", "1.0 GiB")


def test_a_storage_whose_disks_take_their_room_at_once_needs_all_of_it(
    environment: Make, host: MemoryHost
) -> None:
    with host.open() as model:
        model.state["storages"]["vg"] = {"type": "lvm", "content": "images", "avail": 60 * GIB}
    only(environment(storage="vg", disk=64), "64 GiB free on vg", "takes its room at once")


def test_an_unknown_bridge_is_told(environment: Make) -> None:
    only(environment(bridge="vmbr7"), "'vmbr7'", "there: vmbr0")


def test_several_bridges_without_vmbr0_need_a_choice(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["bridges"] = {"lan": "", "dmz": ""}
    only(environment(), "dmz, lan", "nested_pve_bridge")


def test_a_missing_image_names_the_command_that_fetches_one(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["volumes"] = {}
    found = only(environment(), "Debian cloud image", "none")
    assert "pvesh create /nodes/father/storage/local/download-url --content import" in found


def test_an_image_that_is_not_there_is_told_with_those_that_are(environment: Make) -> None:
    only(environment(image="local:import/nosuch.qcow2"), "nosuch", "debian-13-genericcloud-amd64.qcow2")


def test_an_image_that_the_run_brings_is_named_as_the_volume_it_will_be(
    environment: Make, host: MemoryHost, tmp_path: Path
) -> None:
    file = tmp_path / "mine.raw"
    file.write_bytes(b"an image")
    digest = hashlib.sha256(b"an image").hexdigest()
    for image, ending in ((str(file), "raw"), (f"https://x.example/mine.qcow2#sha256:{digest}", "qcow2")):
        assert preflight(environment(image=image))["image"] == f"local:import/mine-{digest[:16]}.{ending}"
    with host.open() as model:
        assert not any("mine" in each for each in [*model.state["files"], *model.state["volumes"]])
        model.state["storages"]["local"]["content"] = "images,snippets"
    only(environment(image=str(file)), "content import", "pvesm set local --content images,import,snippets")


STATIC = "ip=10.77.7.5/24,gw=10.77.7.1"


def test_one_address_for_several_workers_is_told_before_anything_is_made(environment: Make) -> None:
    env = environment(ipconfig=STATIC)
    env.workers = 2
    only(env, "10.77.7.5/24", "2 workers", "nested_pve_scope = run")
    env.workers = 1
    assert preflight(env)["bridge"] == "vmbr0"


def test_one_address_for_several_workers_is_told_when_the_profile_names_it(
    environment: Make, host: MemoryHost
) -> None:
    with host.open() as model:
        model.state["files"][PROFILE] = f"[nested-pve]\nipconfig = {STATIC}\n"
    env = environment()
    env.workers = 2
    only(env, "10.77.7.5/24", PROFILE)


def test_an_image_in_content_iso_is_told(environment: Make) -> None:
    only(environment(image="local:iso/debian.img"), "content import or images only")


@pytest.mark.parametrize("image", ["local:iso/debian.img", "second:9/vm-9-disk-0.qcow2"])
def test_an_image_is_fetched_to_where_pve_takes_it(environment: Make, host: MemoryHost, image: str) -> None:
    with host.open() as model:
        model.state["storages"]["second"] = {"type": "dir", "content": "images,rootdir"}
    found = only(environment(image=image), "storage/local/download-url --content import")
    assert "pvesm set" not in found
    with host.open() as model:
        # As installed: a download is refused [ownL-035].
        model.state["storages"]["local"]["content"] = "iso,vztmpl,backup"
    found = next(each for each in findings(environment(image=image)) if each.startswith("image:"))
    given = found.index("pvesm set local --content backup,import,iso,snippets,vztmpl")
    assert given < found.index("storage/local/download-url")
    assert "second/download-url" not in found


def test_an_image_on_an_unknown_storage_is_told(environment: Make) -> None:
    only(environment(image="tank:import/x.qcow2"), "'tank'", "local")


def test_the_newest_debian_among_the_import_volumes_is_taken(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        for name in (
            "debian-12-genericcloud-amd64.qcow2",
            "ubuntu-24.04.qcow2",
            "debian-13-nocloud-amd64.qcow2",
        ):
            model.state["volumes"][f"local:import/{name}"] = {
                "content": "import", "format": "qcow2", "size": 1, "vmid": None,
            }  # fmt: skip
    env = environment()
    assert preflight(env)["image"] == "local:import/debian-13-genericcloud-amd64.qcow2"


def test_a_full_range_is_told(environment: Make, host: MemoryHost) -> None:
    api = host.connect().api
    for vmid in (99900, 99901):
        api.post("/nodes/father/qemu", vmid=vmid, name=f"other-{vmid}")
    with host.open() as model:
        model.state["offset"] = 60.0  # the broadcast has come round; the lease's clock is not asked here
    only(environment(vmid_ranges=((99900, 99901),)), "99900-99901", "all of them are taken")


def test_a_range_full_of_leftover_volumes_and_pool_members_is_told(
    environment: Make, host: MemoryHost
) -> None:
    with host.open() as model:
        model.state["volumes"]["local:99900/vm-99900-disk-0.raw"] = {
            "content": "images", "format": "raw", "size": 1, "vmid": 99900,
        }  # fmt: skip
        model.state["pools"]["theirs"] = {"comment": "", "vms": [99901]}
    env = environment(vmid_ranges=((99900, 99901),))
    only(env, "99900-99901", "by volumes on a storage, or in a pool")
    preflight(environment(vmid_ranges=((99900, 99902),)))


def test_nested_virtualisation_that_is_off_is_told(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["files"][NESTED] = "N\n"
    only(environment(), "kvm_intel's parameter nested", "options kvm_intel nested=1", "kvm=0")


def test_a_host_without_kvm_is_told(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        del model.state["files"][NESTED]
    only(environment(), "kvm_intel or kvm_amd loaded", "firmware")


def test_without_kvm_nested_virtualisation_is_not_asked_for(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["files"] = {}
    env = environment(vm_options={"kvm": "0"})
    preflight(env)


def test_another_user_than_root_is_told_and_no_more_is_asked(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["uid"] = 1000
    only(environment(), "uid 1000", "root@HOST")
    with host.open() as model:
        assert model.state["commands"] == []


def test_a_host_that_is_no_pve_is_told(environment: Make, host: MemoryHost) -> None:
    host.fault("GET", "/version", text="bash: line 1: pvesh: command not found", times=9)
    only(environment(), "Proxmox VE host", "pvesh")


def test_an_old_pve_is_told(environment: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    env = environment()
    get = env.outer.api.get
    monkeypatch.setattr(
        env.outer.api, "get", lambda path, **p: {"version": "8.1.4"} if path == "/version" else get(path, **p)
    )
    only(env, "PVE 8.2 or newer", "8.1.4")


def test_an_unreachable_host_is_told(environment: Make) -> None:
    def refuse() -> Any:
        raise HostUnreachable("no route to father")

    env = environment(host="father")
    env._connect = refuse
    only(env, "a login as root at father", "no route to father")


def test_clocks_far_apart_are_told(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["offset"] = -4000.0
    only(environment(), "clock", "behind")


def test_the_hosts_profile_fills_what_nobody_set(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["files"][PROFILE] = "[nested-pve]\nmirror = http://mirror.example/debian\n"
    env = environment()
    preflight(env)
    assert env.settings.mirror == "http://mirror.example/debian"
    assert env.settings.origin("mirror") == f"{PROFILE} on father"


@pytest.mark.parametrize(
    "text", ["no section\n", "[nested-pve]\nsources = a=/etc\n", "[nested-pve]\nmirror = x y\n"]
)
def test_an_unreadable_profile_is_told(environment: Make, host: MemoryHost, text: str) -> None:
    with host.open() as model:
        model.state["files"][PROFILE] = text
    only(environment(), "profile", PROFILE)


def test_a_template_that_is_missing_is_told(environment: Make) -> None:
    only(environment(template="9000"), "'9000'", "no such VM")


def test_an_ordinary_vm_is_no_template(environment: Make, host: MemoryHost) -> None:
    host.connect().api.post("/nodes/father/qemu", vmid=9000, name="golden")
    only(environment(template="9000"), "an ordinary VM")


def test_a_missing_parent_pool_is_told(environment: Make) -> None:
    only(environment(pool_parent="team"), "'team'", "pveum pool add team")


def test_an_answer_that_the_host_refuses_is_a_finding(environment: Make, host: MemoryHost) -> None:
    host.fault("GET", "/nodes/father/network", text="403 Permission check failed", times=9)
    only(environment(), "bridge", "Permission check failed")


def test_the_disk_format_is_read_from_the_storages_own_answer() -> None:
    assert disk_format({"formats": {"supported": ["raw", "qcow2"], "default": "raw"}}) == "qcow2"
    assert disk_format({"formats": {"supported": ["raw"], "default": "raw"}}) is None
    assert disk_format({"format": [{"raw": 1, "qcow2": 1, "subvol": 0}, "raw"]}) == "qcow2"
    assert disk_format({"type": "lvmthin"}) is None


@pytest.mark.parametrize(
    ("found", "advice", "text"),
    [
        ("no", "Do so.", "it: expected yes; found no. Do so."),
        ("silence. Is it on?", "", "it: expected yes; found silence. Is it on?"),
        ("silence. Is it on?", "Look.", "it: expected yes; found silence. Is it on? Look."),
    ],
)
def test_a_finding_reads_as_sentences(found: str, advice: str, text: str) -> None:
    assert str(Finding("it", "yes", found, advice)) == text


def with_memory(host: MemoryHost, total: int, available: int) -> None:
    with host.open() as model:
        model.state["memory"] = {"total": total * GIB, "available": available * GIB}


def workers(environment: Make, count: int, **settings: Any) -> Environment:
    env = environment(host="father", **settings)
    env.workers = count
    return env


def test_more_memory_for_all_workers_than_the_node_has_is_told_with_what_fits(
    environment: Make, host: MemoryHost
) -> None:
    with_memory(host, 32, 20)
    env = workers(environment, 6)
    only(env, "memory: expected 48 GiB for 6 workers, 8 GiB", "20 GiB available of 32 GiB", "2 fit")
    assert "`pytest --pve-host father -n 2`" in only(env, "nested_pve_scope = run")


def test_where_only_one_fits_the_command_shares_it(environment: Make, host: MemoryHost) -> None:
    with_memory(host, 15, 9)
    only(workers(environment, 2), "1 fits", "`pytest --pve-host father -n 2 -o nested_pve_scope=run`")


def test_more_memory_than_is_available_now_is_a_warning(environment: Make, host: MemoryHost) -> None:
    with_memory(host, 32, 20)
    env = workers(environment, 3)
    assert preflight(env)["storage"] == "local"
    (remark,) = env.remarks
    assert "expected 24 GiB for 3 workers" in remark
    assert "20 GiB available of 32 GiB" in remark
    assert preflight(workers(environment, 2))["storage"] == "local"


def test_one_vm_for_all_workers_is_counted_once(environment: Make, host: MemoryHost) -> None:
    with_memory(host, 10, 9)
    env = environment()
    preflight(env)
    assert env.remarks == []


def test_the_vms_of_workers_that_were_quicker_are_not_counted_twice(
    environment: Make, host: MemoryHost
) -> None:
    """Two of three run, grown to all they were given: the third, which has not begun, still fits."""
    from pytest_nestedpve.setup.checks.context import Seen
    from pytest_nestedpve.setup.checks.run_checks import CHECKS, look

    with_memory(host, 32, 10)
    env = workers(environment, 3)
    running = {"type": "qemu", "status": "running", "node": "father", "maxmem": 8 * GIB}
    seen = Seen(env.outer, env.settings, workers=3, own=frozenset({"a" * 12, "b" * 12}))
    seen._answers.known["/cluster/resources"] = [
        {**running, "vmid": 99900, "pool": "team/npve-" + "a" * 12, "mem": 8 * GIB},
        {**running, "vmid": 99901, "pool": "npve-" + "b" * 12, "mem": 7 * GIB},
        {**running, "vmid": 99902, "pool": "npve-" + "c" * 12, "mem": GIB},
    ]
    (check,) = [each for each in CHECKS if each.name == "memory"]
    found = look(seen, checks=[Check(check.name, check.do)])
    assert [each.level for each in found.findings] == ["ok"]
    assert "2 run already, 9 GiB still to come" in found.findings[0].found


def test_a_node_that_does_not_say_its_memory_is_a_warning(environment: Make, host: MemoryHost) -> None:
    with host.open() as model:
        model.state["memory"] = {"total": None}
    env = environment()
    preflight(env)
    assert "does not say" in env.remarks[0]


def test_runs_of_one_xdist_session_know_each_other(tmp_path: Path) -> None:
    from pytest_nestedpve.setup.preflight import _begun

    for run, family in (("a" * 12, "x"), ("b" * 12, "x"), ("c" * 12, "y"), ("d" * 12, None)):
        (tmp_path / run).mkdir()
        if family:
            (tmp_path / run / "session").write_text(family)
    assert _begun(tmp_path / ("a" * 12)) == {"a" * 12, "b" * 12}
    assert _begun(tmp_path / ("d" * 12)) == {"d" * 12}


def test_the_doctor_makes_no_token_on_a_host_that_has_https(host: MemoryHost) -> None:
    """Seeing over HTTPS takes a token, and that would be made on the host."""
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.transports import HostApi
    from pytest_nestedpve.session.modes.doctor import only_reading
    from pytest_nestedpve.setup.checks.context import Seen
    from pytest_nestedpve.setup.checks.run_checks import CHECKS, FOR_PEOPLE, look

    ssh = host.connect().ssh
    reading = only_reading(PveHost("father", ssh, HostApi(ssh)))
    found = look(Seen(reading, Settings(), by_https=True), checks=(*CHECKS, *FOR_PEOPLE))
    assert [each.what for each in found.of("missing")] == ["PVE"]  # this host has no pvesh in its shell
    with host.open() as model:
        sent = model.state["shell"]
    assert any("pvesh get /version" in line for line in sent)
    assert not any("pveum" in line or "token" in line for line in sent)


NEW_CERTIFICATE = "pvecm updatecerts --force"


@pytest.mark.parametrize(
    ("case", "words", "first"),
    [
        ("closed", "port 8006", "systemctl restart pveproxy"),
        ("expired", "expired", NEW_CERTIFICATE),
        ("nameless", "no subject alternative name", NEW_CERTIFICATE),
        ("another", "not the one that root reads", NEW_CERTIFICATE),
        ("as it should be", "answers", None),
    ],
)
def test_where_https_cannot_be_used_a_warning_says_why_and_no_token_is_made(
    tmp_path: Path, case: str, words: str, first: str | None
) -> None:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.transports import HostApi
    from pytest_nestedpve.setup.checks.connectivity import transport
    from pytest_nestedpve.setup.checks.context import Seen

    with serve_https_host(tmp_path) as served:
        served.listens = case != "closed"
        if case in ("expired", "nameless"):
            pem = create_certificate(days=-1) if case == "expired" else create_certificate(names=())
            served.set_certificate(pem)
            served.read_pem = pem[0]
        if case == "another":
            served.set_certificate(create_certificate())
        seen = Seen(PveHost("father", served, HostApi(served)), Settings(), by_https=True)
        (found,) = transport(seen)
        assert served.requests == []
        assert served.tokens_created == 0
    assert found.level == ("warning" if first else "ok")
    assert words in found.found
    assert str(seen.choices.transport).startswith("pvesh" if first else "HTTPS")
    assert found.fix[:1] == ((first,) if first else ())
