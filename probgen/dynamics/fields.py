"""What a diffusion or a flow looks like to a solver: drift and noise that are affine in one network call.

Same marginals for every a >= 0 (Song et al. 2021, arXiv 2011.13456; Karras et al. 2022, arXiv 2206.00364):

    dx = [v - w^2/2 score] dt + w dW for dt < 0,    dx = [v + w^2/2 score] dt + w dW for dt > 0,    w^2 = a g^2,

with v the velocity of the probability flow, v = f x - g^2/2 score. As x0hat = a(t) x + b(t) output, the drift is
A(t) x + B(t) output: two numbers a time, worked out in float64 before the loop. Solvers run in u = 0..n, one unit a
step, on a smooth schedule t(u): an n-step scheme takes n steps, whatever rounding does to the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from probgen.core import (
    Diffusion,
    Flow,
    InputError,
    Predicting,
    Support,
    UnsupportedError,
    Within,
    check,
    process_support,
    shown,
)
from probgen.processes import (
    Process,
    Schedule,
    check_times,
    denoiser_coefficients,
    over_event,
    velocity_coefficients,
)
from probgen.randomness import Noise

Output = Callable[[Tensor, Tensor], Tensor]
Coefficients = Callable[[Tensor], tuple[Tensor, Tensor]]
_NODES_PER_STEP = 12  # every stage of the fixed-step methods falls on a twelfth of a step
_SIXTHS = (0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6)
MAX_STEPS = 1_000_000
Steps = Annotated[int, Within(1, MAX_STEPS, why="their tables would not fit memory")]
_LEAST_CHECKED, _MOST_CHECKED, _SLACK = 16, 10_000, 1e-9  # steps of a grid looked at; rounding at its ends


# --- where a flow starts ----------------------------------------------------------------------------------------


class Initial(Protocol):
    """The law of x_1. `str()` of it says which law it is."""

    def draw(self, noise: Noise) -> Tensor:
        """x_1, one row for each row of the noise: `(noise.num_rows, *event)`."""

    def log_prob(self, x_1: Tensor) -> Tensor:
        """log density in nats, `(batch,)`; `UnsupportedError` where it is not known."""


@dataclass(frozen=True)
class GaussianInitial:
    """x_1 ~ N(0, scale^2), scale `()` or `(*event)`.

    >>> GaussianInitial(torch.tensor(2.0)).log_prob(torch.zeros(3, 1)).shape
    torch.Size([3])
    """

    scale: Tensor

    def draw(self, noise: Noise) -> Tensor:
        """Unit noise of key 0, scaled."""
        return times(scalar(self.scale), noise(0))

    def log_prob(self, x_1: Tensor) -> Tensor:
        """sum_i log N(x_i; 0, scale_i^2)."""
        law = torch.distributions.Normal(
            torch.zeros((), dtype=x_1.dtype, device=x_1.device), self.scale.to(x_1), validate_args=False
        )
        return law.log_prob(x_1).flatten(1).sum(1)

    def __str__(self) -> str:
        low, high = self.scale.min().item(), self.scale.max().item()
        return (
            f"N(0, {low:.4g}^2 I)"
            if low == high
            else f"N(0, diag(scale^2)), scale in [{low:.4g}, {high:.4g}]"
        )


# --- affine in one network call ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class AffineDenoiser:
    """x0hat = a(t) x_t + b(t) output(x_t, t), for any diffusion.

    Args:
        output: the network, x `(batch, *event)` and t `(1,)` in the dtype of x -> `(batch, *event)`.
        coefficients: a and b at float64 times `(n,)`, each `(n,)` or `(n, *event)`.
        process: the noising law.
    """

    output: Output
    coefficients: Coefficients
    process: Process

    @staticmethod
    def of(program: Diffusion) -> AffineDenoiser:
        """A program's network with its coefficients, or its `denoise` with a = 0, b = 1."""
        if isinstance(program, Predicting):
            return AffineDenoiser(program.predict, program.denoiser_coefficients, program.process())
        process = program.process()
        return AffineDenoiser(program.denoise, lambda t: denoiser_coefficients(process, "x0", t), process)

    def through(self, wrap: Callable[[Output], Output]) -> AffineDenoiser:
        """The same with its network wrapped: counted, compiled, watched."""
        return replace(self, output=wrap(self.output))

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """E[x_0 | x_t = x] at one time, one network call."""
        at = torch.full((1,), t, dtype=torch.float64)
        on_x, on_output = (scalar(value[0]) for value in self.coefficients(at))
        return times(on_x, x) + times(on_output, self.output(x, at.to(x)))


