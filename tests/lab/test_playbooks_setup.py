"""nested-pve-ssh.yml, nested-pve-repos.yml and nested-pve-setup.yml on an installed node with its bridge."""

from __future__ import annotations

import hashlib

from lab.setup_fixtures import BY_HAND, SECRETS, SITE, STORE, Finished, Keyed, Served

# -- nested-pve-ssh.yml


def test_authorized_keys_remains_a_link_into_pmxcfs(keyed: Keyed) -> None:
    assert keyed.link_before == keyed.link == "/etc/pve/priv/authorized_keys"


def test_keys_are_added_and_existing_lines_are_kept(keyed: Keyed) -> None:
    before, after = keyed.keys_before.splitlines(), keyed.keys.splitlines()
    assert before[-1] == "# a line by hand"
    assert after == [*before, *keyed.variables["nested_pve_authorized_keys"]]


def test_the_key_allows_a_login(keyed: Keyed) -> None:
    assert f"Server accepts key: {keyed.pair} " in keyed.login
    assert "Exit status 0" in keyed.login


def test_the_key_allows_a_login_while_pmxcfs_is_down(keyed: Keyed) -> None:
    assert keyed.without_pmxcfs == "leads nowhere"
    assert f"Server accepts key: {keyed.pair} " in keyed.login_without_pmxcfs
    assert "Exit status 0" in keyed.login_without_pmxcfs


def test_the_key_that_pve_created_for_root_is_not_changed(keyed: Keyed) -> None:
    assert keyed.root_key == keyed.root_key_before


def test_only_root_can_read_the_runs_key(keyed: Keyed) -> None:
    mode, checksum = keyed.placed.splitlines()
    assert mode == "600 root id_nestedpve"
    assert checksum.split()[0] == hashlib.sha256(keyed.pair.read_bytes()).hexdigest()


def test_the_node_logs_in_to_its_leaves_with_the_runs_key_and_nowhere_else(keyed: Keyed) -> None:
    assert keyed.offered_to_leaf.splitlines()[0].endswith("/id_nestedpve")
    assert "id_nestedpve" not in keyed.offered_elsewhere
    assert "Server accepts key: /root/.ssh/id_nestedpve " in keyed.to_leaf


def test_lines_of_pve_in_the_ssh_configuration_are_kept(keyed: Keyed) -> None:
    assert keyed.config.splitlines()[0] == "Ciphers aes256-ctr"


def test_the_users_private_key_is_not_on_the_node(keyed: Keyed) -> None:
    assert keyed.users_key == ""


def test_the_runs_private_key_is_not_in_the_output_even_with_high_verbosity(keyed: Keyed) -> None:
    assert keyed.leaked == []


def test_a_second_run_of_the_ssh_playbook_changes_nothing(keyed: Keyed) -> None:
    assert keyed.first.changed > 0
    assert keyed.second.changed_tasks() == []
    assert keyed.second.changed == 0


# -- nested-pve-repos.yml: the node


def test_content_types_are_added_to_those_of_the_storage(served: Served) -> None:
    assert served.before.content == {"backup", "rootdir"}
    assert served.after_first.content == {"backup", "rootdir", "images", "import", "iso", "snippets"}


def test_the_outer_hosts_key_is_added_through_the_link(served: Served) -> None:
    assert served.after_first.keys == f"{served.before.keys}\n{served.outer_key}"


def test_a_certificate_with_the_right_names_is_not_renewed(served: Served, finished: Finished) -> None:
    states = [
        served.after_first,
        served.after_second,
        served.after_third,
        served.after_fourth,
        finished.after,
    ]
    assert {state.certificate for state in states} == {served.before.certificate}
    assert {state.pveproxy for state in states} == {served.before.pveproxy}


# -- the token


def test_a_token_with_roots_rights_is_created_and_readable_by_root_only(served: Served) -> None:
    assert served.before.tokens == set()
    assert served.before.token == ""
    assert served.after_first.tokens == {"nested-pve"}
    assert served.after_first.token.startswith("root@pam!nested-pve=")
    assert served.after_first.answers == "200"
    assert f"600 root {STORE}" in served.after_first.modes.splitlines()


