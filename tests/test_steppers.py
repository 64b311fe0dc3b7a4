"""Our steppers: torchdiffeq and exact solutions as oracles, orders against theory, rows that do not know each other."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gaussian_flow import GaussianData, PerCoordinate
from probgen.core import InputError
from probgen.dynamics import (
    FIXED_STEP,
    AffineDenoiser,
    ClockedField,
    SolverError,
    Velocity,
    WholeBatch,
    dopri5,
    dopri5_along,
    fixed_step,
    flow_field,
    reversed_schedule,
    solve_ode,
    steppers,
)
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.processes import (
    EDM,
    OU,
    VE,
    VP,
    CosineVP,
    OTPath,
    Schedule,
    SubVP,
    as_grid,
    denoiser_coefficients,
)

PROCESSES = (VP(), SubVP(), CosineVP(), VE(), EDM(), OU(), OTPath())
ORDER = {"euler": 1, "heun": 2, "rk4": 4}
THEIRS = {"euler": "euler", "heun": "heun2", "rk4": "rk4"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def clocked(velocity: Velocity, steps: int, grid: str = "quadratic", forward: bool = False) -> ClockedField:
    schedule = as_grid(grid).between(velocity.t_max, velocity.t_min, velocity.process)
    return flow_field(velocity, reversed_schedule(schedule) if forward else schedule, steps)


def velocity_of(program: GaussianData) -> Velocity:
    law = program.law
    return Velocity.of_denoiser(
        AffineDenoiser(program.denoise, lambda t: denoiser_coefficients(law, "x0", t), law)
    )


# --- fixed steps --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("method", FIXED_STEP)
def test_fixed_steps_are_those_of_torchdiffeq(method, process):
    """The same formula in another order of sums: equal to rounding, on every grid, in both directions."""
    velocity = Velocity.of(GaussianMixture.example(3, process))
    x = normal(20, 3)
    for grid in ("uniform", "quadratic", "karras"):
        for forward in (False, True):
            field = clocked(velocity, 7, grid, forward)
            theirs = solve_ode(field, x, THEIRS[method])
            assert (fixed_step(field, x, method) - theirs).abs().max() < 1e-11 * (1 + theirs.abs().max())


@pytest.mark.parametrize("forward", [False, True], ids=["to data", "to noise"])
@pytest.mark.parametrize("method", FIXED_STEP)
def test_fixed_steps_converge_at_their_order(method, forward):
    """Against the exact flow away from the ends. A wrong weight or node leaves order 1, a wrong equation order 0."""
    law = VP(t_min=0.05)
    program = GaussianData(law)
    ends = (law.t_min, law.t_max) if forward else (law.t_max, law.t_min)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    exact = program.flow(x, *ends)

    def error(steps: int) -> float:
        field = clocked(velocity_of(program), steps, "uniform", forward)
        return (fixed_step(field, x, method) - exact).abs().max().item()

    steps = 40 if method == "rk4" else 320
    assert abs(math.log2(error(steps) / error(2 * steps)) - ORDER[method]) < 0.15


def test_a_wrong_tableau_is_found_out(monkeypatch):
    """The broken twin: the best known rk4 with one node moved is of order 1."""
    good = FIXED_STEP["rk4"]
    monkeypatch.setitem(FIXED_STEP, "rk4", good._replace(nodes=(0.0, 1 / 3, 1 / 3, 1.0)))
    with pytest.raises(AssertionError):
        test_fixed_steps_converge_at_their_order("rk4", forward=False)
    with pytest.raises(AssertionError):
        test_fixed_steps_are_those_of_torchdiffeq("rk4", VP())


@pytest.mark.parametrize("method", FIXED_STEP)
def test_a_step_costs_its_calls_and_leaves_its_input_alone(method):
    asked: list[float] = []
    program = GaussianData(VP())

    def output(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return program.denoise(x, t)

    velocity = velocity_of(program).through(lambda _: output)
    x = normal(5, 1).float()
    before = x.clone()
    ends = fixed_step(clocked(velocity, 10), x, method)
    assert len(asked) == 10 * len(FIXED_STEP[method].nodes)
    assert torch.equal(x, before)
    assert ends.dtype == torch.float32
    assert 1e-3 * (1 - 1e-6) <= min(asked) <= max(asked) <= 1


@pytest.mark.parametrize("method", FIXED_STEP)
def test_fixed_steps_are_differentiable(method):
    """Along a direction, against a central difference."""
    field = clocked(Velocity.of(GaussianMixture.example(2)), 4)
    x, direction, h = normal(3, 2).requires_grad_(), normal(3, 2, seed=1), 1e-5
    (slope,) = torch.autograd.grad(fixed_step(field, x, method).sum(), x)
    with torch.no_grad():
        ahead, behind = (fixed_step(field, x + step * direction, method).sum() for step in (h, -h))
    torch.testing.assert_close((slope * direction).sum(), (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", [*FIXED_STEP, "dopri5"])
def test_a_process_of_its_own_for_each_coordinate_is_solved(method):
    program = GaussianData(PerCoordinate(), 2)
    velocity = velocity_of(program)
    x = normal(6, 2)
    exact = program.flow(x, 1.0, 1e-3)
    if method == "dopri5":
        found, _ = dopri5(lambda t, y, _: velocity(y, t), x, 1.0, 1e-3, rtol=1e-8, atol=1e-8)
        assert (found - exact).abs().max() < 1e-6
    else:
        error = (fixed_step(clocked(velocity, 200), x, method) - exact).abs().max()
        assert error < {"euler": 0.03, "heun": 1e-3, "rk4": 1e-6}[method]


# --- adaptive steps -----------------------------------------------------------------------------------------------


def swing(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """y(t) = y(0) exp(sin(3 t) / 3)."""
    return torch.cos(3 * t)[:, None].to(y) * y


def swung(y: Tensor, t_0: float, t_1: float) -> Tensor:
    return y * math.exp((math.sin(3 * t_1) - math.sin(3 * t_0)) / 3)


def test_tableau_meets_the_order_conditions():
    """sum_i b_i c_i^(k-1) = 1/k to order 5 for the step and to order 4 for the one it is compared with."""
    nodes = torch.tensor([0.0, *steppers._NODES], dtype=torch.float64)
    for node, weights in zip(steppers._NODES, steppers._STAGES, strict=True):
        assert abs(sum(weights) - node) < 1e-12
    step = torch.tensor([*steppers._STAGES[-1], 0.0], dtype=torch.float64)
    other = step - torch.tensor(steppers._ERROR, dtype=torch.float64)
    for weights, order in ((step, 5), (other, 4)):
        for k in range(1, order + 1):
            assert abs((weights * nodes ** (k - 1)).sum().item() - 1 / k) < 1e-12
    assert abs((other * nodes**4).sum().item() - 1 / 5) > 1e-4


@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, 0.0), (-1.0, 0.3)], ids=str)
def test_errors_follow_the_tolerance(ends):
    y = torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None]
    tolerances = [10.0**-k for k in range(4, 12)]
    errors = []
    for tolerance in tolerances:
        found, _ = dopri5(swing, y, *ends, rtol=tolerance, atol=tolerance)
        errors.append((found - swung(y, *ends)).abs().max().item())
        assert errors[-1] < 10 * tolerance
    slope = math.log(errors[0] / errors[-1]) / math.log(tolerances[0] / tolerances[-1])
    assert 0.8 < slope < 1.2, errors


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_every_process_is_solved_as_by_torchdiffeq(process):
    """Two adaptive solvers with two controllers: within the tolerance of each other, and of the exact flow."""
    program = GaussianData(process)
    velocity = velocity_of(program)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * process.terminal_scale()
    exact = program.flow(x, process.t_max, process.t_min)
    found, _ = dopri5(lambda t, y, _: velocity(y, t), x, process.t_max, process.t_min, rtol=1e-7, atol=1e-7)
    theirs = solve_ode(clocked(velocity, 1), x, "dopri5", 1e-7, 1e-7)
    assert (found - exact).abs().max() < 3e-6
    assert (found - theirs).abs().max() < 6e-6


def stiffening(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
    """Rows of very different speeds: y' = -y^3."""
    return -(y**3)


