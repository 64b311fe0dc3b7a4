"""The solvers: network calls counted one by one, draws that are their own, orders of convergence against theory."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probgen import DDPM, VP, Ancestral, ProbabilityFlowODE, ReverseSDE, infer
from probgen.core import Engine, InputError, NonFiniteWarning, ProbgenError
from probgen.dynamics import (
    ODE_ADAPTIVE,
    ODE_FIXED,
    AffineDenoiser,
    ClockedField,
    FlowEngine,
    family_field,
    reversed_schedule,
    solve_ode,
    solve_sde,
)
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import PREDICTIONS, Power, denoiser_coefficients, output_from_denoised
from probgen.randomness import BrownianSteps, Noise
from statistics_tools import StepsOfTwo

CALLS_PER_STEP = ORDER = {
    "euler": 1,
    "midpoint": 2,
    "heun2": 2,
    "heun3": 3,
    "rk4": 4,
}  # of torchdiffeq's methods
METHODS = {"euler": 1, "heun": 2, "rk4": 4} | {f"torchdiffeq:{name}": n for name, n in CALLS_PER_STEP.items()}
MEAN, SD = 0.7, 0.5


class Gaussian(nn.Module):
    """x ~ N(MEAN, SD^2) with its exact denoiser, which counts its calls and keeps the times it is asked at."""

    event_shape = (1,)

    def __init__(self, dtype: torch.dtype = torch.float64, t_min: float = 1e-3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.asked: list[float] = []
        self._process = VP(t_min=t_min)

    def model(self, batch: Any) -> None:
        raise NotImplementedError

    def process(self) -> VP:
        return self._process

    def variance(self, t: Tensor) -> Tensor:
        return self._process.alpha(t).square() * SD**2 + self._process.sigma(t).square()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked += [t[0].item()]
        assert t.dtype == x.dtype == self.weight.dtype
        alpha = self._process.alpha(t)
        return MEAN + (alpha * SD**2 / self.variance(t))[:, None] * (x - alpha[:, None] * MEAN)

    def flow(self, x_1: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x_1 at t_min: standardised values stay what they are."""
        first, last = (torch.tensor([t], dtype=torch.float64) for t in (1.0, self._process.t_min))
        standard = (x_1 - self._process.alpha(first) * MEAN) / self.variance(first).sqrt()
        return self._process.alpha(last) * MEAN + self.variance(last).sqrt() * standard


def field_of(program: Gaussian, steps: int, stochasticity: float = 0.0, power: float = 1.0) -> ClockedField:
    process = program.process()
    schedule = Power(power).between(process.t_max, process.t_min, process)
    return family_field(
        AffineDenoiser.of(program), schedule, steps, lambda t: stochasticity * process.diffusion2(t)
    )


# --- network calls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 99, 100, 101])
def test_sde_of_n_steps_asks_the_network_n_times_and_once_at_the_end(steps, dtype):
    program = Gaussian(dtype)
    posterior = infer(program, ReverseSDE(steps), num_draws=3)
    expected = torch.cat((torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)[:-1], torch.tensor([1e-3])))
    torch.testing.assert_close(torch.tensor(program.asked, dtype=torch.float64), expected, rtol=1e-6, atol=0)
    assert posterior.cost.network_calls == steps + 1
    assert posterior["x"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 99, 100, 101])
@pytest.mark.parametrize("method", METHODS)
def test_ode_of_n_steps_asks_the_network_once_a_stage_and_once_at_the_end(method, steps, dtype):
    program = Gaussian(dtype)
    posterior = infer(program, ProbabilityFlowODE(steps, method, "uniform"), num_draws=3)
    assert len(program.asked) == posterior.cost.network_calls == METHODS[method] * steps + 1
    assert posterior["x"].dtype == dtype


@pytest.mark.parametrize("steps", [2, 99, 100, 101])
def test_chain_of_n_steps_asks_the_network_n_times(steps):
    program = Gaussian()
    chain = DDPM(Network(program), VP(), steps, event_shape=(1,), prediction="x0").double()
    posterior = infer(chain, Ancestral(), num_draws=3)
    assert program.asked == [k / steps for k in range(steps, 0, -1)]
    assert posterior.cost.network_calls == steps


class Network(nn.Module):
    def __init__(self, program: Gaussian) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.program.denoise(x, t)


def test_batches_are_counted_each():
    assert infer(Gaussian(), ReverseSDE(5, batch_size=2), num_draws=5).cost.network_calls == 3 * 6


