"""Parallel tempering: chains at higher temperatures cross between modes, and hand what they find down by swaps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor

from probgen.core import InputError, Target, Within, describe
from probgen.inference.hmc import HMC
from probgen.kernels import (
    Adapter,
    Coordinates,
    Evaluate,
    Kernel,
    MarkovEngine,
    Point,
    Stats,
    Tuning,
    per_chain,
    per_set,
)
from probgen.kernels.run import Trajectory
from probgen.kernels.schedule import windows
from probgen.targets import Density

_SWAP_NORMALS = 2
_LEAST_REJECTION = 1e-3  # keeps rungs apart where every swap was accepted


class TemperedState(NamedTuple):
    """Where chains stand: columns chain by chain, rung by rung from the coldest, data sets innermost.

    Args:
        position, log_prob, grad: as for `Point`; the density is p itself, not p^beta.
        turn: 0 or 1, `(n,)`: which neighbours swap next, those whose colder rung is even, or odd.
        returning: 1 where the walker was at the hottest rung since it was at the coldest, else 0, `(n,)`.
    """

    position: Tensor
    log_prob: Tensor
    grad: Tensor
    turn: Tensor
    returning: Tensor


class Tempered(NamedTuple):
    """p^beta, beta `(n,)`."""

    evaluate: Evaluate
    beta: Tensor

    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """beta log p and its gradient."""
        log_prob, grad = self.evaluate(x)
        return self.beta * log_prob, self.beta * grad


class TemperedKernel:
    """Each rung moves by a kernel that keeps p^beta; then neighbours swap, even and odd pairs in turn.

    Rungs i and j change places with probability min(1, exp((beta_i - beta_j) (log p(u_j) - log p(u_i)))), which keeps
    the product of p^beta over all rungs.

    Args:
        moves: the kernel of each rung; its state must be a `Point`.
        num_temperatures: rungs.
    """

    def __init__(self, moves: Kernel, num_temperatures: int) -> None:
        self.moves, self.num_temperatures = moves, num_temperatures
        self.static = moves.static

    def normals(self, dim: int) -> int:
        """Those of the moves, and two for the swap."""
        return self.moves.normals(dim) + _SWAP_NORMALS

    def start(self, evaluate: Evaluate, position: Tensor, noise: Tensor) -> TemperedState:
        """The density where chains begin."""
        point = self.moves.start(evaluate, position, noise[:-_SWAP_NORMALS])
        if type(point) is not Point:
            raise InputError(
                f"{describe(self.moves)} remembers more than a position from one transition to the next, which swaps "
                "would mix up. Take moves=HMC(...), MALA(...) or NUTS(...)."
            )
        zeros = torch.zeros_like(point.log_prob)
        return TemperedState(*point, turn=zeros, returning=zeros)

    def step(
        self, evaluate: Evaluate, state: TemperedState, tuning: Tuning, noise: Tensor
    ) -> tuple[TemperedState, Stats]:
        """One move at every temperature, one round of swaps."""
        beta, num_sets = (
            per_chain(tuning.beta, len(state.log_prob)),
            len(tuning.beta) // self.num_temperatures,
        )
        point = Point(state.position, beta * state.log_prob, beta * state.grad)
        point, stats = self.moves.step(Tempered(evaluate, beta), point, tuning, noise[:-_SWAP_NORMALS])
        point = Point(point.position, point.log_prob / beta, point.grad / beta)

        column = torch.arange(len(beta), device=beta.device)
        rung = column // num_sets % self.num_temperatures
        coldest, hottest = rung == 0, rung == self.num_temperatures - 1
        log_ratio = (beta - beta.roll(-num_sets)) * (point.log_prob.roll(-num_sets) - point.log_prob)
        log_ratio = torch.where(hottest, -torch.inf, log_ratio)
        swaps = accepted(log_ratio, noise[-_SWAP_NORMALS:]) & ((rung + state.turn) % 2 == 0)
        source = column + num_sets * (swaps.long() - swaps.roll(num_sets).long())

        returning = torch.where(hottest, 1.0, state.returning[source])
        new = _moved(point, source, tuning.coordinates)
        state = TemperedState(*new, 1 - state.turn, torch.where(coldest, 0.0, returning))
        return state, stats | {
            "swap_rate": log_ratio.clamp(max=0).exp(),
            "round_trip": coldest & (returning > 0),
        }


class TemperedTrajectory(TemperedKernel):
    """The same where moves are trajectories, which may be too long to be compiled whole."""

    moves: Trajectory

    @property
    def num_steps(self) -> int:
        """Those of the moves."""
        return self.moves.num_steps

    def in_steps(self) -> TemperedKernel:
        """The same, with the steps of the moves compiled one by one."""
        return TemperedKernel(self.moves.in_steps(), self.num_temperatures)


def accepted(log_ratio: Tensor, noise: Tensor) -> Tensor:
    """True with probability min(1, exp(log_ratio)): (z_1^2 + z_2^2)/2 of two normals `(2, n)` is -log of a uniform."""
    return -0.5 * noise.square().sum(0) < log_ratio


def _moved(point: Point, source: Tensor, coordinates: Coordinates) -> Point:
    """What stands in column `source[i]`, in the coordinates of column i."""
    u, grad = coordinates.to_u(point.position)[:, source], coordinates.push(point.grad)[:, source]
    return Point(coordinates.to_x(u), point.log_prob[source], coordinates.pull(grad))


class Ladder:
    """Spaces the temperatures so that all neighbours swap equally often.

    The rejection rate between neighbours adds up to a barrier Lambda along the ladder, interpolated linearly in
    log beta; at the end of each window of warm-up beta_k moves to where k/(K - 1) of the whole barrier lies below it.

    Args:
        num_temperatures: K.
        max_temperature: of the hottest rung; beta_k starts at max_temperature^(-k/(K - 1)).
        num_warmup: transitions of warm-up, in which windows double.

    Source: Syed, Bouchard-Cote, Deligiannidis & Doucet (2022), arXiv 1905.02939, section 5.
    """

    def __init__(self, num_temperatures: int, max_temperature: float, num_warmup: int) -> None:
        self.num_temperatures, self.max_temperature = num_temperatures, max_temperature
        self.num_groups = num_temperatures
        self._rejections, self._count = torch.zeros(()), 0
        self.ends = windows(num_warmup) if num_warmup else []

    def begin(self, tuning: Tuning, num_sets: int) -> Tuning:
        """A geometric ladder; steps as long as a Gaussian is wide at each temperature."""
        self.num_groups = num_sets
        step_size = tuning.step_size
        fraction = torch.linspace(0, 1, self.num_temperatures).to(step_size)
        beta = (self.max_temperature**-fraction).repeat_interleave(num_sets // self.num_temperatures)
        self._forget()
        return _at(tuning, torch.ones_like(beta), beta)

    def update(self, step: int, state: TemperedState, stats: Stats, tuning: Tuning) -> Tuning:
        """Count the rejections; at the end of a window the temperatures change."""
        self._rejections = self._rejections + 1 - per_set(stats["swap_rate"], self.num_groups).mean(0)
        self._count += 1
        if step + 1 not in self.ends:
            return tuning
        rejections = (self._rejections / self._count).reshape(self.num_temperatures, -1)[:-1]
        log_beta = tuning.beta.log().reshape(self.num_temperatures, -1)
        beta = equally_spaced(log_beta, rejections + _LEAST_REJECTION).exp().flatten()
        self._forget()
        return _at(tuning, tuning.beta, beta)

    def restart(self, tuning: Tuning) -> Tuning:
        """Coordinates do not matter to swaps."""
        return tuning

    def finish(self, tuning: Tuning) -> Tuning:
        """Keep the temperatures there are."""
        return tuning

    def _forget(self) -> None:
        self._rejections, self._count = torch.zeros(()), 0


def _at(tuning: Tuning, old: Tensor, new: Tensor) -> Tuning:
    """New temperatures, steps longer in proportion to the width of a Gaussian."""
    longer = per_chain((old / new).sqrt(), len(tuning.step_size))
    return tuning._replace(beta=new, step_size=tuning.step_size * longer)


def equally_spaced(knots: Tensor, costs: Tensor) -> Tensor:
    """Knots with the same ends, between which the cost, spread evenly over each old interval, is the same.

    Args:
        knots: `(K, m)`, m ladders side by side, monotone.
        costs: of the intervals, > 0, `(K - 1, m)`.

    >>> equally_spaced(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0]])).flatten()
    tensor([0.0000, 1.3333, 2.0000])
    """
    total = torch.cat([torch.zeros_like(costs[:1]), costs.cumsum(0)])
    share = total / total[-1]
    wanted = torch.linspace(0, 1, len(knots)).to(knots)[1:-1, None].expand(-1, knots.shape[1])
    interval = torch.searchsorted(share.mT.contiguous(), wanted.mT.contiguous()).mT.clamp(1, len(costs))
    before, after = share.gather(0, interval - 1), share.gather(0, interval)
    low, high = knots.gather(0, interval - 1), knots.gather(0, interval)
    inner = low + (high - low) * (wanted - before) / (after - before)
    return torch.cat([knots[:1], inner, knots[-1:]])


@dataclass(frozen=True)
class ParallelTempering(MarkovEngine):
    """Chains of p^beta at several temperatures 1/beta, which swap: the way between modes that no chain crosses alone.

    Hot chains cross the valleys between modes, and what they find comes down the ladder by swaps between neighbours,
    even and odd pairs in turn. beta multiplies the log density over unconstrained space, whose tails must be at least
    exponential: p^(1/max_temperature) of a Cauchy site is improper, and its hottest chains run away.

    Args:
        moves: the engine whose transitions each temperature makes, with a step size and a metric of its own: HMC, MALA
            or NUTS; its num_warmup is that of all.
        num_temperatures: rungs of the ladder, >= 2; each chain costs as many. More are needed the more dimensions there
            are: the square root of their number, about.
        max_temperature: of the hottest rung, > 1: the square of half the distance between modes over their width,
            about.
        thin, compile: as for every `MarkovEngine`; those of `moves` are not used.

    Raises:
        InputError: a setting out of range, or moves that are not exact or remember more than a position.

    `stats` holds those of the moves at temperature 1, swap_rate (the probability of a swap with the next rung) and
    round_trip (a walker came back from the hottest rung); `run_stats`, of each rung `(chain, rung)`, step_size,
    temperature and swap_rates.

    Source: Swendsen & Wang (1986); Syed, Bouchard-Cote, Deligiannidis & Doucet (2022), arXiv 1905.02939.

    >>> ParallelTempering(num_temperatures=6).replicas
    6
    """

    moves: MarkovEngine = field(default_factory=lambda: HMC(num_steps=8))
    num_temperatures: Annotated[int, Within(2)] = 10
    max_temperature: Annotated[float, Within(1, ends="(]")] = 50.0
    guarantee = "asymptotic"
    paper: ClassVar[str] = "Syed, Bouchard-Cote, Deligiannidis & Doucet 2022, arXiv 1905.02939"
    offers: ClassVar[str] = "modes far apart, in their right proportions"
    gives_up: ClassVar[str] = (
        "as many times the cost as there are temperatures; tails heavier than exponential"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moves.guarantee != "asymptotic":
            raise InputError(
                f"moves must be an engine of Markov chains with an accept step, got {self.moves}: swaps keep the joint "
                "law of chains that keep their own. Take moves=HMC(...), MALA(...) or NUTS(...)."
            )

    @property
    def replicas(self) -> int:
        """One copy of each chain a temperature."""
        return self.num_temperatures

    def density(self, target: Target) -> Density:
        """What the moves move in."""
        return self.moves.density(target)

    def kernel(self) -> TemperedKernel:
        """The moves of all rungs, and swaps."""
        moves = replace(self.moves, compile=self.compile).kernel()
        made = TemperedTrajectory if isinstance(moves, Trajectory) else TemperedKernel
        return made(moves, self.num_temperatures)

    def adapters(self) -> list[Adapter]:
        """The ladder, then what the moves adapt, at each temperature."""
        ladder = Ladder(self.num_temperatures, self.max_temperature, self.warmup)
        return [ladder, *self.moves.adapters()]

    @property
    def warmup(self) -> int:
        """That of the moves."""
        return self.moves.warmup

    @property
    def first_step_size(self) -> float | None:
        """That of the moves, at temperature 1; in proportion to the square root of the temperature above."""
        return self.moves.first_step_size

    def run_stats(self, tuning: Tuning, stats: Stats) -> Stats:
        """What the moves report, temperatures, and how often neighbours swap."""
        n = stats["swap_rate"].shape[1]
        return self.moves.run_stats(tuning, stats) | {
            "temperature": per_chain(1 / tuning.beta, n),
            "swap_rates": stats["swap_rate"].mean(0),
        }


def example() -> ParallelTempering:
    """Three temperatures, a short warm-up and short trajectories."""
    return ParallelTempering(moves=HMC(num_steps=4, num_warmup=20), num_temperatures=3, max_temperature=4.0)
