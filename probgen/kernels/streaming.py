"""Moments of more chains than memory holds: chains run chunk by chunk, and no draw is kept."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from probgen.core import (
    Cost,
    Count,
    Engine,
    InputError,
    NonNegativeInt,
    Target,
    UnsupportedError,
    Within,
    check_arguments,
    describe,
)
from probgen.kernels.core import MarkovEngine
from probgen.kernels.run import Chains
from probgen.kernels.spread import Spread
from probgen.progress import ticker
from probgen.randomness import forked_rng
from probgen.targets import Density, frozen, read, restored_store
from probgen.targets.routes import faithfully_recorded

_CHUNK = 2**14  # chains; their state stays near the processor
_AHEAD = 8  # chunks begun before they run
Values = dict[str, Tensor]


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each site with their Monte Carlo errors, and whether the chains agree.

    Args:
        mean, sd: of all draws, by site.
        mean_error, sd_error: their standard errors, from the spread between chains, which are independent.
        r_hat: split R-hat, of each chain's two halves: sqrt(((n - 1)/n W + B/n)/W), W the variance within halves of n
            draws, B/n that of their means (Gelman et al. 2013, section 11.4; not rank-normalised).
        ess: effective number of draws for the mean, (sd/mean_error)^2.
        num_chains, num_draws: chains, and draws of each.
        engine, cost: how the draws were made, and what they cost.
    """

    mean: Values
    sd: Values
    mean_error: Values
    sd_error: Values
    r_hat: Values
    ess: Values
    num_chains: int
    num_draws: int
    engine: str
    cost: Cost = field(default_factory=Cost)

    def __str__(self) -> str:
        lines = [
            f"{self.num_chains:,} chains x {self.num_draws:,} draws by {self.engine}.",
            f"Cost: {self.cost}.",
        ]
        for name, mean in self.mean.items():
            worst = float(self.r_hat[name].max())
            if mean.ndim:
                lines.append(f"  {name}: {' x '.join(map(str, mean.shape))}, R-hat up to {worst:.4f}")
            else:
                spread = f"sd {self.sd[name]:.5g} +- {self.sd_error[name]:.2g}"
                lines.append(
                    f"  {name}: {mean:.5g} +- {self.mean_error[name]:.2g}, {spread}, R-hat {worst:.4f}"
                )
        return "\n".join(lines)


def moments(
    program: Any,
    engine: Engine,
    *,
    data: Any = None,
    args: tuple[Any, ...] = (),
    num_draws: Annotated[int, Within(4)],
    num_chains: Annotated[int, Within(2)],
    chunk: Count = _CHUNK,
    seed: NonNegativeInt = 0,
    progress: bool = False,
) -> Moments:
    """Mean, standard deviation and convergence of many chains, none of whose draws is kept.

    Chains run `chunk` at a time, as many chunks side by side as torch has threads. Those of engines that adapt nothing
    (`ULA`) are the same whatever the chunk, and the same as those of `infer`; others are adapted chunk by chunk.

    Args:
        program, engine, data, args, seed: as for `infer`; the engine runs Markov chains.
        num_draws: of each chain, >= 4.
        num_chains: >= 2.
        chunk: chains at a time, >= 1.
        progress: show a line while running.

    Raises:
        InputError: arguments out of range, chains that run away.
        UnsupportedError: an engine without Markov chains.

    >>> import pyro
    >>> import pyro.distributions as dist
    >>> from probgen.inference.ula import ULA
    >>> def program():
    ...     pyro.sample("z", dist.Normal(3.0, 1.0))
    >>> found = moments(program, ULA(step_size=0.1, num_warmup=50), num_draws=100, num_chains=2000)
    >>> bool(abs(found.mean["z"] - 3) < 4 * found.mean_error["z"])
    True
    """
    check_arguments(moments, locals())
    if not isinstance(engine, MarkovEngine):
        raise UnsupportedError(
            f"Moments are kept of Markov chains, and {describe(engine)} has none; draw with infer(...) and take the "
            "moments of the draws."
        )
    with forked_rng(seed), frozen(program), restored_store(), torch.no_grad():
        run = _Chunks(engine, read(program, data, args), num_draws, seed, min(chunk, num_chains))
        return run.moments(num_chains, progress)


