"""Latents of one fitted VAE by its own guide, by a new fit to these digits, and by Markov chains."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from probgen import NUTS, SVI, VAE, Guide, Posterior, Quantised, agree, infer, predict, summary, to_arviz
from probgen.core import Engine, describe
from probgen.diagnostics.plots import plot_ranks, plot_traces
from probgen.diagnostics.predictive import plot_predictive
from probgen.report.record import Record
from probgen.report.steps.settings import Settings

ENGINES = ("guide", "svi", "nuts")
FILES = [
    *(f"traces_{name}.png" for name in ENGINES),
    *(f"posterior_{name}.nc" for name in ENGINES),
    "ranks_nuts.png",
    "predictive_nuts.png",
]


def infer_latents(record: Record, vae: VAE, held_out: Quantised, settings: Settings) -> None:
    """p(z | x) three times, the chains being the reference."""
    x = held_out[torch.arange(settings.num_latent_digits)]
    num_draws = settings.num_draws
    svi = SVI(num_steps=settings.svi_steps)
    nuts = NUTS(num_warmup=settings.num_warmup, max_tree_depth=settings.max_tree_depth)
    guess = infer(vae, Guide(), data=x, num_draws=num_draws, num_chains=4)
    fitted = infer(vae, svi, data=x, num_draws=4 * num_draws, progress=True)
    chains = infer(vae, nuts, data=x, num_draws=num_draws, num_chains=4, init=guess, progress=True)
    show(record, x, dict(zip(ENGINES, (guess, fitted, chains), strict=True)))
    compare(record, vae, Guide(), guess, chains)
    compare(record, vae, svi, fitted, chains)
    judge_chains(record, vae, nuts, chains)


def show(record: Record, x: Tensor, posteriors: dict[str, Posterior]) -> None:
    """Traces of all, ranks and predictions of the chains, and ArviZ's files."""
    section = record.section("Latents")
    section.prose(
        "The latents of a few held-out digits under the fitted VAE: by its guide, by SVI anew, and by NUTS, whose "
        "chains are the reference."
    )
    for name, posterior in posteriors.items():
        record.drawn(f"traces_{name}.png", partial(plot_traces, posterior))
        with record.file(f"posterior_{name}.nc") as path:
            to_arviz(posterior).to_netcdf(str(path))
    chains = posteriors["nuts"]
    section.plot(
        record.folder.path / "traces_nuts.png",
        "For eight latents the density of each of four chains, and the draws in their order.",
        "NUTS: chains that have mixed lie on top of one another. Traces of the other two lie beside this page.",
    )
    section.plot(
        record.drawn("ranks_nuts.png", partial(plot_ranks, chains)),
        "For eight latents the ranks of each chain's draws among all draws, as histograms.",
        "Ranks of each chain's draws among those of all: flat, inside the grey band, where chains agree.",
    )
    predicted = predict(chains, num_draws=10)["x"]
    section.plot(
        record.drawn("predictive_nuts.png", partial(plot_predictive, x, predicted, name="pixel")),
        "The spread of observed pixels over those of 40 predicted data sets.",
        "Posterior predictive: pixels of these digits over those predicted from NUTS's latents.",
    )


def compare(record: Record, vae: VAE, engine: Engine, posterior: Posterior, reference: Posterior) -> None:
    """An approximate posterior beside draws of the real one."""
    z, exact = posterior.flat("z"), reference.flat("z")
    shift = ((z.mean(0) - exact.mean(0)) / exact.std(0)).abs().mean()
    quality = f"means {shift:.2f} sd off, sd x {(z.std(0) / exact.std(0)).mean():.2f}"
    found = agree({describe(engine): posterior, "NUTS": reference})
    worst = abs(found.worst.z)
    diagnosis = "agrees with NUTS" if found.ok else f"differs from NUTS, |z| <= {worst:.0f}"
    record.row(vae, engine, posterior.cost, quality, diagnosis, worst)
    if not found.ok:
        record.advise(
            f"Latents by {describe(engine)} are an approximation, and one can see it: the {found.worst.name} lies "
            f"{worst:.0f} standard errors from that of NUTS. Where that matters, pay for NUTS."
        )


def judge_chains(record: Record, vae: VAE, nuts: NUTS, chains: Posterior) -> None:
    """R-hat, effective sample size and divergences, through ArviZ."""
    judged = summary(chains)
    r_hat, ess = judged.table["r_hat"].max(), judged.table["ess_bulk"].min()
    diagnosis = f"R-hat {r_hat:.3f}, ESS {ess:.0f}, {int(chains.stats['diverging'].sum())} divergences"
    record.row(vae, nuts, chains.cost, "the reference", diagnosis, r_hat)
    for sentence in judged.problems:
        record.advise(f"NUTS: {sentence}")
