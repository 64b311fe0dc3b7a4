"""Pairs of truth and data from a program, and what an engine draws for each: what calibration is judged by."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from probgen.core import (
    Cost,
    Count,
    DataSets,
    Engine,
    InputError,
    NonNegativeInt,
    Posterior,
    Target,
    check_arguments,
    check_fields,
    describe,
    did_you_mean,
)
from probgen.diagnostics.uniformity import power
from probgen.progress import ticker
from probgen.randomness import forked_rng
from probgen.replay import observations, simulations
from probgen.targets import read
from probgen.verbs import infer

Array = npt.NDArray[np.float64]
Quantity = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]

ENOUGH_SETS = 1000
_ROWS_SHOWN = 12
_CORRELATED = 1 / 3  # of neighbours in an AR(1) chain whose effective sample size is half the number of draws


class Entry(NamedTuple):
    """One number of a site: its truths `(num_sets,)`, and draws of each `(num_draws, num_sets)`."""

    name: str
    truth: Array
    draws: Array


@dataclass(frozen=True)
class SimulatedPosteriors:
    """Pairs (z, y) ~ p(z, y), and draws of z | y for each y: what `sbc`, `coverage` and `tarp` judge.

    Made by `simulated_posteriors`, or by hand from draws of anybody's posteriors.

    Args:
        truth: z by site, `(num_sets, *shape)`.
        draws: of z | y by site, `(num_draws, num_sets, *shape)`, exchangeable.
        data: y by site, `(num_sets, *shape)`.
        engine: who drew.
        autocorrelation: of neighbouring draws, the largest over all entries.
        cost: what all draws cost.

    Raises:
        InputError: shapes that do not fit together, or draws that are not finite.

    >>> z = torch.randn(50)
    >>> posteriors = SimulatedPosteriors({"z": z}, {"z": torch.randn(99, 50)}, {}, "the prior")
    >>> posteriors.num_sets, posteriors.num_draws
    (50, 99)
    """

    truth: Mapping[str, Tensor]
    draws: Mapping[str, Tensor]
    data: Mapping[str, Tensor]
    engine: str = "an engine"
    autocorrelation: float = 0.0
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.truth or self.truth.keys() != self.draws.keys():
            raise InputError(
                f"truth and draws must be of the same sites, got {list(self.truth)} and {list(self.draws)}."
            )
        for site, truth in self.truth.items():
            got = tuple(self.draws[site].shape)
            if truth.ndim < 1 or 0 in got or got != (self.num_draws, self.num_sets, *truth.shape[1:]):
                raise InputError(
                    f"Site {site!r}: truths of shape {tuple(truth.shape)} need draws (num_draws, "
                    f"{', '.join(map(str, truth.shape))}), got {got}."
                )
            self._check_finite(site)

    def _check_finite(self, site: str) -> None:
        finite = torch.isfinite(self.draws[site].double())
        lost = ~finite.reshape(*finite.shape[:2], -1).all(-1).all(0)
        if bool(lost.any()):
            raise InputError(
                f"Site {site!r}: {self.engine} drew NaN or Inf for {int(lost.sum())} of {self.num_sets} data sets, the "
                f"first being {int(lost.nonzero()[0])}. To leave them out would judge the others alone: make the "
                "engine serve them first."
            )

    @property
    def num_sets(self) -> int:
        """How many pairs."""
        return len(next(iter(self.truth.values())))

    @property
    def num_draws(self) -> int:
        """Draws for each of them."""
        return len(next(iter(self.draws.values())))

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every scalar of every site, named like "x[0, 1]"."""
        return tuple(self._entries())

    def _entries(self) -> Iterator[Entry]:
        for site in self.truth:
            truth, draws = _array(self.truth[site]), _array(self.draws[site])
            for index in np.ndindex(truth.shape[1:]):
                name = site + (f"[{', '.join(map(str, index))}]" if index else "")
                yield Entry(name, truth[(..., *index)], draws[(..., *index)])

    def with_quantity(self, name: str, quantity: Quantity) -> SimulatedPosteriors:
        """The same with a further site, computed from z and y; sums and products see what single entries do not.

        Ranks of z alone do not tell a posterior from the prior; those of quantities of z *and* y do, log p(y | z)
        first of all (Modrák et al. 2022, arXiv 2211.02383).

        Args:
            name: what to call it.
            quantity: (z by site `(num_sets, *shape)`, y by site `(num_sets, *shape)`) -> `(num_sets, ...)`.

        >>> posteriors = example().with_quantity("z y", lambda z, y: z["z"] * y["y"])
        >>> [entry.name for entry in posteriors.entries]
        ['z', 'z y']
        """
        rows = ({site: draws[i] for site, draws in self.draws.items()} for i in range(self.num_draws))
        drawn = torch.stack([quantity(row, self.data) for row in rows])
        truth = quantity(self.truth, self.data)
        return replace(self, truth={**self.truth, name: truth}, draws={**self.draws, name: drawn})

    def only(self, sites: Collection[str]) -> SimulatedPosteriors:
        """The same with some of the sites."""
        if unknown := [site for site in sites if site not in self.truth]:
            raise InputError(f"There is no site {unknown[0]!r}; {did_you_mean(unknown[0], self.truth)}")
        return replace(
            self,
            truth={site: self.truth[site] for site in sites},
            draws={site: self.draws[site] for site in sites},
        )

    def vectors(self) -> tuple[Array, Array]:
        """All entries side by side: truths `(num_sets, d)` and draws `(num_draws, num_sets, d)`."""
        return (
            np.stack([entry.truth for entry in self.entries], -1),
            np.stack([entry.draws for entry in self.entries], -1),
        )

    def __str__(self) -> str:
        return f"{self.num_draws:,} draws for each of {self.num_sets:,} simulated data sets by {self.engine}"

    def caveats(self) -> Iterator[str]:
        """What limits any judgement of these draws, in sentences."""
        if self.autocorrelation > _CORRELATED:
            yield (
                f"Neighbouring draws correlate by {self.autocorrelation:.2f}. Ranks take draws for independent, and "
                "correlated ones look too narrow, as wholes first of all: thin more (the engine's thin=), or take "
                "fewer draws of more chains or runs."
            )
        if self.num_sets < ENOUGH_SETS:
            yield (
                f"{self.num_sets:,} data sets are few: ten bins find draws whose sd is 20 % too large in "
                f"{power(self.num_sets):.0%} of such trials (at p < 0.01), and in {power(ENOUGH_SETS):.0%} with "
                f"{ENOUGH_SETS:,}, as each adds no more than 0.05 to the chi-square. Passing is weak evidence."
            )


