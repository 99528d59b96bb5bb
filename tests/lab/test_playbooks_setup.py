"""nested-pve-ssh.yml, nested-pve-repos.yml and nested-pve-setup.yml on an installed node with its bridge."""

from __future__ import annotations

import hashlib

from lab.setup_fixtures import BY_HAND, SECRETS, SITE, STORE, Finished, Keyed, Served

# -- nested-pve-ssh.yml


def test_authorized_keys_stays_the_link_into_pmxcfs(keyed: Keyed) -> None:
    assert keyed.link_before == keyed.link == "/etc/pve/priv/authorized_keys"


def test_keys_are_added_and_no_line_that_was_there_is_lost(keyed: Keyed) -> None:
    before, after = keyed.keys_before.splitlines(), keyed.keys.splitlines()
    assert before[-1] == "# a line by hand"
    assert after == [*before, *keyed.variables["nested_pve_authorized_keys"]]


def test_with_the_key_one_may_log_in(keyed: Keyed) -> None:
    assert f"Server accepts key: {keyed.pair} " in keyed.login
    assert "Exit status 0" in keyed.login


def test_with_the_key_one_may_log_in_even_while_pmxcfs_is_down(keyed: Keyed) -> None:
    assert keyed.without_pmxcfs == "leads nowhere"
    assert f"Server accepts key: {keyed.pair} " in keyed.login_without_pmxcfs
    assert "Exit status 0" in keyed.login_without_pmxcfs


def test_roots_own_key_stays_as_pve_made_it(keyed: Keyed) -> None:
    assert keyed.own == keyed.own_before


def test_the_runs_key_is_placed_for_root_alone(keyed: Keyed) -> None:
    mode, checksum = keyed.placed.splitlines()
    assert mode == "600 root id_nestedpve"
    assert checksum.split()[0] == hashlib.sha256(keyed.pair.read_bytes()).hexdigest()


def test_the_node_logs_in_to_its_leaves_with_the_runs_key_and_nowhere_else(keyed: Keyed) -> None:
    assert keyed.offered_to_leaf.splitlines()[0].endswith("/id_nestedpve")
    assert "id_nestedpve" not in keyed.offered_elsewhere
    assert "Server accepts key: /root/.ssh/id_nestedpve " in keyed.to_leaf


def test_what_pve_keeps_in_its_ssh_configuration_stays(keyed: Keyed) -> None:
    assert keyed.config.splitlines()[0] == "Ciphers aes256-ctr"


def test_the_users_own_private_key_is_nowhere_on_the_node(keyed: Keyed) -> None:
    assert keyed.users_key == ""


def test_the_runs_private_key_is_not_in_the_output_even_if_much_is_asked_for(keyed: Keyed) -> None:
    assert keyed.shown == []


def test_a_second_run_of_the_keys_changes_nothing(keyed: Keyed) -> None:
    assert keyed.first.changed > 0
    assert keyed.second.told_changes() == []
    assert keyed.second.changed == 0


# -- nested-pve-repos.yml: the node


def test_the_storages_content_types_are_united_with_what_is_there(served: Served) -> None:
    assert served.before.content == {"backup", "rootdir"}
    assert served.after_first.content == {"backup", "rootdir", "images", "import", "iso", "snippets"}


def test_the_outer_hosts_key_is_added_through_the_link(served: Served) -> None:
    assert served.after_first.keys == f"{served.before.keys}\n{served.outer_key}"


def test_a_certificate_that_fits_is_not_renewed(served: Served, finished: Finished) -> None:
    states = [
        served.after_first,
        served.after_second,
        served.after_third,
        served.after_fourth,
        finished.after,
    ]
    assert {each.certificate for each in states} == {served.before.certificate}
    assert {each.pveproxy for each in states} == {served.before.pveproxy}


# -- the token


def test_a_token_with_roots_rights_is_made_and_kept_for_root_alone(served: Served) -> None:
    assert served.before.tokens == set()
    assert served.before.token == ""
    assert served.after_first.tokens == {"nested-pve"}
    assert served.after_first.token.startswith("root@pam!nested-pve=")
    assert served.after_first.answers == "200"
    assert f"600 root {STORE}" in served.after_first.modes.splitlines()


