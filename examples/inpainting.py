"""Claim: what is hidden of a digit can be drawn from its posterior under a fitted prior, by several engines that agree.

    OMP_NUM_THREADS=1 python examples/inpainting.py --out runs/inpainting

A diffusion is fitted to real digits; of 20 held-out ones the lower half is hidden and the upper half seen with noise.
Each engine draws 4 chains for every digit. Printed: R-hat and effective sample size by ArviZ, the share of hidden
pixels whose value lies inside 90 % of the draws, network calls, seconds. Written: a picture for each
engine, and figures.json. GuidedSDE approximates: that its R-hat is 1 says nothing
about its bias.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen import VP, DataSets, Optim, Posterior, Prior, ScoreSDE, TimeMLP, digits, fit, infer, summary
from probgen.core import Engine
from probgen.diagnostics.image_posterior import plot_image_posterior
from probgen.inference import GuidedSDE, SplitGibbs, TwistedSMC
from probgen.objectives import DenoisingScoreMatching
from probgen.randomness import forked_rng

NOISE, LEVEL = 0.2, 0.9
ENGINES: dict[str, Engine] = {
    "GuidedSDE": GuidedSDE(steps=100),
    "TwistedSMC": TwistedSMC(particles=256, steps=100),
    "SplitGibbs": SplitGibbs(num_temperatures=4, num_warmup=200, thin=5),
}


def fit_prior(num_steps: int, width: int) -> tuple[ScoreSDE, Tensor]:
    """A diffusion of 8 x 8 digits, and digits it has not seen."""
    train, held_out = digits()
    with forked_rng(0):
        network = TimeMLP(train.event_shape, width=width, num_blocks=3)
        prior = ScoreSDE(network, VP(beta_min=0.4, beta_max=14.0), prediction="v")
        optim = Optim(lr=2e-3, schedule="cosine", warmup=min(100, num_steps), ema_decay=0.998)
        fit(prior, train, DenoisingScoreMatching(), num_steps=num_steps, batch_size=256, optim=optim)
        return prior, held_out.all()


def noisy_upper_half(truth: Tensor) -> Tensor:
    """What is seen of digits `(n, 1, 8, 8)`: `(n, 1, 4, 8)`."""
    with forked_rng(1):
        return truth[..., :4, :] + NOISE * torch.randn_like(truth[..., :4, :])


def condition(prior: ScoreSDE, y: Tensor, engine: Engine, num_draws: int) -> Posterior:
    """p(x | upper half) for every digit, side by side; data sets are digits."""

    def upper_half_seen() -> None:
        x = pyro.sample("x", Prior(prior))
        pyro.sample("y", dist.Normal(x[..., :4, :], NOISE).to_event(3))

    data = DataSets({"y": y})
    return infer(upper_half_seen, engine, data=data, num_draws=num_draws, num_chains=4, seed=0, progress=True)


def judge(posterior: Posterior, truth: Tensor) -> dict[str, float]:
    """Of the hidden pixels alone: worst R-hat, smallest ESS, coverage of central 90 % intervals."""
    hidden = posterior["x"][..., 4:, :]
    part = Posterior({"hidden": hidden}, "mcmc", posterior.guarantee, posterior.engine, posterior.cost)
    table = summary(part).table
    draws = hidden.flatten(0, 1)
    tail = (1 - LEVEL) / 2
    low, high = (draws.quantile(q, dim=0) for q in (tail, 1 - tail))
    inside = (truth[..., 4:, :] >= low) & (truth[..., 4:, :] <= high)
    found = {
        "r_hat": float(table["r_hat"].max()),
        "r_hat_median": float(table["r_hat"].median()),
        "ess": float(table["ess_bulk"].min()),
        "coverage": float(inside.double().mean()),
        "network_calls": posterior.cost.network_calls or posterior.cost.gradients,
        "seconds": posterior.cost.seconds + posterior.cost.warmup_seconds,
    }
    return found | {
        name: float(value.min()) for name, value in posterior.run_stats.items() if name == "min_ess"
    }


def main(
    out: str | Path = "runs/inpainting",
    num_digits: int = 20,
    num_steps: int = 6000,
    num_draws: int = 200,
    width: int = 256,
    engines: dict[str, Engine] | None = None,
) -> dict[str, dict[str, float]]:
    print(__doc__)
    prior, held_out = fit_prior(num_steps, width)
    truth = held_out[:num_digits]
    y = noisy_upper_half(truth)
    seen = torch.cat([y, torch.full_like(truth[..., 4:, :], torch.nan)], -2)
    figures = {}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, engine in (engines or ENGINES).items():
        posterior = condition(prior, y, engine, num_draws)
        figures[name] = judge(posterior, truth)
        print(name, {key: round(value, 3) for key, value in figures[name].items()})
        file = folder / f"{name.lower().replace(' ', '_')}.png"
        plot_image_posterior(
            truth, seen, posterior["x"].flatten(0, 1), file, title=f"Lower half hidden, by {engine}"
        )
        print(f"  {file}")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/inpainting")
    parser.add_argument("--steps", type=int, default=6000)
    arguments = parser.parse_args()
    main(arguments.out, num_steps=arguments.steps)