def test_a_row_does_not_depend_on_its_batch_mates():
    """Each row alone and among others that need a hundred times the steps: the same to rounding."""
    y = torch.tensor([[1.0, 0.5], [30.0, 1.0], [0.1, 0.2], [5.0, -5.0]], dtype=torch.float64)
    together, stats = dopri5(stiffening, y, 0.0, 1.0, rtol=1e-6, atol=1e-6)
    for row in range(len(y)):
        alone, own = dopri5(stiffening, y[row : row + 1], 0.0, 1.0, rtol=1e-6, atol=1e-6)
        assert (together[row] - alone[0]).abs().max() < 1e-12
        assert own.accepted == stats.accepted[row]
    assert stats.accepted.unique().numel() > 2


def test_shared_control_would_be_found_out():
    """The broken twin: torchdiffeq's norm over the whole batch lets a mate change a row by more than the tolerance."""
    y = torch.tensor([[1.0, 0.5], [30.0, 1.0]], dtype=torch.float64)

    def solve(y: Tensor) -> Tensor:
        from torchdiffeq import odeint

        return odeint(lambda t, y: -(y**3), y, torch.tensor([0.0, 1.0]), rtol=1e-6, atol=1e-6)[-1]

    assert (solve(y)[0] - solve(y[:1])[0]).abs().max() > 1e-10