class _Site(NamedTuple):
    """What is kept of a site: how statistics of a chain are spread over chains, and those of half a chain."""

    means: Spread
    variances: Spread
    mean_squares: Spread  # of the distance from a centre that is about the mean
    sums: Spread  # of the mean and the mean square: for their covariance
    half_means: Spread
    half_variances: Spread

    def and_(self, other: _Site) -> _Site:
        return _Site(*(a.and_(b) for a, b in zip(self, other, strict=True)))


class _Chunks:
    """The chains of one run, chunk by chunk."""

    def __init__(self, engine: MarkovEngine, target: Target, num_draws: int, seed: int, chunk: int) -> None:
        self.engine, self.target, self.seed = engine, target, seed
        self.num_draws, self.chunk = num_draws, chunk
        self.centre: Values = {}
        self.first: Chains | None = None
        self.recorded = False  # whether chains run without running the program
        self._constrain: dict[int, Callable[[Tensor], Values]] = {}

    def moments(self, num_chains: int, progress: bool) -> Moments:
        starts = range(0, num_chains, self.chunk)
        sizes = [min(self.chunk, num_chains - first) for first in starts]
        total: dict[str, _Site] = {}
        started = time.perf_counter()
        costs = []
        with ticker(describe(self.engine), {"chains": num_chains}, progress) as show:
            for sites, cost in self._all(list(zip(starts, sizes, strict=True))):
                total = {name: total[name].and_(site) if total else site for name, site in sites.items()}
                costs.append(cost)
                show(int(next(iter(total.values())).means.number))
        return self._verdict(total, num_chains, _together(costs, time.perf_counter() - started))

    def _all(self, parts: list[tuple[int, int]]) -> Iterator[tuple[dict[str, _Site], Cost]]:
        """The first chunk, in which operations are recorded and compiled; others of its size side by side; the rest."""
        with _threads() as pool:
            yield self._finished(self._begun(*parts[0]))
            alike = [part for part in parts[1:] if part[1] == self.chunk]
            yield from self._side_by_side(pool, alike) if self.recorded else self._in_turn(alike)
            yield from self._in_turn([part for part in parts[1:] if part[1] != self.chunk])

    def _in_turn(self, parts: list[tuple[int, int]]) -> Iterator[tuple[dict[str, _Site], Cost]]:
        return (self._finished(self._begun(*part)) for part in parts)

    def _side_by_side(
        self, pool: ThreadPoolExecutor, parts: list[tuple[int, int]]
    ) -> Iterator[tuple[dict[str, _Site], Cost]]:
        """Programs run in this thread, recorded operations in others."""
        waiting: deque[Future[tuple[dict[str, _Site], Cost]]] = deque()
        for part in parts:
            waiting.append(pool.submit(self._finished, self._begun(*part)))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _begun(self, first: int, size: int) -> Chains:
        """The chains of a chunk where they start."""
        chains = Chains(self.engine, self.target, size, self.seed, first, self.first)
        chains.begin()
        if self.first is None:
            self.first, self.recorded = chains, isinstance(chains.function, GraphModule)
        return chains

    def _finished(self, chains: Chains) -> tuple[dict[str, _Site], Cost]:
        """What is kept of their draws."""
        with torch.no_grad():
            chains.warm_up()
            with chains.clock.counting("seconds"):
                parts = self._parts(chains)
            return {
                name: self._site(name, [part[name] for part in parts if part]) for name in parts[0]
            }, chains.cost()

    def _parts(self, chains: Chains) -> list[dict[str, Spread]]:
        """The spread of the draws of each chain: of the first half, the last, and the draw between, if there is one."""
        half = self.num_draws // 2
        found: list[dict[str, Spread]] = [{}, {}, {}]
        done = 0
        for part in chains.blocks(self.num_draws * self.engine.thin):
            for u in part["u"]:
                values = self._values(u)
                which = 0 if done < half else 1 if done >= self.num_draws - half else 2
                found[which] = {
                    name: _one_more(found[which].get(name), value) for name, value in values.items()
                }
                done += 1
        return found

    def _values(self, u: Tensor) -> Values:
        """Sites, each `(chains, sets, *shape)`."""
        columns = u.shape[1]
        if columns not in self._constrain:
            self._constrain[columns] = self._recorded(u)
        values = self._constrain[columns](u)
        return {name: value.unflatten(0, (-1, self._density.num_sets)) for name, value in values.items()}

    def _recorded(self, u: Tensor) -> Callable[[Tensor], Values]:
        """`constrain` without its program, where it can be recorded."""
        constrain = self._density.constrain
        names = list(constrain(u))
        graph = faithfully_recorded(lambda u: [constrain(u)[name] for name in names], u)
        if graph is None:
            self.recorded = False
            return constrain
        return lambda u: dict(zip(names, graph(u), strict=True))

    @property
    def _density(self) -> Density:
        assert self.first is not None
        return self.first.density

    def _site(self, name: str, parts: list[Spread]) -> _Site:
        """What is kept of the chains of a chunk; the first two parts are the halves."""
        self._check(name, parts[0].mean)
        parts = [Spread(*(value.double() for value in part)) for part in parts]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole.and_(part)
        centre = self.centre.setdefault(name, whole.mean.mean(0))
        variance = whole.scatter / whole.number
        mean_square = variance + (whole.mean - centre).square()
        half_means = torch.cat([part.mean for part in parts[:2]])
        half_variances = torch.cat([part.variance for part in parts[:2]])
        found = (whole.mean, variance, mean_square, whole.mean + mean_square, half_means, half_variances)
        return _Site(*map(Spread.of, found))

    def _check(self, name: str, mean: Tensor) -> None:
        lost = ~torch.isfinite(mean).flatten(1).all(1)
        if bool(lost.any()):
            raise InputError(
                f"{int(lost.sum())} of {len(lost)} chains of {describe(self.engine)} ran away to infinity at site "
                f"{name!r}: no mean is left to take. Take a smaller step, or proper priors."
            )

    def _verdict(self, total: dict[str, _Site], num_chains: int, cost: Cost) -> Moments:
        found: dict[str, Values] = {}
        for name, site in total.items():
            for what, value in _estimates(site, self.centre[name], self.num_draws).items():
                found.setdefault(what, {})[name] = value if self._density.sets_shown else value[0]
        return Moments(
            **found, num_chains=num_chains, num_draws=self.num_draws, engine=str(self.engine), cost=cost
        )


