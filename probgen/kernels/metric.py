"""The metric: the scale of the posterior, learnt in windows during warm-up, as a change of coordinates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probgen.core import InputError, did_you_mean
from probgen.kernels.adaptation import StepSize
from probgen.kernels.coordinates import Coordinates
from probgen.kernels.core import Adapter, Point, Stats, Tuning, per_set

MetricKind = Literal["identity", "diagonal", "dense"]
METRICS: tuple[MetricKind, ...] = ("identity", "diagonal", "dense")
_PRIOR_COUNT = 5.0  # draws that D counts for against the covariance
# Shares of warm-up: before the windows, after them, the first window.
_FIRST, _LAST, _WINDOW = 0.15, 0.1, 0.05
_FEWEST = 20  # transitions of warm-up, below which nothing can be learnt but a step size (Stan)
_AFTER = 10  # transitions that finding a step size in new coordinates takes at least


class Metric:
    """Learns coordinates u = S x from the chains and transitions of each window; windows double in length.

    S S' is the covariance C of N draws, or its diagonal, shrunk to a diagonal D that few draws tell as well as many,

        S S' = N/(N + 5) C + 5/(N + 5) D,   D_i^2 = var(u_i) / var(g_i),

    g the gradient of log p: on N(m, diag(s^2)) any two draws give D = diag(s^2), whatever its scale. D alone would make
    x most like a standard normal in Fisher divergence, but where a few directions are much longer than the rest it
    leaves them so, and trajectories that turn with the rest are too short for them. Each data set has its own.

    Args:
        kind: "diagonal", "dense" or "identity" (nothing is learnt).
        num_warmup: transitions of warm-up, which the windows divide; fewer than 20 teach nothing.

    Source: Stan reference manual, "Automatic parameter tuning"; D from Seyboldt, Carlson & Carpenter (2026), arXiv
    2603.18845.
    """

    def __init__(self, kind: MetricKind, num_warmup: int) -> None:
        check_metric(kind)
        self.kind: MetricKind = kind
        self.ends = [] if kind == "identity" else windows(num_warmup)
        self.first = int(_FIRST * num_warmup)
        self.num_sets = 1

    def begin(self, tuning: Tuning, num_sets: int) -> Tuning:
        """Nothing is known yet: the identity, in the shape of what will be learnt."""
        self.num_sets = num_sets
        scale = tuning.coordinates.scale
        if self.kind == "dense":
            scale = torch.eye(len(scale)).to(scale).expand(num_sets, -1, -1).contiguous()
        elif self.kind == "diagonal":
            scale = scale[:, :1].repeat(1, num_sets)
        return self.restart(tuning._replace(coordinates=Coordinates(scale)))

    def restart(self, tuning: Tuning) -> Tuning:
        """Forget the draws of the last window."""
        self._draws, self._grads = Spread(self.kind == "dense"), Spread(dense=False)
        return tuning

    def update(self, step: int, state: Point, stats: Stats, tuning: Tuning) -> Tuning:
        """Take in the draws of one transition; at the end of a window the coordinates change."""
        if self.ends and self.first <= step < self.ends[-1]:
            u = self._by_set(tuning.coordinates.to_u(state.position))
            grad = self._by_set(tuning.coordinates.push(state.grad))
            known = (torch.isfinite(u) & torch.isfinite(grad)).all(-1, keepdim=True)
            self._draws.take_in(u, known)
            self._grads.take_in(grad, known)
        if step + 1 in self.ends:
            return tuning._replace(coordinates=self._coordinates(tuning.coordinates.scale))
        return tuning

    def finish(self, tuning: Tuning) -> Tuning:
        """Nothing is left to do."""
        return tuning

    def _by_set(self, columns: Tensor) -> Tensor:
        """`(dim, n)` -> `(sets, chains, dim)`, float64."""
        return per_set(columns.double(), self.num_sets).permute(2, 1, 0)

    def _coordinates(self, old: Tensor) -> Coordinates:
        """What was learnt; where a data set has taught nothing, what there was."""
        count = self._draws.count
        target = (self._draws.variance() / self._grads.variance()).sqrt()
        learnt = (count > 1) & (torch.isfinite(target) & (target > 0)).all(-1, keepdim=True)
        weight = _PRIOR_COUNT / (count + _PRIOR_COUNT)
        if self.kind != "dense":
            scale = ((1 - weight) * self._draws.variance() + weight * target).sqrt()
            return Coordinates(torch.where(learnt, scale, old.mT).mT.to(old).contiguous())
        weight, learnt = weight[:, :, None], learnt[:, :, None]
        mixed = (1 - weight) * self._draws.covariance() + weight * torch.diag_embed(target)
        factor = torch.linalg.cholesky(torch.where(learnt, mixed, torch.eye(mixed.shape[-1]).to(mixed)))
        return Coordinates(torch.where(learnt, factor.to(old), old))


class Spread:
    """Mean and covariance of draws that arrive a few at a time (Welford 1962), for each data set.

    Args:
        dense: all of the covariance, or its diagonal alone.
    """

    def __init__(self, dense: bool) -> None:
        self.dense = dense
        self.count: Tensor = torch.zeros(1, 1)
        self._mean: Tensor | None = None

    def take_in(self, x: Tensor, known: Tensor) -> None:
        """Draws x `(sets, chains, dim)`, of which those count that are `known`, `(sets, chains, 1)`."""
        count = known.sum(1).to(x)
        held = torch.where(known, x, 0.0)
        mean = held.sum(1) / count.clamp(min=1)
        apart = torch.where(known, held - mean[:, None], 0.0)
        if self._mean is None:
            self.count, self._mean, self._scatter = count, mean, self._products(apart)
            return
        gap, total = mean - self._mean, (self.count + count).clamp(min=1)
        between = self._products((gap * (self.count * count / total).sqrt())[:, None])
        self._scatter = self._scatter + self._products(apart) + between
        self._mean = self._mean + gap * (count / total)
        self.count = self.count + count

    def covariance(self) -> Tensor:
        """`(sets, dim, dim)`, or its diagonal `(sets, dim)`."""
        degrees = (self.count - 1).clamp(min=1)
        return self._scatter / (degrees[:, :, None] if self.dense else degrees)

    def variance(self) -> Tensor:
        """`(sets, dim)`."""
        return self.covariance().diagonal(dim1=-2, dim2=-1) if self.dense else self.covariance()

    def _products(self, x: Tensor) -> Tensor:
        return x.mT @ x if self.dense else x.square().sum(1)


def windows(num_warmup: int) -> list[int]:
    """Transitions after which a window ends: each window twice as long as the last, the last takes what is left.

    >>> windows(1000)
    [200, 300, 500, 900]
    """
    if num_warmup < _FEWEST:
        return []
    first, last = int(_FIRST * num_warmup), num_warmup - max(_AFTER, int(_LAST * num_warmup))
    length, ends = max(1, int(_WINDOW * num_warmup)), []
    end = first
    while end < last:
        end = end + length
        if end + 2 * length > last:
            end = last
        ends.append(end)
        length *= 2
    return ends


def check_metric(kind: str) -> None:
    """Raise `InputError` for a metric that does not exist."""
    if kind not in METRICS:
        raise InputError(f"There is no metric {kind!r}; {did_you_mean(str(kind), METRICS)}")


def step_and_metric(
    step_size: float | None,
    target_accept: float,
    metric: MetricKind,
    num_warmup: int,
    adapter: type[StepSize] = StepSize,
) -> list[Adapter]:
    """What engines that accept adapt: the step size unless it is given, the metric unless it is the identity."""
    adapters: list[Adapter] = []
    if step_size is None:
        adapters.append(adapter(target_accept, alone=int(_FIRST * num_warmup)))
    if metric != "identity" and num_warmup:
        adapters.append(Metric(metric, num_warmup))
    return adapters
