"""The parts of Markov chains: leapfrog and accept step, step size and metric, coordinates, starts, saved states."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from global_state import SETTINGS, STREAMS, unchanged
from probgen import SVI, InputError, Optim, Posterior, infer
from probgen.core import DataSets, Engine
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin
from probgen.kernels import (
    ChainState,
    Coordinates,
    Evaluate,
    InCoordinates,
    Metric,
    Point,
    StepSize,
    Tuning,
    accept,
    find_step_size,
    kinetic_energy,
    leapfrog,
    per_chain,
    per_set,
)
from probgen.kernels.schedule import windows
from probgen.kernels.spread import Spread
from probgen.randomness import forked_rng
from statistics_tools import ALLOWED_Z

Integrator = Callable[[Evaluate, Point, Tensor, Tensor], tuple[Point, Tensor]]


def normals(*shape: int, seed: int = 0) -> Tensor:
    with forked_rng(seed):
        return torch.randn(*shape, dtype=torch.float64)


def lopsided(x: Tensor) -> tuple[Tensor, Tensor]:
    """log p = -|x|^2/2 - (x_0 - x_1^2/2)^2/4 - log(1 + exp(x_2)): no symmetry hides a sign."""
    off = x[0] - x[1].square() / 2
    log_prob = -0.5 * x.square().sum(0) - 0.25 * off.square() - torch.nn.functional.softplus(x[2])
    bend = torch.stack([-0.5 * off, 0.5 * off * x[1], -torch.sigmoid(x[2])])
    return log_prob, bend - x


def gaussian(scale: Tensor) -> Evaluate:
    """log p of N(0, diag(scale^2)), scale `(dim, 1)` or `(dim, n)`."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        return -0.5 * (x / scale).square().sum(0), -x / scale.square()

    return evaluate


def at(evaluate: Evaluate, x: Tensor) -> Point:
    return Point(x, *evaluate(x))


def tuning(step_size: Tensor, dim: int) -> Tuning:
    return Tuning(step_size, Coordinates.identity(dim, step_size), torch.ones(()).to(step_size))


# --- leapfrog -----------------------------------------------------------------------------------------------------


def kick_then_drift(
    evaluate: Evaluate, point: Point, momentum: Tensor, step_size: Tensor
) -> tuple[Point, Tensor]:
    """Symplectic Euler: preserves volume, of order one, not reversible."""
    momentum = momentum + step_size * point.grad
    return at(evaluate, point.position + step_size * momentum), momentum


def explicit_euler(
    evaluate: Evaluate, point: Point, momentum: Tensor, step_size: Tensor
) -> tuple[Point, Tensor]:
    """Both from the old values: volume grows."""
    new = at(evaluate, point.position + step_size * momentum)
    return new, momentum + step_size * point.grad


def trajectory(
    integrator: Integrator, start: Tensor, momentum: Tensor, step_size: float, num_steps: int
) -> Any:
    """All energies, and where it ends."""
    point, energies = at(lopsided, start), []
    for _ in range(num_steps):
        energies.append(kinetic_energy(momentum) - point.log_prob)
        point, momentum = integrator(lopsided, point, momentum, torch.tensor(step_size, dtype=torch.float64))
    return torch.stack(energies), point, momentum


def return_error(integrator: Integrator, num_steps: int) -> float:
    """How far from its start a trajectory ends that is turned round."""
    start, momentum = normals(3, 20), normals(3, 20, seed=1)
    _, there, speed = trajectory(integrator, start, momentum, 0.1, num_steps)
    _, back, speed = trajectory(integrator, there.position, -speed, 0.1, num_steps)
    return float(torch.maximum((back.position - start).abs(), (speed + momentum).abs()).max())


@pytest.mark.parametrize("num_steps", [1, 10, 300])
def test_leapfrog_is_reversible(num_steps: int) -> None:
    assert return_error(leapfrog, num_steps) < 1e-12


def test_an_integrator_that_is_not_reversible_is_seen() -> None:
    assert return_error(kick_then_drift, 1) > 1e-3


