"""Distributions that Pyro lacks, or has at a price."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probgen.core import Count, check_arguments, given
from probgen.dynamics import (
    ClockedField,
    Velocity,
    fixed_step,
    floating_weight,
    flow_field,
    reversed_schedule,
)
from probgen.processes import Schedule, as_grid
from probgen.randomness import Noise


class DiagonalNormal(TorchDistribution):
    """N(loc, diag scale^2) over the last `event_dim` dimensions, the scale as small as it is given.

    log p(x) = -1/2 sum ((x - loc)/scale)^2 - sum log scale - d/2 log(2 pi). `Normal(loc, scale).to_event(n)` is the
    same law; it first spreads the scale over the data and then evaluates every term at every coordinate, which for
    images costs more than a layer of the network.

    Args:
        loc: `(*batch, *event)`.
        scale: > 0, broadcastable to the event: `()` or of its shape.
        event_dim: number of event dimensions; `to_event` adds to it.
        validate_args: check the arguments; None takes torch's setting.

    >>> law = DiagonalNormal(torch.zeros(2, 3), torch.tensor(0.5)).to_event(1)
    >>> law.log_prob(torch.ones(2, 3)).shape
    torch.Size([2])
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012 - as torch declares it
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, event_dim: int = 0, validate_args: bool | None = None
    ) -> None:
        self.loc, self.scale = loc, scale
        split = loc.ndim - event_dim
        super().__init__(loc.shape[:split], loc.shape[split:], validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Real numbers, `event_dim` dimensions of them."""
        return constraints.independent(constraints.real, self.event_dim)

    @property
    def mean(self) -> Tensor:
        """loc."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """scale^2 at every coordinate."""
        return self.scale.square().expand_as(self.loc)

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> DiagonalNormal:
        """The same with more (or, if negative, fewer) dimensions in the event; None means all."""
        more = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return DiagonalNormal(self.loc, self.scale, self.event_dim + more, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiagonalNormal:
        """The same law for a larger batch."""
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return DiagonalNormal(loc, self.scale, self.event_dim, validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """loc + scale z, differentiable."""
        shape = self.shape(torch.Size(sample_shape))
        return self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, `(*batch,)`."""
        if self._validate_args:
            self._validate_sample(value)
        dims = tuple(range(-self.event_dim, 0))
        squares = ((value - self.loc) / self.scale).square()
        size = math.prod(self.event_shape)
        log_scale = self.scale.log()
        constant = log_scale.sum() * (size / log_scale.numel()) if self.event_dim else log_scale
        squares = squares.sum(dims) if dims else squares
        return -0.5 * (squares + size * math.log(2 * math.pi)) - constant


class FlowLaw(TorchDistribution):
    """The law of x_0 where x_1 ~ noise is carried along dx/dt = v(x, t), t from t_max down to t_min.

    log p(x) = log p_1(x_1) + int_{t_min}^{t_max} tr(dv/dx) dt along the same path, the trace exact: deterministic and
    differentiable, as `rsample` is. Both are taken in fixed Runge-Kutta steps; the law is that of x at t_min, with the
    noise that is left there.

    Args:
        program: a diffusion or a flow, such as `ScoreSDE` and `FlowMatching`.
        condition: what the program is asked at, `(rows, ...)`, the batch being these rows; None is no condition.
        num_steps: steps of the fourth-order Runge-Kutta method, >= 1, four network calls each.
        validate_args: check values; None takes torch's setting.

    Source: Chen et al. (2018), arXiv 1806.07366; Song et al. (2021), arXiv 2011.13456.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> law = FlowLaw(GaussianMixture.example()).expand([5])
    >>> law.log_prob(law.rsample()).shape
    torch.Size([5])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(
        self,
        program: Any,
        condition: Tensor | None = None,
        num_steps: Count = 25,
        validate_args: bool | None = None,
    ) -> None:
        check_arguments(FlowLaw.__init__, locals())
        Velocity.of(program)  # refuses what has none
        self.program, self.condition, self.num_steps = program, condition, num_steps
        rows = () if condition is None else condition.shape[:1]
        super().__init__(torch.Size(rows), torch.Size(program.event_shape), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """Real numbers of the event's shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowLaw:
        """The same law for a larger batch: further dimensions on the left."""
        wider = FlowLaw(self.program, self.condition, self.num_steps, validate_args=False)
        wider._batch_shape = torch.Size(batch_shape)
        return wider

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Noise carried to data, differentiable in the weights."""
        shape = self.shape(torch.Size(sample_shape))
        flow, like = self._flow(shape), floating_weight(self.program)
        # Pyro's randomness is torch's: a seed from there makes the noise of every kind of initial law.
        seed = int(torch.randint(2**62, ()))
        noise = Noise(seed, 1, self._rows(shape).numel(), tuple(self.event_shape), like.dtype, like.device)
        field = flow_field(flow, self._schedule(flow), self.num_steps)
        return fixed_step(field, flow.initial.draw(noise), "rk4").reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, `(*sample, *batch)`; 4 d + 4 network calls a step for data of d coordinates, d of them backwards."""
        if self._validate_args:
            self._validate_sample(value)
        rows = torch.broadcast_shapes(self._rows(value.shape), self.batch_shape)
        shape = rows + self.event_shape
        flow = self._flow(shape)
        field = flow_field(flow, reversed_schedule(self._schedule(flow)), self.num_steps)
        x_1, gained = _carry_with_trace(field, value.expand(shape).reshape(-1, *self.event_shape))
        return (flow.initial.log_prob(x_1) + gained).reshape(rows)

    def _rows(self, shape: torch.Size) -> torch.Size:
        return shape[: len(shape) - len(self.event_shape)]

    def _schedule(self, flow: Velocity) -> Schedule:
        return as_grid("quadratic").between(flow.t_max, flow.t_min, flow.process)

    def _flow(self, shape: torch.Size) -> Velocity:
        """The velocity, with the condition repeated for every row of a value of this shape."""
        if self.condition is None:
            return Velocity.of(self.program)
        event = self.condition.shape[1:]
        rows = self.condition.expand(*self._rows(shape), *event).reshape(-1, *event)
        return Velocity.of(given(self.program, rows))


def _carry_with_trace(field: ClockedField, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where the field takes x `(batch, *event)` over its clock, and the integral of its trace there, `(batch,)`."""
    field.tabulate(x, stages=(0.0, 0.5))
    gained = torch.zeros_like(x.reshape(len(x), -1)[:, 0])
    for step in range(field.num_steps):
        one = _with_trace(field, step, x)
        two = _with_trace(field, step + 0.5, x + 0.5 * one[0])
        three = _with_trace(field, step + 0.5, x + 0.5 * two[0])
        four = _with_trace(field, step + 1, x + three[0])
        move, trace = ((a + 2 * (b + c) + d) / 6 for a, b, c, d in zip(one, two, three, four, strict=True))
        x, gained = x + move, gained + trace
    return x, gained


def _with_trace(field: ClockedField, u: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """dx/du and the trace of its derivative in x, one backward pass a coordinate, side by side."""
    pulled: Any = torch.func.vjp(lambda y: field.drift(u, y), x)
    rate, pullback = pulled
    size = x[0].numel()
    directions = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, 1, *x.shape[1:])
    rows = torch.func.vmap(lambda v: pullback(v.expand_as(x))[0])(directions)
    return rate, rows.reshape(size, len(x), size).diagonal(dim1=0, dim2=2).sum(-1)


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """A Pyro program runs inside the block as if alone, when it is called for a draw of another program's site.

    Otherwise the handlers around that site would see the inner program's sites, and its plates would collide.

    >>> import pyro, pyro.distributions as dist
    >>> with pyro.plate("data", 3), apart(), pyro.plate("data", 5):
    ...     pyro.sample("x", dist.Normal(0.0, 1.0)).shape
    torch.Size([5])
    """
    from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK

    lists: tuple[list[Any], ...] = (_PYRO_STACK, _DIM_ALLOCATOR._stack)
    outside = [list(entries) for entries in lists]
    try:
        for entries in lists:
            entries.clear()
        yield
    finally:
        for entries, found in zip(lists, outside, strict=True):
            entries[:] = found
