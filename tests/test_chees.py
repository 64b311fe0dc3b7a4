"""ChEES-HMC: the criterion it climbs, the lengths it finds, and the posteriors it draws."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen import DataSets, InputError, infer, summary
from probgen.inference.chees import ChEES, ChEESKernel, ChEESState, TrajectoryLength, example
from probgen.kernels import Coordinates, InCoordinates, Tuning

LOC = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
SCALE = torch.tensor([0.1, 1.0, 6.0], dtype=torch.float64)


def gaussian() -> None:
    pyro.sample("x", dist.Normal(LOC, SCALE).to_event(1))


def tuning(length: float, step_size: float, columns: int, dim: int) -> Tuning:
    one = torch.ones(columns, dtype=torch.float64)
    return Tuning(one * step_size, Coordinates.identity(dim, one), one[:1] * length)


def flow(origin: Tensor, momentum: Tensor, time: Tensor | float) -> tuple[Tensor, Tensor]:
    """The exact Hamiltonian flow of a standard normal law: a rotation."""
    time = torch.as_tensor(time, dtype=origin.dtype)
    cos, sin = time.cos(), time.sin()
    return cos * origin + sin * momentum, cos * momentum - sin * origin


def chees(end: Tensor, origin: Tensor) -> Tensor:
    """E[(|x' - E x'|^2 - |x - E x|^2)^2]/4 by its definition."""
    gain = [(x - x.mean(1, keepdim=True)).square().sum(0) for x in (end, origin)]
    return 0.25 * (gain[0] - gain[1]).square().mean()


def test_gradient_is_that_of_the_criterion() -> None:
    """d log(ChEES / T^0.2) / d log T of the same trajectories, by automatic differentiation, within 1 %.

    The estimator leaves out that the means move with T, which vanishes as 1/(number of chains).
    """
    generator = torch.Generator().manual_seed(0)
    origin, momentum = torch.randn(2, 3, 20_000, generator=generator, dtype=torch.float64)
    log_time = torch.tensor(math.log(0.9), dtype=torch.float64, requires_grad=True)
    end, _ = flow(origin, momentum, log_time.exp())
    (expected,) = torch.autograd.grad(chees(end, origin).log() - 0.2 * log_time, log_time)
    end, p = (value.detach() for value in flow(origin, momentum, 0.9))
    zero = torch.zeros(20_000, dtype=torch.float64)
    state = ChEESState(end, zero, end, origin, end, p, zero + 0.9)
    learner = TrajectoryLength(100)
    learner.begin(tuning(0.9, 0.1, 20_000, 3), 1)
    found = learner._gradient(state, {"acceptance_rate": zero + 1})
    assert found.shape == (1,)
    assert abs(float(found[0] - expected)) < 0.01 * abs(float(expected))


def test_gradient_ignores_trajectories_that_diverged() -> None:
    generator = torch.Generator().manual_seed(0)
    origin, momentum = torch.randn(2, 3, 1000, generator=generator, dtype=torch.float64)
    end, p = flow(origin, momentum, 0.9)
    time, accept = torch.full((1000,), 0.9, dtype=torch.float64), torch.ones(1000, dtype=torch.float64)
    learner = TrajectoryLength(100)
    learner.begin(tuning(0.9, 0.1, 1000, 3), 1)
    clean = learner._gradient(
        ChEESState(end[:, 1:], time[1:], end[:, 1:], origin[:, 1:], end[:, 1:], p[:, 1:], time[1:]),
        {"acceptance_rate": accept[1:]},
    )
    end[:, 0], accept[0] = math.nan, 0.0
    lost = learner._gradient(ChEESState(end, time, end, origin, end, p, time), {"acceptance_rate": accept})
    assert float((lost - clean).abs()) < 0.02


def test_length_found_is_that_of_the_best_rotation() -> None:
    """On N(0, I) and u uniform, E sin^2(uT) ~ ChEES; log of it less 0.2 log T is largest at T = 2.0 (quadrature)."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    lengths = torch.linspace(0.5, 4, 400, dtype=torch.float64)
    # For x, p ~ N(0, I) the gain of |x|^2 after a rotation by t has variance 4 dim sin(t)^2.
    value = (u * lengths[:, None]).sin().square().mean(1).log() - 0.2 * lengths.log()
    best = float(lengths[value.argmax()])

    def standard() -> None:
        pyro.sample("x", dist.Normal(torch.zeros(10, dtype=torch.float64), 1.0).to_event(1))

    posterior = infer(standard, ChEES(num_warmup=1000), num_draws=2, num_chains=200, seed=1)
    assert abs(math.log(float(posterior.run_stats["trajectory_length"][0]) / best)) < 0.35


