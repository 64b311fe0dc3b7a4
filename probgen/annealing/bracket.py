"""log Z between the estimates of runs that came to it from both sides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_ESS, _LEAST_SHARE = 10, 0.1  # runs that carry the weight, and of all runs
_GAP, _ERRORS = 1.0, 3  # nats between the two estimates; how far they may lie in the wrong order
_DRIFT, _CERTAIN = (
    5.0,
    6,
)  # nats that runs at beta = 1 may still gain, and of how many standard errors to be sure


@dataclass(frozen=True)
class Bracket:
    """log Z from both sides: E[forward] <= log Z <= E[reverse]; of a program with latents log p(x) of each row.

    Args:
        betas: of points on the way, from 0 to 1, `(points,)`.
        forward_paths: log Z_0 and what each run from p_0 to p_1 had gained by then, `(points, runs)` or
            `(points, runs, rows)`.
        reverse_paths: log Z_0 and what each run from p_1 to p_0 had yet to lose then.

    >>> paths = torch.tensor([[0.0, 0.0], [4.9, 5.1]])
    >>> print(Bracket(torch.tensor([0.0, 1.0]), paths, paths + 0.2))
    log Z between 5.005 +- 0.100 and 5.195 +- 0.100
    """

    betas: Tensor
    forward_paths: Tensor
    reverse_paths: Tensor

    @property
    def log_weights(self) -> Tensor:
        """Of the forward runs, log Z_0 included: `(runs,)` or `(runs, rows)`."""
        return self.forward_paths[-1]

    @property
    def reverse_log_weights(self) -> Tensor:
        """Of the reverse runs."""
        return self.reverse_paths[-1]

    @property
    def forward(self) -> Tensor:
        """log of the mean weight of the forward runs in nats, `()` or `(rows,)`."""
        return log_mean(self.log_weights)

    @property
    def forward_error(self) -> Tensor:
        """Its standard error."""
        return log_mean_error(self.log_weights)

    @property
    def reverse(self) -> Tensor:
        """Minus the log of the mean inverse weight of the reverse runs in nats, `()` or `(rows,)`."""
        return -log_mean(-self.reverse_log_weights)

    @property
    def reverse_error(self) -> Tensor:
        """Its standard error."""
        return log_mean_error(-self.reverse_log_weights)

    @property
    def ess(self) -> Tensor:
        """Forward runs that carry the weight: `()` or `(rows,)`."""
        return effective_runs(self.log_weights)

    @property
    def reason(self) -> str:
        """Why it should not be believed; "" if it may be."""
        return collapse(self.log_weights) or self._disorder() or collapse(-self.reverse_log_weights)

    def _disorder(self) -> str:
        gap, size = float((self.reverse - self.forward).mean()), self.forward.numel()
        error = float(torch.hypot(self.forward_error, self.reverse_error).square().sum().sqrt()) / size
        if gap < -_ERRORS * error:
            return (
                f"reverse runs end {-gap:.2g} nats, {-gap / error:.1f} standard errors, below forward runs: their "
                "starts were not at equilibrium; raise num_warmup"
            )
        if gap > _GAP:
            return f"forward and reverse runs are {gap:.1f} nats apart; raise num_temperatures"
        return ""

    def __str__(self) -> str:
        def told(value: Tensor, error: Tensor) -> str:
            return f"{float(value.mean()):.3f} +- {float(error.square().sum().sqrt()) / error.numel():.3f}"

        what = f"mean log p(x) of {len(self.forward)} data" if self.forward.ndim else "log Z"
        sides = (self.forward, self.forward_error), (self.reverse, self.reverse_error)
        return f"{what} between {' and '.join(told(*side) for side in sides)}"


def log_mean(log_weights: Tensor) -> Tensor:
    """log of the mean of weights over the runs, which stand first."""
    return log_weights.logsumexp(0) - math.log(len(log_weights))


def log_mean_error(log_weights: Tensor) -> Tensor:
    """Standard error of `log_mean`, by the delta method."""
    return (log_weights - log_mean(log_weights)).exp().std(0) / math.sqrt(len(log_weights))


def effective_runs(log_weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 over the runs, which stand first."""
    return 1 / log_weights.softmax(0).square().sum(0)


def collapse(log_weights: Tensor) -> str:
    """Why these weights should not be believed; "" if they may be.

    >>> collapse(torch.tensor([0.0, 0.0, -50.0, -50.0, -50.0]))
    'only 2.0 of 5 runs carry the weight; raise num_temperatures'
    """
    runs = len(log_weights)
    lost = int((~torch.isfinite(log_weights)).sum())
    if lost:
        return (
            f"{lost} of {log_weights.numel()} log weights are NaN or infinite: the energy is so where runs went. Is it "
            "bounded below?"
        )
    ess = effective_runs(log_weights).reshape(-1)
    least = max(min(_LEAST_ESS, runs / 2), _LEAST_SHARE * runs)
    poor = int((ess < least).sum())
    if poor:
        where = f" for {poor} of {len(ess)} data, at worst" if len(ess) > 1 else ""
        return f"only {float(ess.min()):.1f} of {runs} runs carry the weight{where}; raise num_temperatures"
    return ""