def test_grid_of_the_engine_is_the_one_asked_for():
    program = Gaussian()
    infer(program, ReverseSDE(4, "quadratic"), num_draws=1)
    u = torch.arange(5, dtype=torch.float64) / 4
    expected = Power(2.0).between(1.0, 1e-3, None).time(u)
    torch.testing.assert_close(torch.tensor(program.asked, dtype=torch.float64), expected)


# --- a draw is its own --------------------------------------------------------------------------------------------


def mixture(dtype: torch.dtype) -> GaussianMixture:
    return GaussianMixture.example(2).to(dtype)


@dataclass(frozen=True)
class Case:
    engine: Any

    def program(self, dtype: torch.dtype) -> Any:
        if isinstance(self.engine, Ancestral):
            return DDPM(mixture(dtype), VP(), 20, prediction="x0").to(dtype)
        return mixture(dtype)

    def draw(self, dtype: torch.dtype = torch.float64, engine: Engine | None = None, **counts: int) -> Tensor:
        return infer(self.program(dtype), engine or self.engine, **counts)["x"]


CASES = [
    pytest.param(Case(Ancestral()), id="Ancestral"),
    pytest.param(Case(ReverseSDE(20)), id="ReverseSDE"),
    *(pytest.param(Case(ProbabilityFlowODE(20, method)), id=f"ODE, {method}") for method in METHODS),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 8])
