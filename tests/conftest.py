"""What every test can rely on, wherever the suite runs."""

import signal

from hypothesis import HealthCheck, settings

# On a busy machine, too, no example is too slow; and all are the same ones each time.
settings.register_profile(
    "quantcli",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("quantcli")

# A script's background jobs are started with SIGINT ignored, and all that they start inherits that:
# Ctrl-C would do nothing in the tests of it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