def test_a_token_that_works_is_kept(served: Served) -> None:
    assert served.after_second.token == served.after_first.token
    assert served.after_second.answers == "200"


def test_a_token_that_works_no_more_is_made_anew(served: Served) -> None:
    assert served.between.answers == "401"
    assert served.after_third.token.startswith("root@pam!nested-pve=")
    assert served.after_third.token != served.after_second.token
    assert served.after_third.answers == "200"


def test_a_token_kept_under_another_name_is_not_taken_for_it(served: Served) -> None:
    assert served.after_fourth.token.startswith("root@pam!another=")
    assert served.after_fourth.answers == "200"


def test_neither_tokens_nor_secrets_are_in_the_output_even_if_much_is_asked_for(served: Served) -> None:
    assert served.shown == []


def test_the_token_goes_into_yaml_and_all_else_stays_as_it_was(served: Served) -> None:
    for state in (served.after_first, served.after_second, served.after_third):
        assert state.secret + "\n" == SECRETS.replace("none yet", state.token)


def test_the_tokens_way_is_made_where_nothing_is_and_mode_owner_and_link_stay(served: Served) -> None:
    link, mode, *lines = served.after_third.credentials.splitlines()
    assert (link, mode, lines) == ("there.yaml", "640 daemon", BY_HAND.splitlines())
    link, mode, *lines = served.after_fourth.credentials.splitlines()
    assert (link, mode) == ("there.yaml", "640 daemon")
    assert lines == [*BY_HAND.splitlines(), "api_tokens:", f"  playbooks: {served.after_fourth.token}"]


# -- sources, secrets, bootstrap


def test_a_source_is_what_git_knows_and_does_not_ignore(served: Served) -> None:
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


def test_of_a_source_what_is_gone_goes_and_what_was_made_there_stays(served: Served) -> None:
    before, after = (set(each.files.splitlines()) for each in (served.between, served.after_third))
    assert before - after == {"644 old/deep/stale.yaml "}
    assert after - before == {"644 new/fresh.yaml "}
    assert "644 made/here " in after
    assert not served.node.true(f"test -e {SITE}/old")
    assert not served.node.true(f"grep -q 'by hand' {SITE}/README")


def test_secrets_are_for_root_alone_also_where_their_mode_was_changed(served: Served) -> None:
    lines = served.after_first.modes.splitlines()
    for state in (served.after_first, served.after_third):
        assert f"600 root {SITE}/secrets.yaml" in state.modes.splitlines()
    kept = [line for line in lines if line.split()[2].startswith("secrets")]
    assert [line.split()[0] for line in kept] == ["700", "600"]


def test_a_secret_with_the_token_in_it_stays_until_there_is_a_new_one(served: Served) -> None:
    assert served.after_second.secret == served.after_first.secret
    assert served.after_fourth.secret + "\n" == SECRETS.replace("correct-horse-41", "battery-staple-17")


def test_the_bootstrap_command_runs_in_its_source_once_per_state(served: Served) -> None:
    assert served.after_first.bootstrapped == served.after_second.bootstrapped == SITE
    assert served.after_fourth.bootstrapped.split() == [SITE, SITE]


def test_a_bootstrap_command_that_failed_is_told_and_run_again(served: Served) -> None:
    assert served.third.rc != 0
    assert "nested_pve_repos : Run the bootstrap command" in served.third.output
    assert served.after_third.bootstrapped == SITE
    assert "nested_pve_repos : Run the bootstrap command" in served.fourth.told_changes()


def test_a_second_run_of_the_repositories_changes_nothing(served: Served) -> None:
    assert served.first.changed > 0
    assert served.second.told_changes() == []
    assert served.second.changed == 0
    assert served.after_second == served.after_first


# -- all of it


def test_the_whole_set_up_of_a_finished_node_changes_nothing(finished: Finished) -> None:
    assert finished.played.told_changes() == []
    assert finished.played.changed == 0
    assert finished.after == finished.before