def _estimates(site: _Site, centre: Tensor, num_draws: int) -> Values:
    """The fields of `Moments`, from what was kept."""
    num_chains, half = site.means.number, num_draws // 2
    squares = num_draws * (num_chains * site.variances.mean + site.means.scatter)
    sd = (squares / (num_chains * num_draws - 1)).sqrt()
    mean_error = (site.means.variance / num_chains).sqrt()
    # (x - mean)^2 = (x - centre)^2 - 2 shift (x - centre) + shift^2
    shift = site.means.mean - centre
    twice = site.sums.variance - site.means.variance - site.mean_squares.variance  # their covariance
    spread = site.mean_squares.variance - 2 * shift * twice + 4 * shift.square() * site.means.variance
    in_halves, of_halves = site.half_variances.mean, site.half_means.variance
    return {
        "mean": site.means.mean,
        "sd": sd,
        "mean_error": mean_error,
        "sd_error": (spread.clamp(min=0) / num_chains).sqrt() / (2 * sd),
        "r_hat": (((half - 1) / half * in_halves + of_halves) / in_halves).sqrt(),
        "ess": (sd / mean_error).square(),
    }


def _one_more(spread: Spread | None, draw: Tensor) -> Spread:
    """Welford's update, in place."""
    if spread is None:
        return Spread(torch.ones(()), draw.clone(), torch.zeros_like(draw))
    number, mean, scatter = spread.number + 1, spread.mean, spread.scatter
    gap = draw - mean
    mean.add_(gap, alpha=1 / float(number))
    scatter.addcmul_(gap, draw - mean)
    return Spread(number, mean, scatter)


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each of which then uses one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(before, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _together(costs: list[Cost], seconds: float) -> Cost:
    """The cost of all chunks; seconds are those that passed, shared out as the chunks' own are."""
    names = ("seconds", "warmup_seconds", "compile_seconds")
    busy = math.fsum(getattr(cost, name) for cost in costs for name in names)
    drawing, warming, compiling = (
        seconds * math.fsum(getattr(cost, name) for cost in costs) / busy for name in names
    )
    return Cost(
        gradients=sum(cost.gradients for cost in costs),
        seconds=drawing,
        warmup_gradients=sum(cost.warmup_gradients for cost in costs),
        warmup_seconds=warming,
        compile_seconds=compiling,
    )
