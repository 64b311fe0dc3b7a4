"""The probability-flow ODE both ways: exact maps, round trips, draws of their own, and what cannot go on."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gaussian_flow import MEAN, SD, GaussianData, PerCoordinate
from probgen import Batch, FlowMatching, ProbabilityFlowODE, infer
from probgen.core import InputError, NonFiniteWarning, UnsupportedError
from probgen.dynamics import SolverError
from probgen.inference import probability_flow_ode
from probgen.inference.probability_flow_ode import METHODS
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import EDM, OU, VE, VP, CosineVP, OTPath, Power, Schedule, SubVP
from probgen.randomness import Noise, forked_rng
from statistics_tools import ALLOWED_Z, z_of_mean

PROCESSES = (VP(), SubVP(), CosineVP(), VE(), EDM(), OU(), OTPath())
EXACT = ProbabilityFlowODE(method="dopri5", rtol=1e-9, atol=1e-9)


def by_name(process: Any) -> str:
    return type(process).__name__


def data_of(mixture: GaussianMixture, num_rows: int) -> Tensor:
    with forked_rng(0):
        return mixture.model(Batch(num_rows=num_rows))


# --- both ways ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [*PROCESSES, PerCoordinate()], ids=by_name)
def test_maps_are_exact_for_gaussian_data(process):
    """Both ways against the closed form; a path that ended in E[x_0 | x] would miss by about sigma(t_min)^2."""
    program = GaussianData(process, 2)
    x = torch.linspace(-1, 2, 10, dtype=torch.float64).reshape(5, 2)
    x_1 = program.flow(x, process.t_min, process.t_max)
    scale = process.terminal_scale()
    assert ((EXACT.encode(program, x) - x_1) / scale).abs().max() < 1e-6
    assert (EXACT.decode(program, x_1) - x).abs().max() < 1e-6


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
@pytest.mark.parametrize(
    ("engine", "allowed"),
    [
        (ProbabilityFlowODE(60, "rk4"), 2e-3),
        (ProbabilityFlowODE(400, "heun"), 1e-2),
        (ProbabilityFlowODE(60, "torchdiffeq:rk4"), 2e-3),
        (ProbabilityFlowODE(method="dopri5", rtol=1e-8, atol=1e-8), 1e-5),
    ],
    ids=str,
)
def test_there_and_back(engine, allowed, process):
    mixture = GaussianMixture.example(2, process)
    x = data_of(mixture, 20)
    assert (engine.decode(mixture, engine.encode(mixture, x)) - x).abs().max() < allowed


@pytest.mark.parametrize("grid", ["uniform", "karras", Power(1.5)], ids=str)
def test_grids_serve_both_ways(grid):
    mixture = GaussianMixture.example(2, VP(t_min=0.01))
    engine, x = ProbabilityFlowODE(80, "rk4", grid), data_of(mixture, 20)
    x_1 = engine.encode(mixture, x)
    assert (x_1 - EXACT.encode(mixture, x)).abs().max() < 1e-3
    assert (engine.decode(mixture, x_1) - x).abs().max() < 2e-3


@pytest.mark.parametrize("process", [VP(), CosineVP(), OTPath()], ids=by_name)
def test_encoded_data_have_the_law_of_noise(process):
    """5,000 codes: a mean is known to 0.014 and a variance to 0.02, so that 0.064 and 0.09 are seen.

    What truly differs from the noise, alpha(t_max) of the data, shifts them by less than 0.01.
    """
    mixture = GaussianMixture.example(2, process)
    z = ProbabilityFlowODE(15, "rk4").encode(mixture, data_of(mixture, 5000)) / process.terminal_scale()
    for statistic in (z[:, 0], z[:, 1], z[:, 0].square() - 1, z[:, 1].square() - 1, z[:, 0] * z[:, 1]):
        assert abs(z_of_mean(statistic)) < ALLOWED_Z


def test_decoding_instead_of_encoding_would_be_found_out():
    """The broken twin: the map run the other way."""
    mixture = GaussianMixture.example(2)
    z = ProbabilityFlowODE(15, "rk4").decode(mixture, data_of(mixture, 5000))
    assert max(abs(z_of_mean(value)) for value in (z[:, 0], z[:, 1], z[:, 0].square() - 1)) > ALLOWED_Z


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_draws_are_decoded_noise_with_its_last_noise_removed(method):
    engine, mixture = ProbabilityFlowODE(10, method), GaussianMixture.example(2)
    draws = infer(mixture, engine, num_draws=7, seed=3).flat("x")
    noise = Noise(3, 1, 7, (2,), torch.float64)(0) * VP().terminal_scale()
    t_min = torch.tensor([1e-3], dtype=torch.float64)
    expected = mixture.denoise(engine.decode(mixture, noise), t_min)
    torch.testing.assert_close(draws, expected, rtol=0, atol=1e-12)


def test_maps_leave_everything_as_it_was():
    program = FlowMatching(StraightGaussian())
    program.train()
    x = torch.linspace(-1, 2, 4)[:, None]
    before = x.clone()
    x_1 = ProbabilityFlowODE(5).encode(program, x.requires_grad_())
    assert not x_1.requires_grad
    assert x_1.dtype == torch.float64  # the program's
    assert torch.equal(x, before)
    assert program.training
    assert all(weight.requires_grad for weight in program.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_solves_the_same_equation(name):
    """Each against the exact flow, within what its order and twenty steps, or its tolerance, allow."""
    program = GaussianData(VP(t_min=0.01), 1)
    x_1 = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    found = ProbabilityFlowODE(20, name, rtol=1e-4, atol=1e-4).decode(program, x_1)
    assert (found - program.flow(x_1, 1.0, 0.01)).abs().max() < (0.1 if name.endswith("euler") else 0.01)


# --- flows that reach the data --------------------------------------------------------------------------------------


class StraightGaussian(nn.Module):
    """The exact velocity of the straight path between N(MEAN, SD^2) and N(0, 1), as a network that counts its calls."""

    event_shape = (1,)

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = t[:, None]
        variance = (1 - t).square() * SD**2 + t.square()
        return self.one * (-MEAN + (t - (1 - t) * SD**2) / variance * (x - (1 - t) * MEAN))


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_flows_run_from_end_to_end(method):
    """From t = 0, where the straight path has no score, to t = 1: x_1 = (x - MEAN) / SD exactly."""
    engine = ProbabilityFlowODE(100, method, "uniform", rtol=1e-8, atol=1e-8)
    flow, x = FlowMatching(StraightGaussian()), torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    x_1 = engine.encode(flow, x)
    assert (x_1 - (x - MEAN) / SD).abs().max() < 1e-6
    assert (engine.decode(flow, x_1) - x).abs().max() < 1e-6


def test_flows_that_reach_the_data_are_not_denoised():
    flow = FlowMatching(StraightGaussian())
    posterior = infer(flow, ProbabilityFlowODE(10), num_draws=4)
    assert flow.network.calls == posterior.cost.network_calls == 40
    start = Noise(0, 1, 4, (1,), torch.float64)(0)
    assert (posterior.flat("x") - (MEAN + SD * start)).abs().max() < 1e-3


def test_a_grid_that_needs_a_ratio_that_is_infinite_is_refused():
    with pytest.raises(InputError, match="time grid"):
        infer(FlowMatching(StraightGaussian()), ProbabilityFlowODE(10, grid="karras"), num_draws=2)


# --- a draw is its own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=by_name)
def test_adaptive_draws_are_their_own(process):
    """Whatever the batch: alone, by threes, or all."""
    mixture, engine = GaussianMixture.example(2, process), ProbabilityFlowODE(method="dopri5")
    whole = infer(mixture, engine, num_draws=7)["x"]
    for size in (1, 3):
        parts = infer(mixture, replace(engine, batch_size=size), num_draws=7)["x"]
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-10)


def test_codes_are_their_own():
    mixture, engine = GaussianMixture.example(2), ProbabilityFlowODE(method="dopri5")
    x = data_of(mixture, 7)
    whole = engine.encode(mixture, x)
    torch.testing.assert_close(replace(engine, batch_size=2).encode(mixture, x), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(engine.encode(mixture, x[4:5]), whole[4:5], rtol=0, atol=1e-10)


def test_a_shared_step_would_be_found_out():
    """The broken twin: one step for the whole batch moves draws within the tolerance, which is more than rounding."""
    mixture, engine = GaussianMixture.example(2), ProbabilityFlowODE(method="torchdiffeq:dopri5")
    whole = infer(mixture, engine, num_draws=7)["x"]
    alone = infer(mixture, replace(engine, batch_size=1), num_draws=7)["x"]
    assert (whole - alone).abs().max() > 1e-8


# --- conditions ---------------------------------------------------------------------------------------------------


class Shifted(GaussianData):
    """x ~ N(MEAN + c, SD^2) for a condition c `(rows, 1)`; asked for every row at once, and no fewer."""

    def given(self, condition: Tensor) -> Any:
        return _At(self, condition)


class _At:
    event_shape = (1,)

    def __init__(self, program: Shifted, shift: Tensor) -> None:
        self.program, self.shift = program, shift
        self.sizes: set[int] = set()

    def model(self, batch: Any) -> None:
        raise NotImplementedError

    def process(self) -> Any:
        return self.program.process()

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        assert len(x) == len(self.shift)
        alpha = self.process().alpha(t)[:, None]
        return self.program.denoise(x - alpha * self.shift, t) + self.shift


@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_conditions_are_met_row_by_row(method):
    """Against the unconditional map, which the condition only shifts."""
    program, engine = Shifted(VP()), ProbabilityFlowODE(20, method, rtol=1e-7, atol=1e-7, batch_size=4)
    x = torch.linspace(-1, 2, 6, dtype=torch.float64)[:, None]
    shifts = torch.tensor([[0.0], [5.0], [-20.0], [0.0], [1.0], [300.0]], dtype=torch.float64)
    x_1 = engine.encode(program, x + shifts, condition=shifts)
    first, last = (VP().alpha(torch.tensor(t, dtype=torch.float64)) for t in (1e-3, 1.0))
    expected = program.flow(x + (1 - first) * shifts, 1e-3, 1.0) + last * shifts
    assert (x_1 - expected).abs().max() < 1e-2
    assert (engine.decode(program, x_1, condition=shifts) - x - shifts).abs().max() < 1e-2
    draws = infer(program, engine, args=(shifts,), num_draws=3)["x"]
    alone = infer(program, engine, args=(shifts[1:2],), num_draws=3)["x"]
    assert draws.shape == (1, 3, 6, 1)
    assert ((draws - shifts).abs() < 4).all()
    assert alone.shape == (1, 3, 1, 1)


def test_one_condition_a_row():
    x = torch.zeros(3, 1, dtype=torch.float64)
    with pytest.raises(InputError, match="x has 3 rows, condition 2"):
        ProbabilityFlowODE(5).encode(Shifted(VP()), x, condition=torch.zeros(2, 1))
    with pytest.raises(InputError, match="takes no condition"):
        ProbabilityFlowODE(5).encode(GaussianData(VP()), x, condition=torch.zeros(3, 1))
    with pytest.raises(InputError, match="one condition for all"):
        ProbabilityFlowODE(5).interpolate(Shifted(VP()), x[0], x[1], 4, condition=torch.zeros(4, 1))


def test_a_compiled_network_sees_one_shape(monkeypatch):
    """Every new shape would cost another compilation."""
    shapes = set()

    def compile_(output: Any, *, dynamic: bool) -> Any:
        assert not dynamic

        def compiled(x: Tensor, t: Tensor) -> Tensor:
            shapes.add((len(x), len(t)))
            return output(x, t)

        return compiled

    monkeypatch.setattr(torch, "compile", compile_)
    mixture, engine = GaussianMixture.example(2), ProbabilityFlowODE(method="dopri5")
    draws = infer(mixture, replace(engine, compile=True), num_draws=9)["x"]
    assert shapes == {(9, 9), (9, 1)}  # the second is the call that finishes
    torch.testing.assert_close(draws, infer(mixture, engine, num_draws=9)["x"], rtol=0, atol=1e-10)


# --- between two data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [VP(), VE(), PerCoordinate()], ids=by_name)
def test_interpolation_runs_along_the_great_circle(process):
    """Noises of one length at angles 0.2 and 1.7: between them the length stays, and angles are evenly spaced.

    A straight line would pass at cos(0.75) = 0.73 of the length, and a circle of x_1 instead of z be an ellipse.
    """
    program, scale = GaussianData(process, 2), process.terminal_scale()
    ends = torch.tensor([0.2, 1.7], dtype=torch.float64)
    x_a, x_b = EXACT.decode(program, scale * torch.stack([ends.cos(), ends.sin()], dim=1))
    path = EXACT.interpolate(program, x_a, x_b, 6)
    z = EXACT.encode(program, path) / scale
    assert (z.norm(dim=1) - 1).abs().max() < 1e-5
    assert (torch.atan2(z[:, 1], z[:, 0]) - torch.linspace(0.2, 1.7, 6)).abs().max() < 1e-5
    torch.testing.assert_close(path[[0, -1]], torch.stack([x_a, x_b]), rtol=0, atol=1e-6)
    torch.testing.assert_close(EXACT.interpolate(program, x_b, x_a, 6).flip(0), path, rtol=0, atol=1e-6)


def test_in_one_dimension_interpolation_is_a_line():
    program = GaussianData(VP(t_min=0.01))
    x_a, x_b = torch.tensor([[-1.0], [2.0]], dtype=torch.float64)
    path = EXACT.interpolate(program, x_a, x_b, 4)
    torch.testing.assert_close(path.flatten(), torch.linspace(-1, 2, 4).double(), rtol=0, atol=1e-6)
    same = EXACT.interpolate(program, x_a, x_a, 3)
    torch.testing.assert_close(same.flatten(), torch.full((3,), -1.0).double(), rtol=0, atol=1e-6)


def test_one_condition_serves_the_whole_path():
    program, shift = Shifted(VP()), torch.tensor([[5.0]], dtype=torch.float64)
    x_a, x_b = torch.tensor([[5.0], [6.0]], dtype=torch.float64)
    path = EXACT.interpolate(program, x_a, x_b, 3, condition=shift)
    torch.testing.assert_close(path[[0, -1]], torch.stack([x_a, x_b]), rtol=0, atol=1e-5)


def test_noise_that_is_not_gaussian_has_no_great_circle():
    flow = FlowMatching(StraightGaussian(), p_init=torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None])
    with pytest.raises(UnsupportedError, match="needs Gaussian noise"):
        ProbabilityFlowODE(5).interpolate(flow, torch.zeros(1), torch.ones(1), 3)


# --- what cannot go on --------------------------------------------------------------------------------------------


class Fragile(GaussianData):
    """Its denoiser is NaN below t = 0.5 where x_t > 1."""

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x > 1) & (over(t, x) < 0.5), torch.nan, super().denoise(x, t))


def over(t: Tensor, x: Tensor) -> Tensor:
    return t[:, None].expand_as(x) if len(t) == len(x) else t.expand_as(x)


def test_adaptive_draws_that_turn_nan_are_named_with_their_time_and_the_others_kept():
    engine = ProbabilityFlowODE(method="dopri5", batch_size=30)
    clean = infer(GaussianData(VP()), engine, num_draws=60)["x"]
    with pytest.warns(NonFiniteWarning, match=r"at t = 0\.[1234]\d*, in draws [\d, ]+") as caught:
        posterior = infer(Fragile(VP()), engine, num_draws=60)
    bad = posterior["x"].isnan()
    assert 0 < bad.sum() < 60
    torch.testing.assert_close(posterior["x"][~bad], clean[~bad], rtol=0, atol=1e-10)
    assert len(caught) == 2


def test_codes_that_turn_nan_are_named_and_the_others_kept():
    x = torch.tensor([[0.1], [0.5], [-0.4], [5.0], [0.2], [4.0]], dtype=torch.float64)
    for engine in (ProbabilityFlowODE(5, batch_size=4), ProbabilityFlowODE(method="dopri5", batch_size=4)):
        clean = engine.encode(GaussianData(VP()), x)
        with pytest.warns(NonFiniteWarning, match=r"at t = 0\.001, in rows [35] of x") as caught:
            codes = engine.encode(Fragile(VP()), x)
        assert codes.isnan().flatten().tolist() == [False, False, False, True, False, True]
        torch.testing.assert_close(codes[:3], clean[:3], rtol=0, atol=1e-10)
        assert len(caught) == 2


class Singular(GaussianData):
    """Its velocity grows without bound towards t = 0.5, for large draws."""

    def denoise(self, x: Tensor, t: Tensor) -> Tensor:
        t = over(t, x)
        return super().denoise(x, t[:, 0]) + torch.where((x.abs() > 1) & (t > 0.5), (t - 0.5).pow(-2), 0.0)


def test_a_singular_time_is_named_with_its_draws():
    engine = ProbabilityFlowODE(method="dopri5", batch_size=4)
    with pytest.raises(SolverError, match=r"dopri5\S+, draws [\d, ]+: .* gave up at t = 0\.5"):
        infer(Singular(VP()), engine, num_draws=12)


def test_torchdiffeq_that_gives_up_is_named():
    with pytest.raises(SolverError, match="keeps rows apart"):
        infer(Fragile(VP()), ProbabilityFlowODE(method="torchdiffeq:dopri5"), num_draws=30)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ProbabilityFlowODE(method="huen"), "did you mean 'heun'"),
        (lambda: ProbabilityFlowODE(method="heun2"), "torchdiffeq's is 'torchdiffeq:heun2'"),
        (lambda: ProbabilityFlowODE(method="torchdiffeq:dopri9"), "did you mean 'torchdiffeq:dopri"),
        (lambda: ProbabilityFlowODE(rtol=0.0), "rtol"),
        (lambda: ProbabilityFlowODE(atol=math.nan), "atol"),
        (lambda: ProbabilityFlowODE(rtol=1e-17, atol=1e-17), "below the precision"),
        (lambda: ProbabilityFlowODE(steps=0), "steps"),
        (lambda: ProbabilityFlowODE(grid="quadratik"), "did you mean 'quadratic'"),
    ],
)
def test_bad_settings_are_refused_by_name(build, message):
    with pytest.raises(InputError, match=message):
        build()


class TurnsBack:
    """A grid of a user's own that is not monotone."""

    def between(self, t_max: float, t_min: float, process: Any) -> Schedule:
        return Schedule(lambda u: 0.5 - 0.4 * torch.cos(6 * u), lambda u: 2.4 * torch.sin(6 * u))


@pytest.mark.parametrize("method", ["rk4", "torchdiffeq:rk4", "torchdiffeq:dopri5"])
def test_grids_that_turn_back_are_refused(method):
    with pytest.raises(InputError, match="must run one way"):
        infer(GaussianData(VP()), ProbabilityFlowODE(10, method, TurnsBack()), num_draws=2)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3), "needs x of shape"),
        (torch.zeros(3, 2), "needs x of shape"),
        (torch.zeros(0, 1), "at least one row"),
        (torch.full((3, 1), torch.nan), "3 NaN"),
    ],
)
def test_bad_data_are_refused(x, message):
    with pytest.raises(InputError, match=message):
        ProbabilityFlowODE(5).encode(GaussianData(VP()), x)


def test_programs_without_a_flow_are_refused():
    with pytest.raises(UnsupportedError, match="Diffusion programs .* or Flow programs"):
        ProbabilityFlowODE(5).encode(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(InputError, match="num"):
        ProbabilityFlowODE(5).interpolate(GaussianData(VP()), torch.zeros(1), torch.ones(1), 1)


def test_the_docstring_names_every_method():
    assert all(f'"{name}"' in probability_flow_ode.ProbabilityFlowODE.__doc__ for name in METHODS)
