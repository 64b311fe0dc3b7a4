"""Annealed importance sampling of Boltzmann machines: log Z between a forward and a reverse estimate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from probgen.core import Cost, Count, Estimate, Estimator, NonNegativeInt, Target, Within
from probgen.couplings import Couplings, Pairwise

_LEAST_ESS = 10  # runs that carry the weight


@dataclass(frozen=True)
class Bracket:
    """log Z from both sides: E[forward] <= log Z <= E[reverse].

    Args:
        forward, forward_error: log of the mean weight of runs from the base to the machine, and its error, nats.
        reverse, reverse_error: minus the log of the mean inverse weight of runs from the machine to the base.
        log_weights: of the forward runs, `(runs,)`.
        reverse_log_weights: of the reverse runs, `(runs,)`.

    >>> print(Bracket(5.0, 0.1, 5.2, 0.1, torch.zeros(2), torch.zeros(2)))
    log Z between 5.000 +- 0.100 and 5.200 +- 0.100
    """

    forward: float
    forward_error: float
    reverse: float
    reverse_error: float
    log_weights: Tensor
    reverse_log_weights: Tensor

    @property
    def ess(self) -> float:
        """Forward runs that carry the weight: (sum w)^2 / sum w^2."""
        return float((2 * self.log_weights.logsumexp(0) - (2 * self.log_weights).logsumexp(0)).exp())

    def __str__(self) -> str:
        return (
            f"log Z between {self.forward:.3f} +- {self.forward_error:.3f} and {self.reverse:.3f} +- "
            f"{self.reverse_error:.3f}"
        )


@dataclass(frozen=True)
class AIS(Estimator):
    """log Z by runs of Gibbs sweeps along p_beta = p_0^(1 - beta) p^beta, and log p(x) = -F(x) - log Z with it.

    Forward, beta rises from 0 and E[w] = Z / Z_0; backward, from draws of the machine itself, it falls and
    E[1/w] = Z_0 / Z. p_0 has independent units; layers independent given the others are summed out.

    Args:
        num_runs: runs each way, side by side, >= 2.
        num_temperatures: steps of beta, >= 1.
        num_sweeps: Gibbs sweeps that bring the reverse runs' starts, which are ends of forward runs, to equilibrium.

    Raises:
        InputError: fewer runs than two.

    Source: Neal (2001), Statistics and Computing 11; Salakhutdinov & Murray (2008), ICML; Burda, Grosse & Salakhutdinov
    (2015), arXiv 1412.8566; Grosse, Ghahramani & Adams (2015), arXiv 1511.02543.

    >>> from probgen.models.rbm import example
    >>> from probgen.verbs import evidence
    >>> evidence(example(), AIS(num_runs=50, num_temperatures=50), torch.ones(1, 4)).kind
    'unbiased'
    """

    num_runs: Annotated[int, Within(2)] = 100
    num_temperatures: Count = 1000
    num_sweeps: NonNegativeInt = 100
    needs = (Pairwise,)
    paper: ClassVar[str] = "Neal 2001, Statistics and Computing 11"
    offers: ClassVar[str] = "log Z of machines too large to be summed, from both sides"
    gives_up: ClassVar[str] = "exactness; weights collapse where temperatures are few"

    def bracket(self, couplings: Couplings, base: Mapping[str, Tensor] | None = None) -> Bracket:
        """log Z from both sides; `base` are the biases of p_0 by layer, those of the machine by default.

        Uses torch's random stream.
        """
        path = _Path(couplings, base or _base(couplings))
        betas = torch.linspace(0, 1, self.num_temperatures + 1).tolist()
        state = path.draw_base(self.num_runs)
        forward = path.log_partition_of_base() + path.travel(state, betas)
        for _ in range(self.num_sweeps):
            path.sweep(state, couplings)
        reverse = path.log_partition_of_base() - path.travel(state, betas[::-1])
        return Bracket(*_log_mean(forward), *_negated(_log_mean(-reverse)), forward, reverse)

    def estimate(self, target: Target, *, seed: int) -> Estimate:
        """log p of each row; see `Estimator.estimate`."""
        started, couplings = time.perf_counter(), target.program.couplings()
        bracket = self.bracket(couplings)
        weight = target.program.log_weight(target.data["x"])
        reason = self._distrust(bracket)
        return Estimate(
            weight - bracket.forward,
            torch.full_like(weight, bracket.forward_error),
            target.program.weight_kind,
            event_size=math.prod(target.program.event_shape),
            trusted=not reason,
            reason=reason,
            diagnostics={
                name: torch.full_like(weight, value)
                for name, value in (
                    ("log_partition_forward", bracket.forward),
                    ("log_partition_reverse", bracket.reverse),
                )
            },
            cost=Cost(network_calls=2 * self.num_temperatures, seconds=time.perf_counter() - started),
            convention=f"nats of the data as given; {bracket}",
        )

    def _distrust(self, bracket: Bracket) -> str:
        """Why the estimate should not be believed; "" if it may be."""
        remedy = f"raise num_temperatures (now {self.num_temperatures})"
        if bracket.ess < _LEAST_ESS:
            return f"only {bracket.ess:.1f} of {self.num_runs} runs carry the weight; {remedy}"
        gap = bracket.reverse - bracket.forward
        if gap > 1:
            return f"forward and reverse runs are {gap:.1f} nats apart; {remedy}"
        return ""


class _Path:
    """Machines between one without couplings and the one that is asked for, and runs along them."""

    def __init__(self, couplings: Couplings, base: Mapping[str, Tensor]) -> None:
        self.couplings, self.base = couplings, base
        self.kept = [site for site in couplings.sites if site not in summed_out(couplings)]

    def draw_base(self, rows: int) -> dict[str, Tensor]:
        """Independent draws of p_0."""
        state = self.couplings.zeros(rows)
        start = self.couplings.between(self.base, 0.0)
        return {site: start.draw(site, state) for site in self.couplings.sites}

    def log_partition_of_base(self) -> Tensor:
        """log Z_0, `()`."""
        return -Couplings({}, self.base, self.couplings.scales).free_energy({})

    def travel(self, state: dict[str, Tensor], betas: list[float]) -> Tensor:
        """Log weights of runs through these beta, `(runs,)`; the state moves along."""
        total = torch.zeros(len(next(iter(state.values()))))
        before = self.couplings.between(self.base, betas[0])
        for beta in betas[1:]:
            after = self.couplings.between(self.base, beta)
            seen = {site: state[site] for site in self.kept}
            total = total + before.free_energy(seen) - after.free_energy(seen)
            self.sweep(state, after)
            before = after
        return total

    def sweep(self, state: dict[str, Tensor], couplings: Couplings) -> None:
        """Draw what was summed out first, then the rest."""
        for site in [*(s for s in couplings.sites if s not in self.kept), *self.kept]:
            state[site] = couplings.draw(site, state)


def summed_out(couplings: Couplings) -> list[str]:
    """The largest group of layers that are independent given the others, and uncoupled inside."""
    groups = [[s for s in group if (s, s) not in couplings.weights] for group in couplings.colours]
    return max(groups, key=lambda group: sum(len(couplings.biases[s]) for s in group))


def _base(couplings: Couplings) -> dict[str, Tensor]:
    """The machine's own biases: with weights of 0 it is p_0."""
    return dict(couplings.biases)


def _log_mean(log_weights: Tensor) -> tuple[float, float]:
    """log of the mean of weights, and the standard error of that by the delta method."""
    runs = len(log_weights)
    value = log_weights.logsumexp(0) - math.log(runs)
    spread = (log_weights - value).exp().std() / math.sqrt(runs)
    return float(value), float(spread)


def _negated(found: tuple[float, float]) -> tuple[float, float]:
    return -found[0], found[1]


def example() -> AIS:
    """A short one."""
    return AIS(num_runs=20, num_temperatures=50)
