"""What was drawn: grids of images, one row an engine, and for each posterior its traces, ranks and predictions."""

from __future__ import annotations

from functools import partial
from typing import Any

from probgen.core import GUARANTEES, MEANINGS, Posterior
from probgen.diagnostics.plots import image_grid, plot_ranks, plot_traces
from probgen.diagnostics.predict import predict
from probgen.diagnostics.predictive import plot_predictive
from probgen.diagnostics.summary import Summary
from probgen.report.entries import bounds_of, engines_for, images_of
from probgen.report.page import Section
from probgen.report.story import Story

_SHOWN = 100  # images in a grid
_ROWS = 12  # of a table of entries
_PREDICTED = 10  # data sets a chain
_COLUMNS = ("draws", "engine", "number", "network calls", "seconds", "law", "R-hat", "ESS", "verdict")


def tell(story: Story) -> None:
    """Grids of what are images; the table; a section for each posterior."""
    if story.found.record.verb != "infer":
        _samples(story)
    if story.posteriors:
        _engines(story)
    for name, posterior in story.posteriors.items():
        if posterior.kind == "mcmc" or not images_of(posterior):
            _posterior(story, name, posterior)


def _samples(story: Story) -> None:
    section = story.page.section("Samples")
    if not story.posteriors:
        commands = [f"probgen sample {story.folder} {engine}" for engine in engines_for(story.found.program)]
        section.missing("Nothing was drawn yet.", "\n".join(commands))
        return
    grids = []
    for name, posterior in story.posteriors.items():
        for images in images_of(posterior).values():
            shown = images[:_SHOWN]
            draw = partial(image_grid, shown, bounds=bounds_of(shown))
            path = story.drawn(draw, ".png")
            if path is not None:
                alt = f"Grid of {len(shown)} images drawn by {posterior.engine}."
                grids.append((path, alt, f"{name}: {posterior.engine}; {GUARANTEES[posterior.guarantee]}."))
    if grids:
        section.pictures(grids)
    else:
        section.prose("What was drawn are no images: see below.")


def _engines(story: Story) -> None:
    section = story.page.section("Engines")
    rows = [_row(name, each, story.verdicts.get(name)) for name, each in story.posteriors.items()]
    section.table("What each engine cost, and what its draws are worth", _COLUMNS, rows)
    section.points(dict.fromkeys(note for verdict in story.verdicts.values() for note in verdict.notes))
    for name, verdict in story.verdicts.items():
        for problem in verdict.problems:
            story.page.problem(f"{name}: {problem}")


def _row(name: str, posterior: Posterior, verdict: Summary | None) -> list[str]:
    cost = posterior.cost
    calls = cost.network_calls + cost.gradients + cost.warmup_gradients
    return [
        name,
        posterior.engine,
        f"{posterior.num_chains:,} x {posterior.num_draws:,}",
        f"{calls:,}" if calls else "-",
        f"{cost.seconds + cost.warmup_seconds:.1f}",
        posterior.guarantee,
        *_convergence(posterior, verdict),
        "could not be judged" if verdict is None else "nothing wrong" if verdict.ok else "needs attention",
    ]


def _convergence(posterior: Posterior, verdict: Summary | None) -> tuple[str, str]:
    """R-hat and ESS: of chains by ArviZ, of particles by their weights, of independent draws their number."""
    if verdict is not None and "r_hat" in verdict.table:
        return f"{verdict.table['r_hat'].max():.3f}", f"{verdict.table['ess_bulk'].min():.0f}"
    if "min_ess" in posterior.run_stats:
        return "-", f"{float(posterior.run_stats['min_ess'].min()):.0f}"
    return "-", "-" if posterior.kind == "weighted" else f"{posterior.num_chains * posterior.num_draws:,}"


def _posterior(story: Story, name: str, posterior: Posterior) -> None:
    section = story.page.section(f"Draws: {name}")
    section.prose(f"{posterior.num_chains:,} x {posterior.num_draws:,} {MEANINGS[posterior.kind]}.")
    story.plot(
        section,
        partial(plot_traces, posterior),
        f"For each entry of {name} its density in each chain, and the draws in their order.",
        "Densities and traces: chains that have mixed lie on top of one another. At most eight entries are shown.",
    )
    if posterior.kind == "mcmc" and posterior.num_chains > 1:
        story.plot(
            section,
            partial(plot_ranks, posterior),
            f"For each entry of {name} the ranks of each chain's draws among those of all chains.",
            "Ranks (Vehtari et al. 2021): flat, inside the grey band, where chains agree.",
        )
    _predictive(story, section, name, posterior)
    if name in story.verdicts:
        caption = f"{story.verdicts[name].heading} By ArviZ, the worst entries first."
        section.table(caption, *_table(story.verdicts[name]))


def _predictive(story: Story, section: Section, name: str, posterior: Posterior) -> None:
    """What was observed over what is predicted, where program and data are known."""
    target = posterior.target
    if target is not None and target.data and not target.num_sets:
        predicted = story.found.attempt(
            lambda: predict(posterior, num_draws=min(_PREDICTED, posterior.num_draws))
        )
        for site, values in (predicted.draws if predicted is not None else {}).items():
            story.plot(
                section,
                partial(plot_predictive, target.data[site], values, name=site),
                f"The spread of the observed {site} over those of predicted data sets.",
                f"Posterior predictive of {site} by {name}: where the black curve leaves the blue ones the program "
                "does not explain the data.",
            )
    elif posterior.kind == "mcmc":
        section.missing(
            "Posterior predictive: the file of a posterior does not hold its program and data. Where `report` is given "
            "them, observed values are drawn over predicted ones.",
            f"probgen.report.run.report({str(story.found.record.path)!r}, program=program, data=data)",
        )


def _table(verdict: Summary) -> tuple[list[str], list[list[str]]]:
    """The worst entries of a summary, as text."""
    table: Any = verdict.table
    worst = "r_hat" if "r_hat" in table else "mcse_mean"
    rows = table.sort_values(worst, ascending=False).head(_ROWS)
    whole, fine = {"ess_bulk": "{:.0f}", "ess_tail": "{:.0f}"}, {"r_hat": "{:.3f}"}
    formats = {name: (whole | fine).get(name, "{:.3g}") for name in table}
    cells = [
        [str(label), *(formats[name].format(row[name]) for name in table)] for label, row in rows.iterrows()
    ]
    return ["entry", *map(str, table)], cells