@pytest.mark.parametrize("metric", ["diagonal", "dense", "identity"])
def test_chains_draw_the_exact_law(metric: str) -> None:
    """Means and variances of an asymmetric Gaussian, scales 0.1 to 6, within 4.5 errors; R-hat < 1.01."""
    posterior = infer(gaussian, ChEES(metric=metric), num_draws=400, num_chains=16, seed=2)  # type: ignore[arg-type]
    table = summary(posterior).table
    assert float(table["r_hat"].max()) < 1.01
    z = (torch.tensor(table["mean"].to_numpy()) - LOC) / torch.tensor(table["mcse_mean"].to_numpy())
    assert float(z.abs().max()) < 4.5
    z = (torch.tensor(table["sd"].to_numpy()) - SCALE) / torch.tensor(table["mcse_sd"].to_numpy())
    assert float(z.abs().max()) < 4.5


def test_data_sets_side_by_side_learn_their_own_scales() -> None:
    """Three means far apart, each found by its own chains within 0.2 (their sd is 0.7)."""

    def program() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1e3))
        with pyro.plate("n", 2):
            pyro.sample("y", dist.Normal(mu, 1.0))

    y = torch.stack([torch.zeros(2), torch.ones(2) * 5, torch.ones(2) * -300]).double()
    posterior = infer(program, ChEES(num_warmup=300), data=DataSets({"y": y}), num_draws=300, num_chains=8)
    assert posterior["mu"].shape == (8, 300, 3)
    error = (posterior["mu"].mean((0, 1)) - y.mean(1)).abs()
    assert float(error.max()) < 0.2


def test_steps_are_those_of_the_length() -> None:
    """ceil(u T / eps) gradients, u the same for all chains; never more than max_steps."""

    def standard(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * x.square().sum(0), -x

    kernel = ChEESKernel(max_steps=7)
    x = torch.zeros(3, 5, dtype=torch.float64)
    evaluate = InCoordinates(Coordinates.identity(3, x), standard)
    state = kernel.start(evaluate, x, torch.zeros(6, 5))
    for normal, length in ((0.0, 1.0), (1.0, 1.0), (-2.0, 1.0), (3.0, 50.0)):
        noise = torch.zeros(6, 5, dtype=torch.float64)
        noise[5] = normal
        uniform = 0.5 * math.erfc(-normal / math.sqrt(2))
        _, stats = kernel.step(evaluate, state, tuning(length, 0.2, 5, 3), noise)
        expected = min(7, max(1, math.ceil(uniform * length / 0.2)))
        assert stats["n_steps"].tolist() == [expected] * 5


def test_one_chain_is_refused() -> None:
    with pytest.raises(InputError, match="at least 2 for each data set"):
        infer(gaussian, ChEES(), num_draws=2, num_chains=1)


@pytest.mark.parametrize(
    "settings", [{"num_warmup": 0}, {"step_size": -1.0}, {"target_accept": 1.0}, {"max_steps": 0}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError):
        ChEES(**settings)  # type: ignore[arg-type]


def test_continuing_is_as_if_never_stopped() -> None:
    whole = infer(gaussian, example(), num_draws=20, num_chains=3)
    half = infer(gaussian, example(), num_draws=10, num_chains=3)
    rest = infer(gaussian, example(), num_draws=10, state=half.state)
    assert torch.equal(whole["x"][:, 10:], rest["x"])
