"""Twisted sequential Monte Carlo: weighted particles under guidance, exact as particles and steps grow."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import (
    Cost,
    Count,
    Engine,
    Estimate,
    InputError,
    Posterior,
    Probability,
    Support,
    Target,
    Within,
    describe,
)
from probgen.dynamics.fields import Steps
from probgen.priors.conditioned import Conditioned
from probgen.priors.engine import around_a_prior
from probgen.priors.guidance import Guidance, PiGDM
from probgen.priors.particles import CollapsedWarning, rows_of, systematic
from probgen.priors.steps import reverse_steps
from probgen.priors.twisted import Ended, Setup, TwistedFilter, uniform
from probgen.processes import Grid, as_grid
from probgen.progress import ticker
from probgen.randomness import Noise, check_seed, time_key
from probgen.targets import frozen

_NUMBERS_AT_ONCE = 2**22  # coordinates of all particles that are moved side by side
_FEWEST = 10  # effective particles, or ancestors, below which nothing is to be believed
_DRAW, _MIX = 100.0, 101.0  # what noise is for, beside that of the filter


@dataclass(frozen=True)
class TwistedSMC(Engine):
    """Particles that follow the reverse diffusion under guidance, weighted so that the guidance's errors cancel.

    With psi_t(x_t) the guidance's p(y | x_t), each step from t to s draws x_s ~ q(x_s | x_t), the diffusion's own
    p(x_s | x_t) with its mean moved along grad log psi_t, and multiplies weights by

        p(x_s | x_t) psi_s(x_s) / (q(x_s | x_t) psi_t(x_t)),

    at the end psi_0 = p(y | x_0). Populations whose effective size has fallen are resampled, systematically. Whatever
    psi_t is, the mean of the weights is an unbiased estimate of p(y) under the diffusion in `steps` steps, and draws
    tend to its posterior as particles grow. p(x_s | x_t) is of second order in the steps (`Step.ahead`).

    Other latents z of the program are carried by the particles. They start from the program's own law, learn of y over
    the first third of the steps, and after each step a random-walk Metropolis step of the size of their spread leaves
    p(z | x_t, y) as it is; no network call, as E[x_0 | x_t] is kept.

    A chain is made of as many independent runs as `num_draws` needs, so that it never returns more draws than it had
    particles; runs are weighed by their evidence. Draws are resampled to equal weight.

    Args:
        particles: of one run and data set, >= 2.
        steps: >= 1; one network call and its gradient each, and one more at the end.
        twist: the guidance, whose `twist` is true: `PiGDM()`, `MomentMatching()`; `Jensen()` does where no site
            is Gaussian.
        grid: how steps are spread over time; see `ReverseSDE`.
        ess_threshold: populations are resampled when their effective size falls below this share of it, in [0, 1].
        batch_size: particles given to the network side by side, to bound memory; None goes by their size. It changes
            no draw, and `cost` counts calls as if all were given at once.

    Raises:
        InputError: a setting out of range, a twist without a density, no prior in the program, weights that are NaN or
            all 0.
        UnsupportedError: the prior is no diffusion.

    Warns:
        CollapsedWarning: the effective size, or the number of first ancestors still represented, fell under 10.

    `run_stats` holds min_ess, surviving_ancestors and log_evidence of each chain, the first two the smallest of its
    runs, and over time ess and ancestors `(chain, time)`; data sets come last. `evidence` is the log of the mean of
    the unbiased estimates of all runs, one value a data set, with its error by the delta method; not to be trusted
    where the weights collapsed or there is just one run.

    Source: Wu et al. (2023), arXiv 2306.17775; evidence and resampling Del Moral, Doucet & Jasra (2006).

    >>> import pyro, pyro.distributions as dist
    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.priors.prior import Prior
    >>> from probgen.verbs import infer
    >>> prior = Prior(GaussianMixture.example())
    >>> def seen():
    ...     x = pyro.sample("x", prior)
    ...     pyro.sample("y", dist.Normal(x[..., 0], 0.5))
    >>> posterior = infer(seen, TwistedSMC(steps=20), data={"y": torch.tensor(1.0)}, num_draws=500, num_chains=2)
    >>> posterior["x"].shape, posterior.evidence.trusted
    (torch.Size([2, 500, 2]), True)
    """

    particles: Annotated[int, Within(2)] = 256
    steps: Steps = 100
    twist: Guidance = PiGDM()  # noqa: RUF009 - frozen
    grid: Grid | str = "logsnr"
    ess_threshold: Probability = 0.5
    batch_size: Count | None = None
    kind = "weighted"
    shares = None  # all runs are pooled into one evidence
    guarantee = "discretised"
    conditions: ClassVar[bool] = True
    data_sets: ClassVar[bool] = True
    default_chains: ClassVar[int] = 4
    paper: ClassVar[str] = "Wu et al. 2023, arXiv 2306.17775"
    offers: ClassVar[str] = (
        "the posterior under a fitted diffusion, exact as particles and steps grow; log p(y) with its error; "
        "any likelihood, other latents, many data sets side by side"
    )
    gives_up: ClassVar[str] = "memory for the particles; weights collapse where the guidance is far off"

    def __post_init__(self) -> None:
        super().__post_init__()
        as_grid(self.grid)
        if not self.twist.twist:
            raise InputError(
                f"{self.twist} moves particles without saying how likely the observation is at x_t: there is nothing "
                "to weigh them by. Twists: PiGDM(), MomentMatching(), Jensen(). GuidedSDE takes any guidance."
            )

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
    ) -> Posterior:
        """Run the particles; see `Engine.run`."""
        check_seed(seed)
        started = time.perf_counter()
        conditioned = Conditioned(target)
        steps = reverse_steps(conditioned.process, self.grid, self.steps)
        counter = _Counter()
        setup = Setup(
            conditioned.through(counter.around),
            self.twist,
            steps,
            self.particles,
            self.ess_threshold,
            seed,
            self.batch_size,
        )
        work = _Work(setup, num_chains, -(-num_draws // self.particles), num_draws)
        with (
            torch.no_grad(),
            frozen(conditioned.prior.program),
            ticker(describe(self), work.num_looks, progress) as update,
        ):
            chains = work.done(lambda **seen: counter.show(update, **seen))
            sites = _sites(setup, chains)
        cost = counter.cost(work.num_rows, time.perf_counter() - started)
        evidence = _evidence(setup, chains, cost)
        _warn(evidence, self)
        return Posterior(
            sites,
            self.kind,
            self.guarantee,
            str(self),
            cost,
            dims=conditioned.dims,
            run_stats=_run_stats(chains, conditioned.sets_shown),
            evidence=evidence,
            target=target,
        )


class _Chains(NamedTuple):
    """Draws of chains, `(chain, draw, set, ...)`, equally weighted; how their runs went, `(chain, run, ..., set)`."""

    x: Tensor
    z: Tensor
    log_evidence: Tensor
    ess: Tensor
    ancestors: Tensor


@dataclass(frozen=True)
class _Work:
    """Chains of `runs` runs each, a few at a time.

    Args:
        setup: what all runs share.
        num_chains, runs, num_draws: how many chains, runs of a chain, and draws of it.
    """

    setup: Setup
    num_chains: int
    runs: int
    num_draws: int

    @property
    def at_once(self) -> int:
        """Runs that memory allows side by side."""
        conditioned = self.setup.conditioned
        return max(
            1, _NUMBERS_AT_ONCE // (self.setup.particles * conditioned.num_sets * conditioned.density.dim)
        )

    @property
    def num_rows(self) -> int:
        """Draws of the prior that the network sees at each time."""
        conditioned = self.setup.conditioned
        plates = conditioned.size // conditioned.prior.event_shape.numel()
        return self.num_chains * self.runs * self.setup.particles * conditioned.num_sets * plates

    @property
    def num_looks(self) -> int:
        """How often the network is looked at."""
        return (len(self.setup.steps) + 1) * sum(len(self._blocks(*part)) for part in self._parts())

    def done(self, show: Callable[..., None]) -> _Chains:
        """All chains."""
        parts = [self._chains(first, count, show) for first, count in self._parts()]
        return _Chains(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def _parts(self) -> list[tuple[int, int]]:
        """First and number of the chains that are pooled together."""
        return _blocks(0, self.num_chains, max(1, self.at_once // self.runs))

    def _blocks(self, first: int, count: int) -> list[tuple[int, int]]:
        """First and number of the runs side by side, of these chains."""
        return _blocks(first * self.runs, count * self.runs, self.at_once)

    def _chains(self, first: int, count: int, show: Callable[..., None]) -> _Chains:
        """Chains first .. first + count - 1, the runs of each pooled into draws of equal weight."""
        ended = [TwistedFilter(self.setup, *block, show).run() for block in self._blocks(first, count)]
        all_runs = Ended(*(torch.cat(values) for values in zip(*ended, strict=True)))
        conditioned = self.setup.conditioned
        rows = self._drawn_rows(all_runs, first, count)
        front = (count, self.num_draws, conditioned.num_sets)
        return _Chains(
            all_runs.x[rows].reshape(*front, *conditioned.shape),
            all_runs.z[rows].reshape(*front, conditioned.num_others),
            *(value.unflatten(0, (count, self.runs)) for value in all_runs[3:]),
        )

    def _drawn_rows(self, ended: Ended, first: int, count: int) -> Tensor:
        """Particles in proportion to their weights, a run's by its evidence, `(count * num_draws * num_sets,)`."""
        by_run = ended.log_evidence[:, None] + ended.log_weight.log_softmax(1)
        pooled = by_run.reshape(count, self.runs * self.setup.particles, -1)
        num_sets, device = pooled.shape[2], pooled.device
        noise = Noise(self.setup.seed, 1, count, (num_sets,), torch.float64, device, first)
        index = systematic(pooled, uniform(noise(time_key(_DRAW))), self.num_draws)
        # Draws that descend from one particle stand side by side: mixed, any part of them is like the whole.
        mixing = Noise(self.setup.seed, 1, count, (self.num_draws, num_sets), torch.float64, device, first)
        return rows_of(index.gather(1, mixing(time_key(_MIX)).argsort(1)), pooled.shape[1])


