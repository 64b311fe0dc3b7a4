"""Flow matching: the velocity's law, pairs of every kind, and where it is a diffusion."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from probgen import (
    VP,
    Ancestral,
    Batch,
    FlowLaw,
    FlowMatching,
    GaussianMixture,
    InputError,
    Labels,
    Optim,
    ProbabilityFlowODE,
    ReverseSDE,
    TimeMLP,
    UnsupportedError,
    fit,
    infer,
)
from probgen.core import Coupled, Diffusion, Flow, Predicting
from probgen.objectives.conditional_flow_matching import ConditionalFlowMatching
from probgen.processes import VE, OTPath
from probgen.randomness import forked_rng
from statistics_tools import ALLOWED_Z, z_of_mean

DIM = 2
LOC = torch.tensor([0.7, -0.4], dtype=torch.float64)
ROOT = torch.tensor([[0.8, 0.0], [0.5, 0.3]], dtype=torch.float64)


class Gaussian(nn.Module):
    """The exact velocity E[x_1 - x_0 | x_t] for data N(LOC, ROOT ROOT') and noise N(0, I), finite at both ends."""

    event_shape = (DIM,)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        eye, s, time = torch.eye(DIM, dtype=x.dtype), ROOT @ ROOT.mT, t[:, None, None]
        variance = (1 - time) ** 2 * s + time**2 * eye
        centred = torch.linalg.solve(variance, (x - (1 - t[:, None]) * LOC)[..., None])
        return (time * centred - (1 - time) * s @ centred)[..., 0] - LOC


def network(**options: Any) -> TimeMLP:
    return TimeMLP((DIM,), width=16, num_blocks=1, **options)


def rows(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pairs(coupling: Any, batch: Batch) -> Tensor:
    """Partners of the same noise, however coupled."""
    flow = FlowMatching(network(), coupling=coupling)
    with forked_rng(1):
        return flow.couple(batch)


# --- the flow -----------------------------------------------------------------------------------------------------


def test_the_law_is_exact_for_gaussian_data() -> None:
    """From t = 1 to t = 0, both included: the density of the data themselves, within the solver's 1e-5."""
    flow, x = FlowMatching(Gaussian()), LOC + rows(20) @ ROOT.mT
    expected = dist.MultivariateNormal(LOC, scale_tril=ROOT).log_prob(x)
    torch.testing.assert_close(FlowLaw(flow).log_prob(x), expected, rtol=0, atol=1e-5)
    assert flow.span() == (0.0, 1.0)
    assert isinstance(flow, Flow) and isinstance(flow, Predicting) and isinstance(flow, Coupled)  # noqa: PT018


def test_it_is_the_diffusion_that_it_says() -> None:
    """x0hat = x_t - t u, against the posterior mean."""
    flow, x, t = FlowMatching(Gaussian()), rows(10), torch.full((1,), 0.3, dtype=torch.float64)
    s = ROOT @ ROOT.mT
    gain = 0.7 * s @ torch.linalg.inv(0.49 * s + 0.09 * torch.eye(DIM))
    torch.testing.assert_close(flow.denoise(x, t), LOC + (x - 0.7 * LOC) @ gain.mT)
    torch.testing.assert_close(flow.denoise(x, t), x - 0.3 * flow.velocity(x, t))


def test_paths_whose_noise_grows_like_a_root_start_later() -> None:
    assert FlowMatching(network(), VP()).span() == (VP().t_min, 1.0)
    assert FlowMatching(network(), VE()).span() == (0.0, 1.0)
    assert FlowMatching(network(), VE(sigma_max=3.0)).initial().log_prob(torch.zeros(1, 1)).exp().item() == (
        pytest.approx(1 / (3 * (2 * torch.pi) ** 0.5))
    )


def test_the_rate_of_the_straight_path_is_exact_at_its_ends() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(OTPath().sigma_rate(t), torch.ones(3))
    torch.testing.assert_close(VP().sigma_rate(t[1:]), VP().variance_rate(t[1:]) / (2 * VP().sigma(t[1:])))


# --- pairs --------------------------------------------------------------------------------------------------------


def test_optimal_pairs_are_those_of_brute_force() -> None:
    x_0 = rows(5)
    x_1, independent = (pairs(coupling, Batch({"x": x_0})) for coupling in ("ot", "independent"))
    orders = list(permutations(range(5)))
    costs = [(x_0 - independent[list(order)]).square().sum() for order in orders]
    best = orders[int(torch.stack(costs).argmin())]
    assert best != (0, 1, 2, 3, 4)
    assert torch.equal(x_1, independent[list(best)])


LABELS = torch.arange(40) % 2


@pytest.mark.parametrize("c", [LABELS, LABELS[:, None] * 1.0, torch.stack((LABELS * 1.0, LABELS * 2.0), 1)])
def test_optimal_pairs_keep_to_their_condition(c: Tensor) -> None:
    """Each class keeps its own noise, or noise would tell of the class; without conditions they exchange it."""
    x_0 = torch.zeros(40, DIM, dtype=torch.float64)
    x_0[::2] = 5.0
    noise = pairs("independent", Batch({"x": x_0}))[::2].sum(1).sort().values
    kept = pairs("ot", Batch({"x": x_0}, condition=c))[::2].sum(1).sort().values
    exchanged = pairs("ot", Batch({"x": x_0}))[::2].sum(1).sort().values
    assert torch.equal(kept, noise)
    assert not torch.equal(exchanged, noise)


@pytest.mark.parametrize("missing", [torch.full((40,), -1), torch.full((40, 1), torch.nan)])
def test_missing_conditions_are_alike(missing: Tensor) -> None:
    batch = Batch({"x": rows(40)})
    assert torch.equal(pairs("ot", replace(batch, condition=missing)), pairs("ot", batch))


def test_given_pairs_stay_together() -> None:
    x_1 = rows(10).float()
    flow = FlowMatching(network(), p_init=x_1, paired=True)
    index = torch.tensor([7, 2, 2])
    found = flow.couple(Batch({"x": torch.zeros(3, DIM)}, index=index, total=10))
    assert torch.equal(found, x_1[index])
    assert torch.equal(flow.couple(Batch({"x": torch.zeros(10, DIM)})), x_1)


def test_noise_may_be_a_data_set() -> None:
    """Rows at random, each as likely (chi-squared of 6,000 draws over 3 rows), the same for a draw in any batch."""
    data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    flow = FlowMatching(network(), p_init=data)
    with forked_rng(3):
        found = flow.couple(Batch({"x": torch.zeros(6000, DIM)}))[:, 0]
    for value in range(3):
        assert abs(z_of_mean((found == value).double(), 1 / 3)) < ALLOWED_Z
    draws = infer(flow, ProbabilityFlowODE(steps=2), num_draws=20)["x"]
    assert torch.equal(draws, infer(flow, ProbabilityFlowODE(steps=2, batch_size=7), num_draws=20)["x"])
    with pytest.raises(UnsupportedError, match="no density"):
        FlowLaw(flow).log_prob(torch.zeros(1, DIM))


def test_noise_may_be_a_program() -> None:
    """Drawn from it, scored by it, left as it is; also while another program is running."""
    mixture = GaussianMixture.example(DIM)
    flow = FlowMatching(Gaussian(), p_init=mixture)
    with forked_rng(4):
        x_1 = flow.couple(Batch({"x": torch.zeros(4000, DIM, dtype=torch.float64)}))
    white = (x_1 - mixture.mean) @ torch.linalg.inv(torch.linalg.cholesky(mixture.covariance)).mT
    assert max(abs(z_of_mean(part)) for part in white.T) < ALLOWED_Z
    assert torch.equal(flow.initial().log_prob(x_1), mixture.log_prob(x_1))
    assert infer(flow, Ancestral(), num_draws=3)["x"].shape == (1, 3, DIM)

    class Nameless(nn.Module):
        event_shape = (DIM,)

        def model(self, batch: Batch) -> None:
            with batch.plate():
                pyro.sample("x", dist.Laplace(torch.zeros(DIM), 1.0).to_event(1))

    with pytest.raises(UnsupportedError, match="Nameless"):
        FlowLaw(FlowMatching(network(), p_init=Nameless())).log_prob(torch.zeros(1, DIM))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"coupling": "ot"}, "depend on the data"), ({"p_init": torch.zeros(3, DIM)}, "a data set of 3 rows")],
)
def test_what_is_no_diffusion_says_so(options: dict[str, Any], reason: str) -> None:
    flow = FlowMatching(network(), **options)
    assert isinstance(flow, Diffusion)
    with pytest.raises(UnsupportedError, match=reason):
        flow.process()
    support = ReverseSDE().supports(flow)
    assert not support
    assert reason in support.reason
    assert infer(flow, ProbabilityFlowODE(steps=2), num_draws=2)["x"].shape == (1, 2, DIM)