def test_batch_size_changes_nothing(case, batch_size):
    whole = case.draw(num_draws=7, num_chains=2)
    engine = replace(case.engine, batch_size=batch_size)
    parts = case.draw(engine=engine, num_draws=7, num_chains=2)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_a_draw_does_not_depend_on_how_many_are_made(case):
    few, many = case.draw(num_draws=3, num_chains=2), case.draw(num_draws=50, num_chains=4)
    torch.testing.assert_close(few, many[:2, :3], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_draws_chains_and_seeds_differ(case):
    draws = case.draw(num_draws=5, num_chains=2)
    other = case.draw(num_draws=5, num_chains=2, seed=1)
    assert torch.cat((draws, other)).flatten(0, 1).unique(dim=0).shape[0] == 20


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_seed_same_bits_and_the_global_stream_is_left_alone(case, dtype):
    before = torch.get_rng_state()
    first = case.draw(dtype, num_draws=100, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(first, case.draw(dtype, num_draws=100, seed=5))


@pytest.mark.parametrize("case", CASES)
def test_precisions_agree(case):
    """The same noise to rounding, and a smooth map: nothing random hangs on the precision."""
    single, double = (case.draw(dtype, num_draws=100) for dtype in (torch.float32, torch.float64))
    assert (single.double() - double).abs().median() < 1e-5


@dataclass(frozen=True)
class StartOnly(FlowEngine):
    """An engine that draws its noise and stops."""

    def draw(self, field: AffineDenoiser, noise: Noise) -> Tensor:
        return noise(0)


@dataclass(frozen=True)
class SharedNoise(FlowEngine):
    """The broken twin: noise drawn a batch at a time."""

    def draw(self, field: AffineDenoiser, noise: Noise) -> Tensor:
        return torch.randn(noise.num_rows, 2, generator=torch.Generator().manual_seed(noise.seed))


def test_draws_take_their_precision_from_buffers_where_there_are_no_parameters():
    assert infer(mixture(torch.float64), StartOnly(), num_draws=2)["x"].dtype == torch.float64


def test_shared_noise_would_be_found_out():
    """Drawn so, draws depend on the batch."""
    whole, parts = (
        infer(mixture(torch.float32), SharedNoise(batch_size=size), num_draws=7)["x"] for size in (None, 3)
    )
    assert (whole - parts).abs().max() > 0.1


# --- conditions ---------------------------------------------------------------------------------------------------


class Shifted(Gaussian):
    """x ~ N(MEAN + c, SD^2) for a condition c `(rows, 1)`."""

    def given(self, condition: Tensor) -> Any:
        return _At(self, condition)


class _At:
    def __init__(self, program: Shifted, shift: Tensor) -> None:
        self.program, self.shift = program, shift

    def process(self) -> VP:
        return self.program.process()

    def model(self, batch: Any) -> None:
        raise NotImplementedError

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        alpha = self.process().alpha(t)[:, None]
        return self.program.denoise(x - alpha * self.shift, t) + self.shift


@pytest.mark.parametrize("engine", [ReverseSDE(50), ProbabilityFlowODE(20)], ids=str)
def test_conditions_are_met_row_by_row(engine):
    """2,000 draws at each of three conditions know a mean to 0.011: rows mixed up would move one by 1."""
    shifts = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    posterior = infer(Shifted(), engine, args=(shifts,), num_draws=1000, num_chains=2)
    assert posterior["x"].shape == (2, 1000, 3, 1)
    assert posterior.dims == {"x": ("data",)}
    assert ((posterior.flat("x").mean(0) - shifts - MEAN).abs() < 0.08).all()
    parts = infer(Shifted(), replace(engine, batch_size=7), args=(shifts,), num_draws=10, num_chains=2)["x"]
    torch.testing.assert_close(parts, posterior["x"][:, :10], rtol=0, atol=1e-10)


def test_a_condition_for_a_program_that_takes_none_is_refused():
    with pytest.raises(InputError, match="takes no condition"):
        infer(Gaussian(), ReverseSDE(5), args=(torch.zeros(3, 1),), num_draws=2)


# --- fields that turn NaN -----------------------------------------------------------------------------------------


class Fragile(Gaussian):
    """Its network gives NaN below t = 0.5 where x_t > 1."""

    limit = 1.0

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        value = super().denoise(x, t)
        return torch.where((x > self.limit) & (t < 0.5), torch.nan, value)


def test_draws_that_turn_nan_are_named_with_their_time_and_the_others_kept():
    clean = infer(Gaussian(), ProbabilityFlowODE(20, "euler"), num_draws=60)["x"]
    with pytest.warns(NonFiniteWarning, match=r"t = 0\.4\d+, in draws [\d, ]+") as caught:
        posterior = infer(Fragile(), ProbabilityFlowODE(20, "euler", batch_size=30), num_draws=60)
    bad = posterior["x"].isnan()
    assert 0 < bad.sum() < 60
    assert torch.equal(posterior["x"][~bad], clean[~bad])
    lists = [re.search(r"in draws ([\d, ]+)", str(warning.message)).group(1) for warning in caught]
    named = {int(number) for text in lists for number in re.findall(r"\d+", text)}
    assert named <= set(bad.flatten().nonzero().flatten().tolist())


def test_when_all_draws_turn_nan_that_is_an_error():
    program = Fragile()
    program.limit = -1e9
    with pytest.raises(ProbgenError, match="all of them"):
        infer(program, ReverseSDE(20), num_draws=3)


# --- orders of convergence ----------------------------------------------------------------------------------------


def observed_order(errors: list[float]) -> float:
    """log2 of the last ratio of errors, each at half the step of the one before."""
    return math.log2(errors[-2] / errors[-1])


@pytest.mark.parametrize("method", ODE_FIXED)
def test_ode_methods_converge_at_their_order(method):
    """Against the exact flow of a Gaussian, t_min = 0.05 so that every derivative is moderate.

    A wrong coefficient or a stage at the wrong time leaves order 1, a wrong equation order 0.
    """
    program = Gaussian(t_min=0.05)
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    steps = (50, 100, 200) if method != "rk4" else (20, 40, 80)
    errors = [
        (solve_ode(field_of(program, n), x_1, method, 1e-6, 1e-6) - program.flow(x_1)).abs().max().item()
        for n in steps
    ]
    assert abs(observed_order(errors) - ORDER[method]) < 0.2, errors


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("method", ODE_ADAPTIVE)
def test_adaptive_methods_meet_the_exact_flow_without_leaving_the_grid(method, power):
    """Tolerances are local, errors add up: 13 tolerances at most were seen. Past the end there is no time."""
    program = Gaussian()
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for tolerance in (1e-4, 1e-6):
        found = solve_ode(field_of(program, 1, power=power), x_1, method, tolerance, tolerance)
        assert (found - program.flow(x_1)).abs().max() < 20 * tolerance
    assert min(program.asked) >= 1e-3 * (1 - 1e-12)
    assert max(program.asked) <= 1


def reverse_sde_law(program: Gaussian, steps: int) -> tuple[float, float]:
    """Mean and variance after n steps of Euler-Maruyama from N(0, sigma(1)^2): for a Gaussian each step is affine."""
    times = torch.linspace(1, program.process().t_min, steps + 1, dtype=torch.float64)
    mean, variance = torch.zeros(1, dtype=torch.float64), program.process().sigma(times[:1]).square()
    for t, dt in zip(times[:-1], times.diff(), strict=True):
        beta, alpha = 0.1 + 19.9 * t, program.process().alpha(t[None])
        factor = 1 + dt * beta * (-0.5 + 1 / program.variance(t[None]))
        mean = factor * mean - dt * beta * alpha * MEAN / program.variance(t[None])
        variance = factor.square() * variance + beta * dt.abs()
    return mean.item(), variance.item()


@pytest.mark.parametrize("steps", [20, 80])
def test_sde_has_the_law_of_euler_maruyama(steps):
    """100,000 draws know the mean to 0.0032 sd and the variance to 0.45 %: 1.5 % and 2 % are seen."""
    program = Gaussian()
    noise = Noise(0, 1, 100_000, (1,), torch.float64)
    field = field_of(program, steps, 1.0)
    x_1 = noise(0) * program.process().terminal_scale()
    draws = solve_sde(field, x_1, BrownianSteps(noise))
    mean, variance = reverse_sde_law(program, steps)
    assert abs(draws.mean().item() - mean) < 4.5 * math.sqrt(variance / len(draws))
    assert abs(draws.var().item() / variance - 1) < 4.5 * math.sqrt(2 / len(draws))


def test_sde_converges_weakly_at_order_one():
    """By the recursion that the draws were just seen to follow, to the variance alpha^2 SD^2 + sigma^2."""
    program = Gaussian(t_min=0.05)
    limit = program.variance(torch.tensor([0.05], dtype=torch.float64)).item()
    errors = [abs(reverse_sde_law(program, n)[1] - limit) for n in (100, 200, 400)]
    assert abs(observed_order(errors) - 1) < 0.1, errors


def test_sde_converges_strongly_at_order_one():
    """Noise is additive, so that Euler is Milstein's scheme: paths at h and h/2 differ by O(h), not O(sqrt h)."""
    program = Gaussian(t_min=0.05)
    noise = Noise(0, 1, 500, (1,), torch.float64)

    def path(steps: int, brownian: BrownianSteps) -> Tensor:
        return solve_sde(field_of(program, steps, 1.0), noise(0), brownian)

    differences = [
        (path(n, StepsOfTwo(noise)) - path(2 * n, BrownianSteps(noise))).square().mean().sqrt().item()
        for n in (100, 200, 400)
    ]
    assert abs(observed_order(differences) - 1) < 0.15, differences


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("stochasticity", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("forward", [False, True])
def test_field_is_the_equation_whatever_the_network_predicts(prediction, stochasticity, forward):
    """f x - (1 +- a)/2 g^2 score and sqrt(a) g, in the clock's units: minus the sign of dt."""
    program, steps = Gaussian(), 7
    process = program.process()

    def output(x: Tensor, t: Tensor) -> Tensor:
        return output_from_denoised(process, prediction, x, program.denoise(x, t), t)

    denoiser = AffineDenoiser(output, lambda t: denoiser_coefficients(process, prediction, t), process)
    schedule = Power(2.0).between(1.0, 1e-3, process)
    schedule = reversed_schedule(schedule) if forward else schedule
    field = family_field(denoiser, schedule, steps, lambda t: stochasticity * process.diffusion2(t))
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    for u in (0.0, 1.0, 3.7, 7.0):
        progress = torch.tensor([u / steps], dtype=torch.float64)
        t, speed = schedule.time(progress), (schedule.speed(progress) / steps).item()
        assert (speed > 0) == forward
        beta = (0.1 + 19.9 * t).item()
        score = -(x - process.alpha(t) * MEAN) / program.variance(t)
        sign = -1 if forward else 1
        expected = speed * (-0.5 * beta * x - 0.5 * (1 + sign * stochasticity) * beta * score)
        drift, noise = field.drift_and_noise(u, x, torch.ones_like(x))
        torch.testing.assert_close(drift, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(noise, torch.full_like(x, math.sqrt(stochasticity * beta * abs(speed))))


# --- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ReverseSDE(5, method="eular"), "did you mean 'euler'"),
        (lambda: ProbabilityFlowODE(5, "huen"), "did you mean 'heun'"),
        (lambda: ProbabilityFlowODE(5, "torchdiffeq:bosh"), "did you mean 'torchdiffeq:bosh3'"),
        (lambda: ReverseSDE(steps=0), "steps"),
        (lambda: ReverseSDE(steps=2.5), "steps"),
        (lambda: ReverseSDE(grid="karas"), "did you mean 'karras'"),
        (lambda: ReverseSDE(grid=Power(0.0)), "exponent"),
        (lambda: ReverseSDE(stochasticity=-1.0), "stochasticity"),
        (lambda: ReverseSDE(batch_size=0), "batch_size"),
        (lambda: ProbabilityFlowODE(steps=-1), "steps"),
        (lambda: ProbabilityFlowODE(rtol=0.0), "rtol"),
        (lambda: ProbabilityFlowODE(atol=-1.0), "atol"),
        (lambda: Ancestral(batch_size=0), "batch_size"),
    ],
)
def test_bad_settings_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()