def energy_slope(integrator: Integrator) -> float:
    """Slope of the log of the largest energy error over unit time against log step size."""
    steps = [0.1 * 2.0**-k for k in range(5)]
    start, momentum = normals(3, 50), normals(3, 50, seed=1)
    errors = []
    for step in steps:
        energies, _, _ = trajectory(integrator, start, momentum, step, round(1 / step) + 1)
        errors.append(float((energies - energies[0]).abs().amax(0).log().mean()))
    return (errors[-1] - errors[0]) / (math.log(steps[-1]) - math.log(steps[0]))


def test_energy_errors_of_leapfrog_are_of_second_order() -> None:
    assert abs(energy_slope(leapfrog) - 2) < 0.1
    assert abs(energy_slope(kick_then_drift) - 1) < 0.1


def volume_change(integrator: Integrator) -> float:
    """Largest |log det| of the Jacobian of one long step."""

    def step(state: Tensor) -> Tensor:
        x, p = state[:3, None], state[3:, None]
        point, momentum = integrator(lopsided, at(lopsided, x), p, torch.tensor(0.7, dtype=torch.float64))
        return torch.cat([point.position[:, 0], momentum[:, 0]])

    jacobians = [torch.autograd.functional.jacobian(step, normals(6, seed=seed)) for seed in range(5)]
    return float(torch.linalg.slogdet(torch.stack(jacobians)).logabsdet.abs().max())


def test_leapfrog_preserves_volume() -> None:
    assert volume_change(leapfrog) < 1e-12
    assert volume_change(explicit_euler) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_leapfrog_takes_a_step_size_for_each_chain(dtype: torch.dtype) -> None:
    start, momentum = normals(3, 4).to(dtype), normals(3, 4, seed=1).to(dtype)
    steps = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=dtype)
    together, _ = leapfrog(lopsided, at(lopsided, start), momentum, steps)
    for i, step in enumerate(steps):
        alone, _ = leapfrog(lopsided, at(lopsided, start[:, i : i + 1]), momentum[:, i : i + 1], step)
        torch.testing.assert_close(together.position[:, i : i + 1], alone.position)
    assert together.position.dtype == dtype


# --- accept -------------------------------------------------------------------------------------------------------

RATIOS = (-3.0, -1.0, -0.1, 0.0, 2.0)


def acceptance_z(accept_step: Callable[..., Any]) -> float:
    """The largest |z| of the share of chains that move, over proposals of several ratios."""
    n, worst = 100_000, 0.0
    old, new = (Point(*[torch.full((1, n), value)] * 3) for value in (0.0, 1.0))
    for k, ratio in enumerate(RATIOS):
        _, _, moved = accept_step(old, new, torch.full((n,), ratio), normals(2, n, seed=k))
        p = min(1.0, math.exp(ratio))
        worst = max(worst, abs(float(moved.double().mean()) - p) / math.sqrt(max(p * (1 - p), 1e-9) / n))
    return worst


def test_proposals_are_accepted_with_their_probability() -> None:
    """100,000 each: an error of 0.007 in a probability would be seen."""
    assert acceptance_z(accept) < ALLOWED_Z


def test_one_normal_where_two_are_needed_is_seen() -> None:
    def halved(old: Point, new: Point, log_ratio: Tensor, noise: Tensor) -> Any:
        return accept(old, new, log_ratio, noise[:1])

    assert acceptance_z(halved) > 10 * ALLOWED_Z


def test_what_is_not_finite_is_never_accepted() -> None:
    n = 1000
    old, new = (Point(torch.full((2, n), v), torch.full((n,), v), torch.full((2, n), v)) for v in (0.0, 1.0))
    for ratio in (math.nan, -math.inf, math.inf):
        point, acceptance, moved = accept(old, new, torch.full((n,), ratio), normals(2, n))
        assert not bool(moved.any()), ratio
        assert not bool(acceptance.any()), ratio
        assert torch.equal(point.position, old.position)


