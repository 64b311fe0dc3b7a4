"""Our own steppers for ordinary differential equations: fixed steps on the clock of a field, and adaptive ones a row.

`fixed_step` does everything linear in Python floats, so that a step is little more than its network calls. `dopri5`
gives every row its own time, step and verdict, so that no row depends on its batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, ProbgenError, check_count, did_you_mean
from probgen.dynamics.fields import ClockedField, times

# --- fixed steps ------------------------------------------------------------------------------------------------


class Tableau(NamedTuple):
    """An explicit Runge-Kutta method: where in a step each slope is taken, and their weights in the state after it.

    `weights[i]` weighs slopes 0..i in the state at which slope i + 1 is taken; the last row makes the step.
    """

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]


FIXED_STEP = {
    "euler": Tableau((0.0,), ((1.0,),)),
    "heun": Tableau((0.0, 1.0), ((1.0,), (1 / 2, 1 / 2))),
    # Kutta's 3/8 rule, of smaller error than the better known one, and torchdiffeq's.
    "rk4": Tableau(
        (0.0, 1 / 3, 2 / 3, 1.0), ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8))
    ),
}


def fixed_step(field: ClockedField, x: Tensor, method: str) -> Tensor:
    """Integrate a field from x `(batch, *event)` over its clock, in `field.num_steps` steps of an explicit method.

    Args:
        field: what to integrate; its noise is left out.
        x: the state at u = 0; left as it is.
        method: "euler", of order 1 with one network call a step; "heun", order 2, two calls; "rk4", order 4, four.

    Returns the state at u = num_steps. Differentiable in x where gradients are on. Raises `InputError` for an unknown
    method.

    Source: Hairer, Norsett & Wanner (1993), Solving Ordinary Differential Equations I, section II.1. Heun's is the
    scheme of Karras et al. (2022), arXiv 2206.00364, algorithm 1, without its Euler step at the end.
    """
    if method not in FIXED_STEP:
        raise InputError(f"Unknown method {method!r}; {did_you_mean(method, FIXED_STEP)}")
    tableau = FIXED_STEP[method]
    field.tabulate(x, [node for node in tableau.nodes if node < 1])
    for k in range(field.num_steps):
        x = _step(field, tableau, k, x)
    return x


def _step(field: ClockedField, tableau: Tableau, k: int, x: Tensor) -> Tensor:
    # Slopes are affine in x and the outputs so far, and so are the states at the stages. The factors are worked out as
    # floats: tensors are touched once for each output and stage.
    state, factors, slopes, terms = x, [1.0], [], [x]
    for node, weights in zip(tableau.nodes, tableau.weights, strict=True):
        row = field.at(k + node, x)
        terms.append(field.output(state, row.t))
        slopes.append([*(row.on_x * factor for factor in factors), row.on_output])
        factors = _moved(weights, slopes)
        state = combine(factors, terms)
    return state


def _moved(weights: Sequence[float], slopes: Sequence[Sequence[Any]]) -> list[Any]:
    """Factors of x + sum_j weights_j slopes_j."""
    factors: list[Any] = [1.0] + [0.0] * len(slopes)
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            for i, factor in enumerate(slope):
                factors[i] = factors[i] + weight * factor
    return factors


# --- adaptive steps ---------------------------------------------------------------------------------------------

Derivative = Callable[[Tensor, Tensor, Tensor], Tensor]

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
# The PI controller of Hairer, Norsett & Wanner (1993), section II.4, with their constants.
_SAFETY, _MOST, _LEAST, _ON_NAN = 0.9, 10.0, 0.2, 0.1
_ON_ERROR, _ON_PREVIOUS = 0.2 - 0.75 * 0.04, 0.04
_SMALLEST_STEP = 16 * torch.finfo(torch.float64).eps  # of the largest time: less does not move the clock
_SMALLEST_STEP_ON_NAN = 1e-6  # of the span: NaN that is there at this step is no stage that overshot


class SolverError(ProbgenError):
    """An adaptive solver could not go on: the message says at which time and in which rows, `rows` names them."""

    def __init__(self, message: str, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Stats(NamedTuple):
    """What a solve took: calls of the derivative, rows over all calls, and steps of each row `(batch,)`.

    `moments` are the times between the steps each row took, `(batch, n + 1)`, the last one repeated for rows of fewer.
    """

    calls: int
    row_calls: int
    accepted: Tensor
    rejected: Tensor
    moments: Tensor


def dopri5(
    derivative: Derivative,
    y: Tensor,
    t_0: float,
    t_1: float,
    *,
    rtol: float | Tensor = 1e-5,
    atol: float | Tensor = 1e-5,
    max_steps: int = 10_000,
) -> tuple[Tensor, Stats]:
    """Integrate dy/dt = derivative(t, y, rows) from t_0 to t_1, each row with its own steps (Dormand-Prince 5(4)).

    A step of a row is accepted where the root mean square over its coordinates of error / (atol + rtol |y|) is at most
    1; nothing else of the batch enters, so that a row's result depends on its batch mates only through the rounding
    of the derivative. Rows that are done leave the batch: `rows` says which are left. Where gradients are on, the
    result is differentiable in y, through the steps taken; the sizes of the steps count as constants (and a rejected
    step that was NaN makes the gradient of its row NaN).

    Args:
        derivative: called with t `(rows,)` float64, y `(rows, n)` and the indices of these rows in the batch, int64;
            returns dy/dt `(rows, n)` in the dtype of y.
        y: the state at t_0, `(batch, n)`.
        t_0, t_1: the ends, in either order.
        rtol, atol: tolerances > 0, a number or one for each coordinate `(n,)`.
        max_steps: most steps a row may try, >= 1.

    Returns:
        The state at t_1, `(batch, n)`, and what it took. A row whose derivative is NaN or infinite however small the
        step is NaN; the others are unaffected.

    Raises:
        InputError: a tolerance that is not > 0, both below the precision of y, equal ends.
        SolverError: a step fell below what moves the clock, or a row took more than `max_steps`.

    Source: Dormand & Prince (1980), doi 10.1016/0771-050X(80)90013-3.

    >>> y, stats = dopri5(lambda t, y, rows: -y, torch.ones(2, 3, dtype=torch.float64), 0.0, 1.0, rtol=1e-8, atol=1e-8)
    >>> bool((y - 0.36787944).abs().max() < 1e-7), stats.accepted.shape
    (True, torch.Size([2]))
    """
    check_tolerances(rtol, atol, y.dtype)
    check_count("max_steps", max_steps)
    if t_0 == t_1:
        raise InputError(f"dopri5 needs two different ends, got t_0 = t_1 = {t_0!r}.")
    solve = _Solve(derivative, t_0, t_1, rtol, atol, y.device)
    running, parts = solve.begin(y), []
    for tried in range(max_steps + 1):
        done = running.t == t_1
        if bool(done.any()):
            parts.append(_picked(running, done))
            running = _picked(running, ~done)
        if not len(running.row):
            break
        if tried == max_steps:
            solve.refuse(running, f"took {max_steps:,} steps")
        running = solve.attempt(running)
    ends = _Rows(*(torch.cat(column) for column in zip(*parts, strict=True)))
    order = ends.row.argsort()
    moments = _moments(y, t_0, solve.visited)
    return ends.y[order], Stats(
        solve.calls, solve.row_calls, ends.accepted[order], ends.rejected[order], moments
    )


def dopri5_along(derivative: Derivative, y: Tensor, moments: Tensor) -> Tensor:
    """Integrate over given steps of each row, one after another, whatever their error.

    Args:
        derivative, y: as for `dopri5`.
        moments: the times between the steps, `(batch, n + 1)` float64, the last one repeated for rows of fewer steps.

    Returns the state at the last moment of each row, `(batch, n)`, differentiable in y where gradients are on.

    >>> moments = torch.linspace(0, 1, 11, dtype=torch.float64).expand(2, 11)
    >>> y = dopri5_along(lambda t, y, rows: -y, torch.ones(2, 3, dtype=torch.float64), moments)
    >>> bool((y - 0.36787944).abs().max() < 1e-7)
    True
    """
    solve = _Solve(derivative, 0.0, 1.0, 1.0, 1.0, y.device)
    rows = torch.arange(len(y), device=y.device)
    slope, finished = solve.slope(moments[:, 0], y, rows), []
    for t, after in zip(moments.unbind(1)[:-1], moments.unbind(1)[1:], strict=True):
        runs = t[rows] != after[rows]
        if not bool(runs.all()):
            finished.append((rows[~runs], y[~runs]))
            rows, y, slope = rows[runs], y[runs], slope[runs]
        y, slopes = solve.stages(rows, t[rows], y, slope, after[rows] - t[rows])
        slope = slopes[-1]
    order, ends = (torch.cat(column) for column in zip(*finished, (rows, y), strict=True))
    return ends[order.argsort()]


def _moments(y: Tensor, t_0: float, visited: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Where each row was after each attempt, attempts that took it nowhere left out."""
    columns = [torch.full((len(y),), t_0, dtype=torch.float64, device=y.device)]
    for row, t in visited:
        columns.append(columns[-1].index_copy(0, row, t))
    table = torch.stack(columns, 1)
    moved = torch.nn.functional.pad(table[:, 1:] != table[:, :-1], (1, 0))
    place = moved.cumsum(1)
    return table[:, -1:].repeat(1, int(place.max()) + 1).scatter_(1, place, table)


