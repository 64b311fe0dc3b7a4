"""Stochastic solvers: calls counted, strong orders against theory on one refinable path, Ito kept from Stratonovich."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchsde
from torch import Tensor

from probgen.core import Batch, InputError, NonFiniteWarning
from probgen.dynamics import (
    SDE_METHODS,
    AffineDenoiser,
    ClockedField,
    family_field,
    fields,
    integrate_sde,
    solve_sde,
    trajectories,
)
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import VE, VP, OTPath, Process, Schedule, as_grid
from probgen.randomness import BrownianPath, BrownianSteps, Noise, forked_rng
from statistics_tools import z_of_mean

CALLS = {"euler": 1, "heun": 2, "srk": 2}
STRONG_ORDER = {"euler": 1.0, "heun": 1.0, "srk": 1.5}  # additive noise


class Still:
    """No noise at all, at no cost."""

    def increment(self, a: float, b: float) -> Tensor:
        return torch.zeros(1, 1)

    def increment_and_area(self, a: float, b: float) -> tuple[Tensor, Tensor]:
        return torch.zeros(1, 1), torch.zeros(1, 1)


def counted_field(steps: int) -> tuple[ClockedField, list[float]]:
    """dx/dt = x on t in [0, 1], which keeps the times it was asked at."""
    asked: list[float] = []

    def output(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return x

    def drift(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t), torch.ones_like(t)

    return ClockedField(output, drift, Schedule(lambda u: u, torch.ones_like), steps), asked


# --- network calls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 99, 100, 101, 128, 1000, 2000])
def test_n_steps_are_n_or_two_n_calls(method, steps):
    field, asked = counted_field(steps)
    solve_sde(field, torch.ones(1, 1), Still(), method)
    assert len(asked) == CALLS[method] * steps
    assert max(asked) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stride"), [("euler", 1), ("heun", 9), ("srk", 9)])
def test_every_number_of_steps_is_that_many_calls(method, stride):
    for steps in range(1, 2001, stride):
        test_n_steps_are_n_or_two_n_calls(method, steps)


def function_calls(run: Callable[[], Any]) -> int:
    """Calls of Python and C functions: what a run costs, without a clock."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("method", SDE_METHODS)