def test_all_that_belongs_to_a_point_moves_with_it() -> None:
    old, new = (Point(torch.full((2, 2), v), torch.full((2,), v), torch.full((2, 2), v)) for v in (0.0, 1.0))
    point, acceptance, moved = accept(old, new, torch.tensor([50.0, -50.0]), torch.ones(2, 2))
    assert [moved.tolist(), point.log_prob.tolist()] == [[True, False], [1.0, 0.0]]
    assert torch.equal(point.grad, point.position)
    torch.testing.assert_close(acceptance, torch.tensor([1.0, math.exp(-50.0)]))


# --- step size ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_step_size_is_where_acceptance_crosses(dtype: torch.dtype) -> None:
    """Side by side for scales from 1e-4 to 1e4: accepted at 0.8 or more, and at less where it is twice as long."""
    sets, chains, dim = 9, 50, 10
    scale = per_chain(torch.logspace(-4, 4, sets, dtype=dtype)[None], sets * chains)
    evaluate = gaussian(scale)
    point = at(evaluate, normals(dim, sets * chains).to(dtype) * scale)
    momentum = normals(dim, sets * chains, seed=1).to(dtype)
    step = find_step_size(evaluate, point, momentum, sets)

    def acceptance(step: Tensor) -> Tensor:
        new, end = leapfrog(evaluate, point, momentum, step)
        change = new.log_prob - kinetic_energy(end) - point.log_prob + kinetic_energy(momentum)
        return per_set(change.clamp(max=0).exp(), sets).mean(0)

    assert bool((acceptance(step) > 0.8).all())
    assert bool((acceptance(2 * step) <= 0.8).all())
    assert step.dtype == dtype


def test_the_first_step_size_stops_before_a_wall() -> None:
    """A density that is NaN or minus infinity beyond |x| = 1: chains at 0.5 find a step that stays inside."""

    def walled(x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs().amax(0) < 1
        wall = torch.where(x[0] > 0, torch.nan, -torch.inf)
        return torch.where(inside, 0.0, wall), torch.zeros_like(x)

    start = torch.tensor([[0.5, -0.5]], dtype=torch.float64).repeat(1, 50)
    step = find_step_size(walled, at(walled, start), normals(1, 100), 2)
    assert bool(((step > 0.01) & (step < 1)).all())


def test_a_flat_density_has_no_step_size() -> None:
    def flat(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(x[0]), torch.zeros_like(x)

    with pytest.raises(InputError, match="improper"):
        find_step_size(flat, at(flat, normals(2, 8)), normals(2, 8, seed=1), 1)


def adapted(
    adapter: Any, acceptance: Callable[[Tensor], Tensor], first: Tensor, num_sets: int, num_steps: int = 400
) -> Tensor:
    """The step size an adapter ends with, where transitions are accepted with a known probability."""
    state = Point(first[None], first, first[None])
    now = adapter.begin(tuning(first, 1), num_sets)
    for step in range(num_steps):
        now = adapter.update(step, state, {"acceptance_rate": acceptance(now.step_size)}, now)
    return adapter.finish(now).step_size


def exponential_error(adapter: StepSize) -> float:
    """Where acceptance is exp(-eps/s), s = 1e-3, 1, 1e3 side by side: the worst log(eps / exact), begun 5 times off."""
    scale = per_chain(torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64), 12)
    exact = -scale * math.log(adapter.target)
    off = [
        (adapted(adapter, lambda eps: (-eps / scale).exp(), factor * exact, num_sets=3) / exact).log().abs()
        for factor in (0.2, 5.0)
    ]
    return float(torch.stack(off).max())


@pytest.mark.parametrize("target", [0.3, 0.574, 0.8, 0.9])
def test_dual_averaging_finds_where_acceptance_is_as_wanted(target: float) -> None:
    assert exponential_error(StepSize(target)) < 0.05


def test_a_step_size_that_follows_the_wrong_way_is_seen() -> None:
    class Backwards(StepSize):
        def update(self, step: int, state: Any, stats: Any, tuning: Tuning) -> Tuning:
            return super().update(step, state, {"acceptance_rate": 1 - stats["acceptance_rate"]}, tuning)

    assert exponential_error(Backwards(0.8)) > 1


def test_chains_on_their_own_have_their_own_step_sizes() -> None:
    """While `alone` each chain follows its own acceptance; afterwards they share one step size."""
    scale = torch.tensor([1e-2, 1.0, 1.0, 1e2], dtype=torch.float64)
    adapter = StepSize(0.8, alone=200)
    seen = []

    def acceptance(eps: Tensor) -> Tensor:
        seen.append(eps)
        return (-eps / scale).exp()

    step = adapted(adapter, acceptance, torch.ones_like(scale), num_sets=1, num_steps=400)
    assert float(seen[199][3] / seen[199][0]) > 1e3
    assert len(set(step.tolist())) == 1


@pytest.mark.parametrize("num_chains", [4, 256])
@pytest.mark.parametrize(
    "engine", [HMC(num_steps=4, num_warmup=400, metric="identity"), MALA(num_warmup=400)], ids=str
)
def test_acceptance_is_as_wanted_after_warm_up(engine: Any, num_chains: int) -> None:
    """On Gaussians of scales 1e-3, 1 and 1e3 side by side, each data set within 0.13 of the target."""
    posterior = infer(
        scaled,
        engine,
        data=DataSets({"scale": SCALES}),
        num_chains=num_chains,
        num_draws=800 // num_chains * 4,
    )
    found = posterior.stats["acceptance_rate"].double().mean((0, 1))
    assert bool(((found - engine.target_accept).abs() < 0.13).all()), found
    spread = (posterior["z"] / SCALES[:, None]).square().mean((0, 1, 3))
    assert bool(((spread - 1).abs() < 0.35).all()), spread


SCALES = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)


