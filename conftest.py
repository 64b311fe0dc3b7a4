"""Guards around every test; at the root, so that the docstrings of the package stand under them too."""

import os
import signal
from collections.abc import Iterator

os.environ["MPLBACKEND"] = "Agg"  # before anything imports Matplotlib: no test opens a window

import pyro
import pytest

from global_state import SETTINGS, unchanged

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in background jobs; tests press Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def settings_unchanged() -> Iterator[None]:
    """Fail the test that leaves a global setting, parameter, variable or directory changed."""
    with unchanged(SETTINGS):
        yield


@pytest.fixture(autouse=True)
def same_streams_at_start() -> None:
    """Start every test from the same random streams, whatever ran before it on the same worker."""
    pyro.set_rng_seed(0)
