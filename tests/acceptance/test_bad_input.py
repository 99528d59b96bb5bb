"""Bad input: status 4 before anything is touched, no traceback; help and collection still work."""

from __future__ import annotations

import pytest
from acceptance.conftest import STEPS
from standin_phases import PHASES


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for name in ("NESTED_PVE_HOST", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    pytester.makepyfile(test_steps=STEPS, test_plain="def test_plain(): pass\n")
    return pytester


def untouched(project: pytest.Pytester) -> bool:
    return not (project.path / ".nested-pve").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["-o", "nested_pve_vmid_range=1-2"], "-o nested_pve_vmid_range: VM ids begin at 100"),
        (["-o", "nested_pve_vmid_range=90000-99999"], "holds 10000 ids"),
        (["-o", "nested_pve_name_pattern=*"], "three literal characters"),
        (["--pve-host", "-x"], "--pve-host"),
        (["--pve-host", "a b"], "--pve-host: expected a destination of ssh"),
        (["--nested-yes"], "--nested-yes is valid only with --nested-destroy-only"),
        (["--context-file", "broken.json"], "expected a JSON object in"),
        (["--context-file", "list.json"], "list.json"),
    ],
)
def test_a_bad_option_is_status_4_and_nothing_is_touched(
    project: pytest.Pytester, args: list[str], says: str
) -> None:
    (project.path / "broken.json").write_text("{")
    (project.path / "list.json").write_text("[]")
    result = project.runpytest_inprocess("--pve-host", "nowhere.invalid", *args)
    assert result.ret == 4
    assert says in result.stderr.str()
    assert "Traceback" not in result.stderr.str() + result.stdout.str()
    assert untouched(project)


def test_a_bad_environment_value_is_status_4(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_PVE_CORES", "many")
    result = project.runpytest_inprocess()
    assert result.ret == 4
    assert "environment variable NESTED_PVE_CORES: expected a number of cores" in result.stderr.str()


def test_a_bad_ini_value_names_the_file(project: pytest.Pytester) -> None:
    project.makeini("[pytest]\nnested_pve_sources = x=/no/such/place\n")
    result = project.runpytest_inprocess()
    assert result.ret == 4
    assert (
        f"nested_pve_sources in {project.path / 'tox.ini'}: the source 'x' does not exist"
        in result.stderr.str()
    )


@pytest.mark.parametrize(
    "args", [["--help"], ["--collect-only", "-q"], ["--fixtures"], ["--markers"], ["--version"]]
)
def test_looking_only_is_not_affected_by_bad_settings(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    monkeypatch.setenv("NESTED_PVE_CORES", "many")
    assert project.runpytest_inprocess(*args).ret == 0


def test_collect_only_shows_the_fourteen_steps_and_connects_to_nothing(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess(
        "--collect-only", "-q", "--pve-host", "nowhere.invalid", "test_steps.py"
    )
    assert result.ret == 0
    assert [line for line in result.outlines if "::" in line] == [
        f"test_steps.py::test_{name}" for name in PHASES
    ]
    assert untouched(project)


def test_no_host_is_an_error_that_names_both_choices_before_any_test_runs(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("-v")
    assert result.ret == 4
    assert "--pve-host HOST" in result.stderr.str()
    assert "--pve-host lab" in result.stderr.str()
    assert "test_plain PASSED" not in result.stdout.str()
    assert untouched(project)


def test_no_host_does_not_matter_where_no_test_needs_one(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("test_plain.py")
    result.assert_outcomes(passed=1)
    assert result.ret == 0


def test_no_host_is_status_4_under_xdist_too(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-n1", "-p", "no:cacheprovider", "test_steps.py")
    assert result.ret == 4
    assert "no outer PVE host was named" in result.stdout.str()
    assert untouched(project)


def test_bad_settings_are_status_4_under_xdist_too(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("-n1", "-o", "nested_pve_cores=0")
    assert result.ret == 4
    assert "-o nested_pve_cores" in result.stderr.str()


def test_a_host_that_cannot_be_reached_fails_preflight_with_status_4(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("-rs", "--pve-host", "nowhere.invalid")
    assert result.ret == 4
    result.assert_outcomes(failed=1, skipped=13, passed=1)
    assert "nowhere.invalid" in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
    assert "depends on test_preflight" in result.stdout.str()


def test_the_plugin_costs_at_most_15_modules_where_it_is_not_used(project: pytest.Pytester) -> None:
    (project.path / "test_steps.py").unlink()
    project.makepyfile(
        count="""
        import sys, pytest
        class Count:
            def pytest_unconfigure(self):
                print("MODULES", *sorted(m for m in sys.modules))
        pytest.main(sys.argv[1:], plugins=[Count()])
        """
    )
    runs = []
    for args in ([], ["-p", "no:pytest_nestedpve.plugin"]):
        result = project.runpython_c(
            "import sys; sys.argv[1:] = " + repr(["-q", *args]) + "; exec(open('count.py').read())"
        )
        line = next(line for line in result.outlines if line.startswith("MODULES"))
        runs.append(set(line.split()[1:]))
    more = runs[0] - runs[1]
    assert len(more) <= 15, sorted(more)
    assert not more & {"paramiko", "ansible_runner", "urllib3", "yaml", "ruamel", "jinja2", "cryptography"}