def scaled() -> None:
    """z ~ N(0, scale^2 I) in five dimensions, its scale observed."""
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=torch.float64), 10.0))
    pyro.sample("z", dist.Normal(0.0, scale.expand(5)).to_event(1))


def three(dtype: torch.dtype = torch.float64) -> Callable[[], None]:
    """A correlated Gaussian in three dimensions, given one observation."""

    def model() -> None:
        z = pyro.sample(
            "z",
            dist.Normal(torch.zeros(3, dtype=dtype), torch.tensor([0.1, 1.0, 10.0], dtype=dtype)).to_event(1),
        )
        pyro.sample("y", dist.Normal(z.sum(), 1.0))

    return model


THREE: dict[str, Any] = {"data": {"y": torch.tensor(1.0, dtype=torch.float64)}}


@pytest.mark.parametrize("num_chains", [4, 256])
@pytest.mark.parametrize("num_warmup", [1, 2, 5, 10, 20, 21, 40])
@pytest.mark.parametrize("metric", ["diagonal", "dense"])
def test_short_warm_ups_leave_chains_that_move(num_warmup: int, num_chains: int, metric: Any) -> None:
    for engine in (
        HMC(num_steps=4, num_warmup=num_warmup, metric=metric),
        MALA(num_warmup=num_warmup, metric=metric),
    ):
        posterior = infer(three(), engine, **THREE, num_chains=num_chains, num_draws=20)
        assert bool(torch.isfinite(posterior["z"]).all())
        assert float(posterior.stats["acceptance_rate"].mean()) > 0.1, (engine, posterior.run_stats)


# --- metric -------------------------------------------------------------------------------------------------------


def learnt(kind: Any, draws: Tensor, grads: Tensor, num_sets: int = 1) -> Tensor:
    """S from draws and gradients `(steps, dim, n)`, as at the end of the only window."""
    steps, dim, n = draws.shape
    metric = Metric(kind, 20)
    metric.first, metric.ends = 0, [steps]
    now = metric.begin(tuning(torch.ones(n, dtype=draws.dtype), dim), num_sets)
    for step in range(steps):
        point = Point(now.coordinates.to_x(draws[step]), draws[step, 0], now.coordinates.pull(grads[step]))
        now = metric.update(step, point, {}, now)
    return now.coordinates.scale


