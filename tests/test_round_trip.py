from pytest_nestedpve import steps  # noqa: F401  (the plugin expands it to the fourteen steps)
