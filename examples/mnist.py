"""MNIST by flow matching: bits/dim with their error, a Fréchet distance in a classifier's features, samples.

    PROBGEN_DATA=../data python examples/mnist.py --steps 4000 --out runs/mnist

Writes samples.png, nearest.png, history.png and figures.json. What one run gave stands in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor

from probgen import (
    ELBO,
    ConditionalFlowMatching,
    FlowMatching,
    ODELikelihood,
    Optim,
    ProbabilityFlowODE,
    UNet,
    evidence,
    fit,
    frechet_distance,
    infer,
)
from probgen.data import Quantised, mnist
from probgen.diagnostics.frechet import frechet_floor
from probgen.diagnostics.plots import image_grid
from probgen.nets import Classifier
from probgen.report.demo import Reader


def fit_flow(train: Quantised, steps: int, widths: tuple[int, ...], batch_size: int) -> FlowMatching:
    """A velocity field by a U-Net, x_t = (1 - t) x_0 + t x_1."""
    torch.manual_seed(0)
    flow = FlowMatching(UNet(train.event_shape, widths))
    optim = Optim(lr=2e-3, schedule="cosine", warmup=min(200, steps), ema_decay=0.999)
    history = fit(flow, train, ConditionalFlowMatching(), num_steps=steps, batch_size=batch_size, optim=optim)
    print(history)
    return flow


def fit_classifier(train: Quantised, held_out: Quantised, steps: int) -> tuple[Classifier, float]:
    """The features to measure in, and the share of held-out digits read correctly."""
    torch.manual_seed(1)
    reader = Reader(train.event_shape)
    fit(reader, {"label": train.labels}, ELBO(), condition=train.all(), num_steps=steps, optim=Optim(lr=3e-3))
    network = reader.network.eval()
    with torch.no_grad():
        read = torch.cat([network(x).argmax(1) for x in held_out.all().split(500)])
    return network, (read == held_out.labels).float().mean().item()


@torch.no_grad()
def features(network: Classifier, images: Tensor) -> Tensor:
    return torch.cat([network.features(x) for x in images.split(500)])


def main(
    out: str | Path = "runs/mnist",
    *,
    steps: int = 4000,
    widths: tuple[int, ...] = (32, 64, 96),
    batch_size: int = 64,
    classifier_steps: int = 1500,
    num_images: int = 5000,
    num_likelihoods: int = 250,
    folder: str | None = None,
) -> dict[str, float]:
    """Fit, draw, measure.

    Args:
        out: where pictures and figures go.
        steps, widths, batch_size: of the fit and its U-Net.
        classifier_steps: of the fit of the classifier.
        num_images: images drawn, compared with as many held-out ones.
        num_likelihoods: held-out images whose likelihood is taken.
        folder: where MNIST lies; None takes `mnist` in the folder that PROBGEN_DATA names.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    train, held_out = mnist(folder)
    started = time.perf_counter()
    flow = fit_flow(train, steps, widths, batch_size)
    fitted = time.perf_counter() - started
    network, accuracy = fit_classifier(train, held_out, classifier_steps)

    draws = infer(flow, ProbabilityFlowODE(steps=25, method="heun", batch_size=250), num_draws=num_images)
    image_grid(
        draws.flat("x")[:100], out / "samples.png", title="MNIST by flow matching, 50 network calls a draw"
    )
    real = features(network, held_out.all()[torch.randperm(len(held_out))[: 2 * num_images]])
    floor = frechet_floor(real)
    distance = frechet_distance(features(network, draws.flat("x")), real[:num_images])

    rows = torch.arange(num_likelihoods)
    estimate = evidence(
        flow,
        ODELikelihood(trace="hutchinson", rtol=1e-4, atol=1e-4),
        held_out[rows],
        levels=held_out.num_levels,
    )
    print(estimate)
    bits, error = estimate.bits_per_dim()
    figures = {
        "bits_per_dim": bits,
        "bits_per_dim_error": error,
        "frechet": distance,
        "frechet_floor": floor,
        "accuracy": accuracy,
        "fit_minutes": fitted / 60,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4000, help="optimiser steps (%(default)s)")
    parser.add_argument("--out", default="runs/mnist", help="folder for pictures and figures (%(default)s)")
    options = parser.parse_args()
    print(json.dumps(main(options.out, steps=options.steps), indent=2))
