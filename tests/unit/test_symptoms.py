"""The table of known symptoms: each is recognised in its example, none in the output of a healthy run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from recorded import EVERY, HTTPS

from pytest_nestedpve.config.keys import KEYS
from pytest_nestedpve.report import symptoms
from pytest_nestedpve.report.symptoms import KINDS, Recognised, Symptom, Text, recognise, table

ROOT = Path(__file__).parent.parent.parent
DATA = ROOT / "tests" / "data"


def names(recognised: tuple[Recognised, ...]) -> list[str]:
    return [match.symptom.name for match in recognised]


def everywhere(content: str) -> list[Text]:
    """The same content in every kind of text."""
    return [Text(kind, kind, content) for kind in KINDS]


def test_the_table_is_large_and_its_names_are_unique() -> None:
    known = [symptom.name for symptom in table()]
    assert len(known) >= 36
    assert len(known) == len(set(known))
    assert len({symptom.explanation for symptom in table()}) == len(known)


@pytest.mark.parametrize("symptom", table(), ids=lambda symptom: symptom.name)
def test_a_symptom_is_recognised_in_its_example_and_comes_first(symptom: Symptom) -> None:
    phase = symptom.phases[0] if symptom.phases else "provision"
    for kind in symptom.kinds:
        recognised = recognise([Text(kind, "here", symptom.example)], phase)
        assert names(recognised)[:1] == [symptom.name], kind
        assert recognised[0].line
        assert recognised[0].where == "here"
        # Every placeholder is replaced by its value, or by its name in capitals.
        assert "{" not in recognised[0].explanation + recognised[0].fix.replace("{print", "")
    assert names(recognise(everywhere(symptom.example), phase))[:1] == [symptom.name]


def root_only(name: str) -> str:
    """The parameter errors of a recorded answer of port 8006, as the API client formats them."""
    errors = json.loads(HTTPS[name]["stdout"].split("\r\n\r\n", 1)[1])["errors"]
    return "\n".join(f"{parameter}: {why}" for parameter, why in errors.items())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("task-interrupted", "TASK ERROR: received interrupt"),
        ("task-interrupted", "task UPID:father:1:2:3:qmshutdown:103:root@pam: ended: broken pipe "),
        ("task-interrupted", "interrupted by signal"),
        ("task-interrupted", json.loads(EVERY["ownG-015"]["stdout"])["exitstatus"]),
        ("no-quorum", EVERY["cluster-121"]["stderr"]),
        ("no-quorum", EVERY["noquorum-011"]["stderr"]),
        ("no-quorum", "close (rename) atomic file '/etc/pve/user.cfg' failed: Permission denied"),
        ("root-only-option", "400 Parameter verification failed.\n" + root_only("ownE-065")),
        ("lock-timeout", EVERY["tasks-025"]["stderr"]),
        ("other-lock-timeout", "can't lock file '/var/lock/pve-manager/pve-storage-local' - got timeout"),
        ("other-lock-timeout", "error during cfs-locked 'storage-nas' operation: got lock request timeout"),
        ("other-lock-timeout", "error with cfs lock 'storage-nas': got lock request timeout"),
        ("disk-full", "  Insufficient free space: 100 extents needed, but only 5 available"),
        ("disk-full", "zfs error: cannot create 'tank/vm-9-disk-0': out of space"),
        ("download-missing", "invalid server response: '403 Forbidden'"),
        ("download-dns", "download failed: wget: unable to resolve host address ‘nosuch.invalid’"),
        ("host-key-changed", "Host key verification failed."),
        ("worker-killed", "TASK ERROR: unexpected status"),
        ("worker-killed", "unable to read tail (got 0 bytes)"),
    ],
)
def test_a_symptom_is_recognised_in_other_messages_of_the_same_failure(name: str, content: str) -> None:
    assert names(recognise([Text("error", "here", content)]))[:1] == [name]


def test_a_host_key_missing_on_a_node_is_not_a_problem_of_this_machines_known_hosts() -> None:
    from_node = "father2 is not reached: no login from node to node, as PVE itself makes them, at father2 "
    for content in (
        "proxy handler failed: Host key verification failed.",
        f"{from_node}(10.0.0.2): Host key verification failed. / lost; `pvecm updatecerts` on both mends it",
    ):
        (recognised,) = recognise([Text("error", "here", content)])
        assert recognised.symptom.name == "node-host-key"
        assert "pvecm updatecerts" in recognised.fix


def _read_recording(name: str) -> list[dict[str, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line) for line in lines]


def test_answers_of_a_healthy_pve_contain_no_symptom() -> None:
    healthy = _read_recording("healthy-recorded.jsonl")
    assert len(healthy) > 200
    for answer in healthy:
        for phase in ("provision", "leaf_wait_ip"):
            assert names(recognise(everywhere(answer["stdout"]), phase)) == [], answer["id"]


#: Lines of a successful first boot and installation.
GOOD_BOOT = """\
cloud-init[412]: Cloud-init v. 25.1.4 finished. Datasource DataSourceNoCloud [seed=/dev/sr0]
status: done
extended_status: degraded done
detail: DataSourceNoCloud [seed=/dev/sr0]
recoverable_errors: DEPRECATED: ['Config key apt_mirror is deprecated in 23.4']
systemd-resolved[230]: Using degraded feature set UDP instead of UDP+EDNS0 for DNS server 10.77.7.1.
systemd-networkd[215]: eth0: DHCPv4 address 10.77.7.50/24, gateway 10.77.7.10 acquired from 10.77.7.10
kernel: audit: type=1400 apparmor="DENIED" operation="mount" error=-13
kernel: pci 0000:00:01.0: BAR 7: can't assign; no space
sshd[901]: Connection closed by 10.77.7.10 port 40412
pvestatd[1200]: status update time (5.127 seconds)
pmxcfs[812]: [main] notice: resolved node name 'nested' to '10.77.7.50' for default node IP address
dhclient[201]: DHCPOFFER of 10.77.7.50 from 10.77.7.10
Hit:1 http://download.proxmox.com/debian/pve trixie InRelease
Setting up proxmox-ve (9.0.0) ...
PLAY RECAP *********************************************************************
nested : ok=31   changed=19   unreachable=0    failed=0    skipped=4    rescued=0    ignored=0
  "net0": "virtio=BC:24:11:00:00:01,bridge=vmbr0",