@dataclass(frozen=True)
class Velocity:
    """dx/dt = A(t) x + B(t) output(x, t), the probability flow of a diffusion or the field of a flow.

    Args:
        output, coefficients: as for `AffineDenoiser`, for the velocity.
        t_min, t_max: where it is defined.
        initial: the law at t_max.
        denoiser: E[x_0 | x_t] from the same network, which ends a path that stops at t_min > 0; None where the flow
            has none, and where it reaches the data.
        process: the noising law, where there is one.
        whole_batch: the network must be asked for all rows of a batch at once, as where each has its own condition.
    """

    output: Output
    coefficients: Coefficients
    t_min: float
    t_max: float
    initial: Initial
    denoiser: AffineDenoiser | None = None
    process: Process | None = None
    whole_batch: bool = False

    @staticmethod
    def supports(program: object) -> Support:
        """Whether the program is a flow or a diffusion, and why not."""
        if isinstance(program, Flow):
            return Support(True)
        if not isinstance(program, Diffusion):
            return Support(
                False,
                "it needs Diffusion programs (process() and denoise(x_t, t)) or Flow programs (velocity(x_t, t))",
            )
        return process_support(program)

    @staticmethod
    def of(program: Flow | Diffusion) -> Velocity:
        """A flow's own velocity, or the probability flow of a diffusion; `UnsupportedError` for other programs."""
        support = Velocity.supports(program)
        if not support:
            raise UnsupportedError(
                f"The program must be a diffusion or a flow, got {shown(program)}: {support.reason}."
            )
        if isinstance(program, Flow):
            t_min, t_max = program.span()
            return Velocity(
                program.velocity, as_it_is, t_min, t_max, program.initial(), process=_process(program)
            )
        return Velocity.of_denoiser(AffineDenoiser.of(program))

    @staticmethod
    def of_denoiser(denoiser: AffineDenoiser) -> Velocity:
        """v = A x + B x0hat, clamped where the process is; it ends in E[x_0 | x]."""
        process = denoiser.process
        return Velocity(
            denoiser.output,
            lambda t: reverse_drift(denoiser, t)[:2],
            process.t_min,
            process.t_max,
            GaussianInitial(process.terminal_scale()),
            denoiser,
            process,
        )

    def through(self, wrap: Callable[[Output], Output]) -> Velocity:
        """The same with its network wrapped: counted, compiled, watched."""
        output = wrap(self.output)
        denoiser = None if self.denoiser is None else replace(self.denoiser, output=output)
        return replace(self, output=output, denoiser=denoiser)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x `(batch, *event)` and times t, one for all, `()` or `(1,)`, or one a row, `(batch,)`."""
        t = t.reshape(-1)
        on_x, on_output = self.coefficients(t.detach().double())
        return over_event(on_x, x) * x + over_event(on_output, x) * self.output(x, t.to(x))

    def finish(self, x: Tensor) -> Tensor:
        """The end of a path that arrived at t_min: E[x_0 | x], or x itself where there is no denoiser."""
        return x if self.denoiser is None else self.denoiser(x, self.t_min)


def as_it_is(t: Tensor) -> tuple[Tensor, Tensor]:
    """Factors 0 on x and 1 on the output."""
    return torch.zeros_like(t), torch.ones_like(t)


def _process(program: Any) -> Process | None:
    """The noising law of a flow, where it has one for its settings."""
    return program.process() if isinstance(program, Diffusion) and process_support(program) else None


def reverse_drift(
    denoiser: AffineDenoiser, t: Tensor, noise2: Tensor | float = 0.0, direction: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors on x and on the output of v + direction w^2/2 score, and w^2 itself, per unit of t.

    Args:
        denoiser: the network and its coefficients.
        t: float64 times `(n,)`.
        noise2: w^2 at these times, >= 0.
        direction: -1 for dt < 0 (the drift is then that of dt, not of |dt|), +1 for dt > 0.
    """
    process = denoiser.process
    on_x, on_output = denoiser.coefficients(t)
    flow_on_x, flow_on_x0hat = velocity_coefficients(process, t)
    noise2 = torch.as_tensor(noise2, dtype=torch.float64).expand_as(flow_on_x)
    # score = (alpha x0hat - x) / sigma^2
    half = 0.5 * direction * noise2 / process.sigma(t).square()
    on_x0hat = flow_on_x0hat + half * process.alpha(t)
    return flow_on_x - half + on_x0hat * on_x, on_x0hat * on_output, noise2