def _blocks(first: int, count: int, size: int) -> list[tuple[int, int]]:
    """First and number of the items of each block of at most `size`.

    >>> _blocks(10, 5, 2)
    [(10, 2), (12, 2), (14, 1)]
    """
    return [(first + start, min(size, count - start)) for start in range(0, count, size)]


class _Counter:
    """Counts the rows that a network sees and that go back through it, and the looks at all particles."""

    def __init__(self) -> None:
        self.rows, self.rows_back, self.looks = 0, 0, 0

    def around(self, output: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def counted(x: Tensor, t: Tensor) -> Tensor:
            self.rows += len(x)
            value = output(x, t)
            if value.requires_grad:
                value.register_hook(self._went_back)
            return value

        return counted

    def show(self, update: Callable[..., None], **seen: float) -> None:
        self.looks += 1
        update(self.looks, **seen)

    def _went_back(self, grad: Tensor) -> None:
        self.rows_back += len(grad)

    def cost(self, num_rows: int, seconds: float) -> Cost:
        """In calls for all rows."""
        return Cost(self.rows // num_rows, self.rows_back // num_rows, seconds)


def _sites(setup: Setup, chains: _Chains) -> dict[str, Tensor]:
    """Draws of all sites, `(chain, draw, [set,] *shape)`."""
    conditioned = setup.conditioned
    front = chains.x.shape[:3] if conditioned.sets_shown else chains.x.shape[:2]
    z = chains.z.flatten(0, 2) if setup.others else None
    values = conditioned.values(chains.x.flatten(0, 2), z)
    return {name: value.reshape(*front, *value.shape[1:]) for name, value in values.items()}


def _run_stats(chains: _Chains, sets_shown: bool) -> dict[str, Tensor]:
    """By chain, data sets last."""
    ess, ancestors = chains.ess.min(1).values, chains.ancestors.min(1).values
    stats = {
        "min_ess": ess.min(1).values,
        "surviving_ancestors": ancestors[:, -1],
        "log_evidence": log_mean(chains.log_evidence.transpose(0, 1)),
        "ess": ess,
        "ancestors": ancestors,
    }
    return stats if sets_shown else {name: value[..., 0] for name, value in stats.items()}


def _evidence(setup: Setup, chains: _Chains, cost: Cost) -> Estimate:
    """log p(y) of each data set, from all runs."""
    log_z = chains.log_evidence.flatten(0, 1)
    runs = len(log_z)
    ess = chains.ess.flatten(0, 1).amin((0, 1))
    ancestors = chains.ancestors.flatten(0, 1)[:, -1].min(0).values
    reason = _distrust(ess, ancestors, runs)
    return Estimate(
        log_mean(log_z),
        log_mean_error(log_z),
        "unbiased",
        setup.num_seen,
        trusted=not reason,
        reason=reason,
        diagnostics={"min_ess": ess, "surviving_ancestors": ancestors},
        cost=cost,
        convention=f"log of the mean of {runs} independent estimates of p(y), each unbiased for the diffusion in "
        f"{len(setup.steps)} steps",
    )


def log_mean(log_z: Tensor) -> Tensor:
    """log of the mean of Z over runs, the first dimension."""
    return log_z.logsumexp(0) - math.log(len(log_z))


def log_mean_error(log_z: Tensor) -> Tensor:
    """Its standard error by the delta method, sd(Z) / (sqrt(n) mean(Z)); infinite for a single run.

    >>> log_mean_error(torch.tensor([[1.0], [3.0]]).log())
    tensor([0.5000])
    """
    n = len(log_z)
    if n == 1:
        return torch.full_like(log_z[0], torch.inf)
    return (n * log_z.softmax(0)).std(0) / math.sqrt(n)


def _distrust(ess: Tensor, ancestors: Tensor, num_runs: int) -> str:
    """Why an estimate is not to be trusted, in words; nothing where it is. One number a data set."""
    reasons = []
    poor = int(((ess < _FEWEST) | (ancestors < _FEWEST)).sum())
    if poor:
        where = f" of {poor} of {len(ess)} data sets" if len(ess) > 1 else ""
        reasons.append(
            f"the weights{where} collapsed: smallest effective size {float(ess.min()):.1f}, surviving ancestors "
            f"{int(ancestors.min())}, where {_FEWEST} are needed. More particles, more steps, or a better twist."
        )
    if num_runs == 1:
        reasons.append("one run says nothing of its own error. More chains, or more draws than particles.")
    return " ".join(reasons)


def _warn(evidence: Estimate, engine: TwistedSMC) -> None:
    if "collapsed" in evidence.reason:
        warnings.warn(f"{engine}: {evidence.reason}", CollapsedWarning, stacklevel=4)


def example() -> TwistedSMC:
    """A few particles and steps."""
    return TwistedSMC(particles=32, steps=10)