def correlated(seed: int, dim: int = 4) -> tuple[Tensor, Tensor]:
    """A covariance of scales 1e-2 .. 1e2 and strong correlations, with its Cholesky factor."""
    factor = torch.linalg.qr(normals(dim, dim, seed=seed)).Q @ torch.diag(
        torch.linspace(0.3, 2, dim).double()
    )
    scale = torch.logspace(-2, 2, dim, dtype=torch.float64)[:, None]
    covariance = (scale * factor) @ (scale * factor).mT
    return covariance, torch.linalg.cholesky(covariance)


def draws_of(factor: Tensor, steps: int, chains: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Draws and gradients of N(3, factor factor'), `(steps, dim, chains)` each."""
    z = normals(steps, len(factor), chains, seed=seed)
    return factor @ z + 3, -torch.linalg.solve_triangular(factor.mT, z, upper=True)


def test_the_dense_metric_learns_the_covariance() -> None:
    """From 40,000 draws: S S' in units of the truth is the identity to 0.03, sixfold the error of an entry."""
    covariance, factor = correlated(0)
    s = learnt("dense", *draws_of(factor, 100, 400))[0]
    white = torch.linalg.solve_triangular(factor, s, upper=False)
    torch.testing.assert_close(white @ white.mT, torch.eye(4, dtype=torch.float64), atol=0.03, rtol=0)


def test_the_diagonal_metric_learns_the_variances() -> None:
    """From 40,000 draws: to 3 %, fourfold the error."""
    covariance, factor = correlated(0)
    s = learnt("diagonal", *draws_of(factor, 100, 400))[:, 0]
    torch.testing.assert_close(s, covariance.diagonal().sqrt(), rtol=0.03, atol=0)


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_few_draws_give_scales(kind: Any, steps: int) -> None:
    """From 4 to 40 draws in 20 dimensions of scales 1e-3 to 1e3: positive definite, the smallest not 5 times off."""
    scale = torch.logspace(-3, 3, 20, dtype=torch.float64)
    s = learnt(kind, *draws_of(torch.diag(scale), steps, 4))
    factor = (s[0] if kind == "dense" else torch.diag(s[:, 0])) / scale[:, None]
    eigenvalues = torch.linalg.eigvalsh(factor @ factor.mT)
    assert float(eigenvalues.min()) > 1 / 25
    assert float(eigenvalues.max()) < 25


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
def test_each_data_set_learns_its_own_metric(kind: Any) -> None:
    """Side by side as apart, to rounding; chain i belongs to data set i mod 3."""
    parts = [draws_of(correlated(seed)[1], 5, 20, seed=seed) for seed in range(3)]
    draws, grads = (torch.stack(pair, -1).flatten(2) for pair in zip(*parts, strict=True))
    together = learnt(kind, draws, grads, num_sets=3)
    for i, (alone_draws, alone_grads) in enumerate(parts):
        alone = learnt(kind, alone_draws, alone_grads)
        torch.testing.assert_close(
            together[i] if kind == "dense" else together[:, i], alone[0] if kind == "dense" else alone[:, 0]
        )


@pytest.mark.parametrize("kind", ["diagonal", "dense"])
@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_lost_chains_do_not_count(kind: Any, lost: float) -> None:
    """Chains that turn NaN or infinite change nothing; a data set of which all are lost keeps what it had."""
    draws, grads = draws_of(correlated(1)[1], 6, 10)
    bad_draws, bad_grads = torch.cat([draws, draws], 2), torch.cat([grads, grads], 2)
    bad_draws[:, 1, 10:], bad_grads[:, 0, 10:] = lost, lost
    torch.testing.assert_close(learnt(kind, bad_draws, bad_grads), learnt(kind, draws, grads))
    one_set_lost = learnt(
        kind,
        bad_draws.unflatten(2, (2, 10)).transpose(2, 3).flatten(2),
        bad_grads.unflatten(2, (2, 10)).transpose(2, 3).flatten(2),
        num_sets=2,
    )
    kept = one_set_lost[1] if kind == "dense" else one_set_lost[:, 1]
    assert torch.equal(kept, torch.eye(4).double() if kind == "dense" else torch.ones(4).double())


def test_spread_is_that_of_all_draws_together() -> None:
    x = normals(30, 2, 5)
    known = (normals(30, 2, 1, seed=1) > -1).logical_and(torch.arange(30)[:, None, None] > 3)
    spread = Spread.none()
    for part, counted in zip(x.split(7), known.split(7), strict=True):
        spread = spread.and_(Spread.of(part, counted, dense=True))
    for i in range(2):
        torch.testing.assert_close(spread.covariance[i], x[known[:, i, 0], i].mT.cov())
    assert torch.equal(spread.number[:, 0].long(), known.sum((0, 2)))


@pytest.mark.parametrize("num_warmup", [0, 1, 5, 10, 19, 20, 21, 33, 100, 500, 1000, 12345])
def test_windows_divide_warm_up(num_warmup: int) -> None:
    """They ascend, the last is the longest, and steps are left to find a step size in the last coordinates."""
    ends = windows(num_warmup)
    lengths = [b - a for a, b in pairwise(ends)]
    assert all(length > 0 for length in lengths)
    assert bool(ends) == (num_warmup >= 20)
    if ends:
        assert num_warmup - ends[-1] >= min(10, num_warmup // 2)
        assert lengths == sorted(lengths)


# --- coordinates --------------------------------------------------------------------------------------------------


def all_coordinates(dtype: torch.dtype = torch.float64) -> dict[str, Coordinates]:
    """For 12 chains in three dimensions."""
    tril = torch.stack(
        [torch.linalg.cholesky(torch.eye(3) + torch.ones(3, 3) * k).to(dtype) for k in range(1, 5)]
    )
    scale = normals(3, 4).exp().to(dtype)
    return {
        "diagonal": Coordinates(scale[:, :1]),
        "diagonal, a set each": Coordinates(scale),
        "dense": Coordinates(tril[:1]),
        "dense, a set each": Coordinates(tril),
    }


@pytest.mark.parametrize("name", all_coordinates())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_have_inverses(name: str, dtype: torch.dtype) -> None:
    s, x = all_coordinates(dtype)[name], normals(3, 12).to(dtype)
    torch.testing.assert_close(s.to_x(s.to_u(x)), x)
    torch.testing.assert_close(s.push(s.pull(x)), x)
    assert s.to_u(x).dtype == dtype


@pytest.mark.parametrize("name", all_coordinates())
def test_gradients_are_pulled_as_autograd_does(name: str) -> None:
    s, x = all_coordinates()[name], normals(3, 12).requires_grad_()
    log_prob, grad = InCoordinates(s, lopsided)(x)
    (exact,) = torch.autograd.grad(log_prob.sum(), x)
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("name", [name for name in all_coordinates() if "each" in name])
def test_chain_i_has_the_coordinates_of_its_data_set(name: str) -> None:
    s, x = all_coordinates()[name], normals(3, 12)
    for i in range(12):
        scale = s.scale[i % 4][None] if s.is_dense else s.scale[:, i % 4, None]
        torch.testing.assert_close(s.to_u(x)[:, i : i + 1], Coordinates(scale).to_u(x[:, i : i + 1]))


# --- starts -------------------------------------------------------------------------------------------------------

ENGINES: list[Any] = [
    HMC(num_steps=3, num_warmup=30),
    HMC(num_steps=3, num_warmup=30, metric="dense"),
    MALA(num_warmup=30),
    ULA(step_size=0.002, num_warmup=10),
    UnderdampedLangevin(step_size=0.05, num_warmup=10),
]
SHORT: dict[str, Any] = {"num_chains": 6, "num_draws": 12}


def half_forbidden() -> None:
    """N(0, 1) where all three coordinates are positive, and nothing elsewhere."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
    pyro.factor("positive", torch.where((z > 0).all(-1), 0.0, -torch.inf))


def test_starts_are_found_where_most_of_space_is_forbidden() -> None:
    """A seventh of the starts is in the support: the others are drawn again, and those found stay."""
    posterior = infer(
        half_forbidden, HMC(num_steps=3, step_size=0.1, num_warmup=0), num_chains=200, num_draws=2
    )
    assert bool((posterior["z"] > 0).all())


def test_starts_do_not_depend_on_the_other_chains() -> None:
    engine = ULA(step_size=1e-12, num_warmup=0)
    few, many = (infer(three(), engine, **THREE, num_draws=1, num_chains=n)["z"] for n in (2, 9))
    torch.testing.assert_close(few, many[:2], rtol=1e-10, atol=1e-5)
    u = many / torch.tensor([1.0, 1.0, 1.0])
    assert float(u.abs().max()) < 2.001


def test_a_program_without_a_finite_start_is_refused_by_site() -> None:
    def nowhere() -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))
        pyro.factor("impossible", -torch.inf * a.exp())

    for engine in ENGINES:
        with pytest.raises(InputError, match="'impossible'.*100 random points"):
            infer(nowhere, engine, **SHORT)


def centred(values: Tensor) -> Posterior:
    """A posterior of `three` whose draws are given."""
    posterior = infer(three(), ENGINES[0], **THREE, **SHORT)
    posterior.draws["z"] = values
    return posterior


@pytest.mark.parametrize("first", [ENGINES[0], SVI(num_steps=20, optim=Optim(lr=0.01))], ids=str)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_chains_start_at_the_draws_of_other_engines(first: Engine, engine: Any) -> None:
    begun = infer(three(), first, **THREE, num_draws=20, num_chains=2, seed=3)
    posterior = infer(three(), engine, **THREE, **SHORT, init=begun)
    assert bool(torch.isfinite(posterior["z"]).all())


def test_starts_are_spread_over_the_draws_of_every_chain() -> None:
    """Of 2 chains of 10 draws: 2 chains begin at the last, 5 at these and at draws before; constrained sites too."""

    def model() -> None:
        pyro.sample("s", dist.LogNormal(torch.zeros((), dtype=torch.float64), 1.0))

    begun = infer(model, ENGINES[0], num_draws=10, num_chains=2)
    begun.draws["s"] = torch.arange(1.0, 21.0, dtype=torch.float64).reshape(2, 10)
    still = ULA(step_size=1e-20, num_warmup=0)
    for num_chains, expected in ((2, [10, 20]), (4, [10, 20, 5, 15]), (5, [10, 20, 7, 17, 4])):
        found = infer(model, still, num_draws=1, num_chains=num_chains, init=begun)["s"][:, 0]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_data_sets_start_at_their_own_draws() -> None:
    sets = DataSets({"scale": SCALES})
    begun = infer(scaled, MALA(num_warmup=50), data=sets, num_draws=10, num_chains=2)
    found = infer(
        scaled, ULA(step_size=1e-20, num_warmup=0), data=sets, num_draws=1, num_chains=2, init=begun
    )
    torch.testing.assert_close(found["z"][:, 0], begun["z"][:, -1])


def test_starts_that_do_not_fit_are_refused() -> None:
    cases = {
        "do not fit": torch.zeros(2, 10, 4, dtype=torch.float64),
        "not finite": torch.full((6, 10, 3), math.nan, dtype=torch.float64),
        "one each": torch.zeros(2, 2, 3, dtype=torch.float64),
    }
    for message, values in cases.items():
        with pytest.raises(InputError, match=message):
            infer(three(), ENGINES[0], **THREE, **SHORT, init=centred(values))
    other = centred(torch.zeros(6, 10, 3))
    other.draws = {"w": other["z"]}
    with pytest.raises(InputError, match="'z'"):
        infer(three(), ENGINES[0], **THREE, **SHORT, init=other)


# --- saved states -------------------------------------------------------------------------------------------------


def run(engine: Any, num_draws: int, **options: Any) -> Posterior:
    return infer(three(), engine, **THREE, num_draws=num_draws, num_chains=6, **options)


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_going_on_is_as_if_never_stopped(engine: Any, tmp_path: Path) -> None:
    """Bit by bit, from memory and from a file, whatever number of draws lies between."""
    whole = run(engine, 21)
    for first in (1, 10):
        part = run(engine, first)
        path = tmp_path / f"{first}.safetensors"
        part.state.save(path)
        for state in (part.state, ChainState.load(path)):
            rest = run(engine, 21 - first, state=state)
            assert torch.equal(rest["z"], whole["z"][:, first:])
            for name, values in rest.stats.items():
                assert torch.equal(values, whole.stats[name][:, first:]), name
            assert rest.cost.warmup_gradients == 0


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runs_are_repeatable_and_keep_to_themselves(engine: Any, dtype: torch.dtype) -> None:
    data = {"y": torch.tensor(1.0, dtype=dtype)}
    with unchanged(SETTINGS), unchanged(STREAMS):
        first, again, other = (
            infer(three(dtype), engine, data=data, **SHORT, seed=seed)["z"] for seed in (0, 0, 1)
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == dtype


def test_states_of_data_sets_go_on() -> None:
    sets = DataSets({"scale": SCALES})
    for engine in (HMC(num_steps=2, num_warmup=30), HMC(num_steps=2, num_warmup=30, metric="dense")):
        whole = infer(scaled, engine, data=sets, num_chains=2, num_draws=9)
        part = infer(scaled, engine, data=sets, num_chains=2, num_draws=4)
        rest = infer(scaled, engine, data=sets, num_draws=5, state=part.state)
        assert torch.equal(rest["z"], whole["z"][:, 4:])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    run(ENGINES[0], 3).state.save(path)
    return path


def other_file(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"kernel.position": torch.zeros(3, 6)}, path)


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "damaged"),
        (lambda content: content[:-1], "damaged"),
        (lambda content: content + b"x", "damaged"),
        (lambda content: b"", "damaged"),
        (lambda content: b"PK\x03\x04" + content, "damaged"),
        (lambda content: flipped(content, len(content) - 3), "damaged"),
        (lambda content: content.replace(b"num_steps=3", b"num_steps=9"), "damaged"),
        (lambda content: content.replace(b"chain state 1", b"chain state 7"), "damaged"),
    ],
)
def test_damaged_files_are_refused(damage: Any, message: str, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(damage(saved.read_bytes()))
    with pytest.raises(InputError, match=message):
        ChainState.load(path)


def test_files_that_are_no_states_are_refused(tmp_path: Path) -> None:
    other_file(tmp_path / "other")
    for path in (tmp_path / "other", tmp_path / "absent", tmp_path, "a\0b"):
        with pytest.raises(InputError):
            ChainState.load(path)


def test_a_failed_save_leaves_everything_as_it_was(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither half a file nor a part of one stays behind, and what was there is there still."""
    state = ChainState.load(saved)
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (tmp_path / "absent" / "state", folder, tmp_path / "a\0b", ".", "/"):
        with pytest.raises(InputError, match="could not be written"):
            state.save(path)
    path = tmp_path / "kept"
    path.write_text("precious")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="No space left"):
            state.save(path)
    assert path.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "kept"]
    state.save(path)
    assert ChainState.load(path).step == state.step


def two() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))


def test_states_that_do_not_fit_are_refused(saved: Path) -> None:
    state, hmc = ChainState.load(saved), ENGINES[0]
    with pytest.raises(InputError, match=r"that of HMC.*MALA cannot"):
        run(MALA(num_warmup=30), 3, state=state)
    with pytest.raises(InputError, match="holds 6 chains, asked for are 5"):
        infer(three(), hmc, **THREE, num_draws=3, num_chains=5, state=state)
    with pytest.raises(InputError, match="does not fit"):
        infer(two, hmc, num_draws=3, state=state)
    with pytest.raises(InputError, match="other observations"):
        infer(three(), hmc, data={"y": torch.tensor(1.01, dtype=torch.float64)}, num_draws=3, state=state)
    with pytest.raises(InputError, match="ChainState"):
        infer(three(), hmc, **THREE, num_draws=3, state=run(hmc, 3))
