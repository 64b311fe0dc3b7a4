"""Claim: how noisy an image is can be inferred together with the image, by engines that share no idea, and they agree.

    OMP_NUM_THREADS=1 python examples/unknown_noise.py --out runs/unknown_noise

A diffusion is fitted to real digits; held-out ones are seen through noise of a scale s that nobody tells. s is one more
latent of the program, s ~ LogNormal, and three engines draw it beside the image: weighted particles that carry their
s, a Gibbs sampler that moves it between images, and Hamiltonian chains in the noise of the flow and in s at once.
Printed: mean, standard deviation and 90 % interval of s for each image, R-hat and effective sample size by ArviZ, and
how far the engines are apart. Checked: of all intervals, at least three quarters hold the true s; means of s are within
one standard deviation of each other; the image is closer to the truth than what was seen. Written: a picture for each
engine. The smaller s is, the more images keep to modes of their own: at 0.3 few ancestors of the particles survive and
R-hat of the Gibbs sampler is 1.2, which both say of themselves.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probgen import (
    VP,
    DataSets,
    Optim,
    Posterior,
    Prior,
    ScoreSDE,
    TimeMLP,
    agree,
    digits,
    fit,
    infer,
    summary,
)
from probgen.core import Engine
from probgen.diagnostics.image_posterior import plot_image_posterior
from probgen.inference import HMC, SplitGibbs, TwistedSMC
from probgen.objectives import DenoisingScoreMatching
from probgen.priors.noise_space import NoiseSpace
from probgen.randomness import forked_rng

GUESS, FACTOR = 0.3, 2.0  # what is known of s: its median, and that it may well be twice or half of that
TRUE_S = (0.3, 0.5, 0.8)
HELD, APART = 0.75, 1.0  # what is claimed
ENGINES: dict[str, Engine] = {
    "TwistedSMC": TwistedSMC(particles=128, steps=60),
    "SplitGibbs": SplitGibbs(num_warmup=300, thin=5),
    "HMC in noise space": HMC(space=NoiseSpace(steps=6, method="heun"), num_steps=6, num_warmup=200),
}


class Noisy(NamedTuple):
    """Images `(n, 1, 8, 8)`, the scale s `(n,)` of the noise on each, and what was seen, y."""

    truth: Tensor
    s: Tensor
    y: Tensor


def fit_prior(num_steps: int, width: int) -> tuple[ScoreSDE, Tensor]:
    """A small diffusion of 8 x 8 digits, and digits it has not seen."""
    train, held_out = digits()
    with forked_rng(0):
        network = TimeMLP(train.event_shape, width=width, num_blocks=2)
        prior = ScoreSDE(network, VP(beta_min=0.4, beta_max=14.0), prediction="v")
        optim = Optim(lr=2e-3, schedule="cosine", warmup=min(100, num_steps), ema_decay=0.995)
        fit(prior, train, DenoisingScoreMatching(), num_steps=num_steps, batch_size=128, optim=optim)
        return prior, held_out.all()


def see(truth: Tensor) -> Noisy:
    """Each image with noise, of the scales in turn."""
    s = torch.tensor(TRUE_S).repeat(math.ceil(len(truth) / len(TRUE_S)))[: len(truth)]
    with forked_rng(1):
        return Noisy(truth, s, truth + s[:, None, None, None] * torch.randn_like(truth))


def denoise(prior: ScoreSDE, y: Tensor, engine: Engine, num_draws: int) -> Posterior:
    """p(x, s | y) for every image, side by side; data sets are images."""

    def noisy_image() -> None:
        x = pyro.sample("x", Prior(prior))
        s = pyro.sample("s", dist.LogNormal(math.log(GUESS), math.log(FACTOR)))
        pyro.sample("y", dist.Normal(x, s).to_event(3))

    return infer(noisy_image, engine, data=DataSets({"y": y}), num_draws=num_draws, num_chains=4, seed=0)


def only_s(posterior: Posterior) -> Posterior:
    """The same draws, of s alone."""
    return replace(posterior, draws={"s": posterior["s"]}, dims={"s": posterior.dims["s"]})


class Found(NamedTuple):
    """What is known of s, `(image,)` each, the ends those of central 90 % intervals, and root mean square errors of
    the image and of what was seen.
    """

    mean: Tensor
    sd: Tensor
    low: Tensor
    high: Tensor
    error: float
    error_seen: float

    def held(self, s: Tensor) -> Tensor:
        """Which intervals hold s."""
        return (self.low <= s) & (s <= self.high)


def judge(posterior: Posterior, seen: Noisy) -> Found:
    """All that is claimed, of one engine."""
    s, x = posterior.flat("s"), posterior.flat("x")
    low, high = (s.quantile(q, dim=0) for q in (0.05, 0.95))
    error, error_seen = (float((image - seen.truth).square().mean().sqrt()) for image in (x.mean(0), seen.y))
    return Found(s.mean(0), s.std(0), low, high, error, error_seen)


def told(found: Found, seen: Noisy) -> str:
    """A line for each image."""
    rows = zip(seen.s, *found[:4], found.held(seen.s), strict=True)
    lines = [
        f"  s = {true:.2f}: {mean:.3f} +- {sd:.3f}, 90 % in {low:.3f} .. {high:.3f}{'' if held else '  (missed)'}"
        for true, mean, sd, low, high, held in rows
    ]
    errors = f"  image off by {found.error:.3f}, what was seen by {found.error_seen:.3f}"
    return "\n".join([*lines, errors])


def furthest(found: dict[str, Found]) -> float:
    """The largest gap between means of s, in standard deviations of the wider posterior."""
    gaps = [(a.mean - b.mean).abs() / torch.maximum(a.sd, b.sd) for a, b in combinations(found.values(), 2)]
    return max((float(gap.max()) for gap in gaps), default=0.0)


def main(
    out: str | Path = "runs/unknown_noise",
    num_images: int = 6,
    num_steps: int = 2000,
    num_draws: int = 100,
    width: int = 128,
    engines: dict[str, Engine] | None = None,
) -> dict[str, Found]:
    print(__doc__)
    prior, held_out = fit_prior(num_steps, width)
    seen = see(held_out[:num_images])
    found, of_s = {}, {}
    for name, engine in (engines or ENGINES).items():
        posterior = denoise(prior, seen.y, engine, num_draws)
        found[name], of_s[name] = judge(posterior, seen), only_s(posterior)
        print(f"{engine}\n{told(found[name], seen)}\n{summary(of_s[name])}\n")
        file = Path(out) / f"{name.lower().replace(' ', '_')}.png"
        shown = posterior["x"].flatten(0, 1)
        plot_image_posterior(seen.truth, seen.y, shown, file, title=f"Unknown noise, by {name}")
        print(f"  {file}\n")
    print(agree(of_s), "\n")
    check(found, seen)
    return found


def check(found: dict[str, Found], seen: Noisy) -> None:
    """Assert what is claimed."""
    held = torch.stack([each.held(seen.s) for each in found.values()]).double().mean()
    print(f"{held:.0%} of the intervals hold s; means of s are {furthest(found):.2f} sd apart at most")
    assert held >= HELD
    assert furthest(found) < APART
    assert all(each.error < each.error_seen for each in found.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/unknown_noise")
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    main(arguments.out, num_steps=arguments.steps)
