"""The demo: real digits, two programs, every engine, an honest verdict. To be read as an example of all of probgen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import (
    DDPM,
    ELBO,
    NUTS,
    SVI,
    VAE,
    VP,
    Ancestral,
    Batch,
    DPMSolver,
    ELBOEstimate,
    Estimate,
    Guide,
    ImportanceWeighted,
    Optim,
    Posterior,
    ProbabilityFlowODE,
    Quantised,
    ReverseSDE,
    UNet,
    agree,
    digits,
    evidence,
    fit,
    frechet_distance,
    infer,
    predict,
    summary,
    to_arviz,
)
from probgen.core import Engine, Estimator, describe
from probgen.diagnostics.frechet import frechet_floor
from probgen.diagnostics.plots import image_grid, plot_terms, plot_traces, reconstruction_grid
from probgen.models import GaussianLikelihood
from probgen.nets import Classifier
from probgen.randomness import forked_rng
from probgen.report.folder import Folder
from probgen.report.record import FIGURES, Record

OPTIM = Optim(lr=3e-3, schedule="cosine", ema_decay=0.995)
MAX_FRECHET = 3.0
MIN_ACCURACY = 0.97
SHOWN = 100  # images in a picture
ROWS = 256  # of a bound side by side in the network: what the processor's cache holds


@dataclass(frozen=True)
class Settings:
    """What takes the demo its time.

    Args:
        classifier_steps, vae_steps, ddpm_steps: optimiser steps of the three fits.
        chain_steps: T of the DDPM, and network calls of the reverse SDE.
        ode_steps: steps of the probability-flow ODE, four network calls each.
        num_images: images drawn by each engine; None is half as many as there are real ones, as the floor is taken.
        num_latent_digits: held-out digits whose latents are inferred.
        svi_steps, num_warmup, max_tree_depth, num_draws: of the engines that infer them.
        num_samples: importance samples of a held-out digit.
        num_particles: repeats of the DDPM's bound.
    """

    classifier_steps: int = 800
    vae_steps: int = 2000
    ddpm_steps: int = 1700
    chain_steps: int = 80
    ode_steps: int = 10
    num_images: int | None = None
    num_latent_digits: int = 3
    svi_steps: int = 600
    num_warmup: int = 100
    max_tree_depth: int = 5
    num_draws: int = 300
    num_samples: int = 500
    num_particles: int = 2


QUICK = Settings(
    classifier_steps=20,
    vae_steps=20,
    ddpm_steps=10,
    chain_steps=5,
    ode_steps=2,
    num_images=50,
    num_latent_digits=2,
    svi_steps=20,
    num_warmup=10,
    max_tree_depth=4,
    num_draws=10,
    num_samples=25,
)

PICTURES = {
    "data": "Real digits, dequantised",
    "ancestral": "DDPM, ancestral sampling",
    "reverse_sde": "DDPM, reverse SDE",
    "probability_flow_ode": "DDPM, probability-flow ODE",
    "dpm_solver": "DDPM, 20 network calls of DPM-Solver",
    "vae": "VAE, ancestral sampling",
}
REMEDIES = {
    "DDPM": "fit longer, or a wider network",
    "VAE": "one Gaussian pixel beside another is blurred and noisy whatever the fit; look at its latents instead",
}
FILES = [
    *(f"samples_{name}.png" for name in PICTURES),
    "reconstructions.png",
    "ddpm_terms.png",
    *(f"history_{name}.png" for name in ("vae", "ddpm")),
    *(f"traces_{name}.png" for name in ("guide", "svi", "nuts")),
    *(f"posterior_{name}.nc" for name in ("guide", "svi", "nuts")),
    FIGURES,
]


def demo(out: str | PathLike[str] = "runs/demo", *, quick: bool = False) -> None:
    """Fit a VAE and a DDPM to real digits, draw by every engine, and say how good each draw and likelihood is.

    Args:
        out: where pictures, posteriors and figures go; files of others are left alone.
        quick: a few steps of everything, in seconds; shows the way, not the quality.

    Raises `InputError` where `out` cannot be written or holds files of others.
    """
    started, settings = time.perf_counter(), QUICK if quick else Settings()
    record = Record(Folder(out, FILES), asdict(settings))
    with forked_rng(0), _one_thread():
        train, held_out = digits()
        record.say(
            f"1/6  {len(train):,} digits to learn from, {len(held_out)} held out; a classifier to measure by"
        )
        yardstick = make_yardstick(record, train, held_out, settings)
        record.say("2/6  a VAE, by SVI on the ELBO")
        vae = fit_vae(record, train, held_out, settings)
        record.say("3/6  a hierarchical DDPM, by SVI on the ELBO")
        ddpm = fit_ddpm(record, train, held_out, settings)
        record.say("4/6  images by four engines")
        draw_images(record, vae, ddpm, yardstick, settings)
        record.say(f"5/6  latents of {settings.num_latent_digits} held-out digits by three engines")
        infer_latents(record, vae, held_out, settings)
        record.say(f"6/6  likelihoods of {len(held_out)} held-out digits by three estimates")
        estimate_evidence(record, vae, ddpm, held_out, settings)
    record.finish(time.perf_counter() - started)


# --- the steps -----------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """p(label | x) as a program without latents: its ELBO is its likelihood. Noise on x is for generality."""

    def __init__(self, event_shape: tuple[int, ...], noise: float = 0.3) -> None:
        super().__init__()
        self.network, self.noise = Classifier(event_shape, width=16), noise

    def model(self, batch: Batch) -> None:
        x = batch.condition
        assert x is not None
        if self.training:
            x = x + self.noise * torch.randn_like(x)
        with batch.plate():
            pyro.sample("label", dist.Categorical(logits=self.network(x)))

    def guide(self, batch: Batch) -> None:
        """Nothing is latent."""


class Yardstick:
    """Fréchet distance of images from real ones in a classifier's features, in units of that of real from real.

    Both are medians over random halves of the real images, as many as the images that are judged.
    """

    def __init__(self, network: Classifier, real: Tensor, num_halves: int = 5) -> None:
        self.network = network.eval()
        features = self._features(real)
        self.floor, self.half_size = frechet_floor(features), len(real) // 2
        self.halves = [features[torch.randperm(len(real))[: self.half_size]] for _ in range(num_halves)]

    def __call__(self, images: Tensor) -> float:
        features = self._features(images)
        return median(frechet_distance(features, half) for half in self.halves) / self.floor

    def _features(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            return self.network.features(images)


def make_yardstick(record: Record, train: Quantised, held_out: Quantised, settings: Settings) -> Yardstick:
    """Fit the classifier and measure the floor between two halves of the real digits."""
    reader = Reader(train.event_shape)
    steps = settings.classifier_steps
    fit(reader, {"label": train.labels}, ELBO(), condition=train.all(), num_steps=steps, optim=OPTIM)
    real = torch.cat([train.all(), held_out.all()])
    with record.file("samples_data.png") as path:
        image_grid(real[:SHOWN], path, title=PICTURES["data"])
    yardstick = Yardstick(reader.network, real)
    with torch.no_grad():
        accuracy = (reader.network(held_out.all()).argmax(1) == held_out.labels).float().mean().item()
    record.note(accuracy=accuracy, floor=yardstick.floor)
    record.say(f"     {accuracy:.1%} of the held-out digits are read correctly")
    if accuracy < MIN_ACCURACY:
        record.advise(
            f"The classifier reads only {accuracy:.1%} of the digits: distances in its features mean little."
        )
    return yardstick


def fit_vae(record: Record, train: Quantised, held_out: Quantised, settings: Settings) -> VAE:
    """z ~ N(0, I), x | z ~ N(decoder(z), diag(sigma^2)), q(z | x) Gaussian."""
    vae = VAE.mlp(
        train.event_shape,
        latent_dim=8,
        widths=(128, 128),
        likelihood=GaussianLikelihood(0.37, train.event_shape),
    )
    history = fit(vae, train, ELBO(), validation=held_out, num_steps=settings.vae_steps, optim=OPTIM)
    record.history(vae, history)
    x = held_out[torch.arange(20)]
    seen = infer(vae, Guide(), data=x, num_draws=100)
    with record.file("reconstructions.png") as path:
        reconstruction_grid(
            x, predict(seen)["x"].mean((0, 1)), path, title="VAE: held-out digits, E[x_new | x]"
        )
    return vae


def fit_ddpm(record: Record, train: Quantised, held_out: Quantised, settings: Settings) -> DDPM:
    """x_T ~ N(0, I), x_{k-1} | x_k Gaussian around what a U-Net makes of x_k; the guide adds the noise."""
    network = UNet(train.event_shape, widths=(32, 64))
    ddpm = DDPM(
        network, VP(beta_min=0.4, beta_max=14.0), settings.chain_steps, prediction="v", last_step="x0hat"
    )
    steps = settings.ddpm_steps
    history = fit(ddpm, train, ELBO(), validation=held_out, num_steps=steps, batch_size=64, optim=OPTIM)
    record.history(ddpm, history)
    return ddpm


def draw_images(record: Record, vae: VAE, ddpm: DDPM, yardstick: Yardstick, settings: Settings) -> None:
    """The same fitted DDPM by three engines, the VAE by one."""
    plan: list[tuple[str, Any, Engine]] = [
        ("ancestral", ddpm, Ancestral()),
        ("reverse_sde", ddpm, ReverseSDE(steps=settings.chain_steps // 2, method="heun", grid="quadratic")),
        ("probability_flow_ode", ddpm, ProbabilityFlowODE(steps=settings.ode_steps)),
        ("dpm_solver", ddpm, DPMSolver(steps=20)),
        ("vae", vae, Ancestral()),
    ]
    num_images = settings.num_images or yardstick.half_size
    for name, program, engine in plan:
        draws = infer(program, engine, num_draws=num_images, progress=True)
        with record.file(f"samples_{name}.png") as path:
            image_grid(draws.flat("x")[:SHOWN], path, title=PICTURES[name])
        distance = yardstick(draws.flat("x"))
        quality, diagnosis = f"Fréchet {distance:.1f} x floor", f"{draws.guarantee} law"
        record.row(program, engine, draws.cost, quality, diagnosis, distance)
        if distance > MAX_FRECHET:
            record.advise(
                f"Images of {describe(program)} by {describe(engine)} lie {distance:.1f} times as far from real "
                f"digits as real digits from one another ({MAX_FRECHET:.0f} times would do): "
                f"{REMEDIES[describe(program)]}."
            )


def infer_latents(record: Record, vae: VAE, held_out: Quantised, settings: Settings) -> None:
    """p(z | x) of one fitted program by its own guide, by a new fit to these digits, and by Markov chains."""
    x = held_out[torch.arange(settings.num_latent_digits)]
    num_draws = settings.num_draws
    svi = SVI(num_steps=settings.svi_steps)
    nuts = NUTS(num_warmup=settings.num_warmup, max_tree_depth=settings.max_tree_depth)
    guess = infer(vae, Guide(), data=x, num_draws=num_draws, num_chains=4)
    fitted = infer(vae, svi, data=x, num_draws=4 * num_draws, progress=True)
    chains = infer(vae, nuts, data=x, num_draws=num_draws, num_chains=4, init=guess, progress=True)
    for name, posterior in (("guide", guess), ("svi", fitted), ("nuts", chains)):
        with record.file(f"traces_{name}.png") as path:
            plot_traces(posterior, path)
        with record.file(f"posterior_{name}.nc") as path:
            to_arviz(posterior).to_netcdf(str(path))
    compare(record, vae, Guide(), guess, chains)
    compare(record, vae, svi, fitted, chains)
    judge_chains(record, vae, nuts, chains)


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


def estimate_evidence(record: Record, vae: VAE, ddpm: DDPM, held_out: Quantised, settings: Settings) -> None:
    """Bits/dim of digits that were not learnt from, and where the DDPM's bound is lost."""
    plan: list[tuple[Any, Estimator]] = [
        (vae, ImportanceWeighted(settings.num_samples)),
        (vae, ELBOEstimate()),
        (ddpm, ELBOEstimate(settings.num_particles, batch_size=ROWS)),
    ]
    estimates = [evidence(program, estimator, held_out) for program, estimator in plan]
    for (program, estimator), estimate in zip(plan, estimates, strict=True):
        bits, error = estimate.bits_per_dim()
        quality = f"{bits:.3f} ± {error:.3f} bits/dim"
        record.row(program, estimator, estimate.cost, quality, _trust(estimate), bits)
        if not estimate.trusted:
            record.advise(f"{describe(program)} by {describe(estimator)}: {estimate.reason}")
    terms = estimates[-1].terms
    assert terms is not None
    with record.file("ddpm_terms.png") as path:
        plot_terms(terms, path, title="DDPM on held-out digits")


def _trust(estimate: Estimate) -> str:
    if not estimate.trusted:
        return "not to be trusted"
    return f"{estimate.kind}, Monte Carlo ± {estimate.monte_carlo_error:.2g} nats"


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch inside the block: on tensors this small a second one waits more than it works."""
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(found)
