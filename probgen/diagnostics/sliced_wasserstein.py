"""How far apart are two sets of samples, seen along random directions?"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probgen.core import Count, InputError, NonNegativeInt, Within, check_arguments, check_finite

Array = npt.NDArray[np.float64]


class SlicedWasserstein(NamedTuple):
    """A distance beside the distances that samples of one law have.

    Args:
        distance: in standard deviations of a coordinate, >= 0.
        noise: the mean distance after samples were exchanged at random between the sets.
        z: log distance, in standard deviations of the log distances after exchange.
    """

    distance: float
    noise: float
    z: float

    def __str__(self) -> str:
        return (
            f"Sliced Wasserstein distance {self.distance:.3g} sd, noise {self.noise:.3g} (z = {self.z:+.1f})."
        )


def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    num_directions: Count = 50,
    num_permutations: Annotated[int, Within(10)] = 100,
    seed: NonNegativeInt = 0,
) -> SlicedWasserstein:
    """The mean over directions u on the sphere of W_1(u'a, u'b) = int |F_a(s) - F_b(s)| ds, in joint units.

    Finite samples of one law lie apart too: by how much is found by exchanging samples between the sets.

    Args:
        a, b: independent samples, `(n, d)` and `(m, d)`, n, m >= 2.
        num_directions: how many u.
        num_permutations: how many exchanges, >= 10.
        seed: of directions and exchanges.

    Returns a `SlicedWasserstein`. Raises `InputError` for samples that are not finite or have different d.

    Source: Rabin, Peyré, Delon & Bernot (2012), doi 10.1007/978-3-642-24785-9_37.

    >>> x = torch.randn(3, 500, 2, generator=torch.Generator().manual_seed(0))
    >>> found = sliced_wasserstein(x[0], x[1] + 1.0)
    >>> found.distance > 5 * found.noise, sliced_wasserstein(x[0], x[2]).z < 4.5
    (True, True)
    """
    check_arguments(sliced_wasserstein, locals())
    x = _standardised(a, b)
    rng = np.random.default_rng(seed)
    u = rng.normal(size=(x.shape[1], num_directions))
    slices = x @ (u / np.linalg.norm(u, axis=0))
    order = slices.argsort(0)
    steps = np.diff(np.take_along_axis(slices, order, 0), axis=0)
    share = np.where(np.arange(len(x)) < len(a), 1 / len(a), -1 / len(b))
    distance = _distance(share, order, steps)
    null = np.array([_distance(rng.permutation(share), order, steps) for _ in range(num_permutations)])
    logs = np.log(np.maximum(null, np.finfo(float).tiny))
    z = (np.log(max(distance, np.finfo(float).tiny)) - logs.mean()) / (logs.std() or 1.0)
    return SlicedWasserstein(distance, float(null.mean()), float(z))


def example() -> SlicedWasserstein:
    """Two sets with the same means and variances, of which one has correlated coordinates."""
    x = torch.randn(2, 1000, 2, generator=torch.Generator().manual_seed(0))
    correlated = torch.stack([x[0, :, 0], 0.8 * x[0, :, 0] + 0.6 * x[0, :, 1]], 1)
    return sliced_wasserstein(correlated, x[1])


def _distance(share: Array, order: npt.NDArray[np.int64], steps: Array) -> float:
    """Mean over directions of the integral of |F_a - F_b|; share is what each sample adds to the difference."""
    difference = share[order].cumsum(0)[:-1]
    return float((np.abs(difference) * steps).sum(0).mean())


def _standardised(a: Tensor, b: Tensor) -> Array:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(
            f"Both sets must be (n, d) with the same d and n >= 2, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    for name, value in (("a", a), ("b", b)):
        check_finite(f"Set {name}", value)
    x = torch.cat([a.detach().double().cpu(), b.detach().double().cpu()]).numpy()
    spread = x.std(0)
    return np.asarray((x - x.mean(0)) / np.where(spread > 0, spread, 1.0))
