"""Annealed importance sampling: log Z between a forward and a reverse estimate, and log p(x) with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probgen.annealing import (
    Bracket,
    GaussianToEnergy,
    HamiltonianMoves,
    HamiltonianPath,
    Journey,
    MachinePath,
    Path,
    PriorToPosterior,
    Weighed,
    clamped,
    collapse,
    effective_runs,
    log_mean,
    log_mean_error,
    near_data,
    pilot,
    resampled,
    travel,
)
from probgen.core import (
    Batch,
    Cost,
    Count,
    Energetic,
    Estimate,
    EstimateKind,
    Estimator,
    Guided,
    NonNegativeInt,
    Pairwise,
    Stepwise,
    Support,
    Target,
    UnsupportedError,
    Within,
    describe,
    given,
)
from probgen.couplings import Couplings
from probgen.evidence.elbo import event_size
from probgen.evidence.enumeration import data_of, log_sum, num_visited
from probgen.moves import GibbsMoves
from probgen.progress import ticker
from probgen.targets import frozen

Base = Mapping[str, Tensor] | MultivariateNormal | Literal["guide"]
_ENUMERABLE = 25  # hidden units
_COLUMNS_AT_ONCE = 2**14  # runs of all data, to bound memory
_ROWS_FOR_BASE = 1000


@dataclass(frozen=True)
class AIS(Estimator):
    """log Z by runs along p_beta prop. to p_0^(1 - beta) f^beta, beta from 0 to 1, and log p(x) with it.

    Forward E[w] = Z / Z_0 from draws of p_0, backward E[1/w] = Z_0 / Z from draws of p: the two estimates of log Z have
    it between them. Three kinds of programs have such a path:

    - Boltzmann machines: p_0 has independent units, Gibbs sweeps move; log p(x) = -F(x) - log Z.
    - Energies of real x: p_0 is a Gaussian, Hamiltonian Monte Carlo moves; log p(x) = -E(x) - log Z.
    - Programs with a guide and continuous latents: from p(z) to p(z) p(x | z), whose Z is p(x), for each x by itself.

    Args:
        num_runs: runs each way, side by side, >= 2; of each datum where there are latents.
        num_temperatures: steps of beta, >= 1.
        moves: `GibbsMoves(..)` or `HamiltonianMoves(..)`; None takes what suits the program.
        base: another p_0. Biases by layer for machines, otherwise those of units that are on as often as near the data,
            or where there are none the machine's own; a `MultivariateNormal` over the flat x for energies, such as
            `probgen.annealing.fitted(data)`, otherwise one that covers N(0, I) and where a pilot run from there ends;
            "guide" for latents, q(z | x) in place of p(z).
        num_warmup: moves at beta = 1 between the forward runs' ends and the reverse runs' starts, to equilibrium.

    Raises:
        InputError: fewer runs than two, a base of another kind of program.

    Source: Neal (2001), Statistics and Computing 11; Salakhutdinov & Murray (2008), ICML; Burda, Grosse & Salakhutdinov
    (2015), arXiv 1412.8566; Grosse, Ghahramani & Adams (2015), arXiv 1511.02543; Wu, Burda, Salakhutdinov & Grosse
    (2017), arXiv 1611.04273.

    >>> from probgen.models.rbm import example
    >>> from probgen.verbs import evidence
    >>> evidence(example(), AIS(num_runs=50, num_temperatures=50), torch.ones(1, 4)).kind
    'unbiased'
    """

    num_runs: Annotated[int, Within(2)] = 100
    num_temperatures: Count = 1000
    moves: GibbsMoves | HamiltonianMoves | None = None
    base: Base | None = None
    num_warmup: NonNegativeInt = 100
    paper: ClassVar[str] = "Neal 2001, Statistics and Computing 11"
    offers: ClassVar[str] = "log Z of machines and energies, and log p(x) of a VAE, from both sides"
    gives_up: ClassVar[str] = (
        "exactness; weights collapse where temperatures are few, and modes may be missed by all"
    )

    def supports(self, program: Any) -> Support:
        """Whether there is a path to the program, and these moves and this base serve it."""
        moves = self._moves(program)
        if isinstance(moves, GibbsMoves):
            wrong = "" if _is_machine(program) else "GibbsMoves need a Boltzmann machine: HamiltonianMoves()?"
            kind: tuple[type, str] = Mapping, "biases by layer"
        elif isinstance(program, Energetic):
            wrong, kind = "", (MultivariateNormal, "a MultivariateNormal over x")
        else:
            wrong, kind = _no_latents(program), (str, '"guide"')
        if not wrong and self.base is not None and not isinstance(self.base, kind[0]):
            wrong = f"base must be {kind[1]} for it, or None"
        return Support(not wrong, wrong)

    def bracket(
        self,
        program: Any,
        data: Mapping[str, Tensor] | None = None,
        condition: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> Bracket:
        """log Z from both sides, or log p(x) of data that the program itself made. Uses torch's random stream.

        Args:
            program: as `supports` says; the `Couplings` of a machine will do.
            data: for programs with latents x and the latents that made it, one row each: these are exact draws of
                p(z | x), without which there is no reverse run.
            condition: of each row, for conditional energies and programs.
            progress: show a live line on the terminal.

        Raises `UnsupportedError` where there is no path, `InputError` where latents are missing.
        """
        support = self.supports(program)
        if not support:
            raise UnsupportedError(f"AIS cannot serve {describe(program)}: {support.reason}.")
        with torch.no_grad(), frozen(program):
            path = self._path(program, Batch({"x": data["x"]} if data else {}, condition))
            stages = {
                "forward": self.num_temperatures,
                "warm-up": self.num_warmup,
                "reverse": self.num_temperatures,
            }
            with ticker("AIS", stages, progress) as update:
                done = count(1)
                return self._there_and_back(path, data, lambda: update(next(done)))

    def estimate(self, target: Target, *, seed: int, progress: bool = True) -> Estimate:
        """log p of each row; see `Estimator.estimate`."""
        latent = not (_is_machine(target.program) or isinstance(target.program, Energetic))
        return (self._by_latents if latent else self._by_partition)(target, progress)

    def _by_partition(self, target: Target, progress: bool) -> Estimate:
        """log weight of x, less log Z."""
        started, x, condition = time.perf_counter(), data_of(target), target.batch.condition
        each = torch.zeros(len(x), dtype=torch.long, device=x.device)
        if condition is not None:  # those that are alike have one Z
            condition, each = torch.unique(condition, dim=0, return_inverse=True)
        bracket = self._near(target).bracket(target.program, condition=condition, progress=progress)
        weight, error, kind = self._log_weight(target)
        forward, forward_error, reverse = (
            side.reshape(-1)[each].to(weight)
            for side in (bracket.forward, bracket.forward_error, bracket.reverse)
        )
        return Estimate(
            weight - forward,
            torch.hypot(error, forward_error),
            kind,
            event_size=event_size(target),
            trusted=not bracket.reason,
            reason=self._told(bracket.reason),
            diagnostics={"log_partition_forward": forward, "log_partition_reverse": reverse},
            cost=self._cost(target.program, 2 * self.num_temperatures + self.num_warmup, started),
            convention=f"nats of the data as given; {bracket}",
            shared_error=forward_error,
        )

    def _near(self, target: Target) -> AIS:
        """The same with a base near the data, where it is a machine's and was left open."""
        if self.base is not None or not isinstance(self._moves(target.program), GibbsMoves):
            return self
        couplings = _couplings(target.program)
        if "x" not in couplings.sites:
            return self
        with torch.no_grad():
            rows = target.data["x"].flatten(1)[:_ROWS_FOR_BASE].to(couplings.biases["x"])
            return replace(self, base=near_data(couplings, rows))

    def _by_latents(self, target: Target, progress: bool) -> Estimate:
        """log p(x) of each row, some of them at a time."""
        started, rows = time.perf_counter(), torch.arange(target.batch.size)
        parts, log_weights = rows.split(max(1, _COLUMNS_AT_ONCE // self.num_runs)), []
        with ticker("AIS", len(parts) * self.num_temperatures, progress) as update:
            done = count(1)
            for part in parts:
                path = self._path(target.program, _rows(target.batch, part))
                journey = self._forward(path, lambda: update(next(done)))
                log_weights.append(journey.gained[-1].reshape(self.num_runs, -1))
        gained = torch.cat(log_weights, 1)
        reason = collapse(gained)
        return Estimate(
            log_mean(gained),
            log_mean_error(gained),
            "lower bound",
            event_size=event_size(target),
            trusted=not reason,
            reason=self._told(reason),
            diagnostics={"ess": effective_runs(gained)},
            cost=self._cost(target.program, self.num_temperatures * len(parts), started),
            convention="nats of the data as given; log of a mean of weights, which lies below log p(x) on average",
        )

    def _moves(self, program: Any) -> GibbsMoves | HamiltonianMoves:
        return self.moves or (GibbsMoves() if _is_machine(program) else HamiltonianMoves())

    def _path(self, program: Any, batch: Batch) -> Path[Any]:
        moves, base = self._moves(program), self.base
        if isinstance(moves, GibbsMoves):
            assert base is None or isinstance(base, Mapping)
            return MachinePath(_couplings(program), self.num_runs, base, moves.num_sweeps)
        if isinstance(program, Energetic):
            assert base is None or isinstance(base, MultivariateNormal)
            return self._energy_path(program, batch, moves, base)
        ends = PriorToPosterior(program, batch, self.num_runs, "prior" if base is None else "guide")
        return HamiltonianPath(ends, moves, pilot(ends, moves))

    def _energy_path(
        self, program: Any, batch: Batch, moves: HamiltonianMoves, base: MultivariateNormal | None
    ) -> HamiltonianPath:
        """From the base, or from a Gaussian that covers N(0, I) and where a pilot run from there ends."""
        ends = GaussianToEnergy(program, self.num_runs, batch.condition, base)
        found = pilot(ends, moves)
        ends.check_bounded(found.position)
        if base is None:
            ends = ends.wider(found.position)
            found = pilot(ends, moves)
        return HamiltonianPath(ends, moves, found)

    def _forward(self, path: Path[Any], tick: Callable[[], object]) -> Journey:
        return travel(path, path.draw(), path.schedule(self.num_temperatures), tick)

    def _there_and_back(
        self, path: Path[Any], latents: Mapping[str, Tensor] | None, tick: Callable[[], object]
    ) -> Bracket:
        there = self._forward(path, tick)
        if isinstance(path, HamiltonianPath) and isinstance(path.ends, PriorToPosterior):
            state = path.ends.where(latents or {})
        else:
            state = path.take(there.state, resampled(there.gained[-1], path.log_partition.numel()))
        for _ in range(self.num_warmup):
            state = path.move(state, 1.0)
            tick()
        back = travel(path, state, path.schedule(self.num_temperatures)[::-1], tick)
        forward, reverse = (
            path.log_partition.double() + gained.unflatten(1, (-1, *path.log_partition.shape))
            for gained in (there.gained, (back.gained - back.gained[-1]).flip(0))
        )
        return Bracket(there.betas, forward, reverse)

    def _log_weight(self, target: Target) -> tuple[Tensor, Tensor, EstimateKind]:
        """log p(x) + log Z of each row, its error, and what kind of number it is."""
        program, x = target.program, data_of(target)
        if isinstance(self._moves(program), HamiltonianMoves):
            value = -given(program, target.batch.condition).energy(x)
            return value, torch.zeros_like(value), "unbiased"
        if isinstance(program, Weighed):
            value = program.log_weight(x)
            return value, torch.zeros_like(value), program.weight_kind
        return *self._summed_over_hidden(program.couplings(), x.flatten(1)), "unbiased"

    def _summed_over_hidden(self, couplings: Couplings, x: Tensor) -> tuple[Tensor, Tensor]:
        """log of the sum over h of exp(-E(x, h)): exact where h is small, by runs with x clamped where it is not."""
        x, hidden = x.to(couplings.biases["x"]), [site for site in couplings.sites if site != "x"]
        if num_visited(couplings, hidden) <= _ENUMERABLE:
            value = log_sum(couplings, {"x": x}, hidden, _ENUMERABLE)
            return value, torch.zeros_like(value)
        above, alone = clamped(couplings, x, self.num_runs)
        path = MachinePath(above, self.num_runs, num_rows=len(x))
        gained = self._forward(path, lambda: None).gained[-1].reshape(self.num_runs, -1)
        return (alone + path.log_partition + log_mean(gained)).to(x), log_mean_error(gained).to(x)

    def _told(self, reason: str) -> str:
        now = f"now num_temperatures={self.num_temperatures:,}, num_warmup={self.num_warmup:,}"
        return f"{reason} ({now})" if reason else ""

    def _cost(self, program: Any, transitions: int, started: float) -> Cost:
        moves, seconds = self._moves(program), time.perf_counter() - started
        if isinstance(moves, GibbsMoves):
            return Cost(network_calls=transitions * moves.num_sweeps, seconds=seconds)
        return Cost(gradients=transitions * moves.num_steps, seconds=seconds)


def _is_machine(program: Any) -> bool:
    return isinstance(program, Couplings | Pairwise | Weighed)


def _couplings(program: Any) -> Couplings:
    found: Couplings = program if isinstance(program, Couplings) else program.couplings()
    return found


def _no_latents(program: Any) -> str:
    """Why there are no latents to anneal over; "" if there are."""
    if isinstance(program, Stepwise):
        return "its latents are a chain of many steps: ELBOEstimate()"
    if not isinstance(program, Guided):
        return "it needs a Boltzmann machine, an energy of real x, or a program with a guide q(z | x)"
    return "" if hasattr(program, "event_shape") else "its rows have no latents of their own (no event_shape)"


def _rows(batch: Batch, rows: Tensor) -> Batch:
    condition = None if batch.condition is None else batch.condition[rows]
    return Batch({name: value[rows] for name, value in batch.data.items()}, condition)


def example() -> AIS:
    """A short one."""
    return AIS(num_runs=20, num_temperatures=50)