def test_no_number_of_steps_is_dearer_than_its_neighbours(method):
    """Each step more costs the same: nothing recurses, no tree grows (torchsde's own took 1.2 s at 100 steps)."""
    noise = Noise(0, 1, 2, (1,))

    def cost(steps: int) -> float:
        field, _ = counted_field(steps)
        brownian = BrownianSteps(noise, steps)
        return function_calls(lambda: solve_sde(field, torch.ones(2, 1), brownian, method)) / steps

    cost(1)  # imports
    for steps in (15, 16, 17, 50, 99, 100, 101, 127, 128, 129, 500):
        assert cost(steps) < 1.1 * min(cost(steps - 1), cost(steps + 1)), steps


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_steps_are_those_of_the_library(method):
    """`sdeint` itself on the same increments, over a clock of 16 unit steps."""
    noise = Noise(0, 1, 3, (2,), torch.float64)
    steps = BrownianSteps(noise)
    field, _ = counted_field(16)
    x = noise(0)

    class System:
        noise_type, sde_type = "diagonal", "stratonovich" if method == "heun" else "ito"

        def f(self, u: Tensor, y: Tensor) -> Tensor:
            return y / 16

        def g(self, u: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(y, 0.25)

    class Increments:
        levy_area_approximation, shape = "none", (3, 2)
        dtype, device = torch.float64, torch.device("cpu")

        def __call__(self, a: Tensor, b: Tensor) -> Tensor:
            return steps.increment(a.item(), b.item())

    clock = torch.tensor([0.0, 16.0], dtype=torch.float64)
    expected = torchsde.sdeint(System(), x, clock, bm=Increments(), method=method, dt=1.0)[-1]
    torch.testing.assert_close(solve_sde(field, x, BrownianSteps(noise), method), expected)


# --- strong orders, additive noise --------------------------------------------------------------------------------


def curved_denoiser() -> AffineDenoiser:
    """A mixture under VP, away from t = 0: its score is smooth and not linear, or srk would have order 2."""
    process = VP(t_min=0.1)
    return AffineDenoiser.of(GaussianMixture.example(2, process))


class NoArea(BrownianPath):
    """The broken twin: the area that goes with an increment on average, without its own noise."""

    def increment_and_area(self, a: float, b: float) -> tuple[Tensor, Tensor]:
        return self.increment(a, b), 0.5 * (b - a) * self.increment(a, b)


class FreshNoise(BrownianPath):
    """The broken twin: another path at every step size."""

    def __init__(self, noise: Noise, start: float, end: float) -> None:
        super().__init__(replace(noise, seed=round(end)), start, end)


def additive_order(method: str, path: type[BrownianPath] = BrownianPath) -> float:
    """log2 of the error at 64 steps over that at 128; errors are differences to twice as many steps on one path.

    On 1,000 paths the root of their mean square is known to 2.2 %, and as errors of neighbours go together, the order
    to about 0.03: 0.15 is seen.
    """
    denoiser, noise = curved_denoiser(), Noise(0, 1, 1000, (2,), torch.float64)
    schedule = as_grid("uniform").between(1.0, denoiser.process.t_min, denoiser.process)

    def end(steps: int) -> Tensor:
        field = family_field(denoiser, schedule, steps, denoiser.process.diffusion2)
        return solve_sde(field, noise(0), path(noise, 0.0, float(steps)), method)

    ends = [end(steps) for steps in (64, 128, 256)]
    errors = [(one - other).square().mean().sqrt() for one, other in pairwise(ends)]
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize("method", SDE_METHODS)
def test_strong_order_of_additive_noise(method):
    assert abs(additive_order(method) - STRONG_ORDER[method]) < 0.15


def test_without_its_area_srk_loses_its_order():
    assert additive_order("srk", NoArea) < 1.3


def test_another_path_at_every_step_size_would_be_found_out():
    assert additive_order("euler", FreshNoise) < 0.5


# --- geometric Brownian motion ------------------------------------------------------------------------------------

GROWTH, VOLATILITY = 0.5, 0.8
GBM_ORDER = {
    ("ito", "euler"): 0.5,
    ("ito", "milstein"): 1.0,
    ("ito", "srk"): 1.5,
    ("stratonovich", "milstein"): 1.0,
    ("stratonovich", "heun"): 1.0,
}


@cache
def gbm_ends(method: str, calculus: str) -> tuple[Tensor, list[Tensor]]:
    """W(1) of 4,000 paths, and where 64, 128 and 256 steps take them from 1."""
    path = BrownianPath(Noise(1, 1, 4000, (1,), torch.float64))
    ends = []
    for steps in (64, 128, 256):
        found = integrate_sde(
            lambda x, t: GROWTH * x,
            lambda x, t: VOLATILITY * x,
            torch.ones(4000, 1, dtype=torch.float64),
            [k / steps for k in range(steps + 1)],
            path,
            method=method,
            calculus=calculus,
        )
        assert found.shape == (steps + 1, 4000, 1)
        ends.append(found[-1])
    return path.increment(0.0, 1.0), ends


def gbm_errors(method: str, calculus: str, truth: str) -> list[float]:
    """Root mean square errors at t = 1, against the exact solution of dx = r x dt + v x dW on the same path."""
    w, ends = gbm_ends(method, calculus)
    exact = torch.exp(GROWTH - (0.5 * VOLATILITY**2 if truth == "ito" else 0.0) + VOLATILITY * w)
    return [(end - exact).square().mean().sqrt().item() for end in ends]


@pytest.mark.parametrize(("calculus", "method"), GBM_ORDER)
def test_strong_order_of_geometric_brownian_motion(calculus, method):
    """From 64 to 256 steps; 4,000 heavy-tailed errors know the order to about 0.05."""
    errors = gbm_errors(method, calculus, calculus)
    assert abs(0.5 * math.log2(errors[0] / errors[-1]) - GBM_ORDER[calculus, method]) < 0.15, errors


@pytest.mark.parametrize(("calculus", "method"), GBM_ORDER)
def test_ito_and_stratonovich_are_not_confused(calculus, method):
    """The solution of the other calculus is another process: more steps do not come closer."""
    errors = gbm_errors(method, calculus, truth="stratonovich" if calculus == "ito" else "ito")
    assert 0.5 * math.log2(errors[0] / errors[-1]) < 0.1
    assert errors[-1] > 0.3


def test_times_may_be_uneven():
    """Milstein on the square of an even grid: still the same path, and close to the exact solution."""
    noise = Noise(1, 1, 1000, (1,), torch.float64)
    times = torch.cat((torch.linspace(0, 0.5, 65), torch.linspace(0.5, 1, 33)[1:])).double()
    path = BrownianPath(noise)
    found = integrate_sde(
        lambda x, t: GROWTH * x,
        lambda x, t: VOLATILITY * x,
        torch.ones(1000, 1).double(),
        times,
        path,
        method="milstein",
    )
    exact = torch.exp(GROWTH - 0.5 * VOLATILITY**2 + VOLATILITY * path.value(1.0))
    assert (found[-1] - exact).square().mean().sqrt() < 0.04


def test_drift_and_diffusion_are_told_the_time():
    """dx = t dt: Euler's sum of (k/n)/n."""
    steps = BrownianSteps(Noise(0, 1, 2, (3,), torch.float64))
    x = torch.zeros(2, 3, dtype=torch.float64)
    found = integrate_sde(
        lambda x, t: t.expand_as(x), lambda x, t: 0 * x, x, [0.0, 0.25, 0.5, 0.75, 1.0], steps
    )
    torch.testing.assert_close(found[-1], torch.full_like(x, 0.375))


# --- the refinable path -------------------------------------------------------------------------------------------


def test_a_path_is_the_same_at_every_step_size():
    """Increments add up and areas fit together, U = U_1 + U_2 + W_1 h/2, down fifteen levels."""
    path = BrownianPath(Noise(3, 1, 5, (2,), torch.float64), 1.0, 4.0, num_steps=3)
    length, a = 1.0, 2.0
    for _ in range(15):
        whole, area = path.increment_and_area(a, a + length)
        first, first_area = path.increment_and_area(a, a + length / 2)
        second, second_area = path.increment_and_area(a + length / 2, a + length)
        torch.testing.assert_close(first + second, whole)
        torch.testing.assert_close(first_area + second_area + 0.5 * length * first, area)
        a, length = a + length / 2, length / 2
    torch.testing.assert_close(
        path.value(2.75), sum(path.increment(a, b) for a, b in ((1, 2), (2, 2.5), (2.5, 2.75)))
    )
    assert torch.equal(path.value(1.0), torch.zeros(5, 2, dtype=torch.float64))


def test_a_path_does_not_depend_on_how_it_is_asked_or_on_batch_mates():
    noise = Noise(3, 1, 6, (2,), torch.float64)
    forwards, backwards = BrownianPath(noise), BrownianPath(noise)
    part = BrownianPath(Noise(3, 1, 2, (2,), torch.float64, first=3))
    steps = [(k / 16, (k + 1) / 16) for k in range(16)]
    found = {step: forwards.increment(*step) for step in steps}
    for step in reversed(steps):
        assert torch.equal(backwards.increment(*step), found[step])
        assert torch.equal(part.increment(*step), found[step][3:5])
    assert len(forwards._halves) == 4  # a pair a level is all that is kept


@pytest.mark.parametrize("kind", ["steps", "path"])
def test_increments_and_areas_have_their_joint_law(kind):
    """Var W = h, Var U = h^3/3, Cov(W, U) = h^2/2, steps independent; 40,000 products know each to 1 %."""
    noise = Noise(4, 1, 20_000, (2,), torch.float64)
    brownian = BrownianSteps(noise) if kind == "steps" else BrownianPath(noise)
    h = 0.25
    pairs = [brownian.increment_and_area(k * h, (k + 1) * h) for k in range(4)]
    for w, area in pairs:
        assert abs(z_of_mean(w.square(), h)) < 4.5
        assert abs(z_of_mean(area.square(), h**3 / 3)) < 4.5
        assert abs(z_of_mean(w * area, h**2 / 2)) < 4.5
    for i, one in enumerate(pairs):
        for other in pairs[:i]:
            assert all(abs(z_of_mean(a * b)) < 4.5 for a in one for b in other)
    w, area = NoArea(noise).increment_and_area(0.0, h)
    assert abs(z_of_mean(area.square(), h**3 / 3)) > 4.5


@pytest.mark.parametrize(
    "step", [(0.0, 0.3), (0.1, 0.35), (0.5, 0.5), (0.5, 0.25), (-1.0, 0.0), (1.0, 2.0), (0.0, math.nan)]
)
def test_what_is_no_step_of_the_path_is_refused(step):
    with pytest.raises(InputError, match="no step of this path"):
        BrownianPath(Noise(0, 1, 1, (1,))).increment(*step)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda n: BrownianPath(n, 1.0, 1.0), "start < end"),
        (lambda n: BrownianPath(n, num_steps=0), "num_steps"),
        (lambda n: BrownianPath(n).value(1 / 3), "end of no step"),
    ],
)
def test_bad_paths_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        build(Noise(0, 1, 1, (1,)))


