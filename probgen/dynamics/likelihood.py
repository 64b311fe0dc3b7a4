"""log p(x) of a diffusion or a flow, by the instantaneous change of variables.

Along dx/dt = v(x, t) the density changes as d log p_t(x_t)/dt = -tr(dv/dx), so that

    log p_0(x_0) = log p_1(x_1) + int_0^1 tr(dv/dx)(x_t, t) dt                     (Chen et al. 2018, arXiv 1806.07366).

x and the integral are solved for together, each row with steps of its own. To know the error, the steps that meet the
tolerance are then taken again, each in two halves: a method of order five leaves 2^5 times less error, so that a
sixteenth of the difference holds what is left with a factor of two to spare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probgen.core import Flow, InputError, Scored, describe, given
from probgen.dynamics.fields import GaussianInitial, Velocity, as_it_is
from probgen.dynamics.steppers import Derivative, WholeBatch, check_tolerances, dopri5, dopri5_along
from probgen.dynamics.trace import Field, estimated_divergence, exact_divergence
from probgen.processes import over_event

LogDensity = Callable[[Tensor], Tensor]
Show = Callable[[float], None]
Evaluation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_ERROR_OVER_DIFFERENCE = 1 / 16
_ROUNDINGS = 8
_COARSE = 1 / 3  # of the work are the longer steps: there are twice as many of the others


class Solved(NamedTuple):
    """log p = terminal + integral, and what is known of its error.

    Args:
        terminal: log p_1(x_1), `(batch,)`.
        integral: int tr(dv/dx) dt, `(batch, n)`: one column a probe, a single one for the exact trace.
        error: of the solver, in nats, `(batch,)`.
        x_1: the end of the path, `(batch, *event)`.
        calls: network calls.
        row_calls: rows over all of them.
    """

    terminal: Tensor
    integral: Tensor
    error: Tensor
    x_1: Tensor
    calls: int
    row_calls: int

    @property
    def log_prob(self) -> Tensor:
        """Nats, `(batch,)`, averaged over the probes."""
        return self.terminal + self.integral.mean(1)

    @staticmethod
    def joined(parts: Sequence[Solved]) -> Solved:
        """Several batches as one."""
        terminal, integral, error, x_1, calls, row_calls = zip(*parts, strict=True)
        tensors = [torch.cat(column) for column in (terminal, integral, error, x_1)]
        return Solved(tensors[0], tensors[1], tensors[2], tensors[3], sum(calls), sum(row_calls))


@dataclass(frozen=True)
class Likelihood:
    """How log p of a program is solved for.

    Args:
        program: a diffusion or a flow.
        condition: `(batch, ...)`, one row for each row of x, where the program takes one. Rows that arrive leave the
            batch before the others, so that a condition is named here and not filled in beforehand.
        t_min: where the data are put on the path; None is where the program's field begins, and t = 0 for programs
            that know their score there.
        terminal: log density of x_1, `(batch, *event)` -> `(batch,)`; None is that of the law draws start from.
        rtol, atol: tolerances of the longer steps: for the coordinates together, and for log p on its own; > 0.
        memory: bytes that derivatives going backward side by side may take.
        compile: compile the velocity and its divergence, for the whole batch, once a solve; worth it for long ones.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> mixture = GaussianMixture.example()
    >>> t_max = torch.ones(1, dtype=torch.float64)
    >>> likelihood = Likelihood(mixture, terminal=lambda x: mixture.log_prob(x, t_max))
    >>> x = mixture.mean[None]
    >>> solved = likelihood.solve(x)
    >>> bool((solved.log_prob - mixture.log_prob(x)).abs() < solved.error), bool(solved.error < 1e-5)
    (True, True)
    """

    program: Any
    condition: Tensor | None = None
    t_min: float | None = None
    terminal: LogDensity | None = None
    rtol: float = 1e-5
    atol: float = 1e-5
    memory: int = 2**30
    compile: bool = False

    def velocity(self, rows: Tensor | None = None) -> Velocity:
        """The field of these rows of the batch; of a program that knows its score, down to t = 0."""
        condition = self.condition if self.condition is None or rows is None else self.condition[rows]
        program = given(self.program, condition)
        if not isinstance(program, Scored) or isinstance(program, Flow):
            return Velocity.of(program)
        process = program.process()
        return Velocity(
            program.score,
            lambda t: (process.drift(t), -0.5 * process.diffusion2(t)),
            0.0,
            process.t_max,
            GaussianInitial(process.terminal_scale()),
            process=process,
        )

    def span(self) -> tuple[float, float]:
        """The times between which the equation is solved."""
        velocity = self.velocity()
        if self.t_min is None:
            return velocity.t_min, velocity.t_max
        if not velocity.t_min <= self.t_min < velocity.t_max:
            raise InputError(
                f"t_min must lie in [{velocity.t_min:g}, {velocity.t_max:g}), where the field of "
                f"{describe(self.program)} is defined, got {self.t_min!r}."
            )
        return self.t_min, velocity.t_max

    def log_prob(self, x: Tensor) -> Tensor:
        """log p in nats by the exact trace, `(batch,)`, differentiable in x; a graph of every step is kept for that."""
        y, _ = self._adaptively(_Augmented(self, x))
        terminal, integral, _ = self._parts(x, y)
        return terminal + integral[:, 0]

    def solve(self, x: Tensor, probes: Tensor | None = None, show: Show | None = None) -> Solved:
        """log p of x `(batch, *event)` with its error, by the exact trace or by probes `(batch, n, *event)`.

        Probes stay the same on the whole path. A row whose field turns NaN is NaN, and the others are unaffected.
        `show` is told on the way which share of the work is done, in [0, 1].
        """
        with torch.no_grad():
            augmented = _Augmented(self, x, probes)
            coarse, moments = self._adaptively(augmented, self._shown(augmented, show, 0, _COARSE))
            fine = dopri5_along(self._shown(augmented, show, _COARSE, 1), augmented.start, _halved(moments))
            fine = torch.where(coarse.isnan().any(1, keepdim=True), torch.nan, fine)
            terminal, integral, x_1 = self._parts(x, fine)
            other_terminal, other_integral, _ = self._parts(x, coarse)
        difference = (terminal - other_terminal).abs() + (integral - other_integral).abs().mean(1)
        rounding = torch.finfo(x.dtype).eps * (terminal.abs() + integral.abs().mean(1))
        error = _ERROR_OVER_DIFFERENCE * difference + _ROUNDINGS * rounding
        return Solved(terminal, integral, error, x_1, augmented.calls, augmented.row_calls)

    def lost_at(self, x: Tensor, probes: Tensor | None = None) -> float:
        """Where the field of rows that came out NaN is NaN however small the step; NaN where x_1's density is."""
        augmented, lost = _Augmented(self, x, probes), math.nan

        def watched(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            nonlocal lost
            slope = augmented(t, y, rows)
            bad = ~torch.isfinite(slope).all(1)
            lost = t[bad][0].item() if bool(bad.any()) else lost
            return slope

        with torch.no_grad():
            self._adaptively(augmented, watched)
        return lost

    def _adaptively(
        self, augmented: _Augmented, derivative: Derivative | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_1 with the integrals, and the moments between the steps."""
        check_tolerances(self.rtol, self.atol, augmented.start.dtype)
        rtol, atol = (augmented.tolerances(each) for each in (self.rtol, self.atol))
        y, stats = dopri5(
            derivative or augmented.derivative(), augmented.start, *self.span(), rtol=rtol, atol=atol
        )
        return y, stats.moments

    def _shown(self, augmented: _Augmented, show: Show | None, begin: float, end: float) -> Derivative:
        """The derivative for a solve whose work is the part from `begin` to `end` of all, which it shows as it goes."""
        derivative = augmented.derivative()
        if show is None:
            return derivative
        (first, last), num_rows = self.span(), len(augmented.start)

        def shown(t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
            left = ((last - t) / (last - first)).sum().item() / num_rows
            show(end - left * (end - begin))
            return derivative(t, y, rows)

        return shown

    def _parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p_1(x_1), the integrals and x_1."""
        size = x[0].numel()
        x_1 = y[:, :size].reshape(x.shape)
        return self.log_terminal(x_1), y[:, size:], x_1

    def log_terminal(self, x_1: Tensor) -> Tensor:
        """log p_1(x_1) in nats, `(batch,)`."""
        found = (self.terminal or self.velocity().initial.log_prob)(x_1)
        if found.shape != x_1.shape[:1]:
            raise InputError(
                f"terminal must give one log density a row: expected shape {tuple(x_1.shape[:1])} for x_1 of shape "
                f"{tuple(x_1.shape)}, got {tuple(found.shape)}."
            )
        return found


class _Augmented:
    """d(x, log density)/dt of those rows of a batch that are still on their way, and what they cost."""

    def __init__(self, likelihood: Likelihood, x: Tensor, probes: Tensor | None = None) -> None:
        self.likelihood, self.event, self.probes = likelihood, x.shape[1:], probes
        self.start = torch.cat(
            (x.reshape(len(x), -1), x.new_zeros(len(x), 1 if probes is None else probes.shape[1])), 1
        )
        self.calls = self.row_calls = 0
        self._evaluate: Evaluation | None = None
        self._count = -1

    def tolerances(self, tolerance: float) -> Tensor:
        """One a coordinate. The error of log p is not to be averaged over the coordinates: it has its own."""
        found = torch.full_like(self.start[0], tolerance)
        found[self.event.numel() :] *= len(found) ** -0.5
        return found.clamp_min(torch.finfo(found.dtype).eps)

    def derivative(self) -> Derivative:
        """What a stepper calls, for one solve."""
        return WholeBatch(self) if self.likelihood.compile else self

    def __call__(self, t: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        self.calls, self.row_calls = self.calls + 1, self.row_calls + len(rows)
        x = y[:, : self.event.numel()].reshape(len(y), *self.event)
        if self._evaluate is None or len(rows) != self._count:  # rows only ever leave
            self._evaluate, self._count = self._of(rows, x, t), len(rows)
        v, trace = self._evaluate(x, t)
        return torch.cat((v.reshape(len(y), -1), trace.reshape(len(y), -1)), 1)

    def _of(self, rows: Tensor, x: Tensor, t: Tensor) -> Evaluation:
        """v and the trace, as a function of x and t, for these rows."""
        field, memory = field_of(self.likelihood.velocity(rows)), self.likelihood.memory

        def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            if probes is None:
                return exact_divergence(field, x, t, memory)
            return estimated_divergence(field, x, t, probes, memory)

        probes = None if self.probes is None else self.probes[rows]
        return compiled(evaluate, x, t) if self.likelihood.compile else evaluate


def field_of(velocity: Velocity) -> Field:
    """v as a function of x `(batch, *event)` and float64 times `(batch,)`, one a row."""
    if velocity.coefficients is as_it_is:
        return lambda x, t: velocity.output(x, t.to(x))

    def field(x: Tensor, t: Tensor) -> Tensor:
        on_x, on_output = (over_event(value, x) for value in velocity.coefficients(t))
        return on_x * x + on_output * velocity.output(x, t.to(x))

    return field


def compiled(evaluate: Evaluation, x: Tensor, t: Tensor) -> Evaluation:
    """The same for x and t of these shapes: traced once, derivatives and all, into one graph of plain tensors."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph: Evaluation = torch.compile(make_fx(evaluate)(x, t), dynamic=False)
    return graph


def _halved(moments: Tensor) -> Tensor:
    """Every step `(batch, n + 1)` in two: `(batch, 2 n + 1)`."""
    middle = 0.5 * (moments[:, 1:] + moments[:, :-1])
    return torch.cat((moments[:, :1], torch.stack((middle, moments[:, 1:]), 2).flatten(1)), 1)
