"""House rules: imports between rooms, length of modules, forbidden texts, writers of shared objects."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "pytest_nestedpve"
LONGEST = 600


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _import_nodes(
    tree: ast.AST, *, inside_functions: bool, for_types: bool
) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif _is_type_checking(node):
            if for_types:
                yield from _import_nodes(node, inside_functions=inside_functions, for_types=for_types)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from _import_nodes(node, inside_functions=inside_functions, for_types=for_types)


@functools.cache
def imports(name: str, *, inside_functions: bool = False, for_types: bool = False) -> set[str]:
    """Full names that a module imports when it is loaded; on request also in functions or for types only."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    names: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _import_nodes(tree, inside_functions=inside_functions, for_types=for_types):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names.update({start, *(f"{start}.{alias.name}" for alias in node.names)})
    return names


def test_no_module_imports_itself_through_others() -> None:
    """Not when it is loaded, not later in its functions, and not for types either."""
    # A package's __init__ is loaded before its modules: its imports of them are no cycle.
    graph = {
        name: {
            other for other in _all(name) & set(MODULES) if not name.startswith(f"{other}.") and other != name
        }
        for name in MODULES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        if name in trail:
            pytest.fail("import cycle: " + " -> ".join([*trail[trail.index(name) :], name]))
        if name in done:
            return
        for other in sorted(graph[name]):
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", MODULES)
def test_no_module_exceeds_the_limit_of_lines(name: str) -> None:
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{name} has {lines} lines: it holds more than one idea"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_a_docstring(name: str) -> None:
    text = MODULES[name].read_text(encoding="utf-8")
    assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{name} has no docstring"


def _all(name: str) -> set[str]:
    return imports(name, inside_functions=True, for_types=True)


#: The rooms in order: modules import only from rooms after their own.
ROOMS = (
    "plugin",
    "session",
    "report",
    "setup",
    "teardown",
    "environment",
    "ownership",
    "run",
    "config",
    "lab",
    "pve",
)
#: Modules of other rooms that the lab may import.
LAB_IMPORTS = {"pve.deadline", "pve.errors", "pve.local_file", "pve.lock_file"}


def room(name: str) -> str:
    """The room of a module, or the name of a module at the top."""
    return name.split(".")[1] if "." in name else ""


def test_the_top_of_the_package_has_at_most_twelve_entries() -> None:
    own = {"__init__.py", "__pycache__", "py.typed"}
    entries = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in own}
    assert entries == {*ROOMS, "steps"}
    assert len(entries) <= 12


PACKAGES = sorted(path.parent.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("__init__.py"))


@pytest.mark.parametrize("name", PACKAGES)
def test_the_docstring_of_a_package_has_two_sentences(name: str) -> None:
    """One for what the package is responsible for, one for what it is not."""
    docstring = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(re.findall(r"[.](?:\s|\Z)", docstring)) >= 2, (
        f"{name}: expected two sentences, found {docstring!r}"
    )


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in ROOMS])
def test_a_room_imports_only_from_rooms_below_it(name: str) -> None:
    """Not when a module is loaded, not later in its functions, and not for types either."""
    here = ROOMS.index(room(name))
    for other in _all(name):
        if other not in MODULES or room(other) not in ROOMS or room(other) == room(name):
            continue
        assert ROOMS.index(room(other)) > here, f"{name} imports {other}"
        if room(name) == "lab":
            assert other in {
                "pytest_nestedpve.pve",
                *(f"pytest_nestedpve.{part}" for part in LAB_IMPORTS),
            }


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("pytest_nestedpve.pve")])
def test_modules_that_call_hosts_do_not_import_pytest(name: str) -> None:
    for other in _all(name):
        assert not re.match(r"_?pytest(\.|$)", other), f"{name} imports {other}"


def test_only_config_hosts_imports_the_lab() -> None:
    users = {
        name
        for name in MODULES
        if not name.startswith("pytest_nestedpve.lab")
        and any(other.startswith("pytest_nestedpve.lab") for other in _all(name))
    }
    assert users <= {"pytest_nestedpve.config.hosts"}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("pytest_nestedpve.lab.node.")])
def test_code_of_the_labs_nodes_imports_only_the_standard_library(name: str) -> None:
    for other in _all(name):
        top = other.split(".")[0]
        assert top in sys.stdlib_module_names or other.startswith("pytest_nestedpve.lab.node"), other
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            # The folder is another package on the nodes.
            assert not (node.module or "").startswith("pytest_nestedpve"), f"{name}: {ast.unparse(node)}"


def tracked() -> list[Path]:
    """Text files that git knows."""
    names = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