def test_a_token_that_works_is_kept(served: Served) -> None:
    assert served.after_second.token == served.after_first.token
    assert served.after_second.answers == "200"


def test_a_token_that_no_longer_works_is_replaced(served: Served) -> None:
    assert served.between.answers == "401"
    assert served.after_third.token.startswith("root@pam!nested-pve=")
    assert served.after_third.token != served.after_second.token
    assert served.after_third.answers == "200"


def test_another_token_name_gets_another_token(served: Served) -> None:
    assert served.after_fourth.token.startswith("root@pam!another=")
    assert served.after_fourth.answers == "200"


def test_tokens_and_secrets_are_not_in_the_output_even_with_high_verbosity(served: Served) -> None:
    assert served.leaked == []


def test_the_token_is_written_into_yaml_and_every_other_byte_is_kept(served: Served) -> None:
    for state in (served.after_first, served.after_second, served.after_third):
        assert state.secret + "\n" == SECRETS.replace("none yet", state.token)


def test_missing_keys_of_the_token_file_are_added_and_mode_owner_and_link_kept(served: Served) -> None:
    link, mode, *lines = served.after_third.credentials.splitlines()
    assert (link, mode, lines) == ("target.yaml", "640 daemon", BY_HAND.splitlines())
    link, mode, *lines = served.after_fourth.credentials.splitlines()
    assert (link, mode) == ("target.yaml", "640 daemon")
    assert lines == [*BY_HAND.splitlines(), "api_tokens:", f"  playbooks: {served.after_fourth.token}"]


# -- sources, secrets, bootstrap


def test_a_source_has_tracked_and_untracked_files_but_no_ignored_ones(served: Served) -> None:
    assert served.before.files == ""
    assert served.after_first.files.splitlines() == [
        "644 .gitignore ",
        "644 README ",
        "755 bin/run ",
        "777 link bin/run",
        "644 old/deep/stale.yaml ",
        "600 secrets.yaml ",
        "644 untracked ",
    ]


def test_deleted_files_of_a_source_are_deleted_and_files_created_on_the_node_kept(served: Served) -> None:
    before, after = (set(state.files.splitlines()) for state in (served.between, served.after_third))
    assert before - after == {"644 old/deep/stale.yaml "}
    assert after - before == {"644 new/fresh.yaml "}
    assert "644 made/here " in after
    assert not served.node.succeeds(f"test -e {SITE}/old")
    assert not served.node.succeeds(f"grep -q 'by hand' {SITE}/README")


def test_only_root_can_read_secrets_even_after_their_mode_was_changed(served: Served) -> None:
    lines = served.after_first.modes.splitlines()
    for state in (served.after_first, served.after_third):
        assert f"600 root {SITE}/secrets.yaml" in state.modes.splitlines()
    copies = [line for line in lines if line.split()[2].startswith("secrets")]
    assert [line.split()[0] for line in copies] == ["700", "600"]


def test_a_secret_with_the_token_in_it_is_kept_until_its_source_changes(served: Served) -> None:
    assert served.after_second.secret == served.after_first.secret
    assert served.after_fourth.secret + "\n" == SECRETS.replace("correct-horse-41", "battery-staple-17")


def test_the_bootstrap_command_runs_in_its_source_once_per_state(served: Served) -> None:
    assert served.after_first.bootstrapped == served.after_second.bootstrapped == SITE
    assert served.after_fourth.bootstrapped.split() == [SITE, SITE]


def test_a_failed_bootstrap_command_is_reported_and_repeated(served: Served) -> None:
    assert served.third.rc != 0
    assert "nested_pve_repos : Run the bootstrap command" in served.third.output
    assert served.after_third.bootstrapped == SITE
    assert "nested_pve_repos : Run the bootstrap command" in served.fourth.changed_tasks()


def test_a_second_run_of_the_repos_playbook_changes_nothing(served: Served) -> None:
    assert served.first.changed > 0
    assert served.second.changed_tasks() == []
    assert served.second.changed == 0
    assert served.after_second == served.after_first


# -- nested-pve-setup.yml


def test_the_whole_set_up_changes_nothing_on_a_node_that_is_set_up(finished: Finished) -> None:
    assert finished.played.changed_tasks() == []
    assert finished.played.changed == 0
    assert finished.after == finished.before