# --- on the clock of a fixed-step solver ------------------------------------------------------------------------


class Row(NamedTuple):
    """What a field is at one moment of the clock: t `(1,)` in the dtype of x; factors per unit of u."""

    t: Tensor
    on_x: Any
    on_output: Any
    on_noise: Any


class ClockedField:
    """dx/du = on_x x + on_output output(x, t(u)), with noise of scale on_noise, as functions of u in [0, num_steps].

    Args:
        output: the network.
        drift: times `(n,)` float64 -> factors on x and on the output and w^2, per unit of t; `reverse_drift`.
        schedule: t as a function of u / num_steps; backwards in time as schedules run, or forwards.
        num_steps: number of unit steps, 1..1,000,000.
    """

    def __init__(
        self,
        output: Output,
        drift: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]],
        schedule: Schedule,
        num_steps: int,
    ) -> None:
        check("steps", num_steps, Steps)
        self.output, self.drift_at, self.schedule, self.num_steps = output, drift, schedule, num_steps
        self._table: dict[int, Row] = {}
        self._tabulated: Any = None

    def tabulate(self, x: Tensor, stages: Sequence[float] = _SIXTHS) -> None:
        """Work out every coefficient a fixed-step method will ask for, before the loop; times in the dtype of x.

        Args:
            x: the state.
            stages: where in a step, multiples of 1/12 in [0, 1); the end of the last step is always in the table.

        Once worked out it is kept, so that what is recorded later holds no such work.
        """
        key = (x.dtype, x.device, x.shape[1:], tuple(stages))
        if key == self._tabulated:
            return
        within = [round(stage * _NODES_PER_STEP) for stage in stages]
        nodes = [k * _NODES_PER_STEP + node for k in range(self.num_steps) for node in within]
        nodes.append(self.num_steps * _NODES_PER_STEP)
        rows = self.rows(torch.tensor(nodes, dtype=torch.float64) / _NODES_PER_STEP, x)
        self._table, self._tabulated = dict(zip(nodes, rows, strict=True)), key

    def rows(self, u: Tensor, x: Tensor) -> list[Row]:
        """Rows at clock times u `(n,)`, float64."""
        t, speed = (
            self.schedule.time(u / self.num_steps),
            self.schedule.speed(u / self.num_steps) / self.num_steps,
        )
        on_x, on_output, noise2 = self.drift_at(t)
        speed = speed.reshape(speed.shape + (1,) * (on_x.ndim - 1))
        columns = (speed * on_x, speed * on_output, (noise2 * speed.abs()).sqrt())
        factors = (column.tolist() if column.ndim == 1 else list(column.to(x)) for column in columns)
        return [Row(*row) for row in zip(t[:, None].to(x), *factors, strict=True)]

    def at(self, u: float, x: Tensor) -> Row:
        """The row at clock u."""
        node = round(u * _NODES_PER_STEP)
        if node in self._table and abs(u * _NODES_PER_STEP - node) < 1e-3:
            return self._table[node]
        return self.rows(torch.tensor([u], dtype=torch.float64), x)[0]

    def drift(self, u: float, x: Tensor) -> Tensor:
        """dx/du without the noise; x `(batch, *event)`."""
        return self._drift(x, self.at(u, x))

    def noise(self, u: float, x: Tensor, increment: Tensor) -> Tensor:
        """The noise of a Brownian increment `(batch, *event)`; x gives the dtype alone, noise is additive."""
        return times(self.at(u, x).on_noise, increment)

    def drift_and_noise(self, u: float, x: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        """dx/du and the noise of a step whose Brownian increment is given."""
        row = self.at(u, x)
        return self._drift(x, row), times(row.on_noise, increment)

    def _drift(self, x: Tensor, row: Row) -> Tensor:
        output = self.output(x, row.t)
        if isinstance(row.on_x, float) and isinstance(row.on_output, float):
            if row.on_x == 0.0:
                return output * row.on_output
            return (x * row.on_x).add_(output, alpha=row.on_output)
        return times(row.on_x, x).add_(times(row.on_output, output))


def flow_field(velocity: Velocity, schedule: Schedule, num_steps: int) -> ClockedField:
    """A velocity on the clock of a solver: no noise."""

    def drift(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        on_x, on_output = velocity.coefficients(t)
        return on_x, on_output, torch.zeros_like(on_x)

    check_schedule(schedule, num_steps, velocity.t_min, velocity.t_max)
    return ClockedField(velocity.output, drift, schedule, num_steps)


def family_field(
    denoiser: AffineDenoiser, schedule: Schedule, num_steps: int, noise2: Callable[[Tensor], Tensor]
) -> ClockedField:
    """The member with diffusion w^2 = noise2(t) of the family with the same marginals, in the schedule's direction."""
    check_schedule(schedule, num_steps, denoiser.process.t_min, denoiser.process.t_max)
    ends = schedule.time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    direction = 1 if ends[1] > ends[0] else -1
    return ClockedField(
        denoiser.output, lambda t: reverse_drift(denoiser, t, noise2(t), direction), schedule, num_steps
    )


def reversed_schedule(schedule: Schedule) -> Schedule:
    """The same times from t_min up to t_max: data to noise."""
    return Schedule(lambda u: schedule.time(1 - u), lambda u: -schedule.speed(1 - u))


def check_schedule(schedule: Schedule, num_steps: int, t_min: float, t_max: float) -> None:
    """Raise `InputError` unless the times of its steps run one way and stay within [t_min, t_max]."""
    u = torch.linspace(0, 1, min(max(num_steps, _LEAST_CHECKED), _MOST_CHECKED) + 1, dtype=torch.float64)
    t = schedule.time(u)
    inside = t.clamp(t_min, t_max)
    check_times("The time grid", torch.where((t - inside).abs() < _SLACK, inside, t), t_min, t_max)
    moves = t.diff()
    wrong = moves * moves.sum() <= 0
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        raise InputError(
            f"The time grid must run one way: it goes from t = {t[0].item():.6g} to {t[-1].item():.6g}, but from "
            f"{t[k].item():.6g} to {t[k + 1].item():.6g} at u = {u[k].item():.4g}. Make the grid's time(u) strictly "
            "monotone."
        )


# --- small ------------------------------------------------------------------------------------------------------


def scalar(value: Tensor) -> Any:
    """A Python float where a coefficient is one number, a tensor where it differs by coordinate."""
    return value.item() if value.ndim == 0 else value


def times(coefficient: Any, x: Tensor) -> Tensor:
    """coefficient * x, the coefficient a float or of the shape of one event."""
    if isinstance(coefficient, Tensor):
        return x * coefficient.to(x).reshape(x.shape[1:])
    return x * coefficient
