"""Preflight reports all findings about a host at once, each with its fix."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from https_host import create_certificate, serve_https_host
from standin_environment import Make, environments
from standin_host import GIB, IMAGE, NESTED, StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve.errors import HostUnreachable
from pytest_nestedpve.setup.checks.run_checks import Check
from pytest_nestedpve.setup.preflight import Finding, PreflightError, disk_format, preflight

PROFILE = "/etc/nested-pve.ini"


@pytest.fixture
def environment(tmp_path: Path, host: StandinHost) -> Iterator[Make]:
    with environments(host, tmp_path) as make:
        yield make


def findings(env: Environment) -> list[str]:
    with pytest.raises(PreflightError) as caught:
        preflight(env)
    return [str(finding) for finding in caught.value.findings]


def only(env: Environment, *words: str) -> str:
    messages = findings(env)
    assert len(messages) == 1, messages
    for word in words:
        assert word in messages[0]
    return messages[0]


def test_the_facts_of_a_suitable_host_are_the_resources_to_use(environment: Make) -> None:
    env = environment()
    facts = preflight(env)
    assert facts["version"] == "9.2.11"
    assert facts["node"] == "father"
    assert facts["storage"] == facts["snippets"] == "local"
    assert facts["image"] == "local:import/debian-13-genericcloud-amd64.qcow2"
    assert facts["bridge"] == "vmbr0"
    assert facts["format"] == "qcow2"


def test_all_findings_are_reported_at_once(environment: Make, host: StandinHost) -> None:
    host.bridges()
    host.remove_volume(IMAGE)
    host.file(NESTED).write_text("N\n")
    messages = findings(environment(storage="tank"))
    assert [message.partition(":")[0] for message in messages] == [
        "nested virtualisation",
        "storage",
        "image",
        "bridge",
    ]


def test_an_unknown_storage_is_reported_with_the_existing_ones(environment: Make) -> None:
    only(environment(storage="tank"), "'tank'", "with content images: local", "nested_pve_storage")


def test_a_storage_without_images_is_reported_with_the_command_that_fixes_it(
    environment: Make, host: StandinHost
) -> None:
    host.storage("local", content="iso,import,snippets")
    only(
        environment(storage="local"), "content images", "pvesm set local --content images,import,iso,snippets"
    )


def test_a_disabled_storage_is_reported(environment: Make, host: StandinHost) -> None:
    host.storage("other", content="images", disable=1)
    only(environment(storage="other"), "not active", "pvesm status --storage other")


def test_a_host_without_snippets_is_reported(environment: Make, host: StandinHost) -> None:
    host.storage("local", content="images,import")
    only(environment(), "snippets", "pvesm set local --content images,import,snippets")


def test_too_little_space_is_reported(environment: Make, host: StandinHost) -> None:
    host.report(storage={"local": {"avail": GIB}})
    only(environment(), "8 GiB free on local", "1.0 GiB")


def test_a_storage_without_thin_disks_needs_space_for_the_whole_disk(
    environment: Make, host: StandinHost
) -> None:
    host.storage("vg", "lvm", "images")
    host.report(storage={"vg": {"avail": 60 * GIB}})
    only(environment(storage="vg", disk=64), "64 GiB free on vg", "takes its space at once")


def test_an_unknown_bridge_is_reported(environment: Make) -> None:
    only(environment(bridge="vmbr7"), "'vmbr7'", "existing: vmbr0")


def test_several_bridges_without_vmbr0_need_a_choice(environment: Make, host: StandinHost) -> None:
    host.bridges(lan="", dmz="")
    only(environment(), "dmz, lan", "nested_pve_bridge")


def test_a_missing_image_is_reported_with_a_download_command(environment: Make, host: StandinHost) -> None:
    host.remove_volume(IMAGE)
    message = only(environment(), "Debian cloud image", "none")
    assert "pvesh create /nodes/father/storage/local/download-url --content import" in message


def test_a_missing_volume_is_reported_with_the_existing_ones(environment: Make) -> None:
    only(environment(image="local:import/nosuch.qcow2"), "nosuch", "debian-13-genericcloud-amd64.qcow2")


def test_for_an_image_to_transfer_the_fact_is_its_future_volume(
    environment: Make, host: StandinHost, tmp_path: Path
) -> None:
    file = tmp_path / "mine.raw"
    file.write_bytes(b"an image")
    digest = hashlib.sha256(b"an image").hexdigest()
    for image, ending in ((str(file), "raw"), (f"https://x.example/mine.qcow2#sha256:{digest}", "qcow2")):
        assert preflight(environment(image=image))["image"] == f"local:import/mine-{digest[:16]}.{ending}"
    assert list(host.path.rglob("*mine*")) == []
    host.storage("local", content="images,snippets")
    only(environment(image=str(file)), "content import", "pvesm set local --content images,import,snippets")


STATIC = "ip=10.77.7.5/24,gw=10.77.7.1"


def test_one_address_for_several_workers_is_reported_before_anything_is_created(environment: Make) -> None:
    env = environment(ipconfig=STATIC)
    env.workers = 2
    only(env, "10.77.7.5/24", "2 workers", "nested_pve_scope = run")
    env.workers = 1
    assert preflight(env)["bridge"] == "vmbr0"


def test_one_address_for_several_workers_is_reported_when_the_profile_sets_it(
    environment: Make, host: StandinHost
) -> None:
    host.file(PROFILE).write_text(f"[nested-pve]\nipconfig = {STATIC}\n")
    env = environment()
    env.workers = 2
    only(env, "10.77.7.5/24", PROFILE)


def test_an_image_in_content_iso_is_reported(environment: Make) -> None:
    only(environment(image="local:iso/debian.img"), "content import or images only")


@pytest.mark.parametrize("image", ["local:iso/debian.img", "second:9/vm-9-disk-0.qcow2"])
def test_the_download_command_names_a_storage_with_content_import(
    environment: Make, host: StandinHost, image: str
) -> None:
    host.storage("second", content="images,rootdir")
    message = only(environment(image=image), "storage/local/download-url --content import")
    assert "pvesm set" not in message
    # As installed: PVE refuses a download [ownL-035].
    host.storage("local", content="iso,vztmpl,backup")
    messages = findings(environment(image=image))
    message = next(message for message in messages if message.startswith("image:"))
    content_set = message.index("pvesm set local --content backup,import,iso,snippets,vztmpl")
    assert content_set < message.index("storage/local/download-url")
    assert "second/download-url" not in message


def test_an_image_on_an_unknown_storage_is_reported(environment: Make) -> None:
    only(environment(image="tank:import/x.qcow2"), "'tank'", "local")


def test_the_newest_debian_among_the_import_volumes_is_selected(environment: Make, host: StandinHost) -> None:
    for name in ("debian-12-genericcloud-amd64", "ubuntu-24.04", "debian-13-nocloud-amd64"):
        host.volume(f"local:import/{name}.qcow2", 1)
    assert preflight(environment())["image"] == "local:import/debian-13-genericcloud-amd64.qcow2"


def test_a_full_range_is_reported(environment: Make, host: StandinHost) -> None:
    for vmid in (99900, 99901):
        host.create_vm(vmid, name=f"other-{vmid}")
    host.broadcast()
    only(environment(vmid_ranges=((99900, 99901),)), "99900-99901", "all of them are in use")


def test_a_range_full_of_leftover_volumes_and_pool_members_is_reported(
    environment: Make, host: StandinHost
) -> None:
    host.volume("local:99900/vm-99900-disk-0.raw")
    host.set_pool("theirs", vms=[99901])
    env = environment(vmid_ranges=((99900, 99901),))
    only(env, "99900-99901", "by volumes on a storage, or in a pool")
    preflight(environment(vmid_ranges=((99900, 99902),)))


def test_disabled_nested_virtualisation_is_reported(environment: Make, host: StandinHost) -> None:
    host.file(NESTED).write_text("N\n")
    only(environment(), "kvm_intel's parameter nested", "options kvm_intel nested=1", "kvm=0")


def test_a_host_without_kvm_is_reported(environment: Make, host: StandinHost) -> None:
    host.file(NESTED).unlink()
    only(environment(), "kvm_intel or kvm_amd loaded", "firmware")


def test_with_kvm_0_nested_virtualisation_is_not_required(environment: Make, host: StandinHost) -> None:
    for path in (NESTED, "/dev/kvm"):
        host.file(path).unlink()
    preflight(environment(vm_options={"kvm": "0"}))


def test_another_user_than_root_is_reported_without_requests(environment: Make, host: StandinHost) -> None:
    host.login(uid=1000)
    only(environment(), "uid 1000", "root@HOST")
    assert host.calls() == []


def test_a_host_without_pve_is_reported(environment: Make, host: StandinHost) -> None:
    host.fault("GET", "/version", text="bash: line 1: pvesh: command not found", times=9)
    only(environment(), "Proxmox VE host", "pvesh")


def test_an_old_pve_is_reported(environment: Make, host: StandinHost) -> None:
    host.report(version={"version": "8.1.4"})
    only(environment(), "PVE 8.2 or newer", "8.1.4")


def test_an_unreachable_host_is_reported(environment: Make) -> None:
    def refuse() -> Any:
        raise HostUnreachable("no route to father")

    env = environment(host="father")
    env._connect = refuse
    only(env, "a login as root at father", "no route to father")


def test_clocks_far_apart_are_reported(environment: Make, host: StandinHost) -> None:
    host.advance(-4000)
    only(environment(), "clock", "behind")


def test_the_hosts_profile_sets_options_that_are_not_configured(environment: Make, host: StandinHost) -> None:
    host.file(PROFILE).write_text("[nested-pve]\nmirror = http://mirror.example/debian\n")
    env = environment()
    preflight(env)
    assert env.settings.mirror == "http://mirror.example/debian"
    assert env.settings.origin("mirror") == f"{PROFILE} on father"


@pytest.mark.parametrize(
    "text", ["no section\n", "[nested-pve]\nsources = a=/etc\n", "[nested-pve]\nmirror = x y\n"]
)
def test_an_unreadable_profile_is_reported(environment: Make, host: StandinHost, text: str) -> None:
    host.file(PROFILE).write_text(text)
    only(environment(), "profile", PROFILE)


def test_a_missing_template_is_reported(environment: Make) -> None:
    only(environment(template="9000"), "'9000'", "no such VM")


def test_an_ordinary_vm_is_no_template(environment: Make, host: StandinHost) -> None:
    host.create_vm(9000, name="golden")
    only(environment(template="9000"), "an ordinary VM")


def test_a_missing_parent_pool_is_reported(environment: Make) -> None:
    only(environment(pool_parent="team"), "'team'", "pveum pool add team")


def test_a_request_that_the_host_refuses_is_a_finding(environment: Make, host: StandinHost) -> None:
    host.fault("GET", "/nodes/father/network", text="403 Permission check failed", times=9)
    only(environment(), "bridge", "Permission check failed")


def test_the_disk_format_is_read_from_the_entry_of_the_storage() -> None:
    assert disk_format({"formats": {"supported": ["raw", "qcow2"], "default": "raw"}}) == "qcow2"
    assert disk_format({"formats": {"supported": ["raw"], "default": "raw"}}) is None
    assert disk_format({"format": [{"raw": 1, "qcow2": 1, "subvol": 0}, "raw"]}) == "qcow2"
    assert disk_format({"type": "lvmthin"}) is None


@pytest.mark.parametrize(
    ("actual", "advice", "text"),
    [
        ("no", "Do so.", "it: expected yes; found no. Do so."),
        ("silence. Is it on?", "", "it: expected yes; found silence. Is it on?"),
        ("silence. Is it on?", "Look.", "it: expected yes; found silence. Is it on? Look."),
    ],
)
def test_a_finding_reads_as_sentences(actual: str, advice: str, text: str) -> None:
    assert str(Finding("it", "yes", actual, advice)) == text


def report_memory(host: StandinHost, total: int, available: int) -> None:
    host.report(memory={"total": total * GIB, "available": available * GIB})


def workers(environment: Make, count: int, **settings: Any) -> Environment:
    env = environment(host="father", **settings)
    env.workers = count
    return env


def test_too_much_memory_for_all_workers_is_reported_with_the_number_that_fits(
    environment: Make, host: StandinHost
) -> None:
    report_memory(host, 32, 20)
    env = workers(environment, 6)
    only(env, "memory: expected 48 GiB for 6 workers, 8 GiB", "20 GiB available of 32 GiB", "2 fit")
    assert "`pytest --pve-host father -n 2`" in only(env, "nested_pve_scope = run")


def test_if_only_one_vm_fits_the_command_shares_it(environment: Make, host: StandinHost) -> None:
    report_memory(host, 15, 9)
    only(workers(environment, 2), "1 fits", "`pytest --pve-host father -n 2 -o nested_pve_scope=run`")


def test_more_memory_than_is_available_is_a_warning(environment: Make, host: StandinHost) -> None:
    report_memory(host, 32, 20)
    env = workers(environment, 3)
    assert preflight(env)["storage"] == "local"
    (remark,) = env.remarks
    assert "expected 24 GiB for 3 workers" in remark
    assert "20 GiB available of 32 GiB" in remark
    assert preflight(workers(environment, 2))["storage"] == "local"


def test_one_vm_for_all_workers_is_counted_once(environment: Make, host: StandinHost) -> None:
    report_memory(host, 10, 9)
    env = environment()
    preflight(env)
    assert env.remarks == []


def test_running_vms_of_the_same_session_are_not_counted_twice(environment: Make, host: StandinHost) -> None:
    """Two VMs of three run and use nearly all their memory: the third still fits."""
    from pytest_nestedpve.setup.checks.context import Context
    from pytest_nestedpve.setup.checks.run_checks import CHECKS, run_checks

    report_memory(host, 32, 10)
    env = workers(environment, 3)
    running = {"type": "qemu", "status": "running", "node": "father", "maxmem": 8 * GIB}
    context = Context(env.outer, env.settings, workers=3, begun=frozenset({"a" * 12, "b" * 12}))
    context._answers.known["/cluster/resources"] = [
        {**running, "vmid": 99900, "pool": "team/npve-" + "a" * 12, "mem": 8 * GIB},
        {**running, "vmid": 99901, "pool": "npve-" + "b" * 12, "mem": 7 * GIB},
        {**running, "vmid": 99902, "pool": "npve-" + "c" * 12, "mem": GIB},
    ]
    (check,) = [check for check in CHECKS if check.name == "memory"]
    results = run_checks(context, checks=[Check(check.name, check.do)])
    assert [finding.level for finding in results.findings] == ["ok"]
    assert "2 already running, 9 GiB still needed" in results.findings[0].actual


def test_a_node_that_does_not_report_its_memory_is_a_warning(environment: Make, host: StandinHost) -> None:
    host.report(memory={"total": None})
    env = environment()
    preflight(env)
    assert "does not report its memory" in env.remarks[0]


def test_runs_of_one_xdist_session_are_recognised(tmp_path: Path) -> None:
    from pytest_nestedpve.setup.preflight import _runs_of_session

    for run, family in (("a" * 12, "x"), ("b" * 12, "x"), ("c" * 12, "y"), ("d" * 12, None)):
        (tmp_path / run).mkdir()
        if family:
            (tmp_path / run / "session").write_text(family)
    assert _runs_of_session(tmp_path / ("a" * 12)) == {"a" * 12, "b" * 12}
    assert _runs_of_session(tmp_path / ("d" * 12)) == {"d" * 12}


def test_the_doctor_creates_no_token_on_a_host_with_https(host: StandinHost) -> None:
    """HTTPS needs a token, which would have to be created on the host."""
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.transports import HostApi
    from pytest_nestedpve.session.modes.doctor import reading_only
    from pytest_nestedpve.setup.checks.context import Context
    from pytest_nestedpve.setup.checks.run_checks import CHECKS, DOCTOR_CHECKS, run_checks

    ssh = host.connect().ssh
    read_only = reading_only(PveHost("father", ssh, HostApi(ssh)))
    results = run_checks(Context(read_only, Settings(), by_https=True), checks=(*CHECKS, *DOCTOR_CHECKS))
    assert results.of("missing") == ()
    assert [finding.what for finding in results.of("warning")] == ["transport"]
    commands = host.commands()
    assert any("pvesh get /version" in command for command in commands)
    assert not any("pveum" in command or "token" in command for command in commands)
    assert host.tokens() == []


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
def test_if_https_cannot_be_used_a_warning_has_the_reason_and_no_token_is_created(
    tmp_path: Path, case: str, words: str, first: str | None
) -> None:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.transports import HostApi
    from pytest_nestedpve.setup.checks.connectivity import transport
    from pytest_nestedpve.setup.checks.context import Context

    with serve_https_host(tmp_path) as served:
        served.listens = case != "closed"
        if case in ("expired", "nameless"):
            pem = create_certificate(days=-1) if case == "expired" else create_certificate(names=())
            served.set_certificate(pem)
            served.read_pem = pem[0]
        if case == "another":
            served.set_certificate(create_certificate())
        context = Context(PveHost("father", served, HostApi(served)), Settings(), by_https=True)
        (finding,) = transport(context)
        assert served.requests == []
        assert served.tokens_created == 0
    assert finding.level == ("warning" if first else "ok")
    assert words in finding.actual
    assert str(context.choices.transport).startswith("pvesh" if first else "HTTPS")
    assert finding.fix[:1] == ((first,) if first else ())
