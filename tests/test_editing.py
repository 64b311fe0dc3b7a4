"""Editing by a fitted program: strokes, and one data set as another, against laws that are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from probgen import (
    VP,
    FlowMatching,
    GaussianMixture,
    InputError,
    ProbabilityFlowODE,
    SDEdit,
    UnsupportedError,
    infer,
)
from probgen.nets import TimeMLP

DRAWS = 4000


def gaussian(loc: list[float], scale: float) -> GaussianMixture:
    locs = torch.tensor([loc], dtype=torch.float64)
    covariance = scale**2 * torch.eye(len(loc), dtype=torch.float64)[None]
    return GaussianMixture(torch.ones(1, dtype=torch.float64), locs, covariance, VP())


@pytest.mark.parametrize("start", [0.2, 0.5, 0.9])
def test_strokes_have_the_law_of_a_noised_guide_denoised(start: float) -> None:
    """For N(0, I): mean alpha^2 guide, variance sigma^2 (1 + alpha^2), to 4.5 standard errors (0.07 sd, 5 % of sd)."""
    guide = torch.tensor([2.0, -1.0], dtype=torch.float64)
    x = infer(gaussian([0.0, 0.0], 1.0), SDEdit(guide, start=start, steps=400), num_draws=DRAWS, seed=0)["x"][
        0
    ]
    t = torch.tensor([start], dtype=torch.float64)
    alpha2, sigma2 = VP().alpha(t).square(), VP().sigma(t).square()

    def worst(x: Tensor) -> float:
        mean_z = (x.mean(0) - alpha2 * guide) / (x.std(0) / math.sqrt(DRAWS))
        sd_z = (x.std(0) / (sigma2 * (1 + alpha2)).sqrt() - 1) * math.sqrt(2 * DRAWS)
        return float(torch.cat([mean_z, sd_z]).abs().max())

    assert worst(x) < 4.5
    assert worst(x + 0.1) > 4.5
    assert worst(alpha2 * guide + 1.1 * (x - alpha2 * guide)) > 4.5


def test_strokes_do_not_depend_on_the_batch() -> None:
    engine = SDEdit(torch.ones(2, dtype=torch.float64), start=0.3, steps=10)
    mixture = GaussianMixture.example()
    whole = infer(mixture, engine, num_draws=5)["x"]
    parts = infer(mixture, SDEdit(engine.guide, start=0.3, steps=10, batch_size=2), num_draws=5)["x"]
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-10)


def test_guides_that_do_not_fit_are_refused() -> None:
    mixture = GaussianMixture.example()
    with pytest.raises(InputError, match="shape of one datum"):
        infer(mixture, SDEdit(torch.ones(3)), num_draws=1)
    with pytest.raises(InputError, match="guide holds 1 NaN"):
        SDEdit(torch.tensor([0.0, math.nan]))
    with pytest.raises(InputError, match=r"start must lie in \(0, 1\]"):
        SDEdit(torch.ones(2), start=1.5)
    with pytest.raises(InputError, match="the times of the process"):
        infer(mixture, SDEdit(torch.ones(2), start=1e-5), num_draws=1)


def test_translation_maps_one_gaussian_to_another() -> None:
    """x -> m' + s'/s (x - m), and back again; the noise still knows the means by alpha(1) = 0.0066."""
    one, other = gaussian([1.0, -2.0], 0.5), gaussian([-1.0, 0.3], 1.5)
    engine = ProbabilityFlowODE(steps=100)
    x = torch.tensor([[1.2, -1.7], [0.4, -2.9]], dtype=torch.float64)
    found = engine.translate(one, other, x)
    torch.testing.assert_close(found, other.mean + 3.0 * (x - one.mean), rtol=0, atol=4 * 0.0066)
    torch.testing.assert_close(engine.translate(other, one, found), x, rtol=1e-4, atol=1e-4)


def test_translation_needs_noise_it_knows() -> None:
    flow = FlowMatching(TimeMLP((2,), width=8, num_blocks=1), p_init=torch.randn(10, 2))
    with pytest.raises(UnsupportedError, match="translate needs Gaussian noise"):
        ProbabilityFlowODE().translate(flow, flow, torch.zeros(1, 2))
