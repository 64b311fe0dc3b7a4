"""Boltzmann machines: a step of `fit` and a run of AIS over the same written by hand, and learnergy over ours.

    python -m benchmarks.energies

784 visible and 500 hidden units, batches and chains of 100. Steps of `fit` are timed inside its own loop, as in
`benchmarks.training`. The key `ours/over_learnergy`, seconds a step of its `fit` over those of ours, needs learnergy
beside probgen.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import (
    Ratio,
    StampedObjective,
    arguments,
    interleaved,
    keep_freed_memory,
    report,
    seconds_each,
)
from probgen import Optim, digits, fit
from probgen.core import Objective
from probgen.data import binarise_threshold
from probgen.evidence.ais import AIS
from probgen.models.rbm import RBM
from probgen.objectives.contrastive_divergence import ContrastiveDivergence, PersistentContrastiveDivergence

BATCH_SIZE = 100
LR = 1e-3
State = tuple[Tensor, Tensor]  # v and h of the chains


def main() -> None:
    options = arguments("Boltzmann machines over hand-written loops.", num_pairs=21, num_steps=12)
    keep_freed_memory()
    title = f"Boltzmann machines, {options.pairs} pairs of {4 * options.steps} steps, one thread"
    report(title, measure(options.pairs, 4 * options.steps, options.tiny))


def measure(num_pairs: int, num_steps: int, tiny: bool) -> Iterator[tuple[str, Ratio]]:
    """Ours over theirs, but for learnergy's: theirs over ours."""
    side, num_hidden = (8, 16) if tiny else (28, 500)
    data = binary_digits(side)

    def rbm() -> RBM:
        torch.manual_seed(0)
        return RBM(data.shape[1:], num_hidden)

    yield (
        "ours/rbm_step_over_torch",
        interleaved(
            lambda: seconds_of_fit(
                rbm(), data, PersistentContrastiveDivergence(num_chains=BATCH_SIZE), num_steps
            ),
            lambda: hand_written_loop(rbm(), data, num_steps),
            num_pairs,
        ),
    )
    annealed = rbm().requires_grad_(False)
    for weight in annealed.parameters():
        weight.normal_(std=0.1)
    ais = AIS(num_runs=BATCH_SIZE, num_temperatures=num_steps, num_warmup=0)
    yield (
        "ours/ais_over_torch",
        interleaved(
            lambda: seconds_each(lambda: ais.bracket(annealed), 1),
            lambda: seconds_each(lambda: hand_written_ais(annealed, BATCH_SIZE, num_steps), 1),
            num_pairs,
        ),
    )
    if importlib.util.find_spec("learnergy") is None:
        print(f"ours/over_learnergy skipped: learnergy is not installed in {sys.executable}", file=sys.stderr)
        return
    yield (
        "ours/over_learnergy",
        interleaved(
            lambda: learnergy_step(data, num_hidden, num_steps),
            lambda: seconds_of_fit(rbm(), data, ContrastiveDivergence(), num_steps),
            num_pairs,
        ),
    )


def binary_digits(side: int) -> Tensor:
    """Digits of 0 and 1, flat: `(n, side^2)`."""
    train = digits()[0]
    images = binarise_threshold(train.levels, train.num_levels)
    return F.interpolate(images, size=(side, side)).flatten(1)


# --- a step of contrastive divergence -----------------------------------------------------------------------------


def seconds_of_fit(rbm: RBM, data: Tensor, objective: Objective, num_steps: int) -> float:
    """A step of `fit`, its set-up left out."""
    stamped = StampedObjective(objective)
    optim = Optim(lr=LR, schedule="constant")
    fit(rbm, data, stamped, num_steps=num_steps, batch_size=BATCH_SIZE, optim=optim, progress=False)
    return stamped.stamps.interval(num_steps)


