from pytest_nestedpve import steps  # noqa: F401 (the phases as tests)
