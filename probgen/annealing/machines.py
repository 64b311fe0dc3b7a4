"""Paths of Boltzmann machines: from independent units to coupled ones, moved by Gibbs sweeps."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from probgen.core import EstimateKind, InputError
from probgen.couplings import Couplings, State

_SWEEPS_AT_DATA = 20


@runtime_checkable
class Weighed(Protocol):
    """A machine of pairwise couplings that knows p(x) Z, or a bound on it."""

    weight_kind: EstimateKind

    def couplings(self) -> Couplings:
        """The energy whose Z it is."""

    def log_weight(self, x: Tensor, /) -> Tensor:
        """log p(x) + log Z in nats, or a bound: x `(batch, *event)` -> `(batch,)`."""


class Units(NamedTuple):
    """Where runs stand: the layers that are not summed out, and what follows from them at every beta.

    Args:
        values: of these layers, each `(n, n_l)`.
        pulls: what each summed layer feels at beta = 1 beside its bias, `(n, n_m)`.
        slope: d/dbeta of the part of log f_beta that `values` have among themselves, `(n,)`; `()` where it is 0.
    """

    values: dict[str, Tensor]
    pulls: dict[str, Tensor]
    slope: Tensor


class MachinePath:
    """log f_beta = -(1 - beta) E_0 - beta E, E_0 without couplings; a group of independent layers is summed out.

    Products with W are made once a sweep: they are the same for every beta.

    Args:
        couplings: E; biases one a layer, or one a column.
        num_runs: side by side.
        base: biases of E_0 by layer; None takes those of E.
        num_sweeps: a transition, >= 1.
        num_rows: of the data, where biases are one a column.
    """

    def __init__(
        self,
        couplings: Couplings,
        num_runs: int,
        base: State | None = None,
        num_sweeps: int = 1,
        num_rows: int = 1,
    ) -> None:
        self.couplings, self.num_sweeps = couplings, num_sweeps
        self.num_rows, self.num_columns = num_rows, num_runs * num_rows
        self.start = Couplings({}, _checked(base, couplings), couplings.scales)
        self.summed = summed_out(couplings)
        self.kept = [site for site in couplings.sites if site not in self.summed]
        self.shifts = {
            site: bias - self.start.biases[site]
            for site, bias in couplings.biases.items()
            if not torch.equal(bias, self.start.biases[site])
        }
        pairs = {pair: w for pair, w in couplings.weights.items() if set(pair) <= set(self.kept)}
        self.among = _part(Couplings(pairs, couplings.biases, couplings.scales), self.kept)
        self.apart = _part(self.start, self.kept)
        self.changes = bool(pairs) or any(site in self.shifts for site in self.kept)
        self.level = torch.zeros((), device=next(iter(couplings.biases.values())).device)

    @property
    def log_partition(self) -> Tensor:
        """log Z_0: `()`, or one a row where biases are one a column."""
        value = -self.start.free_energy({})
        return value[: self.num_rows] if value.ndim else value

    def schedule(self, num_temperatures: int) -> list[float]:
        """Even steps."""
        return [step / num_temperatures for step in range(num_temperatures + 1)]

    def draw(self) -> Units:
        """Independent units."""
        values = self.start.zeros(self.num_columns)
        return self._units({site: self._drawn(site, values[site], 0.0) for site in self.kept})

    def log_ratio(self, state: Units, before: float, after: float) -> Tensor:
        """log f_after - log f_before, `(n,)`."""
        total = (after - before) * state.slope
        for site, pull in state.pulls.items():
            gain = self._log_sums(site, pull, after).sub_(self._log_sums(site, pull, before))
            total = total + gain.sum(-1)
        return total

    def move(self, state: Units, beta: float) -> Units:
        """`num_sweeps` sweeps: the layers that were summed out first, then the others."""
        for _ in range(self.num_sweeps):
            values = dict(state.values)
            for site, pull in state.pulls.items():
                values[site] = self._drawn(site, pull, beta)
            for site in self.kept:
                if (site, site) in self.couplings.weights:  # unit after unit
                    values[site] = self.couplings.between(self.start.biases, beta).draw(site, values)
                else:
                    values[site] = self._drawn(site, self._pull(site, values), beta)
            state = self._units({site: values[site] for site in self.kept})
        return state

    def take(self, state: Units, index: Tensor) -> Units:
        """Runs that begin where those of `index` stand."""
        return self._units({site: value[index] for site, value in state.values.items()})

    def _units(self, values: dict[str, Tensor]) -> Units:
        pulls = {site: self._pull(site, values) for site in self.summed}
        slope = self.apart.energy(values) - self.among.energy(values) if self.changes else self.level
        return Units(values, pulls, slope)

    def _pull(self, site: str, values: State) -> Tensor:
        """What a layer feels at beta = 1 beside its bias, `(n, n_l)`."""
        scales, total = self.couplings.scales, None
        for (left, right), weight in self.couplings.weights.items():
            if site in (left, right):
                other, matrix = (right, weight.mT) if left == site else (left, weight)
                unit = values[other] / scales[other] if other in scales else values[other]
                total = unit @ matrix if total is None else total + unit @ matrix
        if total is None:
            total = torch.zeros_like(self.couplings.biases[site]).expand(self.num_columns, -1)
        return total * scales[site] if site in scales else total

    def _bias(self, site: str, beta: float) -> Tensor:
        base = self.start.biases[site]
        return torch.add(base, self.shifts[site], alpha=beta) if site in self.shifts else base

    def _drawn(self, site: str, pull: Tensor, beta: float) -> Tensor:
        felt = torch.add(self._bias(site, beta), pull, alpha=beta)
        if site in self.couplings.scales:
            return felt + self.couplings.scales[site] * torch.randn_like(felt)
        return torch.rand_like(felt).lt_(felt.sigmoid_())

    def _log_sums(self, site: str, pull: Tensor, beta: float) -> Tensor:
        """log of the sum of f_beta over each unit of a layer, up to what is the same at every beta: `(n, n_l)`."""
        felt = torch.add(self._bias(site, beta), pull, alpha=beta)
        if site not in self.couplings.scales:
            return F.softplus(felt)
        first, last = self.start.biases[site], self.couplings.biases[site]
        rest = (1 - beta) * first.square() + beta * last.square()
        return (felt.square() - rest) / (2 * self.couplings.scales[site].square())


def near_data(couplings: Couplings, x: Tensor) -> dict[str, Tensor]:
    """Biases of independent units that are on as often as in data x `(rows, n_x)`, and as x turns hidden ones on.

    Runs that start there go to where the data are: from other units all of them, forward and back, may meet in a phase
    of the machine that data never show, and agree on its Z (Salakhutdinov & Murray 2008, section 3).
    """
    state = couplings.settled(x, _SWEEPS_AT_DATA)
    # Half a unit on and half a unit off are added: no rate is 0 or 1.
    rates = {site: (value.sum(0) + 0.5) / (len(x) + 1) for site, value in state.items()}
    return {
        site: state[site].mean(0) if site in couplings.scales else rate.logit()
        for site, rate in rates.items()
    }


def summed_out(couplings: Couplings) -> list[str]:
    """The largest group of layers that are independent given the others, and uncoupled inside."""
    groups = [[s for s in group if (s, s) not in couplings.weights] for group in couplings.colours]
    return max(groups, key=lambda group: sum(couplings.biases[s].shape[-1] for s in group))


def clamped(couplings: Couplings, x: Tensor, num_runs: int) -> tuple[Couplings, Tensor]:
    """The machine of the layers other than x when x is held, and what x adds to its log weights by itself.

    Args:
        couplings: of layer "x" and others.
        x: flat, `(rows, n_x)`.
        num_runs: how often each row comes.

    Returns couplings with biases `(num_runs * rows, n_l)`, and -E of x alone, `(rows,)`.
    """
    others = [site for site in couplings.sites if site != "x"]
    inside = {pair: w for pair, w in couplings.weights.items() if pair == ("x", "x")}
    alone = _part(Couplings(inside, couplings.biases, couplings.scales), ["x"])
    given = couplings.zeros(len(x)) | {"x": x}
    biases = {site: couplings.field(site, given).repeat(num_runs, 1) for site in others}
    rest = {pair: w for pair, w in couplings.weights.items() if "x" not in pair}
    return Couplings(rest, biases, couplings.scales), -alone.energy({"x": x})


def _checked(base: State | None, couplings: Couplings) -> dict[str, Tensor]:
    """Biases of p_0 for every layer; `InputError` where they do not fit the machine."""
    biases = dict(couplings.biases if base is None else base)
    got = {site: tuple(bias.shape) for site, bias in biases.items()}
    wanted = {site: tuple(bias.shape) for site, bias in couplings.biases.items()}
    if got != wanted:
        raise InputError(f"AIS: base must hold biases of the shapes {wanted}, got {got}.")
    return {site: bias.to(couplings.biases[site]) for site, bias in biases.items()}


def _part(couplings: Couplings, sites: list[str]) -> Couplings:
    """The same with the biases of these layers alone."""
    return Couplings(couplings.weights, {site: couplings.biases[site] for site in sites}, couplings.scales)
