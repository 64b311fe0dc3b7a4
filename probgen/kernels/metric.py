"""The metric: the scale of the posterior, learnt in windows during warm-up, as a change of coordinates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probgen.kernels.coordinates import Coordinates
from probgen.kernels.core import Point, Stats, Tuning, per_set
from probgen.kernels.schedule import early, windows
from probgen.kernels.spread import Spread

MetricKind = Literal["identity", "diagonal", "dense"]
_PRIOR_COUNT = 5.0  # draws that D counts for against the covariance


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
        self.kind: MetricKind = kind
        self.ends = [] if kind == "identity" else windows(num_warmup)
        self.first = early(num_warmup)
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
        self._draws = self._grads = Spread.none()
        return tuning

    def update(self, step: int, state: Point, stats: Stats, tuning: Tuning) -> Tuning:
        """Take in the draws of one transition; at the end of a window the coordinates change."""
        if self.ends and self.first <= step < self.ends[-1]:
            u = self._by_set(tuning.coordinates.to_u(state.position))
            grad = self._by_set(tuning.coordinates.push(state.grad))
            known = (torch.isfinite(u) & torch.isfinite(grad)).all(-1, keepdim=True)
            self._draws = self._draws.and_(Spread.of(u, known, dense=self.kind == "dense"))
            self._grads = self._grads.and_(Spread.of(grad, known))
        if step + 1 in self.ends:
            return tuning._replace(coordinates=self._coordinates(tuning.coordinates.scale))
        return tuning

    def finish(self, tuning: Tuning) -> Tuning:
        """Nothing is left to do."""
        return tuning

    def _by_set(self, columns: Tensor) -> Tensor:
        """`(dim, n)` -> `(chains, sets, dim)`, float64."""
        return per_set(columns.double(), self.num_sets).permute(1, 2, 0)

    def _coordinates(self, old: Tensor) -> Coordinates:
        """What was learnt; where a data set has taught nothing, what there was."""
        count = self._draws.number
        target = (self._draws.variance / self._grads.variance).sqrt()
        learnt = (count > 1) & (torch.isfinite(target) & (target > 0)).all(-1, keepdim=True)
        weight = _PRIOR_COUNT / (count + _PRIOR_COUNT)
        if self.kind != "dense":
            scale = ((1 - weight) * self._draws.variance + weight * target).sqrt()
            return Coordinates(torch.where(learnt, scale, old.mT).mT.to(old).contiguous())
        weight, learnt = weight[:, :, None], learnt[:, :, None]
        mixed = (1 - weight) * self._draws.covariance + weight * torch.diag_embed(target)
        factor = torch.linalg.cholesky(torch.where(learnt, mixed, torch.eye(mixed.shape[-1]).to(mixed)))
        return Coordinates(torch.where(learnt, factor.to(old), old))
