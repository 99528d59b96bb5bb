"""The table of known symptoms: each is recognised in its own words, none in those of a healthy run."""

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


def names(found: tuple[Recognised, ...]) -> list[str]:
    return [each.symptom.name for each in found]


def everywhere(words: str) -> list[Text]:
    """The same words in every kind of text."""
    return [Text(kind, kind, words) for kind in KINDS]


def test_the_table_is_large_and_its_names_are_its_own() -> None:
    known = [each.name for each in table()]
    assert len(known) >= 36
    assert len(known) == len(set(known))
    assert len({each.explanation for each in table()}) == len(known)


@pytest.mark.parametrize("symptom", table(), ids=lambda each: each.name)
def test_a_symptom_is_recognised_in_its_own_words_and_named_first(symptom: Symptom) -> None:
    phase = symptom.phases[0] if symptom.phases else "provision"
    for kind in symptom.kinds:
        found = recognise([Text(kind, "here", symptom.example)], phase)
        assert names(found)[:1] == [symptom.name], kind
        assert found[0].line
        assert found[0].where == "here"
        # Every placeholder of the pattern is filled in, or shown as what it is.
        assert "{" not in found[0].explanation + found[0].fix.replace("{print", "")
    assert names(recognise(everywhere(symptom.example), phase))[:1] == [symptom.name]


def root_only(name: str) -> str:
    """What port 8006 said of the parameters, as it is told."""
    said = json.loads(HTTPS[name]["stdout"].split("\r\n\r\n", 1)[1])["errors"]
    return "\n".join(f"{parameter}: {why}" for parameter, why in said.items())