def test_rows_that_are_done_are_not_asked_again():
    y = torch.tensor([[0.1], [40.0], [1.0]], dtype=torch.float64)
    asked = torch.zeros(3, dtype=torch.int64)

    def counted(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        assert t.shape == rows.shape == y.shape[:1]
        asked[rows] += 1
        return stiffening(t, y, rows)

    _, stats = dopri5(counted, y, 0.0, 1.0)
    # Seven slopes a step of which the first is known, one at the start, and one to guess the first step.
    assert torch.equal(asked, 6 * (stats.accepted + stats.rejected) + 2)
    assert stats.row_calls == asked.sum()
    assert stats.calls == asked.max()
    assert stats.row_calls < 0.6 * stats.calls * len(y)


def test_the_steps_taken_can_be_taken_again():
    """The moments of each row lead to the same end, rejected steps and shorter rows notwithstanding."""
    y = torch.tensor([[0.1], [40.0], [1.0]], dtype=torch.float64)
    found, stats = dopri5(stiffening, y, 0.0, 1.0)
    assert stats.rejected.sum() > 0
    assert torch.equal((stats.moments.diff() != 0).sum(1), stats.accepted)
    assert (stats.moments[:, -1] == 1).all()
    torch.testing.assert_close(dopri5_along(stiffening, y, stats.moments), found, rtol=0, atol=1e-12)


def test_times_stay_between_the_ends():
    """And every row arrives exactly: the last step is cut, not interpolated."""
    times: list[float] = []

    def watched(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        times.extend(t.tolist())
        return swing(t, y, rows)

    dopri5(watched, normal(4, 2), 0.7, 0.3)
    assert min(times) >= 0.3 - 1e-15
    assert max(times) <= 0.7


def test_there_and_back():
    y = normal(5, 3)
    there, _ = dopri5(swing, y, 0.0, 2.0, rtol=1e-10, atol=1e-10)
    back, _ = dopri5(swing, there, 2.0, 0.0, rtol=1e-10, atol=1e-10)
    assert (back - y).abs().max() < 1e-8


def test_the_whole_batch_may_be_asked_for():
    y = torch.tensor([[0.1], [40.0], [1.0]], dtype=torch.float64)
    shifts = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)

    def conditioned(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        assert len(y) == len(t) == 3
        return shifts - y

    found, _ = dopri5(WholeBatch(conditioned), y, 0.0, 1.0)
    expected, _ = dopri5(lambda t, y, rows: shifts[rows] - y, y, 0.0, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found, shifts + (y - shifts) * math.exp(-1), rtol=1e-4, atol=1e-4)


def test_tolerances_may_differ_by_coordinate():
    """The second coordinate has an easy equation and a tight tolerance, and the first a loose one: both are heeded."""
    y = torch.ones(1, 2, dtype=torch.float64)
    loose, tight = 1e-3, 1e-9

    def cost(atol: Any) -> int:
        return dopri5(swing, y, 0.0, 2.0, rtol=1e-12, atol=atol)[1].row_calls

    mixed = cost(torch.tensor([loose, tight], dtype=torch.float64))
    assert cost(loose) < mixed <= cost(tight)
    with pytest.raises(InputError, match="rtol"):
        dopri5(swing, y, 0.0, 1.0, rtol=torch.tensor([1e-5, 0.0]))


def test_gradients_are_those_of_the_flow():
    """d/dy of y / (1 + y t) at t = 1 is 1 / (1 + y)^2."""
    y = torch.tensor([[0.5], [1.0], [3.0]], dtype=torch.float64, requires_grad=True)
    found, _ = dopri5(lambda t, y, _: -y * y, y, 0.0, 1.0, rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(found.sum(), y)
    torch.testing.assert_close(slope, (1 + y.detach()) ** -2, rtol=0, atol=1e-7)


def test_float32_states_keep_their_type_and_times_are_float64():
    def typed(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        assert (t.dtype, y.dtype) == (torch.float64, torch.float32)
        return swing(t, y, rows)

    y = normal(4, 2).float()
    found, _ = dopri5(typed, y, 0.0, 2.0)
    assert found.dtype == torch.float32
    assert (found - swung(y, 0.0, 2.0)).abs().max() < 1e-4


# --- what cannot go on --------------------------------------------------------------------------------------------


def test_rows_that_turn_nan_stop_alone():
    """At t > 0.5, where y > 1.5: the step shrinks to make sure, and the other rows do not notice."""

    def fragile(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return torch.where((y > 1.5) & (t[:, None] > 0.5), torch.nan, swing(t, y, rows))

    y = torch.tensor([[1.0], [2.0], [0.5], [torch.nan], [3.0]], dtype=torch.float64)
    found, stats = dopri5(fragile, y, 0.0, 1.0)
    assert found.isnan().flatten().tolist() == [False, True, False, True, True]
    expected, _ = dopri5(swing, y[[0, 2]], 0.0, 1.0)
    torch.testing.assert_close(found[[0, 2]], expected, rtol=0, atol=1e-13)
    assert (stats.accepted + stats.rejected).max() < 60


def test_nan_of_a_step_too_long_is_only_a_rejected_step():
    """sqrt(y) is NaN below 0, where a long step may look; the solution (1 - t/2)^2 never goes there."""
    found, stats = dopri5(lambda t, y, _: -y.sqrt(), torch.ones(1, 1, dtype=torch.float64), 0.0, 1.9999)
    assert abs(found.item() - (1 - 1.9999 / 2) ** 2) < 1e-4
    assert stats.rejected > 0


def test_a_singular_time_is_named_with_its_rows():
    def singular(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        return y.square()  # 1 / (1/y(0) - t)

    y = torch.tensor([[0.1], [2.0], [0.2], [4.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"t = 0\.25.* rows 3 needed steps below") as caught:
        dopri5(singular, y, 0.0, 1.0)
    assert caught.value.rows == [3]


def test_too_many_steps_are_named_with_their_rows():
    y = torch.tensor([[0.1], [40.0]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"rows 1 took 20 steps"):
        dopri5(stiffening, y, 0.0, 1.0, rtol=1e-8, atol=1e-8, max_steps=20)
    _, stats = dopri5(stiffening, y, 0.0, 1.0)
    needed = int((stats.accepted + stats.rejected).max())
    dopri5(stiffening, y, 0.0, 1.0, max_steps=needed)
    with pytest.raises(SolverError, match=f"took {needed - 1} steps"):
        dopri5(stiffening, y, 0.0, 1.0, max_steps=needed - 1)


def test_tolerances_below_the_precision_are_refused():
    """Else float32 takes minutes of tiny steps, each within the tolerance, and their sum wrong by rounding."""
    with pytest.raises(InputError, match="below the precision of torch.float32"):
        dopri5(swing, normal(2, 2).float(), 0.0, 2.0, rtol=1e-12, atol=1e-12)
    dopri5(swing, normal(2, 2).float(), 0.0, 2.0, rtol=1e-12, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": 0.0}, "rtol must be > 0"),
        ({"atol": -1.0}, "atol must be > 0"),
        ({"atol": math.nan}, "atol must be > 0"),
        ({"max_steps": 0}, "max_steps"),
        ({"t_1": 0.0}, "two different ends"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        dopri5(swing, torch.ones(1, 1), 0.0, **({"t_1": 1.0} | options))


@pytest.mark.parametrize(
    ("time", "message"),
    [
        (lambda u: 1 - u + 0.3 * torch.sin(9 * u), "must lie in"),
        (lambda u: 0.5 - 0.4 * torch.cos(6 * u), "must run one way: .* at u = "),
        (lambda u: 1 - 2 * u, r"must lie in \[0.001, 1\] .*got 0"),
        (lambda u: torch.full_like(u, 0.5), "must run one way"),
        (lambda u: (1 - u).log(), "must lie in"),
    ],
)
def test_grids_that_turn_back_or_leave_the_times_are_refused(time, message):
    with pytest.raises(InputError, match=message):
        flow_field(velocity_of(GaussianData(VP())), Schedule(time, torch.ones_like), 20)


def test_steps_beyond_memory_are_refused():
    with pytest.raises(InputError, match="would not fit memory"):
        clocked(velocity_of(GaussianData(VP())), 10**9)


def test_unknown_methods_are_refused():
    with pytest.raises(InputError, match="did you mean 'euler'"):
        fixed_step(clocked(velocity_of(GaussianData(VP())), 2), normal(1, 1), "eular")


def test_torchdiffeq_that_gives_up_is_named():
    def fragile(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t < 0.5, torch.nan, x)

    velocity = velocity_of(GaussianData(VP())).through(lambda _: fragile)
    with pytest.raises(SolverError, match=r"torchdiffeq's dopri5 gave up near t = 0\.\d+ .*keeps rows apart"):
        solve_ode(clocked(velocity, 1), normal(3, 1), "dopri5")