# --- trajectories -------------------------------------------------------------------------------------------------

PROCESSES = {"VP": VP(), "VE": VE(sigma_min=0.02, sigma_max=10.0), "OTPath": OTPath()}


def moments_z(mixture: GaussianMixture, t: float, x: Tensor, bound: float) -> float:
    """Largest distance of mean and covariance at t from the exact ones, in standard errors beyond `bound` sd."""
    at = torch.tensor([t], dtype=torch.float64)
    alpha, sigma2 = mixture.process().alpha(at), mixture.process().sigma(at).square()
    covariance = alpha.square() * mixture.covariance + sigma2 * torch.eye(2, dtype=torch.float64)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (x - alpha * mixture.mean).mT, upper=False
    )
    products = [white[0] ** 2 - 1, white[1] ** 2 - 1, white[0] * white[1], white[0], white[1]]
    return max(
        max(abs(value.mean().item()) / value.std().item() - bound, 0.0) * math.sqrt(len(x))
        for value in products
    )


def noised(mixture: GaussianMixture, t: float, rows: int) -> Tensor:
    with forked_rng(5):
        at = torch.full((1,), t, dtype=torch.float64)
        law = mixture.process().marginal(mixture.model(Batch(num_rows=rows)), at)
        return law.loc + law.scale * torch.randn(rows, 2, dtype=torch.float64)


