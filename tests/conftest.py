"""What every test can rely on, wherever the suite runs."""

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests import object_server

# On a busy machine, too, no example is too slow; and all are the same ones each time.
settings.register_profile(
    "quantcli",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("quantcli")

# Lines are as long as they are: the width and the colours of a terminal have tests of their own.
for _name in [*os.environ]:
    if _name in {"COLUMNS", "FORCE_COLOR"} or _name.startswith("QUANTCLI_"):
        del os.environ[_name]

# A script's background jobs are started with SIGINT ignored, those of nohup with SIGHUP, and all that
# they start inherits that: interrupts would do nothing in the tests of them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def objects() -> Iterator[object_server.Objects]:
    """A server with the API of S3, which obstore finds by the environment of this process."""
    with object_server.serve() as server:
        yield server
