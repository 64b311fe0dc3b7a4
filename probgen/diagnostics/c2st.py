"""Can a classifier tell two sets of samples apart?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from torch import Tensor, nn

from probgen.core import InputError, NonNegativeInt, Within, check_arguments, check_finite
from probgen.randomness import forked_rng

_WIDTH, _STEPS, _RATE, _DECAY = 32, 60, 0.02, 0.01  # few steps, or it learns the samples by heart


@dataclass(frozen=True)
class C2ST:
    """How well a classifier does on samples it was not trained with; printed, a sentence.

    Args:
        accuracy: share told right, 1/2 where nothing tells them apart.
        num_samples: how many were told, of both sets together.
    """

    accuracy: float
    num_samples: int

    @property
    def standard_error(self) -> float:
        """Of the accuracy under equal laws, sqrt((1 + 2/pi)/(4 n))."""
        return math.sqrt((1 + 2 / math.pi) / (4 * self.num_samples))

    @property
    def z(self) -> float:
        """(accuracy - 1/2) / standard error."""
        return (self.accuracy - 0.5) / self.standard_error

    @property
    def p_value(self) -> float:
        """Probability of such an accuracy, or a higher one, under equal laws."""
        return 0.5 * math.erfc(self.z / math.sqrt(2))

    def __str__(self) -> str:
        return (
            f"A classifier tells {self.accuracy:.1%} +- {self.standard_error:.1%} of {self.num_samples:,} samples "
            f"right (p = {self.p_value:.2g}; 50 % where the laws are one)."
        )


def c2st(a: Tensor, b: Tensor, *, num_folds: Annotated[int, Within(2)] = 5, seed: NonNegativeInt = 0) -> C2ST:
    """The accuracy of a classifier between two sets of samples, on folds left out: classifier two-sample test.

    A network of two layers sees both sets in units of their joint spread. Under equal laws the accuracy on n samples
    has a variance of up to (1 + 2/pi)/(4 n), more than of n coins: samples that teach one another are right or wrong
    together. (For a kernel machine, right where y_i sum_j y_j k_ij > 0, margins i and j correlate by k_ij^2 / sum_l
    k_il^2, and signs by 2/pi of that.) What the classifier does not learn it does not find: a pass from few samples, or
    in many dimensions, says little.

    Args:
        a, b: independent samples, `(n, d)` and `(m, d)`; the larger set is cut at random to the size of the smaller.
        num_folds: each sample is told by the network trained on the others, >= 2.
        seed: of folds and initial weights; the same call gives the same accuracy.

    Returns a `C2ST`. Raises `InputError` for samples that are not finite, of different d, or fewer than 5 a fold.

    Source: Lopez-Paz & Oquab (2017), arXiv 1610.06545.

    >>> x = torch.randn(3, 500, 2, generator=torch.Generator().manual_seed(0))
    >>> print(c2st(x[0], x[1] + torch.tensor([0.0, 3.0])))
    A classifier tells 9... +- 2.0% of 1,000 samples right (p = ...; 50 % where the laws are one).
    >>> c2st(x[0], x[2]).p_value > 0.01
    True
    """
    check_arguments(c2st, locals())
    n = _check(a, b, num_folds)
    with forked_rng(seed):
        x, label = _shuffled(a, b, n)
        folds = (
            torch.arange(2 * n) % num_folds == torch.arange(num_folds)[:, None]
        )  # (fold, sample): held out
        nets = _train(x, label, ~folds)
        told = (nets(x) > 0) == label.bool()
    return C2ST(float(told[folds].double().mean()), 2 * n)


def example() -> C2ST:
    """Two sets with the same means and variances, of which one has correlated coordinates."""
    x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    correlated = torch.stack([x[0, :, 0], 0.8 * x[0, :, 0] + 0.6 * x[0, :, 1]], 1)
    return c2st(correlated, x[1])


class _Networks(nn.Module):
    """One network of two hidden layers for each fold, side by side: x `(n, d)` -> logits `(fold, n)`."""

    def __init__(self, num_folds: int, dim: int) -> None:
        super().__init__()
        sizes = (dim, _WIDTH, _WIDTH, 1)
        pairs = list(pairwise(sizes))
        self.weights = nn.ParameterList([torch.randn(num_folds, i, o) / math.sqrt(i) for i, o in pairs])
        self.biases = nn.ParameterList([torch.zeros(num_folds, 1, o) for _, o in pairs])

    def forward(self, x: Tensor) -> Tensor:
        h = x.expand(len(self.weights[0]), *x.shape)
        for weight, bias in zip(self.weights, self.biases, strict=True):
            h = torch.baddbmm(bias, h, weight)
            h = h if h.shape[-1] == 1 else nn.functional.silu(h)
        return h.squeeze(-1)


@torch.enable_grad()
def _train(x: Tensor, label: Tensor, kept: Tensor) -> _Networks:
    """Fit each network to the samples it may see, kept `(fold, sample)`."""
    nets = _Networks(len(kept), x.shape[1])
    optimiser = torch.optim.AdamW(nets.parameters(), lr=_RATE, weight_decay=_DECAY)
    for _ in range(_STEPS):
        losses = nn.functional.softplus(nets(x) * (1 - 2 * label))
        optimiser.zero_grad()
        (losses * kept).sum().div(kept[0].sum()).backward()
        optimiser.step()
    return nets.requires_grad_(False)


def _shuffled(a: Tensor, b: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n samples of each in random order and joint units, float32, and the labels 0 and 1."""
    both = torch.cat([part[torch.randperm(len(part))[:n]].detach().double().cpu() for part in (a, b)])
    spread = both.std(0)
    x = (both - both.mean(0)) / torch.where(spread > 0, spread, 1.0)
    order = torch.randperm(2 * n)
    return x[order].float(), (order >= n).float()


def _check(a: Tensor, b: Tensor, num_folds: int) -> int:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(
            f"Both sets must be (n, d) with the same d, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    for name, value in (("a", a), ("b", b)):
        check_finite(f"Set {name}", value)
    n = min(len(a), len(b))
    if 2 * n < 5 * num_folds:
        raise InputError(f"{2 * n} samples are too few for num_folds={num_folds}: there must be 5 in each.")
    return n
