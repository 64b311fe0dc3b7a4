"""What engines that follow a guidance share: steps of the reverse family towards p(x | y), batches, cost, failures."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import (
    Cost,
    Count,
    Engine,
    NonFiniteWarning,
    Posterior,
    ProbgenError,
    Program,
    Support,
    Target,
    UnsupportedError,
    describe,
)
from probgen.dynamics import GaussianInitial, listed
from probgen.dynamics.fields import Output, Steps
from probgen.dynamics.multistep import Weights, call_times, exponential_weights, last_weights
from probgen.priors.conditioned import Conditioned
from probgen.priors.guidance import Guidance, Guided, PiGDM, level
from probgen.processes import Grid, Process, as_grid
from probgen.progress import ticker
from probgen.randomness import Noise
from probgen.targets import frozen

_ORDER = 2


@dataclass(frozen=True)
class GuidedEngine(Engine):
    """Carries noise to data along the reverse family of p(x | y), as far as a guidance knows p(y | x_t).

        x_s = (sigma_s/sigma_t) e^{-a h} x_t + alpha_s int (1 + a) e^{-(1 + a)(lambda_s - lambda)} m d lambda
              + sigma_s sqrt(1 - e^{-2 a h}) z,    lambda = log(alpha/sigma), h = lambda_s - lambda_t,

    where m = E[x_0 | x_t, y] = x_0hat + (sigma^2/alpha) grad log p(y | x_t) is a straight line in lambda through its
    last two values: of second order in h at one network call a step. A first-order step bends the law itself: of x
    given y it leaves out the spread of x_0 given x_t. The last step ends in m. A guidance that is not `smooth` takes
    steps of first order. A subclass says what a is.

    Args:
        guidance: log p(y | x_t) as it is approximated.
        steps: n >= 1; network calls a draw.
        grid: how they are spread over time: "quadratic", "logsnr", "karras", "uniform" or a `Grid`.
        batch_size: draws made side by side, to bound memory; None makes all at once. Noise belongs to the draw, not to
            the batch, so that it changes nothing else.
    """

    guidance: Guidance = PiGDM()  # noqa: RUF009 - frozen
    steps: Steps = 200
    grid: Grid | str = "quadratic"
    batch_size: Count | None = None
    stochasticity: ClassVar[float]
    kind = "approximate"
    guarantee = "approximate"
    shares = "draws"
    numbered = True
    conditions = True
    data_sets = True

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)

    def supports(self, program: Any) -> Support:
        """Whether it can be a program around a prior."""
        return around_a_prior(program)

    def run(
        self,
        target: Target,
        *,
        num_draws: int,
        num_chains: int,
        seed: int,
        init: Posterior | None = None,
        state: Any = None,
        progress: bool = True,
        first: int = 0,
    ) -> Posterior:
        """Draw from the posterior as the guidance has it; see `Engine.run`. `cost.gradients` are ways back."""
        started = time.perf_counter()
        conditioned = Conditioned(target)
        _check_alone(self, conditioned)
        steps = self._steps(conditioned.process)
        batches = list(
            _batches(conditioned, seed, num_chains, range(first, first + num_draws), self.batch_size)
        )
        num_calls = len(steps) * len(batches) * self.guidance.num_calls
        with (
            frozen(conditioned.prior.program),
            torch.no_grad(),
            ticker(describe(self), num_calls, progress) as update,
        ):
            counter = CallCounter(update)
            counted = conditioned.through(counter.around)
            parts = [self._batch(counted, steps, noise) for noise in batches]
            x = torch.cat([part.unflatten(0, (num_chains, -1, counted.num_sets)) for part in parts], dim=1)
            values = counted.values(x.flatten(0, 2))
        sets = (counted.num_sets,) if counted.sets_shown else ()
        draws = {name: v.reshape(num_chains, num_draws, *sets, *v.shape[1:]) for name, v in values.items()}
        cost = Cost(counter.calls, counter.gradients, time.perf_counter() - started)
        return Posterior(draws, self.kind, self.guarantee, str(self), cost, dims=counted.dims, target=target)

    def _steps(self, process: Process) -> list[GuidedStep]:
        order = _ORDER if self.guidance.smooth else 1
        return guided_steps(process, as_grid(self.grid), self.steps, self.stochasticity, order)

    def _batch(self, conditioned: Conditioned, steps: list[GuidedStep], noise: Noise) -> Tensor:
        """One batch, `(noise.num_rows, *shape)`; where it fails is found by looking at every step of a second run."""
        x = self._follow(conditioned, steps, noise)
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bool(bad.any()):
            watch = _Watch(conditioned)
            self._follow(conditioned, steps, noise, watch)
            self._report(watch, bad, noise)
        return x

    def _follow(
        self,
        conditioned: Conditioned,
        steps: list[GuidedStep],
        noise: Noise,
        watch: _Watch | None = None,
    ) -> Tensor:
        scale = conditioned.process.terminal_scale()
        noises = noise.each(range(1, len(steps)))
        x, before = GaussianInitial(scale).draw(noise), torch.zeros(())
        for step in steps:
            guided = self.guidance(conditioned, x, step.t)
            if watch:
                watch(step.t, guided)
            x_0 = guided.x_0 + self.guidance.shift(guided, step.on_score) / (step.on_x_0 + step.on_before)
            x = step.on_x * x + step.on_x_0 * x_0 + step.on_before * before
            if step.scale:
                x = x + step.scale * next(noises)
            before = x_0
        return x

    def _report(self, watch: _Watch, bad: Tensor, noise: Noise) -> None:
        draws = {
            noise.first + row // noise.rows % noise.num_draws for row in bad.nonzero().flatten().tolist()
        }
        message = f"{self}: {watch.found}, in draws {listed(sorted(draws))}"
        if bool(bad.all()):
            raise ProbgenError(
                f"{message}: all of them. Check what the program computes from x, which at early times is far from "
                "data, the weights of the prior, and the scale of the data."
            )
        warnings.warn(
            f"{message} ({int(bad.sum())} of {len(bad)}). They are NaN in the result, the others are unaffected.",
            NonFiniteWarning,
            stacklevel=2,
        )


class GuidedStep(NamedTuple):
    """x_s = on_x x_t + on_x_0 m_t + on_before m_before + scale z, m = x_0hat + (sigma^2/alpha) grad, at time t.

    `on_score` is by how much a term that is added to the score moves x_s where m is taken to stay what it is. All are
    worked out in float64.
    """

    t: float
    on_x: float
    on_x_0: float
    on_before: float
    scale: float
    on_score: float


def guided_steps(
    process: Process, grid: Grid, num_steps: int, stochasticity: float, order: int
) -> list[GuidedStep]:
    """The steps of a member of the reverse family, the last of them to the data.

    >>> from probgen.processes import VP
    >>> steps = guided_steps(VP(), as_grid("quadratic"), 3, stochasticity=1.0, order=2)
    >>> [step.on_before < 0 for step in steps], steps[-1].on_x, steps[-1].on_x_0
    ([False, True, False], 0.0, 1.0)
    """
    times = call_times(process, grid, num_steps)
    t, s = times[:-1], times[1:]
    first, later = slice(0, order - 1), slice(order - 1, None)
    looking_back = torch.stack([t[order - 1 - i : len(t) - i] for i in range(order)])
    weights = [
        *exponential_weights(process, t[first], s[first], t[None, first], stochasticity, 0.0),
        *exponential_weights(process, t[later], s[later], looking_back, stochasticity, 0.0),
        last_weights(process, times[-1:]),
    ]
    spread = process.sigma(times).square() / process.alpha(times)
    return [_guided_step(*row) for row in zip(times.tolist(), weights, spread.tolist(), strict=True)]


def _guided_step(t: float, weights: Weights, spread: float) -> GuidedStep:
    on_x_0, on_before = (*map(float, weights.on_x0), 0.0)[:2]
    on_score = (on_x_0 + on_before) * spread
    return GuidedStep(t, float(weights.on_x), on_x_0, on_before, float(weights.scale), on_score)


def around_a_prior(program: Any) -> Support:
    """Whether a program can have a prior as one of its sites: a fitted program is itself the prior of others."""
    if isinstance(program, Program) and hasattr(program, "event_shape"):
        return Support(
            False,
            "it needs a program around a fitted one: a function with the site "
            f'x = pyro.sample("x", Prior({describe(program)})) and what was seen of x as sites below it',
        )
    return Support(True)


def _check_alone(engine: GuidedEngine, conditioned: Conditioned) -> None:
    if conditioned.others:
        raise UnsupportedError(
            f"{engine} draws {conditioned.name!r} alone, and {describe(conditioned.target.program)} has other latents: "
            f"{', '.join(map(repr, conditioned.others))}. Engines that draw them beside a prior: TwistedSMC, "
            "SplitGibbs, HMC(space='noise'). What was seen is observed: data={'y': y}."
        )
    level(conditioned, conditioned.process.t_max)


def _batches(
    conditioned: Conditioned, seed: int, num_chains: int, draws: range, batch_size: int | None
) -> Iterator[Noise]:
    dtype, rows = conditioned.latent.dtype, conditioned.num_sets
    size = batch_size or len(draws)
    for first in draws[::size]:
        count = min(size, draws.stop - first)
        yield Noise(seed, num_chains, count, conditioned.shape, dtype, conditioned.device, first, rows)


class CallCounter:
    """Counts the calls of a network and the ways back through it, and shows the calls."""

    def __init__(self, update: Callable[..., None] = lambda *_: None) -> None:
        self.calls, self.gradients, self.update = 0, 0, update

    def around(self, output: Output) -> Output:
        """The network, counted."""

        def counted(x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            self.update(self.calls)
            value = output(x, t)
            if value.requires_grad:
                value.register_hook(self._went_back)
            return value

        return counted

    def _went_back(self, grad: Tensor) -> None:
        self.gradients += 1


class _Watch:
    """Remembers what was first anything but finite, and when."""

    def __init__(self, conditioned: Conditioned) -> None:
        self.conditioned = conditioned
        self.blamed, self.when = "", "in the steps themselves"

    @property
    def found(self) -> str:
        """What happened, in words."""
        return f"{self.blamed or 'draws'} turned NaN or infinite {self.when}"

    def __call__(self, t: float, guided: Guided) -> None:
        bad = ~torch.isfinite(guided.grad).flatten(1).all(1)
        if not self.blamed and bool(bad.any()):
            self.blamed, self.when = self._blame(guided.x_0[bad][:1]), f"at t = {t:.4g}"

    def _blame(self, x_0: Tensor) -> str:
        if not bool(torch.isfinite(x_0).all()):
            return f"E[x_0 | x_t] of the prior at site {self.conditioned.name!r}"
        return self.conditioned.density.blame(self.conditioned.join(x_0))