def worst_on_the_way(process: Process, t_from: float, t_to: float, stochasticity: float) -> float:
    mixture = GaussianMixture.example(2, process)
    times, states = trajectories(
        mixture,
        noised(mixture, t_from, 10_000),
        t_from=t_from,
        t_to=t_to,
        num_steps=60,
        stochasticity=stochasticity,
        every=30,
    )
    return max(moments_z(mixture, t, x, 0.01) for t, x in zip(times.tolist(), states, strict=True))


WAYS = [(0.05, 0.9), (0.9, 0.05)]


@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("way", WAYS, ids=["forward", "backward"])
@pytest.mark.parametrize("name", PROCESSES)
def test_the_family_keeps_its_marginals_both_ways(name, way, stochasticity):
    """10,000 paths know a moment to 0.01 sd: 0.065 sd of its statistic are seen, beyond a bound of 0.01."""
    assert worst_on_the_way(PROCESSES[name], *way, stochasticity) < 4.5


@pytest.mark.parametrize("way", WAYS, ids=["forward", "backward"])
@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("mutant", ["direction", "noise on the drift only", "g for g^2"])
def test_a_wrong_family_is_found_out(name, way, mutant, monkeypatch):
    drift, process = fields.reverse_drift, PROCESSES[name]

    def broken(denoiser: Any, t: Tensor, noise2: Any = 0.0, direction: int = -1) -> Any:
        if mutant == "direction":
            return drift(denoiser, t, noise2, -direction)
        if mutant == "g for g^2":
            on_x, on_output, _ = drift(denoiser, t, noise2, direction)
            return on_x, on_output, noise2.sqrt()
        on_x, on_output, noise2 = drift(denoiser, t, noise2, direction)
        return on_x, on_output, 0 * noise2

    monkeypatch.setattr(fields, "reverse_drift", broken)
    assert worst_on_the_way(process, *way, 1.0) > 4.5


