"""A step of `fit` with `ELBO()` over a step of a hand-written PyTorch loop: same mathematics, optimiser and batch.

Steps of `fit` are timed inside its own loop, from one loss to the next, so that everything it does for a step counts
(minibatch, bound, backward pass, Adam, bookkeeping) and its set-up does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import (
    Ratio,
    StampedObjective,
    arguments,
    interleaved,
    keep_freed_memory,
    report,
    seconds_each,
)
from probgen import DDPM, ELBO, VAE, VP, Optim, digits, fit
from probgen.nets import TimeMLP, UNet

BATCH_SIZE = 128
LR = 1e-3
NUM_LEVELS = 100  # steps of the chains
Loss = Callable[[Tensor], Tensor]


def main() -> None:
    options = arguments("Steps of fit over steps of a hand-written loop.", num_pairs=21, num_steps=12)
    keep_freed_memory()
    torch.manual_seed(0)
    data = digits()[0].all()
    title = (
        f"a step of fit over a hand-written step, {options.pairs} pairs of {options.steps} steps, one thread"
    )
    report(title, measure(data, options.pairs, options.steps, options.tiny))


def measure(data: Tensor, num_pairs: int, num_steps: int, tiny: bool) -> Iterator[tuple[str, Ratio]]:
    """Each program with the loss a user would write by hand."""

    def conv_ddpm() -> DDPM:
        return DDPM(UNet((1, 8, 8), widths=(8, 8) if tiny else (32, 64)), VP(), NUM_LEVELS)

    def mlp_ddpm() -> DDPM:
        return DDPM(TimeMLP((1, 8, 8), width=16 if tiny else 256), VP(), NUM_LEVELS)

    def vae() -> VAE:
        """The network of Kingma & Welling (2013): 500 hidden units on 28 x 28 images."""
        return VAE.mlp((1, 28, 28), latent_dim=20, widths=(16,) if tiny else (500,))

    def small_vae() -> VAE:
        return VAE.mlp((1, 8, 8), latent_dim=16, widths=(16,) if tiny else (256, 256))

    large = torch.nn.functional.interpolate(data, size=(28, 28))

    yield "ours/conv_ddpm", compare(conv_ddpm, hand_written_ddpm, data, num_pairs, num_steps)
    yield "ours/mlp_ddpm", compare(mlp_ddpm, hand_written_ddpm, data, num_pairs, 4 * num_steps)
    yield "ours/vae", compare(vae, hand_written_vae, large, num_pairs, 4 * num_steps)
    yield "ours/vae_digits", compare(small_vae, hand_written_vae, data, num_pairs, 8 * num_steps)


def compare(
    build: Callable[[], Any], loss_of: Callable[[Any], Loss], data: Tensor, num_pairs: int, num_steps: int
) -> Ratio:
    """Every run starts from new weights."""
    optim = Optim(lr=LR, schedule="constant")

    def ours() -> float:
        objective = StampedObjective(ELBO())
        fit(build(), data, objective, num_steps=num_steps, batch_size=BATCH_SIZE, optim=optim, progress=False)
        return objective.stamps.interval(num_steps)

    def theirs() -> float:
        program = build()
        return hand_written_loop(program, loss_of(program), data, num_steps)

    return interleaved(ours, theirs, num_pairs)


def hand_written_loop(program: nn.Module, loss: Loss, data: Tensor, num_steps: int) -> float:
    """What one writes for one model: minibatches of a permutation, fused Adam, the loss kept."""
    optimiser = torch.optim.Adam(program.parameters(), lr=LR, fused=True)
    batches = (index for _ in iter(int, 1) for index in torch.randperm(len(data)).split(BATCH_SIZE)[:-1])
    history = []

    def step() -> None:
        optimiser.zero_grad()
        value = loss(data[next(batches)])
        value.backward()
        optimiser.step()
        history.append(value.item())

    step()
    return seconds_each(step, num_steps - 1)


def hand_written_ddpm(ddpm: DDPM) -> Loss:
    """The bound of a chain that predicts eps, every constant in a table: w_k |eps - net(x_k, k/T)|^2 and the end terms.

    Steps 2..T are drawn from the law that `fit` draws them from, 1/p_k being part of w_k.
    """
    num_steps, process = ddpm.num_steps, ddpm.process()
    k = torch.arange(1, num_steps + 1, dtype=torch.float64)
    alpha, sigma = process.alpha(k / num_steps), process.sigma(k / num_steps)
    _, on_x_0, variance = process.bridge_coefficients((k - 1) / num_steps, k / num_steps)
    probability = ddpm.step_probabilities()
    cumulative = probability.cumsum(0)
    weight = (0.5 * (on_x_0 * sigma / alpha).square() / variance)[1:] / probability
    alpha_2, sigma_2 = alpha[-1].item() ** 2, sigma[-1].item() ** 2  # of step T
    shrink2, sigma_12 = (1 - alpha[0].item()) ** 2, sigma[0].item() ** 2  # of step 1
    alpha, sigma, weight = alpha[1:].float(), sigma[1:].float(), weight.float()
    network, log_scale = ddpm.network, ddpm.log_last_scale

    def loss(x_0: Tensor) -> Tensor:
        size, dim = len(x_0), x_0[0].numel()
        u = (torch.randperm(size) + torch.rand(size, dtype=torch.float64)) / size
        row = torch.searchsorted(cumulative, u).clamp_(max=num_steps - 2)
        shape = (size,) + (1,) * (x_0.ndim - 1)
        eps = torch.randn_like(x_0)
        x_k = alpha[row].view(shape) * x_0 + sigma[row].view(shape) * eps
        error = (eps - network(x_k, (row + 2) / num_steps)).square().flatten(1).sum(1)
        second_moment = x_0.square().sum() / size
        prior = 0.5 * (alpha_2 * second_moment + dim * (sigma_2 - 1 - math.log(sigma_2)))
        last_error = shrink2 * second_moment + dim * sigma_12
        last = dim * (0.5 * math.log(2 * math.pi) + log_scale) + 0.5 * last_error * torch.exp(-2 * log_scale)
        return (weight[row] * error).mean() + prior + last

    return loss


def hand_written_vae(vae: VAE) -> Loss:
    """Reconstruction under one learned sigma, and the closed KL to N(0, I)."""
    log_scale = vae.likelihood.log_scale

    def loss(x: Tensor) -> Tensor:
        loc, scale = vae.encoder(x)
        z = loc + scale * torch.randn_like(loc)
        error = (x - vae.decoder(z)).square().sum() / len(x)
        nll = x[0].numel() * (0.5 * math.log(2 * math.pi) + log_scale) + 0.5 * error * torch.exp(
            -2 * log_scale
        )
        kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum() / len(x)
        return nll + kl

    return loss


if __name__ == "__main__":
    main()
