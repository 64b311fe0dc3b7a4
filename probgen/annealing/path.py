"""A path of laws from one that can be drawn from to the one that is asked for, and runs along it.

    f_beta = f_0^(1 - beta) f_1^beta,    Z_beta = sum or integral of f_beta,    log Z_0 known, log Z_1 asked for

A run gains log f_beta'(x) - log f_beta(x) where beta becomes beta', at the x it stands at, and then moves by a
transition that leaves p_beta' as it is. The mean of exp(gains) is Z_1 / Z_0 whatever the transitions (Neal 2001).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
_POINTS = 100  # of a run that are kept for pictures


class Path(Protocol[State]):
    """Runs stand side by side; those of several rows of data in columns `run * rows + row`."""

    @property
    def log_partition(self) -> Tensor:
        """log Z_0 in nats: `()`, or one a row of the data, `(rows,)`."""

    def schedule(self, num_temperatures: int) -> list[float]:
        """beta from 0 to 1, `num_temperatures` steps."""

    def draw(self) -> State:
        """Independent draws of p_0."""

    def log_ratio(self, state: State, before: float, after: float) -> Tensor:
        """log f_after - log f_before where the runs stand, `(n,)`."""

    def move(self, state: State, beta: float) -> State:
        """After a transition that leaves p_beta as it is."""

    def take(self, state: State, index: Tensor) -> State:
        """Runs that begin where those of `index` `(n,)` stand."""


class Journey(NamedTuple):
    """Where runs ended, and what they had gained on the way.

    Args:
        state: of the path.
        betas: about a hundred on the way, the first and the last among them, `(points,)`.
        gained: nats of each run by then, `(points, n)`, float64.
    """

    state: Any
    betas: Tensor
    gained: Tensor


def travel(
    path: Path[State],
    state: State,
    betas: Sequence[float],
    tick: Callable[[], object] = lambda: None,
) -> Journey:
    """Take runs through these beta, upwards or downwards; `tick` is called after each of them."""
    every = max(1, (len(betas) - 1) // _POINTS)
    total, seen = torch.zeros((), dtype=torch.float64), [0]
    gained: list[Tensor] = []
    for step, (before, after) in enumerate(pairwise(betas), 1):
        total = total + path.log_ratio(state, before, after)
        state = path.move(state, after)
        if step % every == 0 or step == len(betas) - 1:
            seen.append(step)
            gained.append(total)
        tick()
    return Journey(
        state,
        torch.tensor([betas[step] for step in seen], dtype=torch.float64),
        torch.stack([torch.zeros_like(total), *gained]),
    )


def resampled(gained: Tensor, num_rows: int) -> Tensor:
    """Which runs to go on from, `(n,)`, each as often as its weight asks for: systematic, row by row.

    Runs whose weights are alike stay where they are.

    >>> resampled(torch.tensor([0.0, 0.0, 0.0]), num_rows=1)
    tensor([0, 1, 2])
    """
    weights = gained.reshape(-1, num_rows).softmax(0)
    num_runs = len(weights)
    ends = weights.cumsum(0).mT.contiguous()
    teeth = (torch.arange(num_runs, device=gained.device) + 0.5).to(ends) / num_runs
    run = torch.searchsorted(ends, teeth.expand(num_rows, -1).contiguous()).clamp(max=num_runs - 1)
    return (run * num_rows + torch.arange(num_rows, device=gained.device)[:, None]).mT.flatten()