def test_kept_times_and_states():
    mixture = GaussianMixture.example()
    x = noised(mixture, 1.0, 4)
    times, states = trajectories(mixture, x, t_from=1.0, t_to=0.5, num_steps=10, stochasticity=1.0, every=4)
    torch.testing.assert_close(times, torch.tensor([1.0, 0.8, 0.6, 0.5], dtype=torch.float64))
    assert states.shape == (4, 4, 2)
    assert torch.equal(states[0], x)
    _, part = trajectories(mixture, x[:2], t_from=1.0, t_to=0.5, num_steps=10, stochasticity=1.0, every=4)
    torch.testing.assert_close(part, states[:, :2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"t_from": 1.2}, "lie in"),
        ({"t_to": 0.0}, "lie in"),
        ({"t_to": 1.0}, "must differ"),
        ({"t_to": math.nan}, "lie in"),
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2_000_000}, "1,000,000"),
        ({"every": 0}, "every"),
        ({"stochasticity": -1.0}, "stochasticity"),
        ({"grid": "cosine"}, "grid"),
    ],
)
def test_bad_trajectories_are_refused(changes, message):
    options: dict[str, Any] = {"t_from": 1.0, "t_to": 0.5, "num_steps": 4} | changes
    with pytest.raises(InputError, match=message):
        trajectories(GaussianMixture.example(), torch.zeros(3, 2), **options)


def test_rows_that_blow_up_are_named_and_the_others_stand():
    mixture = GaussianMixture.example()
    x = torch.zeros(3, 2, dtype=torch.float64)
    x[1] = math.nan
    with pytest.warns(NonFiniteWarning, match="rows 1 .1 of 3"):
        _, states = trajectories(mixture, x, t_from=1.0, t_to=0.5, num_steps=4)
    assert torch.isfinite(states[:, [0, 2]]).all()


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "milstien"}, "did you mean 'milstein'"),
        ({"method": "heun"}, "converges to the Stratonovich solution"),
        ({"method": "euler", "calculus": "stratonovich"}, "converges to the Ito solution"),
        ({"calculus": "itoh"}, "did you mean 'ito'"),
        ({"times": [0.0]}, "strictly increasing"),
        ({"times": [1.0, 0.0]}, "substitute s = -t"),
        ({"times": [0.0, 0.0, 1.0]}, "strictly increasing"),
        ({"times": [0.0, math.nan]}, "strictly increasing"),
        ({"drift": lambda x, t: x.sum()}, "drift.* must have the shape of x"),
        ({"diffusion": lambda x, t: x[:, :1]}, "diffusion.* must have the shape of x"),
    ],
)
def test_bad_equations_are_refused(changes, message):
    options: dict[str, Any] = {
        "drift": lambda x, t: x,
        "diffusion": lambda x, t: x,
        "times": [0.0, 1.0],
    } | changes
    noise = Noise(0, 1, 2, (3,))
    with pytest.raises(InputError, match=message):
        integrate_sde(x=torch.ones(2, 3), brownian=BrownianSteps(noise), **options)


def test_equations_that_blow_up_say_when():
    noise = Noise(0, 1, 2, (1,))
    x = torch.tensor([[0.0], [1e30]])
    with pytest.warns(NonFiniteWarning, match="by t = 0.5 in rows 1"):
        integrate_sde(lambda x, t: x**3, lambda x, t: 0 * x, x, [0.0, 0.5, 1.0], BrownianSteps(noise))


@pytest.mark.parametrize("name", ["eular", "milstein"])
def test_unknown_methods_are_refused(name):
    field, _ = counted_field(3)
    with pytest.raises(InputError, match="SDE method"):
        solve_sde(field, torch.ones(1, 1), Still(), name)