def hand_written_loop(rbm: RBM, data: Tensor, num_steps: int) -> float:
    """Persistent contrastive divergence as one writes it: no autograd, fused Adam, the loss kept."""
    optimiser = torch.optim.Adam(rbm.parameters(), lr=LR, fused=True)
    batches = (index for _ in iter(int, 1) for index in torch.randperm(len(data)).split(BATCH_SIZE)[:-1])
    move = hand_written_step(rbm)
    chains, history = start(rbm, data[next(batches)]), list[float]()

    def step() -> None:
        nonlocal chains
        chains, loss = move(data[next(batches)], chains)
        optimiser.step()
        history.append(loss.item())

    step()
    return seconds_each(step, num_steps - 1)


def start(rbm: RBM, x: Tensor) -> State:
    """Chains at data."""
    return x, below((x @ rbm.weight + rbm.hidden_bias).sigmoid())


def hand_written_step(rbm: RBM) -> Callable[[Tensor, State], tuple[State, Tensor]]:
    """Chains move by one sweep; gradients of mean E(data) - mean E(chains) are left in the weights."""
    weight, visible_bias, hidden_bias = rbm.weight, rbm.visible_bias, rbm.hidden_bias

    @torch.no_grad()
    def move(x: Tensor, chains: State) -> tuple[State, Tensor]:
        v, _ = chains
        h = below(torch.addmm(hidden_bias, v, weight).sigmoid_())
        v = below(torch.addmm(visible_bias, h, weight.T).sigmoid_())
        up = torch.addmm(hidden_bias, x, weight).sigmoid_()
        down = torch.addmm(hidden_bias, v, weight).sigmoid_()
        weight.grad = (v.T @ down).addmm_(x.T, up, alpha=-1).div_(len(x))
        visible_bias.grad = v.mean(0) - x.mean(0)
        hidden_bias.grad = down.mean(0) - up.mean(0)
        loss = weight.flatten() @ weight.grad.flatten()
        return (v, h), loss + visible_bias @ visible_bias.grad + hidden_bias @ hidden_bias.grad

    return move


def below(probability: Tensor) -> Tensor:
    """1 with this probability, faster than torch.bernoulli."""
    return (torch.rand_like(probability) < probability).to(probability.dtype)


# --- annealed importance sampling ---------------------------------------------------------------------------------


@torch.no_grad()
def hand_written_ais(rbm: RBM, num_runs: int, num_temperatures: int) -> tuple[Tensor, Tensor]:
    """Log weights of runs to the machine and back: beta on the weights alone, which is a base of its own biases."""
    weight, visible_bias, hidden_bias = rbm.weight, rbm.visible_bias, rbm.hidden_bias
    log_base = F.softplus(visible_bias).sum() + F.softplus(hidden_bias).sum()
    betas = torch.linspace(0, 1, num_temperatures + 1).tolist()
    v = below(visible_bias.sigmoid().expand(num_runs, -1))

    def travel(v: Tensor, betas: list[float]) -> tuple[Tensor, Tensor]:
        total = v.new_zeros(len(v))
        for before, after in pairwise(betas):
            felt = v @ weight
            at = torch.add(hidden_bias, felt, alpha=after)
            total += F.softplus(at).sum(1) - F.softplus(torch.add(hidden_bias, felt, alpha=before)).sum(1)
            h = below(at.sigmoid_())
            v = below(torch.addmm(visible_bias, h, weight.T, alpha=after).sigmoid_())
        return total, v

    forward, v = travel(v, betas)
    reverse, _ = travel(v, betas[::-1])
    return log_base + forward, log_base - reverse


# --- learnergy ----------------------------------------------------------------------------------------------------


def learnergy_step(data: Tensor, num_hidden: int, num_steps: int) -> float:
    """A step of CD-1 in its `fit`, which also follows the squared error and the pseudo-likelihood."""
    peer = importlib.import_module("learnergy.models.bernoulli").RBM(
        data.shape[1], num_hidden, steps=1, learning_rate=LR
    )
    rows = torch.arange(num_steps * BATCH_SIZE) % len(data)
    labelled = torch.utils.data.TensorDataset(data[rows], torch.zeros(len(rows)))
    return seconds_each(lambda: peer.fit(labelled, batch_size=BATCH_SIZE, epochs=1), 1) / num_steps


if __name__ == "__main__":
    main()
