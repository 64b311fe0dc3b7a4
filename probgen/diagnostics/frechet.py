"""How far apart are two sets of samples, seen through a network's features?"""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor

from probgen.core import Count, InputError, NonNegativeInt, check_arguments, check_finite


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}): squared 2-Wasserstein distance of fitted Gaussians.

    The trace of the root is the sum of the singular values of S_a^{1/2} S_b^{1/2}: only symmetric matrices have
    their roots taken, in float64. Finite samples of one law lie apart too: compare with `frechet_floor` at the
    same sample size.

    Args:
        features_a: (n, d), n >= 2, floating point: one row of features a sample.
        features_b: (m, d), m >= 2.

    Returns:
        The distance, in squared units of the features, >= 0.

    Raises:
        InputError: features that are not two matrices of as many columns, fewer than two rows, NaN or Inf.

    Source: Heusel 2017 (arXiv 1706.08500); Dowson and Landau 1982, Journal of Multivariate Analysis 12(3).

    >>> x = torch.randn(1000, 3)
    >>> round(frechet_distance(x, x + 2.0), 3)                            # three coordinates moved by 2
    12.0
    """
    check_arguments(frechet_distance, locals())
    a, b = (_check_features(features) for features in (features_a, features_b))
    if a.shape[1] != b.shape[1]:
        raise InputError(f"Both sets need the same features: got {a.shape[1]} and {b.shape[1]} columns.")
    root_a, root_b = _root(torch.cov(a.T)), _root(torch.cov(b.T))
    overlap = torch.linalg.svdvals(root_a @ root_b).sum()
    spread = root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return float((a.mean(0) - b.mean(0)).square().sum() + spread.clamp(min=0))


def frechet_floor(features: Tensor, seed: NonNegativeInt = 0, num_splits: Count = 5) -> float:
    """The Fréchet distance between two random halves of one data set, median over splits: what zero looks like.

    A generator is judged by frechet_distance(generated, half of the real data) / floor, with as many samples as
    half the data has; 1 is then as good as reality.

    Args:
        features: (n, d), n >= 4: features of real data.
        seed: of the splits.
        num_splits: how many, > 0.

    Returns:
        The median distance, >= 0.

    Raises:
        InputError: as for `frechet_distance`.

    >>> frechet_floor(torch.randn(2000, 3)) < 0.05
    True
    """
    check_arguments(frechet_floor, locals())
    features = _check_features(features)
    generator = torch.Generator().manual_seed(seed)
    half = len(features) // 2
    splits = [torch.randperm(len(features), generator=generator) for _ in range(num_splits)]
    return median(frechet_distance(features[rows[:half]], features[rows[half : 2 * half]]) for rows in splits)


def example() -> float:
    """The distance of N(0, I) and N(1, 4 I) in two dimensions, 2 + 2, up to sampling error."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 10_000, 2, generator=generator)
    return frechet_distance(a, 1 + 2 * b)


def _check_features(features: Tensor) -> Tensor:
    if features.dim() != 2 or min(features.shape) < 1 or len(features) < 2:
        raise InputError(
            f"Features must be a matrix (at least 2 samples, features), got shape {tuple(features.shape)}. "
            "Flatten each sample, or take a network's features of it."
        )
    check_finite("features", features)
    return features.detach().double()


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance, rounding errors below zero cut off."""
    covariance = torch.atleast_2d(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
