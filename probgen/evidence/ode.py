"""log p(x) of diffusions and flows through their ordinary differential equation."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from probgen.core import (
    Cost,
    Count,
    Estimate,
    Estimator,
    InputError,
    NonFiniteWarning,
    Positive,
    ProbgenError,
    Support,
    Target,
    Within,
    describe,
)
from probgen.dynamics import Velocity
from probgen.dynamics.likelihood import Likelihood, LogDensity, Solved, field_of
from probgen.dynamics.steppers import check_tolerances, listed
from probgen.dynamics.trace import bytes_per_row
from probgen.evidence.elbo import event_size
from probgen.progress import Update, silent, ticker
from probgen.randomness import Noise

Trace = Literal["exact", "hutchinson"]
_COPIES = 3  # of what a row keeps in one direction: the value of a layer and its input in all directions live at once


@dataclass(frozen=True)
class ODELikelihood(Estimator):
    """log p(x) = log p_1(x_1) + int tr(dv/dx) dt along dx/dt = v(x, t) from the data to the terminal law.

    v is the velocity of a flow, or a diffusion's v = f x - 1/2 g^2 score. Each datum has steps of its own, that meet
    the tolerances and are then taken in halves: `Estimate.solver_error` is a sixteenth of the difference, twice what
    theory says is left. Where the process stops short of the data, at t_min > 0, p(x) is the density of slightly
    noised data, and `Estimate.convention` says of which; a program that knows its score at t = 0 is followed to there.

    Args:
        trace: "exact", d derivatives an evaluation (far fewer passes for small MLPs), or "hutchinson", the mean of
            e'(dv/dx)e over random signs e, unbiased, one pass a probe.
        num_probes: e per datum, >= 2, from whose spread the standard errors come; they stay as they are along the path
            and belong to the row of the data.
        rtol, atol: tolerances of the steps, > 0; log p has its own, whatever the number of coordinates.
        t_min: where the data are put on the path; None is where the program's velocity begins.
        terminal: log density of x_1, `(rows, *event)` -> `(rows,)`; None is the law that draws of the program start
            from, N(0, sigma(t_max)^2) for diffusions.
        memory: bytes the derivatives may take: as many data are solved for side by side as fit, at least one.
        compile: compile the velocity with its divergence, 5 to 30 s for each number of rows; worth it for long runs.

    Source: Chen et al. (2018), arXiv 1806.07366; Grathwohl et al. (2019), arXiv 1810.01367; Song et al. (2021), arXiv
    2011.13456.

    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.verbs import evidence
    >>> mixture = GaussianMixture.example()
    >>> estimate = evidence(mixture, ODELikelihood(), mixture.mean[None])
    >>> print(estimate.convention)
    density of x itself, at t = 0; terminal law N(0, 1^2 I) at t = 1; exact trace.
    """

    trace: Trace = "exact"
    num_probes: Annotated[int, Within(2)] = 8
    rtol: Positive = 1e-5
    atol: Positive = 1e-5
    t_min: Annotated[float, Within(0, 1, "[)")] | None = None
    terminal: LogDensity | None = None
    memory: Count = 2**30
    compile: bool = False
    needs = ()
    paper: ClassVar[str] = "Song et al. 2021, arXiv 2011.13456"
    offers: ClassVar[str] = (
        "log p(x) itself of diffusions and flows, exact up to a solver's error that is reported"
    )
    gives_up: ClassVar[str] = "hundreds of network calls; the exact trace costs d times as much"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tolerances(self.rtol, self.atol)

    def supports(self, program: object) -> Support:
        """Whether the program is a flow or a diffusion."""
        return Velocity.supports(program)

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """log p of each row; see `Estimator.estimate`."""
        started, x = time.perf_counter(), self._data(target)
        likelihood = self._likelihood(target)
        likelihood.log_terminal(x[:1])  # what is refused is refused before the work
        chunks = torch.arange(len(x), device=x.device).split(self._rows(likelihood, x))
        with ticker(describe(self), len(x), progress) as update:
            parts = [self._solve(likelihood, rows, x, seed, update) for rows in chunks]
        solved = Solved.joined(parts)
        reason = self._lost(likelihood, x, solved.log_prob, seed)
        return Estimate(
            value=solved.log_prob,
            standard_error=self._standard_error(solved.integral),
            kind="exact" if self.trace == "exact" else "unbiased",
            event_size=event_size(target),
            trusted=not reason,
            reason=reason,
            cost=Cost(network_calls=solved.calls, seconds=time.perf_counter() - started),
            solver_error=solved.error,
            convention=self._convention(likelihood),
        )

    def _likelihood(self, target: Target) -> Likelihood:
        return Likelihood(
            target.program,
            target.batch.condition,
            self.t_min,
            self.terminal,
            self.rtol,
            self.atol,
            self.memory,
            self.compile,
        )

    def _data(self, target: Target) -> Tensor:
        """x, of the dtype of the weights: a field in lower precision than the solver's would be noise to it."""
        x, program = target.data["x"], target.program
        weights = (*program.parameters(), *program.buffers()) if isinstance(program, nn.Module) else ()
        dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), x.dtype)
        if x.dtype != dtype:
            raise InputError(
                f"{describe(program)} computes in {dtype} and the data are {x.dtype}: pass data.to({dtype}), or for "
                "tolerances below 1e-6 make both float64 (program.double())."
            )
        check_tolerances(self.rtol, self.atol, dtype)
        return x

    def _rows(self, likelihood: Likelihood, x: Tensor) -> int:
        """How many data to solve for side by side."""
        t = torch.full((1,), likelihood.span()[1], dtype=torch.float64, device=x.device)
        first = torch.zeros(1, dtype=torch.long, device=x.device)
        kept = bytes_per_row(field_of(likelihood.velocity(first)), x[:1], t)
        directions = x[0].numel() if self.trace == "exact" else self.num_probes
        return max(1, self.memory // (_COPIES * kept * directions))

    def _solve(self, likelihood: Likelihood, rows: Tensor, x: Tensor, seed: int, update: Update) -> Solved:
        first = int(rows[0])

        def show(share: float) -> None:
            update(first + round(share * len(rows)))

        return self._of(likelihood, rows).solve(
            x[rows], self._probes(rows, x, seed), show=None if update is silent else show
        )

    def _of(self, likelihood: Likelihood, rows: Tensor) -> Likelihood:
        if likelihood.condition is None:
            return likelihood
        return replace(likelihood, condition=likelihood.condition[rows])

    def _probes(self, rows: Tensor, x: Tensor, seed: int) -> Tensor | None:
        """Random signs `(rows, num_probes, *event)` for consecutive rows, the same whatever is solved for beside."""
        if self.trace == "exact":
            return None
        first, count = int(rows[0]), int(rows[-1]) - int(rows[0]) + 1
        noise = Noise(seed, 1, count, tuple(x.shape[1:]), x.dtype, x.device, first)
        signs = torch.stack([z.signbit() for z in noise.each(range(self.num_probes))], 1)
        return 1 - 2 * signs[rows - first].to(x)

    def _standard_error(self, integral: Tensor) -> Tensor:
        if self.trace == "exact":
            return torch.zeros_like(integral[:, 0])
        return integral.std(1) / math.sqrt(self.num_probes)

    def _lost(self, likelihood: Likelihood, x: Tensor, value: Tensor, seed: int) -> str:
        """Warn of data whose log p is not finite, and say so in words; an error where it is all of them."""
        bad = (~torch.isfinite(value)).nonzero().flatten()
        if not len(bad):
            return ""
        some = bad[:1]
        t = self._of(likelihood, some).lost_at(x[some], self._probes(some, x, seed))
        when = (
            "log density of x_1 is not finite"
            if math.isnan(t)
            else f"velocity turns NaN or infinite at t = {t:.4g}"
        )
        message = f"{self}: the {when} for data {listed(bad.tolist())} ({len(bad)} of {len(x)})"
        if len(bad) == len(x):
            raise ProbgenError(
                f"{message}. Check the weights and the scale of the data, or start at a larger t_min."
            )
        warnings.warn(f"{message}. They are not finite, the others stand.", NonFiniteWarning, stacklevel=2)
        return f"{message}; look at the other values by themselves."

    def _convention(self, likelihood: Likelihood) -> str:
        velocity, (t_min, t_max) = likelihood.velocity(), likelihood.span()
        law = f"{velocity.initial}" if self.terminal is None else "given as a function"
        trace = (
            "exact trace" if self.trace == "exact" else f"trace by {self.num_probes} probes of random signs"
        )
        of = "x itself"
        if velocity.process is not None:
            at = torch.tensor([t_min], dtype=torch.float64)
            alpha, sigma = (
                each(at).mean().item() for each in (velocity.process.alpha, velocity.process.sigma)
            )
            of = of if sigma == 0 else f"data noised to {alpha:.5g} x_0 + {sigma:.4g} noise"
        return f"density of {of}, at t = {t_min:g}; terminal law {law} at t = {t_max:g}; {trace}."


def example() -> ODELikelihood:
    """Loose tolerances and few probes."""
    return ODELikelihood("hutchinson", num_probes=2, rtol=1e-2, atol=1e-2)
