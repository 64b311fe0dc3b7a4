"""The probability-flow ODE, from noise to data and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from probgen.core import (
    InputError,
    Positive,
    Support,
    UnsupportedError,
    check_count,
    check_finite,
    describe,
    did_you_mean,
)
from probgen.dynamics import (
    FIXED_STEP,
    ODE_ADAPTIVE,
    ODE_FIXED,
    FlowEngine,
    GaussianInitial,
    Velocity,
    WholeBatch,
    check_tolerances,
    dopri5,
    fixed_step,
    floating_weight,
    flow_field,
    listed,
    reversed_schedule,
    solve_ode,
)
from probgen.dynamics.fields import Steps
from probgen.processes import Grid, as_grid
from probgen.randomness import Noise
from probgen.targets import frozen

_THEIRS = "torchdiffeq:"
METHODS = (*FIXED_STEP, "dopri5", *(_THEIRS + name for name in ODE_FIXED + ODE_ADAPTIVE))


@dataclass(frozen=True)
class ProbabilityFlowODE(FlowEngine):
    """Draws by integrating dx = [f x - 1/2 g^2 score] dt from t_max down to t_min, then taking E[x_0 | x].

    The ODE between t_min and t_max is a smooth map that can be run both ways: `encode`, `decode`, `interpolate`. Any
    flow, dx = velocity dt, is served too; one that reaches t = 0 needs no E[x_0 | x].

    Args:
        steps: number of steps of a fixed-step method, >= 1.
        method: "euler", "heun" or "rk4" (Kutta's 3/8 rule) of 1, 2 or 4 network calls a step, or "dopri5", which
            gives each draw steps of its own from `rtol` and `atol`, and uses neither `steps` nor `grid`. Those of
            torchdiffeq by name: "torchdiffeq:euler", "torchdiffeq:midpoint", "torchdiffeq:heun2", "torchdiffeq:heun3",
            "torchdiffeq:rk4" (fixed), "torchdiffeq:dopri5", "torchdiffeq:bosh3", "torchdiffeq:adaptive_heun",
            "torchdiffeq:dopri8" (adaptive, by one norm over the whole batch: a draw then depends on its batch mates,
            within the tolerance).
        grid: how steps are spread over time: "uniform", "quadratic", "karras", or a `Grid` such as `Power(1.5)`.
        rtol, atol: tolerances of adaptive methods, > 0.
        batch_size, compile: as for every `FlowEngine`.

    Raises:
        InputError: an unknown method or grid, steps or tolerances out of range.
        SolverError: an adaptive method could not go on; the message says at which t and for which draws.

    Source: Song et al. (2021), arXiv 2011.13456; Karras et al. (2022), arXiv 2206.00364; Chen et al. (2018),
    arXiv 1806.07366.

    >>> ProbabilityFlowODE(steps=20, method="heun").method
    'heun'
    """

    steps: Steps = 25
    method: str = "rk4"
    grid: Grid | str = "quadratic"
    rtol: Positive = 1e-5
    atol: Positive = 1e-5
    needs = ()
    field = Velocity
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = "few network calls; a smooth, invertible map from noise to data"
    gives_up: ClassVar[str] = "exactness at finite steps; errors of the score are not corrected"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)
        check_tolerances(self.rtol, self.atol)
        _check_method(self.method)

    def supports(self, program: object) -> Support:
        """Whether the program is a diffusion or a flow."""
        return Velocity.supports(program)

    def num_calls(self) -> int:
        """A call a stage and one to finish, for our fixed-step methods."""
        return self.steps * len(FIXED_STEP[self.method].nodes) + 1 if self.method in FIXED_STEP else 0

    def field_of(self, program: Any, condition: Tensor | None) -> Velocity:
        """The velocity; rows with conditions of their own stay together, and a compiled network keeps its shape."""
        return replace(
            super().field_of(program, condition), whole_batch=condition is not None or self.compile
        )

    def draw(self, field: Velocity, noise: Noise) -> Tensor:
        """One batch; see `FlowEngine.draw`."""
        return field.finish(self._carry(field, field.initial.draw(noise), forward=False))

    # --- both ways ----------------------------------------------------------------------------------------------

    def encode(self, program: Any, x: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """Carry data to noise: x_1 at t_max of the path that stands at x at t_min.

        Data are taken to be x_t at t_min, which they are but for noise of size sigma(t_min), and exactly so for flows
        that reach t = 0. `decode` undoes this up to the solver's error. No gradients are kept.

        Args:
            program: a diffusion or a flow.
            x: data, `(batch, *event)`.
            condition: what the program is conditioned on, one row for each row of x, or None.

        Returns x_1, `(batch, *event)`, in the dtype of the program. Rows that turn NaN are named in a
        `NonFiniteWarning`, the others stand.

        >>> from probgen.models.gaussian_mixture import GaussianMixture
        >>> mixture, engine = GaussianMixture.example(), ProbabilityFlowODE()
        >>> x = torch.tensor([[0.3, -0.5]], dtype=torch.float64)
        >>> bool((engine.decode(mixture, engine.encode(mixture, x)) - x).abs().max() < 1e-3)
        True
        """
        return self._map(program, x, condition, forward=True)

    def decode(self, program: Any, x_1: Tensor, *, condition: Tensor | None = None) -> Tensor:
        """Carry noise to data: x at t_min of the path that stands at x_1 at t_max, the inverse of `encode`.

        Draws of `infer` go one step further, to E[x_0 | x], which cannot be undone: it forgets noise of size
        sigma(t_min). Arguments as for `encode`.
        """
        return self._map(program, x_1, condition, forward=False)

    def interpolate(
        self, program: Any, x_a: Tensor, x_b: Tensor, num: int, *, condition: Tensor | None = None
    ) -> Tensor:
        """Data between two data: decoded points of the great circle between their noises.

        Unit noise of high dimension lies near a sphere, which a straight line would leave. With z = x_1 / scale and phi
        the angle between z_a and z_b, z(w) = [sin((1 - w) phi) z_a + sin(w phi) z_b] / sin(phi), w = 0 .. 1; along a
        line where phi is 0 or pi, as always in one dimension.

        Args:
            program: a diffusion, or a flow whose x_1 is Gaussian.
            x_a, x_b: data, `(*event)`.
            num: how many, ends included, >= 2.
            condition: what the program is conditioned on, one row, `(1, ...)`, or None.

        Returns `(num, *event)`; the ends are x_a and x_b up to the solver's error. Raises `UnsupportedError` where x_1
        is not Gaussian.

        Source: Shoemake (1985), doi 10.1145/325165.325242; White (2016), arXiv 1609.04468.

        >>> from probgen.models.gaussian_mixture import GaussianMixture
        >>> mixture = GaussianMixture.example()
        >>> ProbabilityFlowODE(steps=5).interpolate(mixture, torch.zeros(2), torch.ones(2), num=4).shape
        torch.Size([4, 2])
        """
        check_count("num", num, 2)
        scale = self._gaussian_scale(program, "interpolate")
        ends = self.encode(program, torch.stack([x_a, x_b]), condition=_repeated(condition, 2))
        scale = scale.to(ends)
        z_a, z_b = ends / scale
        return self.decode(program, _great_circle(z_a, z_b, num) * scale, condition=_repeated(condition, num))

    def translate(self, program: Any, other: Any, x: Tensor) -> Tensor:
        """Data of one program as data of another with the same noise: `other` decodes what `program` encodes.

        Args:
            program: a diffusion or a flow that x comes from.
            other: one of the same event shape whose x_1 has the same law, up to its scale.
            x: data of `program`, `(batch, *event)`.

        Returns `(batch, *event)`. Back again gives x, up to the solver's error. Raises `UnsupportedError` where the
        noise of either is not Gaussian.

        Source: Su et al. (2023), arXiv 2203.08382.

        >>> from probgen.models.gaussian_mixture import GaussianMixture
        >>> mixture, engine = GaussianMixture.example(), ProbabilityFlowODE()
        >>> x = torch.tensor([[0.3, -0.5]], dtype=torch.float64)
        >>> bool((engine.translate(mixture, mixture, x) - x).abs().max() < 1e-3)
        True
        """
        scales = [self._gaussian_scale(each, "translate") for each in (program, other)]
        x_1 = self.encode(program, x)
        return self.decode(other, x_1 * (scales[1] / scales[0]).to(x_1))

    def _gaussian_scale(self, program: Any, verb: str) -> Tensor:
        """Standard deviation of x_1."""
        self._check_support(program)
        initial = Velocity.of(program).initial
        if not isinstance(initial, GaussianInitial):
            raise UnsupportedError(
                f"{verb} needs Gaussian noise, where it knows what lies between two points and how scales compare; "
                f"that of {describe(program)} is {initial}. Mix what `encode` gives in a way that suits it, and "
                "`decode` that."
            )
        return initial.scale

    def _map(self, program: Any, x: Tensor, condition: Tensor | None, *, forward: bool) -> Tensor:
        self._check_support(program)
        _check_rows(program, x, condition)
        x = x.detach().to(floating_weight(program))
        size = self.batch_size or len(x)
        with torch.no_grad(), frozen(program):
            parts = [
                self._map_rows(program, x, condition, slice(first, first + size), forward)
                for first in range(0, len(x), size)
            ]
        return torch.cat(parts)

    def _map_rows(
        self, program: Any, x: Tensor, condition: Tensor | None, rows: slice, forward: bool
    ) -> Tensor:
        field = self.field_of(program, None if condition is None else condition[rows])
        return self.solved(
            lambda wrap: self._carry(field.through(wrap), x[rows], forward=forward),
            lambda output: output,
            lambda bad: f"rows {listed([rows.start + row for row in bad])} of x",
        )

    def _check_support(self, program: Any) -> None:
        support = self.supports(program)
        if not support:
            raise UnsupportedError(f"{describe(self)} cannot serve {describe(program)}: {support.reason}.")

    # --- solving ------------------------------------------------------------------------------------------------

    def _carry(self, field: Velocity, x: Tensor, *, forward: bool) -> Tensor:
        """x from t_max down to t_min, or forward in time from t_min up to t_max."""
        if self.method == "dopri5":
            return self._each_row(field, x, forward=forward)
        name = self.method.removeprefix(_THEIRS)
        schedule = as_grid(self.grid).between(field.t_max, field.t_min, field.process)
        schedule = reversed_schedule(schedule) if forward else schedule
        clocked = flow_field(field, schedule, 1 if name in ODE_ADAPTIVE else self.steps)
        if self.method in FIXED_STEP:
            return fixed_step(clocked, x, name)
        return solve_ode(clocked, x, name, self.rtol, self.atol)

    def _each_row(self, field: Velocity, x: Tensor, *, forward: bool) -> Tensor:
        def derivative(t: Tensor, y: Tensor, _rows: Tensor) -> Tensor:
            return field(y.reshape(-1, *x.shape[1:]), t).reshape(y.shape)

        ends = (field.t_min, field.t_max) if forward else (field.t_max, field.t_min)
        equation = WholeBatch(derivative) if field.whole_batch else derivative
        solved, _ = dopri5(equation, x.reshape(len(x), -1), *ends, rtol=self.rtol, atol=self.atol)
        return solved.reshape(x.shape)


def _check_method(method: str) -> None:
    if method not in METHODS:
        theirs = f"{_THEIRS}{method}"
        way_out = f"torchdiffeq's is {theirs!r}." if theirs in METHODS else did_you_mean(method, METHODS)
        raise InputError(f"Unknown ODE method {method!r}; {way_out}")


def _check_rows(program: Any, x: Tensor, condition: Tensor | None) -> None:
    event_shape = tuple(program.event_shape)
    if x.ndim != 1 + len(event_shape) or tuple(x.shape[1:]) != event_shape or not len(x):
        raise InputError(
            f"{describe(program)} needs x of shape (batch, *event) with event {event_shape} and at least one row, got "
            f"{tuple(x.shape)}."
        )
    check_finite("x", x)
    if condition is not None and len(condition) != len(x):
        raise InputError(
            f"There must be one condition a row: x has {len(x)} rows, condition {len(condition)}."
        )


def _repeated(condition: Tensor | None, num_rows: int) -> Tensor | None:
    if condition is None:
        return None
    if len(condition) != 1:
        raise InputError(f"interpolate needs one condition for all, (1, ...), got {tuple(condition.shape)}.")
    return condition.expand(num_rows, *condition.shape[1:])


def _great_circle(z_a: Tensor, z_b: Tensor, num: int) -> Tensor:
    """Points from z_a to z_b, `(*event)` each -> `(num, *event)`."""
    w = torch.linspace(0, 1, num).to(z_a).reshape(-1, *[1] * z_a.ndim)
    cosine = (z_a * z_b).sum() / (z_a.norm() * z_b.norm())
    phi = math.acos(min(1.0, max(-1.0, cosine.item())))
    if math.sin(phi) < 1e-4:  # one direction or opposite ones: no great circle is singled out
        return (1 - w) * z_a + w * z_b
    return (torch.sin((1 - w) * phi) * z_a + torch.sin(w * phi) * z_b) / math.sin(phi)


def example() -> ProbabilityFlowODE:
    """A few steps."""
    return ProbabilityFlowODE(steps=5)
