"""Flow matching: a velocity learned from pairs of data and noise, whatever the noise is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from probgen.conditioning import Condition
from probgen.core import (
    Batch,
    InputError,
    Normalised,
    Probability,
    Program,
    Size,
    UnsupportedError,
    check_finite,
    describe,
    did_you_mean,
)
from probgen.denoising import DenoisingProgram
from probgen.distributions import FlowLaw, apart
from probgen.dynamics import GaussianInitial, Initial
from probgen.nets import TimeMLP
from probgen.processes import OTPath, Process
from probgen.randomness import Noise, forked_rng
from probgen.targets import frozen

Coupling = Literal["independent", "ot"]
_COUPLINGS: tuple[Coupling, ...] = ("independent", "ot")


class FlowMatching(DenoisingProgram):
    """dx/dt = u(x, t) carries x_1 ~ p_init at t = 1 to data at t = 0, u = E[alpha' x_0 + sigma' x_1 | x_t].

    Points of the path are x_t = alpha x_0 + sigma x_1; the network is u itself. With x_1 ~ N(0, I) drawn independently
    of x_0 it is a diffusion as well, and serves engines that need a score.

    Args:
        network: u, `net(x, t)`, x `(batch, *event)`, t `(batch,)` in [0, 1] -> `(batch, *event)`, any nn.Module; with a
            condition `net(x, t, c)`.
        path: alpha and sigma; for a p_init of your own it must end in x_1 itself, alpha(1) = 0 and sigma(1) = 1.
        p_init: the law of x_1: None for N(0, I), a program, which is run as it stands and not fitted, or a data set
            `(n, *event)`.
        coupling: "independent", or "ot": x_1 is permuted within the minibatch to minimise sum |x_0 - x_1|^2, among rows
            of equal condition. Straighter paths, and no diffusion any more.
        paired: row i of the data set p_init belongs to row i of the data.
        event_shape: shape of one datum; None takes `network.event_shape`.
        condition: what c is, `Labels(num_classes)` or `Vector(shape)`; None takes `network.condition`, if it has one.
        condition_dropout: probability with which a row's condition is dropped in training mode.

    Raises:
        InputError: an unknown coupling, a p_init of another shape, a path that does not end in it, or pairs asked for
            where there are none.

    Source: Lipman et al. (2022), arXiv 2210.02747; Liu et al. (2022), arXiv 2209.03003; Tong et al. (2023),
    arXiv 2302.00482, and Pooladian et al. (2023), arXiv 2304.14772, for the coupling. Their time is 1 - t.

    >>> flow = FlowMatching(TimeMLP((2,), width=8, num_blocks=1))
    >>> from probgen import ProbabilityFlowODE, infer
    >>> infer(flow, ProbabilityFlowODE(steps=5), num_draws=3)["x"].shape
    torch.Size([1, 3, 2])
    """

    paper: ClassVar[str] = "Lipman et al. 2022, arXiv 2210.02747"
    offers: ClassVar[str] = "density by an ODE; straight paths; any two laws joined"
    gives_up: ClassVar[str] = (
        "several network calls a draw; a score where the noise is not independent Gaussian"
    )

    def __init__(
        self,
        network: nn.Module,
        path: Process = OTPath(),  # noqa: B008 - frozen
        *,
        p_init: Program | Tensor | None = None,
        coupling: Coupling = "independent",
        paired: bool = False,
        event_shape: Sequence[Size] | None = None,
        condition: Condition | None = None,
        condition_dropout: Probability = 0.1,
    ) -> None:
        super().__init__(
            network,
            path,
            "velocity",
            event_shape=event_shape,
            condition=condition,
            condition_dropout=condition_dropout,
        )
        if coupling not in _COUPLINGS:
            raise InputError(f"Unknown coupling {coupling!r}; {did_you_mean(str(coupling), _COUPLINGS)}")
        if paired and not isinstance(p_init, Tensor):
            raise InputError(
                "paired=True needs p_init as a data set whose row i belongs to row i of the data."
            )
        if paired and coupling == "ot":
            raise InputError(
                'Pairs that are given cannot be permuted: coupling="ot" and paired=True exclude each other.'
            )
        self.coupling: Coupling = coupling
        self.paired = paired
        self._initial = self._as_initial(p_init)

    def _as_initial(self, p_init: Program | Tensor | None) -> Initial:
        path, end = self._process, torch.ones(1, dtype=torch.float64)
        if p_init is None:
            return GaussianInitial(path.sigma(end)[0])
        if not bool((path.alpha(end).abs() < 1e-6).all() and ((path.sigma(end) - 1).abs() < 1e-6).all()):
            raise InputError(
                f"A p_init of your own needs a path that ends in x_1, alpha(1) = 0 and sigma(1) = 1; {path} does not. "
                "Use OTPath()."
            )
        shape = p_init.shape[1:] if isinstance(p_init, Tensor) else getattr(p_init, "event_shape", None)
        if shape is None or tuple(shape) != self.event_shape:
            raise InputError(
                f"p_init has event shape {shape and tuple(shape)}, the network {self.event_shape}."
            )
        if isinstance(p_init, Tensor):
            check_finite("FlowMatching: p_init", p_init)
            return DataInitial(p_init)
        self.p_init = p_init  # so that its weights move with those of the network
        return ProgramInitial(p_init)

    def model(self, batch: Batch) -> Tensor:
        """x ~ p(x | c) for each row, by the flow."""
        with batch.plate():
            return pyro.sample("x", FlowLaw(self, batch.condition))

    # --- the flow ------------------------------------------------------------------------------------------------

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """u(x_t, t) = dx_t/dt, the network: x_t `(batch, *event)`, t `(batch,)` or `(1,)` -> `(batch, *event)`."""
        return self.predict(x_t, t)

    def path(self) -> Process:
        """alpha and sigma of x_t = alpha x_0 + sigma x_1, with their rates."""
        return self._process

    def span(self) -> tuple[float, float]:
        """(0, 1), but for paths whose sigma' is infinite at t = 0: those start at their t_min."""
        starts = bool(self._process.sigma_rate(torch.zeros(1, dtype=torch.float64)).isfinite().all())
        return (0.0 if starts else self._process.t_min), 1.0

    def initial(self) -> Initial:
        """The law at t = 1: that of x_1, or N(0, sigma(1)^2)."""
        return self._initial

    def couple(self, batch: Batch) -> Tensor:
        """x_1 for each row of the data, `(batch, *event)`: drawn from p_init, paired with x_0 as `coupling` says."""
        x_0 = batch.data["x"]
        x_1 = self._partners(x_0, batch.index)
        return x_1[_cheapest_permutation(x_0, x_1, batch.condition)] if self.coupling == "ot" else x_1

    def _partners(self, x_0: Tensor, index: Tensor | None) -> Tensor:
        if isinstance(self._initial, GaussianInitial):
            return torch.randn_like(x_0)
        if self.paired and isinstance(self._initial, DataInitial):
            return self._initial.rows(torch.arange(len(x_0)) if index is None else index).to(x_0)
        seed = int(torch.randint(2**62, ()))
        return self._initial.draw(Noise(seed, 1, len(x_0), self.event_shape, x_0.dtype, x_0.device))

    # --- the diffusion, where it is one --------------------------------------------------------------------------

    def process(self) -> Process:
        """The path as a noising law; `UnsupportedError` where x_1 is not Gaussian or depends on x_0."""
        if not isinstance(self._initial, GaussianInitial):
            raise UnsupportedError(
                f"its noise is {self._initial}, not N(0, I), so that the velocity holds no score; "
                "ProbabilityFlowODE serves it"
            )
        if self.coupling == "ot":
            raise UnsupportedError(
                'coupling="ot" makes the noise depend on the data, so that the velocity holds no score; '
                "ProbabilityFlowODE serves it"
            )
        return self._process