def simulated_posteriors(
    program: Any,
    engine: Engine,
    *,
    observed: str | Collection[str],
    args: tuple[Any, ...] = (),
    num_sets: Count = ENOUGH_SETS,
    num_draws: Count = 99,
    num_chains: Count | None = None,
    chunk_size: Count | None = None,
    seed: NonNegativeInt = 0,
    progress: bool = False,
) -> SimulatedPosteriors:
    """Draw (z, y) ~ p(z, y), hide z, and let the engine draw from p(z | y), for every pair.

    Under p(z, y) a truth z and draws of z | y have the same law given y. Whatever tells them apart is an error of the
    engine. Engines that take data sets side by side have them all in one run, others one after another.

    Args:
        program: as for `infer`; sites with a `Prior` are drawn by its own sampler.
        engine: whose draws are to be judged, set up as it would be used.
        observed: the sites that the engine shall see, by name; all others are latent.
        args: arguments of the program.
        num_sets: pairs; fewer than 1,000 detect almost nothing.
        num_draws, num_chains: for each data set, as for `infer`; all chains count as draws of one posterior.
        chunk_size: data sets side by side in one run, None means all; less takes less memory.
        seed: the same call gives the same pairs and draws.
        progress: show a live line on the terminal.

    Returns `SimulatedPosteriors`. Raises `InputError` for sites that do not exist, that have an improper law, or that
    the program observes by itself and are not named; and as `infer` does.

    >>> from probgen.inference import Guide
    >>> from probgen.models import ConjugateGaussian
    >>> print(simulated_posteriors(ConjugateGaussian.example(), Guide(), observed="x", num_sets=10))
    99 draws for each of 10 simulated data sets by Guide
    """
    check_arguments(simulated_posteriors, locals())
    names = [observed] if isinstance(observed, str) else list(observed)
    target = read(program, None, args)
    _check_observed(target, names)
    starts = range(0, num_sets, (chunk_size or num_sets) if engine.data_sets else 1)
    first, *seeds = (int(s) for s in np.random.SeedSequence(seed).generate_state(1 + len(starts)))
    pairs = simulations(target, num_draws=num_sets, seed=first)
    data = {name: pairs[name] for name in names}
    runs = []
    with ticker(f"simulated posteriors by {engine}", num_sets, progress) as update:
        for start, one_seed in zip(starts, seeds, strict=True):
            part = {name: value[start : start + starts.step] for name, value in data.items()}
            runs.append(_infer(program, engine, part, args, num_draws, num_chains, one_seed))
            update(min(num_sets, start + starts.step))
    sites = [site for site in runs[0].draws if site in pairs]
    draws = {site: torch.cat([run.draws[site] for run in runs], 2) for site in sites}
    return SimulatedPosteriors(
        {site: pairs[site] for site in sites},
        {site: value.flatten(0, 1) for site, value in draws.items()},
        data,
        str(engine),
        max((_autocorrelation(_array(value)) for value in draws.values()), default=0.0),
        _total([run.cost for run in runs]),
    )