@pytest.mark.parametrize(
    ("name", "words"),
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
def test_a_symptom_is_recognised_in_its_other_words(name: str, words: str) -> None:
    """Those of the same kind of failure, as the client types them."""
    assert names(recognise([Text("error", "here", words)]))[:1] == [name]


def test_a_key_that_one_node_misses_of_another_is_not_this_machines_known_hosts() -> None:
    from_node = "father2 is not reached: no login from node to node, as PVE itself makes them, at father2 "
    for words in (
        "proxy handler failed: Host key verification failed.",
        f"{from_node}(10.0.0.2): Host key verification failed. / lost; `pvecm updatecerts` on both mends it",
    ):
        (found,) = recognise([Text("error", "here", words)])
        assert found.symptom.name == "node-host-key"
        assert "pvecm updatecerts" in found.fix


def _recorded(name: str) -> list[dict[str, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()[1:]
    return [json.loads(line) for line in lines]


def test_what_pve_says_when_all_is_well_is_no_symptom() -> None:
    healthy = _recorded("healthy-recorded.jsonl")
    assert len(healthy) > 200
    for answer in healthy:
        for phase in ("provision", "leaf_wait_ip"):
            assert names(recognise(everywhere(answer["stdout"]), phase)) == [], answer["id"]


#: What a first boot and an installation that end well say among other things.
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


def test_what_a_good_boot_and_a_good_playbook_say_is_no_symptom() -> None:
    for phase in ("ensure_pve", "setup_network", "leaf_wait_ip"):
        assert names(recognise(everywhere(GOOD_BOOT), phase)) == []


@pytest.mark.parametrize("symptom", table(), ids=lambda each: each.name)
def test_an_example_that_names_a_recording_is_what_was_recorded(symptom: Symptom) -> None:
    """Word by word, wherever the recording is among those kept here."""
    files = ("recorded_answers.jsonl", "recorded_failures.jsonl", "standin-recorded.jsonl")
    kept = {each["id"]: each for name in files for each in _recorded(name) if "id" in each}
    assert re.search(r"recording [a-zA-Z]+-\d+|facts of PVE 9\.2, \d+|field notes \d+", symptom.source)
    for name in re.findall(r"recording ([a-zA-Z]+-\d+)", symptom.source):
        if name not in kept or symptom.name == "authorized-keys-replaced":
            continue
        said = kept[name]["stdout"] + kept[name]["stderr"]
        assert any(symptom.pattern.search(line) for line in (said, *symptom.example.splitlines()))
        assert symptom.pattern.search(said) is not None, name


def test_every_setting_that_a_fix_names_exists() -> None:
    settings = {f"nested_pve_{key.name}" for key in KEYS}
    named = {
        word for each in table() for word in re.findall(r"nested_pve_\w+", f"{each.fix} {each.explanation}")
    }
    assert named <= settings, named - settings
    assert len(named) > 8


@pytest.mark.parametrize("symptom", table(), ids=lambda each: each.name)
def test_a_fix_says_what_to_type_or_to_set(symptom: Symptom) -> None:
    programs = (
        "append apt-get cloud-init curl date df dpkg export find getent ha-manager ip journalctl mkdir pvecm "
        "pvesh pvesm pveum pytest qemu-img qm rm sha256sum ssh sshd systemctl uptime"
    )
    typed = rf"\b(?:{'|'.join(programs.split())})\b|nested_pve_\w+|\.qcow2"
    assert re.search(typed, symptom.fix), symptom.fix
    assert len(symptom.title) < 80
    assert symptom.explanation.endswith((".", ")"))


def test_the_most_specific_comes_first_and_no_more_than_three() -> None:
    words = "\n".join(each.example for each in table() if "error" in each.kinds)
    found = recognise([Text("error", "here", words)], "provision")
    assert len(found) == 3
    assert not any(each.symptom.general for each in found)
    start = "kvm: Host doesn't support requested features\nTASK ERROR: start failed: QEMU exited with code 1"
    assert names(recognise([Text("task", "task", start)])) == ["cpu-feature", "qemu-ended"]


def test_what_the_error_itself_says_comes_before_what_a_log_says() -> None:
    found = recognise(
        [
            Text("error", "error", "snapshot feature is not available"),
            Text("task", "log", "bridge 'vmbr9' does not exist"),
        ]
    )
    assert names(found) == ["no-snapshots", "bridge-missing"]


def test_a_log_is_not_taken_for_a_complaint_of_pve() -> None:
    """A journal may quote anything: only what a guest itself complains of is looked for in it."""
    assert recognise([Text("journal", "journal", "echo bridge 'vmbr9' does not exist")]) == ()


def test_what_gets_into_a_command_is_one_plain_word() -> None:
    (found,) = recognise([Text("error", "here", "storage 'x' is not configured for content-type 'import'")])
    assert "pvesm set x --content iso,vztmpl,backup,import" in found.fix
    (found,) = recognise(
        [Text("task", "here", "WARN: failed to get path and owner of volume 'a:1/$(reboot)': no")]
    )
    assert "pvesm free VOLUME" in found.fix
    assert "reboot" not in found.fix


@pytest.mark.parametrize(
    "words",
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
def test_no_text_can_break_the_look(words: str) -> None:
    assert recognise(everywhere(words), "provision") == ()


def test_colours_and_a_long_line_do_not_hide_a_symptom() -> None:
    words = "x" * 5000 + " \x1b[0;31mbridge 'vmbr9' does\x1b[0m not exist" + "y" * 5000
    (found,) = recognise([Text("ansible", "here", words)])
    assert found.symptom.name == "bridge-missing"
    assert len(found.line) < 320
    assert "bridge 'vmbr9' does not exist" in found.line


def test_the_tables_are_read_only_when_something_failed() -> None:
    import subprocess
    import sys

    code = (
        "import sys, pytest_nestedpve.plugin, pytest_nestedpve.session.session\n"
        "print([name for name in sys.modules if 'symptoms' in name or 'diagnosis' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert symptoms.table() is symptoms.table()


def _cell(words: str) -> str:
    return re.sub(r"\{(\w+)\}", lambda group: group[1].upper(), words).replace("|", "\\|")


def test_the_page_on_failures_lists_the_table_as_it_is() -> None:
    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    rows = [
        f"| {_cell(each.title)} | {_cell(each.explanation)} | {_cell(each.fix)} | {_cell(each.source)} |"
        for each in table()
    ]
    found = page[page.index("## Known symptoms") :].split("|---|---|---|---|\n")[1].splitlines()
    assert found == rows, "docs/failures.md should end with:\n" + "\n".join(rows)
    assert "failures.md" in (ROOT / "docs" / "using-it.md").read_text(encoding="utf-8")


def test_the_page_on_failures_names_every_file_and_limit() -> None:
    from pytest_nestedpve.report import artifacts, collect

    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    for file, *_ in artifacts.QUESTIONS:
        assert f"nested-{file}" in page
    one, inside = collect.ITEM, collect.ITEM + artifacts.REACH
    assert f"{one:.0f} seconds for each file ({inside:.0f} for a file from a guest)" in page
    assert f"{collect.BUDGET:.0f} for all together" in page
    assert f"{collect.TOTAL_LIMIT >> 20} MiB in all" in page
    assert f"last {artifacts.TASKS} tasks" in page