# --- laws of x_1 ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataInitial:
    """x_1 is a row of a data set, `(n, *event)`, each as likely."""

    data: Tensor

    def rows(self, index: Tensor) -> Tensor:
        """The rows at `index`."""
        return self.data[index.to(self.data.device)]

    def draw(self, noise: Noise) -> Tensor:
        """Rows at random: one normal number a row of the noise says which."""
        uniform = torch.special.ndtr(noise(0).reshape(noise.num_rows, -1)[:, 0].double())
        return self.rows((uniform * len(self.data)).long().clamp_max(len(self.data) - 1)).to(noise(0))

    def log_prob(self, x_1: Tensor) -> Tensor:
        """`UnsupportedError`: a data set has no density."""
        raise UnsupportedError(
            "The flow starts from a data set, which has no density: fit a program to it first and pass that as p_init."
        )

    def __str__(self) -> str:
        return f"a data set of {len(self.data):,} rows"


@dataclass(frozen=True)
class ProgramInitial:
    """x_1 is what a program draws at its site "x"; a batch of draws is one run, seeded by its first draw."""

    program: Any

    def draw(self, noise: Noise) -> Tensor:
        """One run of the program with a row for each row of the noise."""
        with apart(), forked_rng((noise.seed + noise.first) % 2**63), frozen(self.program), torch.no_grad():
            trace = poutine.trace(self.program.model).get_trace(Batch(num_rows=noise.num_rows))
        return trace.nodes["x"]["value"].to(noise.device, noise.dtype)

    def log_prob(self, x_1: Tensor) -> Tensor:
        """log density of the program, `(batch,)`; `UnsupportedError` where it has none."""
        if not isinstance(self.program, Normalised):
            raise UnsupportedError(
                f"The flow starts from {describe(self.program)}, whose density is not known: it has no log_prob(x)."
            )
        return self.program.log_prob(x_1)

    def __str__(self) -> str:
        return f"what {describe(self.program)} draws"


def _cheapest_permutation(x_0: Tensor, x_1: Tensor, condition: Tensor | None) -> Tensor:
    """The permutation of x_1 that minimises sum |x_0 - x_1|^2, among rows of equal condition."""
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x_0.flatten(1).double(), x_1.flatten(1).double()).square()
    if (
        condition is not None
    ):  # or x_1 would tell of c, and the noise of one class would not be that of another
        c = condition.flatten(1) if condition.ndim > 1 else condition[:, None]
        alike = ((c[:, None] == c) | (c[:, None].isnan() & c.isnan())).all(-1)
        cost = cost.masked_fill(~alike, math.inf)
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(columns, device=x_1.device)


def example() -> FlowMatching:
    """A small one on the plane."""
    return FlowMatching(TimeMLP((2,), width=16, num_blocks=1))
