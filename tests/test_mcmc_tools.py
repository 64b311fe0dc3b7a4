"""The verdicts on chains are tried on chains that are right and on chains made wrong on purpose."""

from __future__ import annotations

import math
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor

from location_and_scale import evaluate_by_hand, location_and_scale, simulate
from mcmc_tools import (
    Moments,
    geweke_z,
    max_r_hat,
    ranks,
    uniformity,
    worst_z,
    z_scores,
)
from statistics_tools import ALLOWED_Z

REFERENCE = Moments(mean=2.0, sd=0.5, ess=10_000)


def autoregression(num_chains: int, num_draws: int, correlation: float = 0.6) -> Tensor:
    """Stationary chains `(chain, draw)` with the moments of REFERENCE."""
    noise = torch.randn(num_draws, num_chains, dtype=torch.float64)
    states = [noise[0]]
    for step in noise[1:]:
        states.append(correlation * states[-1] + math.sqrt(1 - correlation**2) * step)
    return REFERENCE.mean + REFERENCE.sd * torch.stack(states, 1)


# --- z-scores -----------------------------------------------------------------------------------------------------


def test_z_scores_are_standard_normal() -> None:
    """Over 200 repetitions against references of as many draws, mean squares of z are 1 +- 4.5 errors."""
    scores = []
    for _ in range(200):
        other = REFERENCE.mean + REFERENCE.sd * torch.randn(1000, dtype=torch.float64)
        scores.append(
            z_scores(autoregression(4, 500), Moments(float(other.mean()), float(other.std()), 1000))
        )
    squares = torch.tensor(scores).square().mean(0)
    assert float((squares - 1).abs().max()) < ALLOWED_Z * math.sqrt(2 / 200)


def test_z_scores_see_a_wrong_chain() -> None:
    """4 x 1,000 draws of ESS about 1,000: an sd off by 20 % and a mean off by 0.3 sd stand out."""
    draws = autoregression(4, 1000)
    assert worst_z({"z": draws}, {"z": REFERENCE}).size < ALLOWED_Z
    for scale in (0.8, 1.2):
        worst = worst_z({"z": REFERENCE.mean + scale * (draws - REFERENCE.mean)}, {"z": REFERENCE})
        assert worst.size > ALLOWED_Z
        assert worst.name == "sd of z"
    assert worst_z({"z": draws + 0.3 * REFERENCE.sd}, {"z": REFERENCE}).name == "mean of z"


def test_z_scores_count_the_error_of_the_reference() -> None:
    draws = autoregression(4, 1000)
    shifted = Moments(REFERENCE.mean + 0.3 * REFERENCE.sd, REFERENCE.sd)
    assert worst_z({"z": draws}, {"z": shifted}).size > ALLOWED_Z
    assert worst_z({"z": draws}, {"z": shifted._replace(ess=50)}).size < ALLOWED_Z


def test_z_scores_miss_nothing() -> None:
    with pytest.raises(KeyError, match="w"):
        worst_z({"z": autoregression(4, 10)}, {"w": REFERENCE})
    broken = autoregression(4, 100)
    broken[0, 3] = math.nan
    assert worst_z({"z": broken}, {"z": REFERENCE}).size == math.inf


def test_r_hat_sees_chains_apart() -> None:
    draws = autoregression(4, 1000)
    apart = draws + torch.tensor([[0.0], [0.0], [0.0], [0.5 * REFERENCE.sd]])
    assert max_r_hat({"z": draws}) < 1.01 < max_r_hat({"z": draws, "w": apart})


# --- calibration --------------------------------------------------------------------------------------------------