# --- fitted -------------------------------------------------------------------------------------------------------


def test_a_class_is_drawn_when_asked_for() -> None:
    """Two classes at -2 and 2, sd 0.3: the mean of each within 0.25, and of no class between them with both present."""
    generator = torch.Generator().manual_seed(5)
    c = torch.randint(2, (2000,), generator=generator)
    x = (4.0 * c - 2)[:, None] + 0.3 * torch.randn(2000, 1, generator=generator)
    with forked_rng(6):
        flow = FlowMatching(TimeMLP((1,), width=32, num_blocks=1, condition=Labels(2)), coupling="ot")
    fit(flow, x, ConditionalFlowMatching(), condition=c, num_steps=400, optim=Optim(lr=5e-3), progress=False)
    asked = torch.tensor([0, 1, -1])
    draws = infer(flow, ProbabilityFlowODE(steps=10), args=(asked,), num_draws=400)["x"][0, :, :, 0]
    torch.testing.assert_close(draws.mean(0)[:2], torch.tensor([-2.0, 2.0]), rtol=0, atol=0.25)
    assert 0.3 < (draws[:, 2] > 0).float().mean() < 0.7
    assert 0.2 < draws[:, 0].std() < 0.5


def test_a_flow_from_a_flow_leaves_it_as_it_was() -> None:
    """p_init has weights of its own: drawn from, never fitted, in the mode it was in."""
    first = FlowMatching(network())
    flow = FlowMatching(network(), p_init=first)
    before = [parameter.clone() for parameter in first.parameters()]
    own = [parameter.clone() for parameter in flow.network.parameters()]
    fit(flow, rows(20).float(), ConditionalFlowMatching(), num_steps=2, progress=False)
    assert all(torch.equal(*pair) for pair in zip(before, first.parameters(), strict=True))
    assert not all(torch.equal(*pair) for pair in zip(own, flow.network.parameters(), strict=True))
    assert first.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "sinkhorn"}, "Unknown coupling"),
        ({"paired": True}, "p_init as a data set"),
        ({"p_init": torch.zeros(4, DIM), "paired": True, "coupling": "ot"}, "exclude each other"),
        ({"p_init": torch.zeros(4, 3)}, r"event shape \(3,\)"),
        ({"p_init": "noise"}, "p_init must be a Program or a torch.Tensor"),
        ({"p_init": torch.zeros(4, DIM).to("meta")}, "p_init must be .*on meta"),
        ({"p_init": lambda: None}, "p_init must be a Program"),
        ({"p_init": torch.zeros(4, DIM), "path": VP()}, "ends in x_1"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowMatching(network(), **options)
