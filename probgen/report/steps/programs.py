"""The two programs, each fitted by SVI on its ELBO."""

from __future__ import annotations

import torch

from probgen import DDPM, ELBO, VAE, VP, Guide, Quantised, UNet, fit, infer, predict
from probgen.diagnostics.plots import reconstruction_grid
from probgen.models import GaussianLikelihood
from probgen.report.page import Section
from probgen.report.record import Record
from probgen.report.steps.settings import OPTIM, Settings

FILES = ["reconstructions.png", "history_vae.png", "history_ddpm.png"]


def fit_vae(
    record: Record, section: Section, train: Quantised, held_out: Quantised, settings: Settings
) -> VAE:
    """z ~ N(0, I), x | z ~ N(decoder(z), diag(sigma^2)), q(z | x) Gaussian."""
    vae = VAE.mlp(
        train.event_shape,
        latent_dim=8,
        widths=(128, 128),
        likelihood=GaussianLikelihood(0.37, train.event_shape),
    )
    history = fit(vae, train, ELBO(), validation=held_out, num_steps=settings.vae_steps, optim=OPTIM)
    record.history(section, vae, history)
    x = held_out[torch.arange(20)]
    mean = predict(infer(vae, Guide(), data=x, num_draws=100))["x"].mean((0, 1))
    picture = record.drawn("reconstructions.png", lambda path: reconstruction_grid(x, mean, path))
    section.picture(
        picture,
        "Pairs of rows: 20 held-out digits, and below each the mean of what the VAE makes of its latents.",
        "Held-out digits and E[x_new | x] under the VAE's guide.",
    )
    return vae


def fit_ddpm(
    record: Record, section: Section, train: Quantised, held_out: Quantised, settings: Settings
) -> DDPM:
    """x_T ~ N(0, I), x_{k-1} | x_k Gaussian around what a U-Net makes of x_k; the guide adds the noise."""
    network = UNet(train.event_shape, widths=(32, 64))
    ddpm = DDPM(
        network, VP(beta_min=0.4, beta_max=14.0), settings.chain_steps, prediction="v", last_step="x0hat"
    )
    steps = settings.ddpm_steps
    history = fit(ddpm, train, ELBO(), validation=held_out, num_steps=steps, batch_size=64, optim=OPTIM)
    record.history(section, ddpm, history)
    return ddpm
