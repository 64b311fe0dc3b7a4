"""Exact log p(x) of machines small enough to be summed over all their states."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from probgen.core import (
    Cost,
    Estimate,
    Estimator,
    InputError,
    Pairwise,
    Support,
    Target,
    Within,
    check_finite,
    describe,
)
from probgen.couplings import Couplings
from probgen.progress import Update, silent, ticker

_AT_ONCE = 2**15  # states


@dataclass(frozen=True)
class Enumeration(Estimator):
    """log p(x) = log sum_h exp(-E(x, h)) - log sum_{x, h} exp(-E(x, h)), every sum over all states: exact.

    Layers that are independent given the others are summed in closed form, so that of an RBM only the states of its
    smaller layer are visited.

    Args:
        max_units: units whose states are visited, 2^max_units at most.

    Raises:
        InputError: more units than that.

    Source: none needed; the oracle for all estimates of log Z.

    >>> from probgen.models.rbm import example
    >>> from probgen.verbs import evidence
    >>> bool(evidence(example(), Enumeration(), torch.ones(1, 4)).value < 0)
    True
    """

    max_units: Annotated[int, Within(1, 32, why="2^max_units states are visited")] = 25
    needs = (Pairwise,)
    paper: ClassVar[str] = "Salakhutdinov & Murray 2008, ICML"
    offers: ClassVar[str] = "exact log p(x) and log Z"
    gives_up: ClassVar[str] = "machines of more than 25 units to sum over"

    def supports(self, program: Any) -> Support:
        """Whether the program is a Boltzmann machine whose data are units of it."""
        support = super().supports(program)
        if support and "x" not in program.couplings().sites:
            return Support(
                False, "its data are below its top, and given layers that do not meet in one energy"
            )
        return support

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """log p of each row; see `Estimator.estimate`."""
        started, couplings = time.perf_counter(), target.program.couplings()
        x = data_of(target).flatten(1).to(couplings.biases["x"].dtype)
        hidden = [site for site in couplings.sites if site != "x"]
        stages = {"log Z": 2 ** num_visited(couplings, list(couplings.sites))}
        stages["data"] = len(x) * 2 ** num_visited(couplings, hidden)
        with ticker("states", stages, progress) as update:
            log_z = log_partition(couplings, self.max_units, update)
            value = log_sum(
                couplings, {"x": x}, hidden, self.max_units, lambda done: update(stages["log Z"] + done)
            )
        return Estimate(
            value - log_z,
            torch.zeros_like(value),
            "exact",
            event_size=x.shape[1],
            diagnostics={"log_partition": log_z.expand(len(x))},
            cost=Cost(seconds=time.perf_counter() - started),
            convention="nats of the data as given; the sum over all states",
        )


def data_of(target: Target) -> Tensor:
    """x, of which every unit must have been seen: `InputError` where that is not so."""
    if "x" not in target.data:
        raise InputError(
            f"Of {describe(target.program)} log p(x) is known, and x is not among the data: {[*target.data]}."
        )
    x = target.data["x"]
    check_finite("Site 'x'", x)
    return x


def log_partition(couplings: Couplings, max_units: int = 25, update: Update = silent) -> Tensor:
    """log Z, `()`: by visiting the states of the fewest units that make all others independent."""
    return log_sum(couplings, {}, list(couplings.sites), max_units, update)


def log_sum(
    couplings: Couplings, seen: dict[str, Tensor], free: list[str], max_units: int, update: Update = silent
) -> Tensor:
    """log of the sum of exp(-E) over the states of the layers `free`: `(rows,)`, or `()` where no layer is seen.

    Args:
        couplings: E.
        seen: values of all other layers, each `(rows, n_l)`.
        free: the layers to sum over.
        max_units: raise `InputError` where the states of more than these would be visited.
        update: is told how many states were visited.
    """
    visited = _visited(couplings, free)
    size = _size(couplings, visited)
    gaussian = [site for site in visited if site in couplings.scales]
    if gaussian:
        raise InputError(f"Layer {gaussian[0]!r} is Gaussian: its states cannot be enumerated.")
    if size > max_units:
        raise InputError(
            f"Enumeration would visit 2^{size} states of {', '.join(visited)}, and goes up to 2^{max_units}. Estimate "
            "log Z by AIS() instead."
        )
    rows = len(next(iter(seen.values()))) if seen else 1
    at_once = max(1, _AT_ONCE // rows)
    parts = []
    for first in range(0, 2**size, at_once):
        several = states(size, first, min(at_once, 2**size - first)).to(couplings.biases[couplings.sites[0]])
        state = _by_layer(couplings, visited, several.repeat_interleave(rows, 0))
        state |= {site: value.repeat(len(several), 1) for site, value in seen.items()}
        log_weights = -couplings.free_energy(state).expand(len(several) * rows)
        parts.append(log_weights.reshape(-1, rows).logsumexp(0))
        update((first + len(several)) * rows)
    total = torch.stack(parts).logsumexp(0)
    return total if seen else total[0]


def num_visited(couplings: Couplings, free: list[str]) -> int:
    """Units whose states `log_sum` visits."""
    return _size(couplings, _visited(couplings, free))


def states(size: int, first: int = 0, count: int | None = None) -> Tensor:
    """Rows `first .. first + count - 1` of the states of binary units, in the order of counting: `(count, size)`."""
    numbers = torch.arange(first, first + (2**size if count is None else count))
    return (numbers[:, None] >> torch.arange(size - 1, -1, -1)) & 1


def _visited(couplings: Couplings, free: list[str]) -> list[str]:
    """The free layers whose states are visited: all but the largest group of free layers that are independent."""
    inside = [site for site in free if (site, site) in couplings.weights]
    groups = [[site for site in group if site in free and site not in inside] for group in couplings.colours]
    summed = max(
        groups, key=lambda group: (any(s in couplings.scales for s in group), _size(couplings, group))
    )
    return [site for site in free if site not in summed]


def _size(couplings: Couplings, sites: list[str]) -> int:
    return sum(len(couplings.biases[site]) for site in sites)


def _by_layer(couplings: Couplings, sites: list[str], rows: Tensor) -> dict[str, Tensor]:
    sizes = [len(couplings.biases[site]) for site in sites]
    return dict(zip(sites, rows.split(sizes, dim=1), strict=True)) if sites else {}


def example() -> Enumeration:
    """Up to 2^25 states."""
    return Enumeration()
