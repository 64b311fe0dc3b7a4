"""The guards of conftest.py are tested too: each leak is made on purpose, must be reported and repaired."""

import os
import random
from collections.abc import Callable

import matplotlib as mpl
import numpy as np
import pyro
import pytest
import torch

from global_state import SETTINGS, STREAMS, unchanged

LEAKS: dict[str, Callable[[], object]] = {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "torch's gradient mode": lambda: torch.set_grad_enabled(False),
    "torch's number of threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's deterministic mode": lambda: torch.use_deterministic_algorithms(True),
    "Pyro's settings": lambda: pyro.enable_validation(False),
    "Pyro's parameter store": lambda: pyro.param("left behind", torch.zeros(2)),
    "NumPy's error handling": lambda: np.seterr(over="ignore"),
    "Matplotlib's backend": lambda: mpl.use("svg"),
    "the environment": lambda: os.environ.update(PROBGEN_LEFT_BEHIND="1"),
    "the working directory": lambda: os.chdir(os.sep),
    "torch's random stream": lambda: torch.rand(1),
    "NumPy's random stream": np.random.rand,
    "Python's random stream": random.random,
}


def test_every_probe_has_a_leak() -> None:
    assert LEAKS.keys() == SETTINGS.keys() | STREAMS.keys()


@pytest.mark.parametrize("name", LEAKS)
def test_a_leak_is_named_and_repaired(name: str) -> None:
    probes = SETTINGS | STREAMS
    with pytest.raises(AssertionError, match=name), unchanged(probes):
        LEAKS[name]()
    with unchanged(probes):
        pass


def test_a_changed_parameter_is_seen() -> None:
    store = pyro.get_param_store()
    pyro.param("weight", torch.zeros(2))
    message = r"parameter store: weight \[0.0, 0.0\] became \[1.0, 1.0\]"
    with pytest.raises(AssertionError, match=message), unchanged(SETTINGS):
        store["weight"] = torch.ones(2)
    store.clear()


@pytest.mark.parametrize("attempt", [1, 2])
def test_every_test_starts_from_the_same_streams(attempt: int) -> None:
    assert (torch.initial_seed(), torch.rand(()).item()) == (0, pytest.approx(0.4962566))
