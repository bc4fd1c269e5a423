"""One stock of good checkpoints for all tests of verification."""

import pytest

from tests.verify.stock import Stock


@pytest.fixture(scope="session")
def stock(tmp_path_factory):
    return Stock(tmp_path_factory.mktemp("stock"))
