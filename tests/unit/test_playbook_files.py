"""What a playbook depends on is found by reading: an edit of it changes the hash, any other edit does not."""

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
NOT_NEEDED = {"roles/other/tasks/main.yml", "other.yml"}


@pytest.fixture
def play(tmp_path: Path) -> Callable[[], str]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return lambda: digest_of(tmp_path / "site.yml")


def test_what_is_imported_and_the_roles_of_roles_count(play: Callable[[], str], tmp_path: Path) -> None:
    play()
    found = {str(path.relative_to(tmp_path)) for path in files_of(tmp_path / "site.yml")}
    assert found == set(FILES) - NOT_NEEDED


@pytest.mark.parametrize("name", sorted(set(FILES) - NOT_NEEDED))
def test_an_edit_of_what_it_needs_changes_the_hash(
    play: Callable[[], str], tmp_path: Path, name: str
) -> None:
    before = play()
    path = tmp_path / name
    path.write_text(path.read_text() + "# edited\n")
    assert play() != before


@pytest.mark.parametrize("name", sorted(NOT_NEEDED))
def test_an_edit_of_another_file_does_not(play: Callable[[], str], tmp_path: Path, name: str) -> None:
    before = play()
    (tmp_path / name).write_text("# edited\n")
    assert play() == before


def test_a_role_whose_name_is_made_at_run_time_means_every_role(
    play: Callable[[], str], tmp_path: Path
) -> None:
    play()
    path = tmp_path / "roles" / "web" / "tasks" / "main.yml"
    path.write_text("- include_role:\n    name: '{{ which }}'\n")
    assert tmp_path / "roles" / "other" / "tasks" / "main.yml" in files_of(tmp_path / "site.yml")


def test_a_file_that_is_no_yaml_counts_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "site.yml"
    path.write_text("a: [\n")
    before = digest_of(path)
    path.write_text("a: [ \n")
    assert digest_of(path) != before


def test_roles_of_a_further_path_count(tmp_path: Path) -> None:
    (tmp_path / "more" / "extra" / "tasks").mkdir(parents=True)
    (tmp_path / "more" / "extra" / "tasks" / "main.yml").write_text("[]\n")
    (tmp_path / "site.yml").write_text("- hosts: all\n  roles: [{role: ns.collection.extra}]\n")
    found = files_of(tmp_path / "site.yml", [tmp_path / "more"])
    assert tmp_path / "more" / "extra" / "tasks" / "main.yml" in found