def pit(truth: Array, draws: Array) -> Array:
    """(#{draws < truth} + U (1 + #{draws = truth})) / (1 + num_draws), U ~ U(0, 1): uniform where draws are right.

    Args:
        truth: `(num_sets,)`.
        draws: exchangeable with the truth, `(num_draws, num_sets)`.

    Returns the probability integral transform of each truth, `(num_sets,)` in (0, 1); the same call the same numbers.

    >>> pit(np.zeros(1), np.linspace(-1, 1, 1000)[:, None]).round(2)
    array([0.5])
    """
    u = np.random.default_rng(0).uniform(size=len(truth))
    below, equal = (draws < truth).sum(0), (draws == truth).sum(0)
    return np.asarray((below + u * (1 + equal)) / (1 + len(draws)))


def example() -> SimulatedPosteriors:
    """z ~ N(0, 1), y ~ N(z, 1), and exact draws of z | y ~ N(y/2, 1/2) for each of 1,000 data sets."""
    with forked_rng(0):
        z = torch.randn(1000)
        y = z + torch.randn(1000)
        draws = y / 2 + torch.randn(99, 1000) / 2**0.5
    return SimulatedPosteriors({"z": z}, {"z": draws}, {"y": y}, "exact draws")


# --- running the engine --------------------------------------------------------------------------------------------


def _check_observed(target: Target, names: Sequence[str]) -> None:
    sites = target.sites
    for name in names:
        if name not in sites:
            raise InputError(
                f"{describe(target.program)} has no site {name!r} to observe; {did_you_mean(name, sites)}"
            )
    if not names:
        raise InputError("Which sites shall the engine see? Name them: observed='y'.")
    if left := [name for name in observations(target) if name not in names]:
        raise InputError(
            f"{describe(target.program)} observes {', '.join(map(repr, left))} by itself. Pairs are simulated, data "
            "and all: name these sites in observed= too, or take their obs= out."
        )
    if not [name for name in target.latents if name not in names]:
        raise InputError("All sites are observed: nothing is left to be inferred.")


def _infer(
    program: Any,
    engine: Engine,
    data: dict[str, Tensor],
    args: tuple[Any, ...],
    num_draws: int,
    num_chains: int | None,
    seed: int,
) -> Posterior:
    """The posterior of one or several data sets, draws `(chain, draw, num_sets, ...)`."""
    settings: Any = {"args": args, "num_draws": num_draws, "num_chains": num_chains, "seed": seed}
    if engine.data_sets:
        return infer(program, engine, data=DataSets(data), **settings)
    one = infer(program, engine, data={name: value[0] for name, value in data.items()}, **settings)
    return replace(one, draws={site: value.unsqueeze(2) for site, value in one.draws.items()})


def _autocorrelation(draws: Array) -> float:
    """The largest lag-one autocorrelation of `(chain, draw, num_sets, ...)`, all data sets taken together."""
    e = (draws - draws.mean((0, 1))).reshape(*draws.shape[:3], -1)
    shared, total = (e[:, 1:] * e[:, :-1]).mean((0, 1)).sum(0), (e**2).mean((0, 1)).sum(0)
    return float(np.max(shared[total > 0] / total[total > 0], initial=0.0)) if draws.shape[1] > 1 else 0.0


def _total(costs: Sequence[Cost]) -> Cost:
    names = Cost.__dataclass_fields__
    return Cost(**{name: sum(getattr(cost, name) for cost in costs) for name in names})


def _array(value: Tensor) -> Array:
    return value.detach().double().cpu().numpy()


# --- words ---------------------------------------------------------------------------------------------------------


def verdict_text(heading: str, rows: Sequence[str], verdict: str, sentences: Collection[str]) -> str:
    """A verdict as it is printed: heading, table (its first line the header), verdict, sentences as a list."""
    shown = list(rows[: 1 + _ROWS_SHOWN])
    shown += [f"... and {len(rows) - len(shown):,} more"] * (len(rows) > len(shown))
    advice = [
        textwrap.fill(text, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
        for text in sentences
    ]
    return "\n".join([heading, "", *shown, "", verdict, *advice])
