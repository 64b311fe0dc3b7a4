"""What takes the demo its time."""

from __future__ import annotations

from dataclasses import dataclass

from probgen import Optim

OPTIM = Optim(lr=3e-3, schedule="cosine", ema_decay=0.995)
SHOWN = 100  # images in a picture


@dataclass(frozen=True)
class Settings:
    """How long each step is.

    Args:
        classifier_steps, vae_steps, ddpm_steps: optimiser steps of the three fits.
        chain_steps: T of the DDPM, and network calls of the reverse SDE.
        ode_steps: steps of the probability-flow ODE, four network calls each.
        num_images: images drawn by each engine; None is half as many as there are real ones, as the floor is taken.
        num_hidden_digits: held-out digits whose lower half is hidden.
        guided_steps: network calls, each with its gradient, of the engines that draw it.
        num_particles: of each of four runs of the exact one; num_completions: draws of a run that are kept.
        num_latent_digits: held-out digits whose latents are inferred.
        svi_steps, num_warmup, max_tree_depth, num_draws: of the engines that infer them.
        num_samples: importance samples of a held-out digit.
        num_bounds: repeats of the DDPM's bound.
        energy_steps: optimiser steps of each Boltzmann machine, half as many as of the network beside them.
        num_temperatures: on the way to log Z.
    """

    classifier_steps: int = 800
    vae_steps: int = 2000
    ddpm_steps: int = 1700
    chain_steps: int = 80
    ode_steps: int = 10
    num_images: int | None = None
    num_hidden_digits: int = 4
    guided_steps: int = 40
    num_particles: int = 128
    num_completions: int = 50
    num_latent_digits: int = 3
    svi_steps: int = 600
    num_warmup: int = 100
    max_tree_depth: int = 5
    num_draws: int = 300
    num_samples: int = 500
    num_bounds: int = 2
    energy_steps: int = 1200
    num_temperatures: int = 1000


QUICK = Settings(
    classifier_steps=20,
    vae_steps=20,
    ddpm_steps=10,
    chain_steps=5,
    ode_steps=2,
    num_images=50,
    num_hidden_digits=2,
    guided_steps=4,
    num_particles=8,
    num_completions=8,
    num_latent_digits=2,
    svi_steps=20,
    num_warmup=10,
    max_tree_depth=4,
    num_draws=10,
    num_samples=25,
    energy_steps=20,
    num_temperatures=20,
)
