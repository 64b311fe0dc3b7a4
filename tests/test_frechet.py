"""The Fréchet distance: closed forms, what it detects, a broken twin, bad features."""

import math

import pytest
import torch
from torch import Tensor

from probgen.core import InputError
from probgen.diagnostics.frechet import example, frechet_distance, frechet_floor


def with_moments(num_rows: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Rows whose sample mean and covariance are exactly these, so that closed forms hold to rounding."""
    x = torch.randn(num_rows, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return mean + (torch.linalg.cholesky(covariance) @ whitened).T


def random_covariance(size: int) -> Tensor:
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def by_general_eigenvalues(a: Tensor, b: Tensor) -> float:
    """The same formula by another way: tr (S_a S_b)^{1/2} = sum of roots of the eigenvalues of S_a S_b."""
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    overlap = torch.linalg.eigvals(cov_a @ cov_b).sqrt().sum().real
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap)


def test_gaussians_with_commuting_covariances_meet_the_closed_form():
    """Diagonal covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    mean_a, mean_b = torch.tensor([0.0, 1.0, -2.0]).double(), torch.tensor([0.5, 1.0, 1.0]).double()
    scale_a, scale_b = torch.tensor([1.0, 2.0, 0.1]).double(), torch.tensor([3.0, 0.5, 0.1]).double()
    a = with_moments(50, mean_a, scale_a.square().diag())
    b = with_moments(70, mean_b, scale_b.square().diag())
    wanted = float((mean_a - mean_b).square().sum() + (scale_a - scale_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-10)


def test_covariances_that_do_not_commute_meet_another_way_and_not_a_broken_twin():
    mean = torch.zeros(4, dtype=torch.float64)
    a, b = (with_moments(60, mean, random_covariance(4)) for _ in range(2))
    assert frechet_distance(a, b) == pytest.approx(by_general_eigenvalues(a, b), rel=1e-8)
    variances = torch.cov(a.T).diag(), torch.cov(b.T).diag()
    blind_to_correlation = float((variances[0].sqrt() - variances[1].sqrt()).square().sum())
    assert blind_to_correlation < 0.9 * frechet_distance(a, b)


def test_it_is_a_symmetric_distance_zero_at_equality():
    a, b = torch.randn(2, 100, 5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_rotations_leave_it_and_scales_square():
    a, b = torch.randn(2, 100, 5, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(3 * a, 3 * b) == pytest.approx(9 * frechet_distance(a, b), rel=1e-9)


def test_singular_covariances_and_float32_are_no_trouble():
    """More features than rows, constant columns; in float32 squares of 1e3 would leave errors of order 1."""
    a = torch.cat([1e3 + torch.randn(20, 40), torch.zeros(20, 3)], dim=1)
    assert frechet_distance(a, a + 1) == pytest.approx(43, rel=1e-4)
    assert frechet_distance(torch.zeros(2, 1), torch.ones(2, 1)) == pytest.approx(1)


@pytest.mark.parametrize(
    "spoil", [lambda x: x + 0.15, lambda x: 1.1 * x, lambda x: x[:, [0] * 16], lambda x: x[:50].repeat(10, 1)]
)
def test_the_floor_tells_reality_from_small_faults(spoil):
    """A shift of 0.15 sd, a scale of 1.1, lost directions, lost variety are seen; another true half is not."""
    data, more = torch.randn(1000, 16), torch.randn(500, 16)
    floor = frechet_floor(data)
    assert frechet_distance(more, data[:500]) < 1.5 * floor
    assert frechet_distance(spoil(more), data[:500]) > 1.5 * floor


def test_the_floor_repeats_with_its_seed_and_falls_as_data_grow():
    """The bias of n samples is of order 1/n: four times the rows, a quarter of the floor, to 30 %."""
    data = torch.randn(4000, 8)
    assert frechet_floor(data, seed=1) == frechet_floor(data, seed=1) != frechet_floor(data, seed=2)
    assert frechet_floor(data) / frechet_floor(data[:1000]) == pytest.approx(0.25, rel=0.3)


def test_the_floor_leaves_the_random_stream_alone():
    before = torch.random.get_rng_state()
    frechet_floor(torch.zeros(10, 2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_example_is_the_distance_it_says():
    """4 with a standard error of sqrt(2^2 * 2 * (1 + 4) / 10^4 + ...) = 0.08."""
    assert example() == pytest.approx(4, abs=4.5 * 0.08)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (torch.zeros(5), torch.zeros(5, 1), "got shape (5,)"),
        (torch.zeros(5, 2), torch.zeros(1, 2), "got shape (1, 2)"),
        (torch.zeros(5, 0), torch.zeros(5, 0), "got shape (5, 0)"),
        (torch.zeros(5, 2), torch.zeros(5, 3), "got 2 and 3 columns"),
        (torch.full((5, 2), math.nan), torch.zeros(5, 2), "10 NaN or Inf"),
    ],
)
def test_bad_features_are_refused_in_words(a, b, told):
    with pytest.raises(InputError) as error:
        frechet_distance(a, b)
    assert told in str(error.value)


def test_the_floor_of_what_has_no_rows_is_refused():
    with pytest.raises(InputError, match="at least 2 samples"):
        frechet_floor(torch.ones(()))
