"""What this repository's own test runs need beyond the plugin itself."""

pytest_plugins = ["pytester"]