def conjugate_ranks(
    scale: float = 1.0, shift: float = 0.0, num_sets: int = 1000, num_draws: int = 99
) -> Tensor:
    """z ~ N(0, 1), x | z ~ N(z, 1): ranks among draws of N(x/2 + shift, scale^2 / 2), right for scale 1, shift 0."""
    z = torch.randn(num_sets, dtype=torch.float64)
    x = z + torch.randn(num_sets, dtype=torch.float64)
    noise = torch.randn(num_draws, num_sets, dtype=torch.float64)
    return ranks(z, x / 2 + shift + scale * math.sqrt(0.5) * noise)


def test_ranks_of_exact_draws_are_uniform() -> None:
    """p-values are uniform themselves: of 200 about a tenth lies under 0.1, and none under 1e-4."""
    found = torch.tensor([uniformity(conjugate_ranks(), 99) for _ in range(200)])
    assert float(found.min()) > 1e-4
    share = (found < 0.1).double().mean(0)
    assert float((share - 0.1).abs().max()) < ALLOWED_Z * math.sqrt(0.1 * 0.9 / 200)


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_ranks_see_a_wrong_width(scale: float) -> None:
    """An sd off by 20 % fails with p < 1e-6, at every one of ten seeds."""
    assert max(uniformity(conjugate_ranks(scale), 99).width for _ in range(10)) < 1e-6


def test_ranks_see_a_shift() -> None:
    """Draws 0.3 sd off fail both tests that see any error."""
    assert max(uniformity(conjugate_ranks(shift=0.3 * math.sqrt(0.5)), 99)[:2]) < 1e-6


def test_ranks_run_from_none_to_all() -> None:
    draws = torch.arange(3.0)[:, None].expand(3, 2)
    assert ranks(torch.tensor([-1.0, 5.0]), draws).tolist() == [0, 3]
    with pytest.raises(AssertionError, match="ran away"):
        ranks(torch.tensor([-1.0, 5.0]), draws * math.nan)


# --- Geweke -------------------------------------------------------------------------------------------------------


def joint(num_chains: int) -> dict[str, Tensor]:
    z = torch.randn(num_chains, dtype=torch.float64)
    return {"z": z, "x": observe(z)}


def observe(z: Tensor) -> Tensor:
    return z + torch.randn_like(z)


def gibbs(scale: float, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An exact draw of z | x for scale 1; its sd off by the factor `scale` otherwise."""
    z = state["x"] / 2 + scale * math.sqrt(0.5) * torch.randn_like(state["x"])
    return {"z": z, "x": observe(z)}


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    z, x = state["z"], state["x"]
    return {"z": z, "z^2": z.square(), "z x": z * x}


def test_geweke_passes_an_exact_kernel() -> None:
    for _ in range(10):
        found = geweke_z(joint, partial(gibbs, 1.0), statistics, num_chains=2000, num_steps=10)
        assert found.size < ALLOWED_Z


@pytest.mark.parametrize("scale", [0.8, 1.2])
def test_geweke_sees_a_wrong_width(scale: float) -> None:
    found = geweke_z(joint, partial(gibbs, scale), statistics, num_chains=2000, num_steps=10)
    assert found.size > ALLOWED_Z
    assert found.name in ("z^2", "z x")


# --- the program by hand ------------------------------------------------------------------------------------------


def test_the_density_by_hand_is_that_of_the_program() -> None:
    """Differences between 50 points agree to 1e-5 (float32 laws), the gradient with autograd to 1e-10."""
    drawn = simulate(50)
    u = torch.stack([drawn.loc, drawn.scale.log()]).requires_grad_()
    value, grad = evaluate_by_hand(drawn.y, u)
    assert torch.allclose(torch.autograd.grad(value.sum(), u)[0], grad, rtol=1e-10)
    gaps = []
    for i in range(50):
        given = {"loc": drawn.loc[i], "scale": drawn.scale[i], "y": drawn.y[i]}
        trace = poutine.trace(pyro.condition(location_and_scale, given)).get_trace()
        gaps.append(float(trace.log_prob_sum() + given["scale"].log() - value[i].detach()))
    assert max(gaps) - min(gaps) < 1e-5