class _Rows(NamedTuple):
    """The rows still running: index, time, next step > 0, state and its derivative, what the controller remembers."""

    row: Tensor
    t: Tensor
    step: Tensor
    y: Tensor
    slope: Tensor
    error: Tensor
    growth: Tensor
    accepted: Tensor
    rejected: Tensor


def _picked(rows: _Rows, which: Tensor) -> _Rows:
    return _Rows(*(value[which] for value in rows))


class _Solve:
    """One integral: its equation, its ends and tolerances, and what it has cost so far."""

    def __init__(
        self,
        derivative: Derivative,
        t_0: float,
        t_1: float,
        rtol: float | Tensor,
        atol: float | Tensor,
        device: torch.device,
    ) -> None:
        self.derivative, self.t_0, self.t_1 = derivative, t_0, t_1
        self.rtol, self.atol = rtol, atol
        self.direction = 1.0 if t_1 > t_0 else -1.0
        self.smallest = _SMALLEST_STEP * max(abs(t_0), abs(t_1))
        self.smallest_on_nan = _SMALLEST_STEP_ON_NAN * abs(t_1 - t_0)
        self.nodes = torch.tensor(_NODES, dtype=torch.float64, device=device)
        self.calls = self.row_calls = 0
        self.visited: list[tuple[Tensor, Tensor]] = []  # rows and the times at which an attempt left them

    def slope(self, t: Tensor, y: Tensor, row: Tensor) -> Tensor:
        self.calls += 1
        self.row_calls += len(row)
        return self.derivative(t, y, row)

    def size(self, value: Tensor, y: Tensor) -> Tensor:
        """Root mean square of value / (atol + rtol |y|) over the coordinates of each row: `(rows,)` float64."""
        return (value / (y * self.rtol + self.atol)).square().mean(1, dtype=torch.float64).sqrt()

    def begin(self, y: Tensor) -> _Rows:
        """Every row at t_0, with Hairer's guess of its first step; NaN rows are at t_1 already."""
        row = torch.arange(len(y), device=y.device)
        t = torch.full((len(y),), self.t_0, dtype=torch.float64, device=y.device)
        slope = self.slope(t, y, row)
        lost = ~(torch.isfinite(y) & torch.isfinite(slope)).all(1)
        none = torch.zeros_like(row)
        return _Rows(
            row,
            torch.where(lost, self.t_1, t),
            self.first_step(t, y, slope, row),
            torch.where(lost[:, None], torch.nan, y),
            slope,
            torch.full_like(t, 1e-4),
            torch.full_like(t, _MOST),
            none,
            none,
        )

    def first_step(self, t: Tensor, y: Tensor, slope: Tensor, row: Tensor) -> Tensor:
        """A step whose Euler error is about a hundredth (Hairer, Norsett & Wanner 1993, section II.4)."""
        span = abs(self.t_1 - self.t_0)
        with torch.no_grad():
            magnitude = y.abs()
            state, speed = self.size(y, magnitude), self.size(slope, magnitude)
            tiny = (state < 1e-5) | (speed < 1e-5)
            trial = torch.where(tiny, 1e-6, 0.01 * state / speed).nan_to_num(1e-6).clamp(max=span)
            signed = self.direction * trial
            moved = self.slope(t + signed, y + signed[:, None].to(y) * slope, row)
            curvature = self.size(moved - slope, magnitude) / trial
            worst = torch.maximum(speed, curvature)
            guess = torch.where(worst <= 1e-15, trial.mul(1e-3).clamp_min(1e-6), (0.01 / worst) ** 0.2)
            return torch.minimum(100 * trial, guess.nan_to_num(1e-6)).clamp(max=span)

    def attempt(self, rows: _Rows) -> _Rows:
        """One step of every row, taken where its error allows, with the size of the next."""
        left = (self.t_1 - rows.t).abs()
        last = rows.step * 1.01 >= left
        step = torch.where(last, left, rows.step)
        signed = self.direction * step
        y, slopes = self.stages(rows.row, rows.t, rows.y, rows.slope, signed)
        with torch.no_grad():
            error = self.error(rows.y, y, slopes, signed)
            accept = error <= 1
            factor = torch.minimum(self.factor(error, rows.error), torch.where(accept, rows.growth, 1.0))
            t = torch.where(accept, torch.where(last, self.t_1, rows.t + signed), rows.t)
            remembered = torch.where(accept, error.clamp_min(1e-4), rows.error)
            growth = torch.where(accept, _MOST, 1.0)
        self.visited.append((rows.row, t))
        taken = accept[:, None]
        after = _Rows(
            rows.row,
            t,
            step * factor,
            torch.where(taken, y, rows.y),
            torch.where(taken, slopes[-1], rows.slope),
            remembered,
            growth,
            rows.accepted + accept,
            rows.rejected + ~accept,
        )
        return self.without_lost(after, error)

    def stages(
        self, row: Tensor, t: Tensor, y: Tensor, slope: Tensor, step: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The state a step later and the seven slopes, the last of which is the first of the next step."""
        after, wide, slopes = y, step[:, None].to(y), [slope]
        for moment, weights in zip(t + torch.outer(self.nodes, step), _STAGES, strict=True):
            after = torch.addcmul(y, wide, combine(weights, slopes))
            slopes.append(self.slope(moment, after, row))
        return after, slopes

    def error(self, before: Tensor, after: Tensor, slopes: list[Tensor], step: Tensor) -> Tensor:
        """Size of the difference between the orders 5 and 4."""
        difference = combine(_ERROR, slopes).mul_(step[:, None].to(before))
        return self.size(difference, torch.maximum(before.abs(), after.abs()))

    def factor(self, error: Tensor, previous: Tensor) -> Tensor:
        """What the next step is multiplied by."""
        wished = _SAFETY * error**-_ON_ERROR * previous**_ON_PREVIOUS
        return torch.where(torch.isfinite(error), wished.clamp(_LEAST, _MOST), _ON_NAN)

    def without_lost(self, rows: _Rows, error: Tensor) -> _Rows:
        """Rows that are NaN however small the step end here, NaN; a row that is stuck otherwise is an error."""
        nan = ~torch.isfinite(error)
        stuck = rows.step < torch.where(nan, self.smallest_on_nan, self.smallest)
        stuck &= rows.t != self.t_1
        if not bool(stuck.any()):
            return rows
        if bool((stuck & ~nan).any()):
            bad = _picked(rows, stuck & ~nan)
            self.refuse(bad, f"needed steps below {self.smallest:.2g}, which do not move the clock")
        return rows._replace(
            t=torch.where(stuck, self.t_1, rows.t), y=torch.where(stuck[:, None], torch.nan, rows.y)
        )

    def refuse(self, rows: _Rows, what: str) -> None:
        """Raise the error that names the time and the rows."""
        names, t = rows.row.tolist(), rows.t[0].item()
        raise SolverError(
            f"dopri5 gave up at t = {t:.6g} on the way from {self.t_0:g} to {self.t_1:g}: rows {listed(names)} {what}. "
            "The equation is stiff or singular there: raise rtol and atol, solve in float64, or stop short of the "
            "singular time.",
            names,
        )


def check_tolerances(rtol: float | Tensor, atol: float | Tensor, dtype: torch.dtype = torch.float64) -> None:
    """Raise `InputError` unless all are > 0 and each coordinate has one that numbers of this dtype can meet."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not bool(torch.as_tensor(value > 0).all()):
            raise InputError(f"{name} must be > 0, got {value!r}.")
    precision = torch.finfo(dtype).eps
    if bool(((torch.as_tensor(rtol) < precision) & (torch.as_tensor(atol) < precision)).any()):
        raise InputError(
            f"rtol = {rtol!r} and atol = {atol!r} are below the precision of {dtype}, {precision:.2g}: raise one of "
            "them, or solve in float64 (program.double())."
        )


class WholeBatch:
    """A derivative asked for every row of the batch at every call, rows that are done carried along.

    For networks that cannot be asked for some of the rows: each has its own condition, or they are compiled for one
    shape. Without gradients.
    """

    def __init__(self, derivative: Derivative) -> None:
        self.derivative = derivative
        self._t: Tensor | None = None

    def __call__(self, t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """See `dopri5`; the first call is for all rows."""
        if self._t is None:
            self._t, self._y, self._rows = t.clone(), y.clone(), rows
        self._t[rows], self._y[rows] = t, y
        return self.derivative(self._t, self._y, self._rows)[rows]


# --- small ------------------------------------------------------------------------------------------------------


def listed(numbers: Sequence[int]) -> str:
    """The first ten, for a message."""
    return ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")


def combine(weights: Sequence[Any], terms: Sequence[Tensor]) -> Tensor:
    """sum_i weights_i terms_i; weights are floats, those that are 0 cost nothing, or of the shape of one event."""
    total = times(weights[0], terms[0])
    for weight, term in zip(weights[1:], terms[1:], strict=True):
        if not isinstance(weight, float):
            total = total.add_(times(weight, term))
        elif weight != 0.0:
            total = total.add_(term, alpha=weight)
    return total
