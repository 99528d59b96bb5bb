"""The filter nested_pve_yaml_set: set a value in a YAML text."""

from ansible.errors import AnsibleFilterError


def nested_pve_yaml_set(text, keys, value):
    """`text` with `value` at the path `keys`; comments and order are preserved."""
    try:
        from pytest_nestedpve.config.yaml_path import YamlPathError, set_value
    except ImportError as e:
        raise AnsibleFilterError(
            "writing the token to a YAML file needs the Python package pytest-nestedpve beside "
            f"ansible-playbook: {e}"
        ) from e
    try:
        return set_value(str(text), [str(key) for key in keys], str(value))
    except YamlPathError as e:
        raise AnsibleFilterError(str(e)) from e


class FilterModule:
    """The filters of this file, for Ansible."""

    def filters(self):
        return {"nested_pve_yaml_set": nested_pve_yaml_set}
