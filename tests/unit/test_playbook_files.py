"""An edit of a file that a playbook depends on changes its hash; no other edit does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_nestedpve.setup.ansible.dependencies import digest_of, files_of

FILES = {
    "site.yml": "- import_playbook: base.yml\n- hosts: all\n  roles: [web]\n",
    "base.yml": """
- hosts: all
  vars_files: [vars/base.yml]
  vars: {secret: !vault "abc"}
  tasks:
    - ansible.builtin.include_tasks: tasks/one.yml
    - name: by a block
      block:
        - ansible.builtin.import_role:
            name: db
""",
    "vars/base.yml": "a: 1\n",
    "tasks/one.yml": "- ansible.builtin.command: /bin/true\n",
    "group_vars/all.yml": "b: 2\n",
    "roles/web/tasks/main.yml": "- include_role: name=shared\n",
    "roles/web/templates/page.j2": "hello\n",
    "roles/web/meta/main.yml": "dependencies:\n  - role: common\n",
    "roles/db/tasks/main.yml": "- ansible.builtin.copy: {src: x, dest: /x}\n",
    "roles/db/files/x": "x\n",
    "roles/common/tasks/main.yml": "[]\n",
    "roles/shared/tasks/main.yml": "[]\n",
    "roles/other/tasks/main.yml": "[]\n",
    "other.yml": "- hosts: all\n  roles: [other]\n",
}
UNUSED = {"roles/other/tasks/main.yml", "other.yml"}


@pytest.fixture
def play(tmp_path: Path) -> Callable[[], str]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return lambda: digest_of(tmp_path / "site.yml")


def test_imports_and_roles_of_roles_are_dependencies(play: Callable[[], str], tmp_path: Path) -> None:
    play()
    names = {str(path.relative_to(tmp_path)) for path in files_of(tmp_path / "site.yml")}
    assert names == set(FILES) - UNUSED


@pytest.mark.parametrize("name", sorted(set(FILES) - UNUSED))
def test_an_edit_of_a_dependency_changes_the_hash(play: Callable[[], str], tmp_path: Path, name: str) -> None:
    before = play()
    path = tmp_path / name
    path.write_text(path.read_text() + "# edited\n")
    assert play() != before


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_an_edit_of_another_file_keeps_the_hash(play: Callable[[], str], tmp_path: Path, name: str) -> None:
    before = play()
    (tmp_path / name).write_text("# edited\n")
    assert play() == before


def test_a_role_name_with_a_variable_makes_every_role_a_dependency(
    play: Callable[[], str], tmp_path: Path
) -> None:
    play()
    path = tmp_path / "roles" / "web" / "tasks" / "main.yml"
    path.write_text("- include_role:\n    name: '{{ which }}'\n")
    assert tmp_path / "roles" / "other" / "tasks" / "main.yml" in files_of(tmp_path / "site.yml")


def test_a_file_that_is_no_yaml_counts_by_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "site.yml"
    path.write_text("a: [\n")
    before = digest_of(path)
    path.write_text("a: [ \n")
    assert digest_of(path) != before


def test_roles_of_the_roles_path_are_dependencies(tmp_path: Path) -> None:
    (tmp_path / "more" / "extra" / "tasks").mkdir(parents=True)
    (tmp_path / "more" / "extra" / "tasks" / "main.yml").write_text("[]\n")
    (tmp_path / "site.yml").write_text("- hosts: all\n  roles: [{role: ns.collection.extra}]\n")
    paths = files_of(tmp_path / "site.yml", [tmp_path / "more"])
    assert tmp_path / "more" / "extra" / "tasks" / "main.yml" in paths