FORBIDDEN = {
    "an SSH client that takes any host key": r"Auto" r"AddPolicy|Warning" r"Policy",
    "host keys that are not checked": r"StrictHostKey" r"Checking[= ]*[\"']?(no\b|accept-new)",
    "host keys that are forgotten": r"UserKnownHosts" r"File[= ]*/dev/null",
    "Ansible without host keys": r"host_key_" r"checking *= *(False|false)",
    "TLS that is not verified": r"verify *= *" r"False|CERT_" r"NONE",
    "packages that are not verified": r"trusted" r"=yes",
    "the address of a package registry": r"https?://[a-z0-9.-]*(pypi|debian|npmjs|pythonhosted)[a-z0-9.-]*",
    "a path of one machine": r"(?:^|[^a-zA-Z0-9_.])/(?:wo" r"rk|fa" r"rm)/",
}
CODE_ONLY = {
    "work put off": r"# *(TO" r"DO|FIX" r"ME|X" r"XX)\b",
    "a test that is not run": r"pytest\.mark\.(sk" r"ip|xf" r"ail)\(",
}


SHIPPED = ("pytest_nestedpve", "playbooks", "benchmarks", "examples")


@pytest.mark.parametrize("what", [*FORBIDDEN, *CODE_ONLY])
def test_nowhere_in_the_repository(what: str) -> None:
    pattern = re.compile(FORBIDDEN.get(what) or CODE_ONLY[what], re.MULTILINE)
    lines = []
    for path in tracked():
        place = path.relative_to(ROOT)
        if place == Path("tests/unit/test_house.py") or (what in CODE_ONLY and path.suffix != ".py"):
            continue
        # Documentation and tests may name what is forbidden, and recordings hold output of hosts.
        everywhere = what in ("the address of a package registry", "a path of one machine", *CODE_ONLY)
        if not everywhere and place.parts[0] not in SHIPPED:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines += [
            f"{place}:{number}: {line.strip()[:120]}"
            for number, line in enumerate(text.splitlines(), 1)
            if pattern.search(line)
        ]
    assert not lines, f"{what}:\n" + "\n".join(lines)


def test_nothing_sleeps_where_it_could_wait_for_something() -> None:
    names = [name for name, path in MODULES.items() if "time.sl" + "eep(" in path.read_text(encoding="utf-8")]
    assert not names


#: Objects of the session that several modules use. Each attribute has one writer, the class itself.
SHARED_OBJECTS = frozenset({"nested", "state", "tally", "guard", "open_run", "session"})
#: pytest's own session: assigning these is how a plugin replaces the collection and the exit status.
OF_PYTEST = frozenset({"items", "testscollected", "exitstatus", "shouldstop"})
MUTATORS = frozenset({"append", "extend", "insert", "remove", "pop", "clear", "update", "setdefault", "add"})


def _shared_object(node: ast.expr) -> str | None:
    """`nested` of `nested`, `self.nested` and `self._nested`; None of any other expression."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_") if name.lstrip("_") in SHARED_OBJECTS else None


def _written(node: ast.AST) -> ast.expr | None:
    """The expression that a statement assigns to, deletes, or changes in place."""
    if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
        return node
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return node.value
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        target = node.func.value
        # A call of a shared object's method is permitted.
        return target if node.func.attr in MUTATORS and _shared_object(target) is None else None
    return None


def foreign_writes(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that write to an attribute of a shared object from outside of its class."""
    for written in map(_written, ast.walk(tree)):
        if not isinstance(written, ast.Attribute):
            continue
        owner = _shared_object(written.value)
        if owner is not None and not (owner == "session" and written.attr in OF_PYTEST):
            yield written


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("pytest_nestedpve.lab")])
def test_an_attribute_of_the_session_has_one_writer(name: str) -> None:
    """Other modules call a method with a verb, such as `state.record_kept(...)`."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    writes = [f"{node.lineno}: {ast.unparse(node)}" for node in foreign_writes(tree)]
    assert not writes, f"{name} writes to an object of the session:\n" + "\n".join(writes)


@pytest.mark.parametrize(
    "code",
    [
        "nested.job = 1",
        "self.nested.run_id = 1",
        "self._nested.remarks += [1]",
        "state.remarks.append(1)",
        "nested.state.item, x = 1, 2",
        "session.tally = 1",
        "run.state.first_reports['a'] = 1",
        "del open_run.lock",
    ],
)
def test_a_second_writer_is_noticed(code: str) -> None:
    assert list(foreign_writes(ast.parse(code)))
    assert not list(foreign_writes(ast.parse("session.items = []; self.x = nested.y; state.remark(1)")))


HEAVY = ("paramiko", "ansible_runner", "urllib3", "jinja2", "ruamel", "cryptography", "yaml", "requests")


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("pytest_nestedpve.lab")])
def test_heavy_libraries_are_imported_at_first_use(name: str) -> None:
    """A module that derives from their classes is loaded at first use itself."""
    heavy = {other.split(".")[0] for other in imports(name)} & set(HEAVY)
    loaders = [other for other in MODULES if name in imports(other)]
    assert not heavy or not loaders, f"{name} imports {heavy} when it is loaded, as {loaders} do with it"


def test_an_unused_plugin_costs_at_most_fifteen_modules() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.modules import LIMIT, imported_modules
    finally:
        sys.path.remove(str(ROOT))
    bare = imported_modules()
    ours = imported_modules("pytest_nestedpve.plugin")
    assert len(ours) - len(bare) <= LIMIT, sorted(ours - bare)
