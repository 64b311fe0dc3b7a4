"""What a call must leave as it found it, and a context that fails and repairs when it did not."""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pyro
import torch

SET_BY_OTHERS = {
    "PYTEST_CURRENT_TEST",  # by pytest, in every phase of a test
    "KMP_DUPLICATE_LIB_OK",  # by scikit-learn, when first imported
    "KMP_INIT_AT_FORK",
    "TORCHINDUCTOR_CACHE_DIR",  # by torch, when its compiler is first imported
    "TRITON_CACHE_DIR",
}


class Probe(NamedTuple):
    """One piece of global state: `read` gives a value that `==` compares, `write` puts it back."""

    read: Callable[[], Any]
    write: Callable[[Any], object]


def _read_params() -> dict[str, Any]:
    """Names and values of Pyro's parameter store, constrained."""
    return {name: value.tolist() for name, value in pyro.get_param_store().items()}


def _write_params(params: dict[str, Any]) -> None:
    """The values left behind are of no use to the next test: only the names that were there can be kept."""
    store = pyro.get_param_store()
    for name in set(store.keys()) - set(params):
        del store[name]


def _read_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in SET_BY_OTHERS}


def _write_environment(variables: dict[str, str]) -> None:
    for name in set(_read_environment()) - set(variables):
        del os.environ[name]
    os.environ.update(variables)


def _read_numpy_stream() -> tuple[Any, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 -- the global stream is what is watched
    return (name, keys.tolist(), *rest)


SETTINGS = {
    "torch's default dtype": Probe(torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": Probe(torch.get_default_device, torch.set_default_device),
    "torch's gradient mode": Probe(torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's number of threads": Probe(torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic mode": Probe(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms
    ),
    # Pyro's settings hold its own three validation flags and that of torch.distributions.
    "Pyro's settings": Probe(pyro.settings.get, lambda settings: pyro.settings.set(**settings)),
    "Pyro's parameter store": Probe(_read_params, _write_params),
    "NumPy's error handling": Probe(np.geterr, lambda modes: np.seterr(**modes)),
    "Matplotlib's backend": Probe(mpl.get_backend, mpl.use),
    "the environment": Probe(_read_environment, _write_environment),
    "the working directory": Probe(os.getcwd, os.chdir),
}

STREAMS = {
    "torch's random stream": Probe(
        lambda: torch.get_rng_state().tolist(),
        lambda state: torch.set_rng_state(torch.tensor(state, dtype=torch.uint8)),
    ),
    "NumPy's random stream": Probe(_read_numpy_stream, np.random.set_state),
    "Python's random stream": Probe(random.getstate, random.setstate),
}


def difference(before: Any, after: Any) -> str:
    """What changed, in words; of dictionaries the differing entries alone."""
    if isinstance(before, dict):
        names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return "; ".join(f"{name} {difference(before.get(name), after.get(name))}" for name in names)
    return f"{before!r:.100} became {after!r:.100}"


@contextmanager
def unchanged(probes: dict[str, Probe]) -> Iterator[None]:
    """Fail, naming what was left changed, and put it back so that nothing that follows fails for it."""
    before = {name: probe.read() for name, probe in probes.items()}
    yield
    changed = []
    for name, probe in probes.items():
        after = probe.read()
        if after != before[name]:
            changed.append(f"{name}: {difference(before[name], after)}")
            probe.write(before[name])
    assert not changed, "Global state was left changed.\n" + "\n".join(changed)
