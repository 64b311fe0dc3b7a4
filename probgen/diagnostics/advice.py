"""What is wrong with these draws, and what to do about it? One rule for one sign, one sentence for one remedy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from probgen.arviz_io import energy_bfmi
from probgen.core import Cost, Posterior

MAX_R_HAT = 1.01  # Vehtari et al. 2021
MIN_ESS = 400.0
MIN_ESS_PER_CHAIN = 100.0  # of the first ten chains: more of them do not each have to be long
MIN_BFMI = 0.3  # Betancourt 2016
MAX_DEEP_TREES = 0.01
RARE_DIVERGENCES = 1e-4
MIN_ACCEPTANCE, STUCK_ACCEPTANCE, LONELY_ACCEPTANCE = 0.4, 0.01, 0.1
MIN_SWAP_RATE = 0.1
_SEPARATED, _SETTLED, _DRIFTING = 3.0, 0.5, 1.0  # standard deviations within chains
_FAR = 1e10  # largest draw over the median one: beyond what any tail with a mean gives
_MOST_CHAINS = 10


def problems(posterior: Posterior, table: Any) -> Iterator[str]:
    """What is wrong and the way out, a sentence each.

    Args:
        posterior: draws of any engine.
        table: its `chain_table` where `kind` is "mcmc", else its `draws_table`.

    >>> from probgen.arviz_io import chain_table
    >>> posterior = example()
    >>> next(problems(posterior, chain_table(posterior)))
    'R-hat is ... chains settle in separate places (3 near -4, 1 near 4...)...ParallelTempering...'
    """
    yield from _not_finite(posterior.draws)
    if posterior.evidence is not None and not posterior.evidence.trusted:
        yield f"The evidence that came with these draws is not to be trusted: {posterior.evidence.reason}"
    if posterior.kind == "weighted" and posterior.num_chains == 1:
        yield "One run only: errors of resampled particles come from independent runs; use num_chains=4 or more."
    if posterior.kind == "mcmc":
        yield from _problems_of_chains(posterior, table)


def notes(posterior: Posterior) -> Iterator[str]:
    """What these diagnostics cannot see, and what is rare enough to live with."""
    if posterior.guarantee == "approximate" or posterior.kind == "approximate":
        yield (
            "The draws come from an approximation, and nothing here says how close it is: check it with "
            "ImportanceWeighted, or against NUTS with agree({...})."
        )
    if posterior.guarantee == "discretised" and posterior.kind == "mcmc":
        yield (
            "The chains keep a law that the step size puts off the posterior, which neither R-hat nor effective sample "
            "size can see: halve the step size, infer again, and compare by agree({...})."
        )
    elif posterior.guarantee == "discretised":
        yield "The draws are exact only as steps grow finer: double the number of steps and compare by agree({...})."
    count, share = _divergences(posterior.stats)
    if 0 < share <= RARE_DIVERGENCES:
        yield (
            f"{_many(count, 'transition')} of {_transitions(posterior.stats)} diverged ({share:.2g}): rare, but where "
            "they did the draws are too few. To be sure, increase target_accept and compare by agree({...})."
        )


def example() -> Posterior:
    """Four chains of a posterior with two modes, none of which ever crossed between them."""
    z = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    z = z + torch.tensor([-4.0, -4.0, 4.0, -4.0])[:, None]
    return Posterior({"z": z}, "mcmc", "asymptotic", "Example", Cost())


# --- any draws ------------------------------------------------------------------------------------------------------


def _not_finite(draws: Mapping[str, Tensor]) -> Iterator[str]:
    bad = [name for name, value in draws.items() if not bool(torch.isfinite(value).all())]
    if bad:
        yield f"Draws of {_list(bad)} hold NaN or Inf: check the program's scales for 0 or overflow."


# --- Markov chains --------------------------------------------------------------------------------------------------


def _problems_of_chains(posterior: Posterior, table: Any) -> Iterator[str]:
    stats = posterior.stats
    if posterior.num_chains == 1:
        yield "One chain only: R-hat cannot see a mode that one chain never left; use num_chains=4."
    yield from _stuck(posterior, table)
    yield from _acceptance(posterior)
    yield from _far_away(posterior)
    yield from _high_r_hat(posterior, table)
    yield from _no_round_trips(posterior)
    yield from _low_ess(table, posterior.num_chains, posterior.num_draws)
    yield from _many_divergences(stats)
    yield from _deep_trees(stats)
    yield from _slow_energy(stats)


def _stuck(posterior: Posterior, table: Any) -> Iterator[str]:
    moved = _moved(posterior)
    still = (~moved).nonzero()
    if not len(still):
        constant = list(table.index[table["sd"] == 0])
        if constant:
            yield (
                f"{_list(constant)} never moved. If that is no constant of the program, the step size is far off: warm "
                "up longer (num_warmup), or start elsewhere (init)."
            )
    elif len(still) == moved.numel():
        yield (
            f"None of the {moved.numel():,} chains ever moved: no proposal was accepted. Take a much smaller "
            "step_size, or leave it to warm-up (step_size=None, num_warmup=500)."
        )
    else:
        of_set = f" of data set {int(still[0, 1])}" if moved.ndim > 1 else ""
        yield (
            f"{len(still):,} of {moved.numel():,} chains never moved (the first is chain {int(still[0, 0])}{of_set}): "
            "where they stand the step size is far too long. Start elsewhere (init), warm up longer (num_warmup), or "
            "take a smaller step_size."
        )


def _moved(posterior: Posterior) -> Tensor:
    """Which chains moved at all: `(chain,)`, or `(chain, data_set)` where there are several."""
    kept = 2 if posterior.target is not None and posterior.target.num_sets else 1
    entries = [value[..., None] for value in posterior.draws.values()]  # at least one dimension to gather
    return torch.stack([(x != x[:, :1]).any(1).flatten(kept).any(-1) for x in entries]).any(0)


def _acceptance(posterior: Posterior) -> Iterator[str]:
    if posterior.guarantee != "asymptotic" or "acceptance_rate" not in posterior.stats:
        return
    each = posterior.stats["acceptance_rate"].double().mean(1)
    rate, lonely = float(each.mean()), int((each < LONELY_ACCEPTANCE).sum())
    step = posterior.run_stats.get("step_size")
    at = "" if step is None else f" at step size {float(step.median()):.3g}"
    if rate < STUCK_ACCEPTANCE:
        yield (
            f"Next to no proposal was accepted ({rate:.2%}{at}): the step is far too long. Divide step_size by ten, or "
            "leave it to warm-up (step_size=None, num_warmup=500)."
        )
    elif rate < MIN_ACCEPTANCE:
        yield (
            f"Only {rate:.0%} of the proposals were accepted{at}: transitions are wasted, and tails are hard to enter. "
            "Take a smaller step_size, or leave it to a longer warm-up (step_size=None, num_warmup)."
        )
    elif lonely:
        yield (
            f"{_many(lonely, 'chain')} of {each.numel():,} accepted less than {LONELY_ACCEPTANCE:.0%} of the "
            f"proposals, all together {rate:.0%}: they sit where the posterior is narrower. Increase target_accept, "
            "warm up longer, or reparameterise."
        )


def _far_away(posterior: Posterior) -> Iterator[str]:
    far = {}
    for name, value in posterior.draws.items():
        size = value.double().abs().flatten()
        size = size[torch.isfinite(size)]
        if len(size) and float(size.max()) > _FAR * max(1.0, float(size.median())):
            far[name] = float(size.max())
    if far:
        name = max(far, key=lambda name: far[name])
        yield (
            f"Draws of {_list(list(far))} reach {far[name]:.2g}, more than {_FAR:.0e} times their median: the "
            "posterior is improper, or its tails have no mean. Give every site a proper prior, a scale a lighter tail."
        )


def _high_r_hat(posterior: Posterior, table: Any) -> Iterator[str]:
    high = table["r_hat"][table["r_hat"] >= MAX_R_HAT].sort_values(ascending=False)
    if len(high):
        chains = _entry(posterior, list(table.index).index(high.index[0]))
        yield (
            f"R-hat is {high.iloc[0]:.3f} for {high.index[0]}, and {MAX_R_HAT} or more for {len(high)} of {len(table)} "
            f"entries ({_list(list(high.index))}): {_how_chains_differ(chains, posterior.engine)}"
        )


def _how_chains_differ(chains: Tensor, engine: str) -> str:
    """What draws `(chain, draw)` with a high R-hat look like, and what helps."""
    means, within = chains.mean(1), float(chains.var(1).mean().sqrt())
    first, second = chains.chunk(2, dim=1)
    drift = float((first.mean(1) - second.mean(1)).abs().median())
    order = means.sort().values
    gaps = order.diff()
    tempered = engine.startswith("ParallelTempering")
    remedy = "take more temperatures" if tempered else "draw with ParallelTempering, whose chains cross over"
    if len(gaps) and float(gaps.max()) > _SEPARATED * within and drift < _SETTLED * within:
        low, high = order[: int(gaps.argmax()) + 1], order[int(gaps.argmax()) + 1 :]
        return (
            f"chains settle in separate places ({len(low)} near {low.mean():.3g}, {len(high)} near {high.mean():.3g}), "
            f"as with several modes. How many chains a mode holds does not tell its weight: {remedy}."
        )
    if drift > _DRIFTING * within:
        return (
            "the chains still drift; their spread was "
            f"{float(first.std()):.3g} in the first half and {float(second.std()):.3g} in the second. Warm up and run "
            "longer; if the spread keeps growing, the posterior is improper in some direction: give it a proper prior."
        )
    return (
        f"the chains disagree. Run longer; if it stays, the posterior has several modes ({remedy}) or chains get "
        "stuck: reparameterise, or start elsewhere (init)."
    )


def _entry(posterior: Posterior, row: int) -> Tensor:
    """The draws `(chain, draw)` behind a row of the table."""
    for value in posterior.draws.values():
        entries = value.flatten(2) if value.ndim > 2 else value[..., None]
        if row < entries.shape[2]:
            return entries[..., row].double()
        row -= entries.shape[2]
    raise IndexError(row)


def _no_round_trips(posterior: Posterior) -> Iterator[str]:
    if "round_trip" not in posterior.stats:
        return
    trips = posterior.stats["round_trip"].sum(1)
    none = int((trips == 0).sum())
    if none:
        rates = posterior.run_stats["swap_rates"][:, :-1]  # the hottest rung has no next one
        remedy = "add temperatures (num_temperatures)" if rates.min() < MIN_SWAP_RATE else "run longer"
        yield (
            f"{_many(none, 'chain')} of {trips.numel():,} saw no round trip between the coldest and the hottest "
            "temperature, and cannot have changed modes. The rarest swap succeeds "
            f"{float(rates.min()):.0%} of the time: {remedy}."
        )


def _low_ess(table: Any, num_chains: int, num_draws: int) -> Iterator[str]:
    needed = max(MIN_ESS, MIN_ESS_PER_CHAIN * min(num_chains, _MOST_CHAINS))
    for column, use in (("ess_bulk", "means"), ("ess_tail", "quantiles")):
        low = table[column][table[column] < needed].sort_values()
        if len(low):
            name, smallest = column.removeprefix("ess_"), float(low.iloc[0])
            yield (
                f"The {name} effective sample size is {smallest:.0f} of {num_chains * num_draws:,} draws for "
                f"{low.index[0]}, and below {needed:.0f} for {len(low)} of {len(table)} entries: {use} and R-hat "
                f"itself are too noisy. Draw {needed / max(smallest, 1.0):.1f} times as many, or reparameterise."
            )


def _divergences(stats: Mapping[str, Tensor]) -> tuple[int, float]:
    """How many transitions diverged, and what share of all."""
    if "diverging" not in stats:
        return 0, 0.0
    count = int(stats["diverging"].sum())
    return count, count / max(1, stats["diverging"].numel())


def _transitions(stats: Mapping[str, Tensor]) -> str:
    return f"{stats['diverging'].numel():,}"


def _many_divergences(stats: Mapping[str, Tensor]) -> Iterator[str]:
    count, share = _divergences(stats)
    if share > RARE_DIVERGENCES:
        were = "was 1 divergence" if count == 1 else f"were {count:,} divergences"
        yield (
            f"There {were} after warm-up, {share:.2g} of {_transitions(stats)} transitions: the step is too long for "
            "part of the posterior, which the draws then miss. Increase target_accept, or reparameterise (non-centred)."
        )


def _deep_trees(stats: Mapping[str, Tensor]) -> Iterator[str]:
    share = (
        float(stats["reached_max_tree_depth"].double().mean()) if "reached_max_tree_depth" in stats else 0.0
    )
    if share > MAX_DEEP_TREES:
        yield (
            f"{share:.0%} of the transitions reached the maximum tree depth: they stop before they turn back, and cost "
            "most. Rescale the latents, warm up longer, or increase max_tree_depth."
        )


def _slow_energy(stats: Mapping[str, Tensor]) -> Iterator[str]:
    if "energy" not in stats:
        return
    energy = stats["energy"].double().movedim(1, -1).flatten(0, -2)  # (chains of all data sets, draws)
    energy = energy[energy.isfinite().all(1) & (energy.std(1) > 0)]
    lowest = float(energy_bfmi(energy.numpy()).min()) if len(energy) else math.inf
    if lowest < MIN_BFMI:
        yield (
            f"E-BFMI is {lowest:.2f} (below {MIN_BFMI}): the energy changes too slowly from draw to draw, as with "
            "heavy tails or a funnel. Reparameterise (non-centred), or give scales lighter tails."
        )


# --- words ----------------------------------------------------------------------------------------------------------


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count > 1 else "")


def _list(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
