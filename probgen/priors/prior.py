"""A fitted program as the law of one site of a larger program."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probgen.core import (
    Batch,
    Count,
    Energetic,
    Engine,
    EstimateKind,
    Guided,
    InputError,
    Normalised,
    Program,
    UnsupportedError,
    check_arguments,
    describe,
    given,
)
from probgen.distributions import FlowLaw, apart
from probgen.dynamics import Velocity, floating_weight
from probgen.randomness import forked_rng
from probgen.targets import frozen, read, restored_store


class Prior(TorchDistribution):
    """p(x) of a fitted program, as a Pyro distribution: `x = pyro.sample("x", Prior(program))`.

    What its `log_prob` is depends on the program, and is declared in `density_kind`:

    - "exact": log p(x), for programs that know it (`log_prob(x)`), and for diffusions and flows, whose density is that
      of the probability-flow ODE in fixed steps: deterministic and differentiable (`FlowLaw`).
    - "unnormalised": -E(x), for energies.
    - "lower bound": a random estimate of the ELBO, for programs with a guide (VAE).

    Args:
        program: a fitted program with one site "x" and an `event_shape`.
        condition: what the program is conditioned on, `(*batch, ...)` flattened to `(rows, ...)`, one row for each
            element of the batch; None is no condition.
        sampler: engine that `sample` draws by, such as `Ancestral()`; None carries noise along the flow where there is
            one, which is differentiable, and else runs the program.
        num_steps: steps of the fourth-order Runge-Kutta method, of flows.
        validate_args: check values; None takes torch's setting.

    Raises:
        InputError: what is given is no program of one site "x" with an `event_shape`; a condition without rows.
        UnsupportedError: a draw or a density is asked for that the program does not have.

    >>> import pyro
    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> prior = Prior(GaussianMixture.example())
    >>> prior.event_shape, prior.density_kind, pyro.sample("x", prior).shape
    (torch.Size([2]), 'exact', torch.Size([2]))
    >>> prior.expand([3]).sample().shape, prior.log_prob(torch.zeros(5, 2, dtype=torch.float64)).shape
    (torch.Size([3, 2]), torch.Size([5]))
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        program: Any,
        condition: Tensor | None = None,
        sampler: Engine | None = None,
        num_steps: Count = 25,
        validate_args: bool | None = None,
    ) -> None:
        check_arguments(Prior.__init__, locals())
        _check(program, condition, sampler)
        self.program, self.condition, self.sampler, self.num_steps = program, condition, sampler, num_steps
        self.like = floating_weight(program).detach().reshape(-1)[:0]
        rows = () if condition is None else condition.shape[:1]
        super().__init__(torch.Size(rows), torch.Size(program.event_shape), validate_args=validate_args)

    def __repr__(self) -> str:
        return f"Prior({describe(self.program)})"

    @property
    def density_kind(self) -> EstimateKind | None:
        """What `log_prob` is; None where there is no density."""
        if isinstance(self.program, Normalised) or self._flows:
            return "exact"
        if isinstance(self.program, Energetic):
            return "unnormalised"
        return "lower bound" if isinstance(self.program, Guided) else None

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        """Whether draws are differentiable."""
        return self.sampler is None and self._flows

    @property
    def support(self) -> Any:
        """Real numbers of the event's shape."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def _flows(self) -> bool:
        return bool(Velocity.supports(self.program))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Prior:
        """The same law for a larger batch: further dimensions on the left."""
        wider = Prior(self.program, self.condition, self.sampler, self.num_steps, validate_args=False)
        wider._batch_shape = torch.Size(batch_shape)
        return wider

    def stand_in(self) -> Tensor:
        """A value of the event's shape, for running a program without drawing: zeros."""
        return self.like.new_zeros(self.event_shape)

    # --- draws ---

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, `(*sample, *batch, *event)`."""
        with torch.no_grad():
            return self._drawn(torch.Size(sample_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws that are differentiable in the weights: noise carried along the flow."""
        if not self.has_rsample:
            raise UnsupportedError(f"Draws of {self} are not differentiable: it is no diffusion and no flow.")
        return self._law().rsample(torch.Size(sample_shape))

    def _drawn(self, sample_shape: torch.Size) -> Tensor:
        shape = self.shape(sample_shape)
        rows = shape[: len(shape) - len(self.event_shape)].numel()
        if self.sampler is None and self._flows:
            return self._law().rsample(sample_shape)
        c = self._rows_of_condition(rows)
        batch = Batch(condition=c, num_rows=rows)
        with apart():
            x = self._by_sampler(batch) if self.sampler else self._by_model(batch)
        return x.reshape(shape)

    def _by_sampler(self, batch: Batch) -> Tensor:
        assert self.sampler is not None
        seed = int(torch.randint(2**62, ()))
        count = batch.size if batch.condition is None else 1
        target = read(self.program, None, () if batch.condition is None else (batch.condition,))
        with forked_rng(seed), frozen(self.program), restored_store():
            return self.sampler.run(target, num_draws=count, num_chains=1, seed=seed, progress=False)["x"]

    def _by_model(self, batch: Batch) -> Tensor:
        from pyro import poutine

        trace = poutine.trace(self.program.model).get_trace(batch)
        x: Tensor = trace.nodes["x"]["value"]
        return x

    # --- density ---

    def log_prob(self, value: Tensor) -> Tensor:
        """Nats, `(*sample, *batch)`: exact, a bound or unnormalised, as `density_kind` says."""
        if self._validate_args:
            self._validate_sample(value)
        if not isinstance(self.program, Normalised) and self._flows:
            return self._law().log_prob(value)
        rows = torch.broadcast_shapes(value.shape[: value.ndim - len(self.event_shape)], self.batch_shape)
        x = value.expand(rows + self.event_shape).reshape(-1, *self.event_shape)
        return self._density(x).reshape(rows)

    def _density(self, x: Tensor) -> Tensor:
        c = self._rows_of_condition(len(x))
        if isinstance(self.program, Normalised):
            return given(self.program, c).log_prob(x)
        if isinstance(self.program, Energetic):
            return -given(self.program, c).energy(x)
        if isinstance(self.program, Guided):
            return _elbo(self.program, Batch({"x": x}, c))
        raise UnsupportedError(
            f"{self} has no density: draw from it, or condition it by an engine for scores."
        )

    def _law(self) -> FlowLaw:
        return FlowLaw(self.program, self.condition, self.num_steps, validate_args=False).expand(
            self.batch_shape
        )

    def _rows_of_condition(self, rows: int) -> Tensor | None:
        if self.condition is None:
            return None
        return self.condition.repeat(rows // len(self.condition), *[1] * (self.condition.ndim - 1))


def _elbo(program: Guided, batch: Batch) -> Tensor:
    """One draw of log p(x, z) - log q(z | x) for each row."""
    import pyro

    from probgen.bounds import log_weights

    with apart():
        model = pyro.condition(program.model, data=batch.data)
        weights = log_weights(model, program.guide, (batch,), 1, vectorised=True)
    return sum((weight[0] for weight in weights.values()), torch.zeros(batch.size).to(batch.data["x"]))


def _check(program: Any, condition: Any, sampler: Any) -> None:
    if not isinstance(program, Program) or not hasattr(program, "event_shape"):
        raise InputError(
            f"Prior needs a fitted program with a model(batch) and an event_shape, got {describe(program)}. A Pyro "
            "function is already a program: call it inside yours."
        )
    if condition is not None and not (isinstance(condition, Tensor) and condition.ndim):
        got = f"shape {tuple(condition.shape)}" if isinstance(condition, Tensor) else describe(condition)
        raise InputError(
            f"The condition of Prior({describe(program)}) must be a tensor of one row for each element of the batch, "
            f"got {got}; one row is c[None]."
        )
    if sampler is not None and not isinstance(sampler, Engine):
        raise InputError(f"sampler must be an engine such as Ancestral(), got {sampler!r}.")
    if sampler is not None and not (support := sampler.supports(program)):
        raise UnsupportedError(f"{describe(sampler)} cannot draw from {describe(program)}: {support.reason}.")