"""


def test_a_good_boot_and_a_good_playbook_contain_no_symptom() -> None:
    for phase in ("ensure_pve", "setup_network", "leaf_wait_ip"):
        assert names(recognise(everywhere(GOOD_BOOT), phase)) == []


@pytest.mark.parametrize("symptom", table(), ids=lambda symptom: symptom.name)
def test_a_symptom_is_recognised_in_the_recording_that_it_names(symptom: Symptom) -> None:
    """If that recording is in the repository."""
    files = ("recorded_answers.jsonl", "recorded_failures.jsonl", "standin-recorded.jsonl")
    kept = {answer["id"]: answer for name in files for answer in _read_recording(name) if "id" in answer}
    assert re.search(r"recording [a-zA-Z]+-\d+|facts of PVE 9\.2, \d+|field notes \d+", symptom.source)
    for name in re.findall(r"recording ([a-zA-Z]+-\d+)", symptom.source):
        if name not in kept or symptom.name == "authorized-keys-replaced":
            continue
        output = kept[name]["stdout"] + kept[name]["stderr"]
        assert any(symptom.pattern.search(line) for line in (output, *symptom.example.splitlines()))
        assert symptom.pattern.search(output) is not None, name


def test_every_setting_that_a_fix_names_exists() -> None:
    settings = {f"nested_pve_{key.name}" for key in KEYS}
    named = {
        word
        for symptom in table()
        for word in re.findall(r"nested_pve_\w+", f"{symptom.fix} {symptom.explanation}")
    }
    assert named <= settings, named - settings
    assert len(named) > 8


@pytest.mark.parametrize("symptom", table(), ids=lambda symptom: symptom.name)
def test_a_fix_contains_a_command_or_a_setting(symptom: Symptom) -> None:
    programs = (
        "append apt-get cloud-init curl date df dpkg export find getent ha-manager ip journalctl mkdir pvecm "
        "pvesh pvesm pveum pytest qemu-img qm rm sha256sum ssh sshd systemctl uptime"
    )
    command = rf"\b(?:{'|'.join(programs.split())})\b|nested_pve_\w+|\.qcow2"
    assert re.search(command, symptom.fix), symptom.fix
    assert len(symptom.title) < 80
    assert symptom.explanation.endswith((".", ")"))


def test_at_most_three_symptoms_are_recognised_the_most_specific_first() -> None:
    content = "\n".join(symptom.example for symptom in table() if "error" in symptom.kinds)
    recognised = recognise([Text("error", "here", content)], "provision")
    assert len(recognised) == 3
    assert not any(match.symptom.general for match in recognised)
    start = "kvm: Host doesn't support requested features\nTASK ERROR: start failed: QEMU exited with code 1"
    assert names(recognise([Text("task", "task", start)])) == ["cpu-feature", "qemu-ended"]


def test_a_symptom_in_the_error_comes_before_one_in_a_log() -> None:
    recognised = recognise(
        [
            Text("error", "error", "snapshot feature is not available"),
            Text("task", "log", "bridge 'vmbr9' does not exist"),
        ]
    )
    assert names(recognised) == ["no-snapshots", "bridge-missing"]


def test_messages_of_pve_are_not_searched_for_in_a_journal() -> None:
    """A journal may quote anything: it is searched for messages of the guest only."""
    assert recognise([Text("journal", "journal", "echo bridge 'vmbr9' does not exist")]) == ()


def test_only_one_plain_word_is_inserted_into_a_command() -> None:
    (recognised,) = recognise(
        [Text("error", "here", "storage 'x' is not configured for content-type 'import'")]
    )
    assert "pvesm set x --content iso,vztmpl,backup,import" in recognised.fix
    (recognised,) = recognise(
        [Text("task", "here", "WARN: failed to get path and owner of volume 'a:1/$(reboot)': no")]
    )
    assert "pvesm free VOLUME" in recognised.fix
    assert "reboot" not in recognised.fix


@pytest.mark.parametrize(
    "content",
    [
        "",
        "\x00\x1b[31m",
        "é" * 10,
        "a" * 5_000_000,
        "\n" * 1_000_000,
        "bridge '" * 100_000,
        "cfs-lock '/etc/pve/x' " * 15_000,
    ],
)
def test_no_text_can_break_the_search(content: str) -> None:
    assert recognise(everywhere(content), "provision") == ()


def test_colours_and_a_long_line_do_not_hide_a_symptom() -> None:
    content = "x" * 5000 + " \x1b[0;31mbridge 'vmbr9' does\x1b[0m not exist" + "y" * 5000
    (recognised,) = recognise([Text("ansible", "here", content)])
    assert recognised.symptom.name == "bridge-missing"
    assert len(recognised.line) < 320
    assert "bridge 'vmbr9' does not exist" in recognised.line


def test_the_tables_are_read_only_after_a_failure() -> None:
    import subprocess
    import sys

    code = (
        "import sys, pytest_nestedpve.plugin, pytest_nestedpve.session.session\n"
        "print([name for name in sys.modules if 'symptoms' in name or 'diagnosis' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert symptoms.table() is symptoms.table()


def _format_cell(text: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda group: group[1].upper(), text).replace("|", "\\|")


def test_the_page_on_failures_lists_the_table_unchanged() -> None:
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    rows = [
        f"| {' | '.join(map(_format_cell, (row.title, row.explanation, row.fix, row.source)))} |"
        for row in table()
    ]
    listed = page[page.index("## Known symptoms") :].split("|---|---|---|---|\n")[1].splitlines()
    assert listed == rows, "docs/failures.md should end with:\n" + "\n".join(rows)
    assert "failures.md" in (ROOT / "docs" / "using-it.md").read_text(encoding="utf-8")


def test_the_page_on_failures_names_every_file_and_limit() -> None:
    from pytest_nestedpve.report import artifacts, collect

    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    for file, *_ in artifacts.GUEST_FILES:
        assert f"nested-{file}" in page
    item, guest_item = collect.ITEM, collect.ITEM + artifacts.REACH
    assert f"{item:.0f} seconds for each file ({guest_item:.0f} for a file from a guest)" in page
    assert f"{collect.BUDGET:.0f} for all together" in page
    assert f"{collect.TOTAL_LIMIT >> 20} MiB in all" in page
    assert f"last {artifacts.TASKS} tasks" in page
