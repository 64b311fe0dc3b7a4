"""MNIST by flow matching: bits/dim with their error, a Fréchet distance in a classifier's features, samples.

    PROBGEN_DATA=path/to/data OMP_NUM_THREADS=1 python examples/mnist.py --steps 3000 --out runs/mnist

Writes samples.png and figures.json. What one run gave stands in docs/results.md.
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
    DPMSolver,
    Estimate,
    FlowMatching,
    ODELikelihood,
    Optim,
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
from probgen.report.steps.yardstick import Reader


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


def frechet(network: Classifier, images: Tensor, held_out: Quantised) -> tuple[float, float]:
    """Distance of the images from as many held-out ones, and that of the held-out ones from as many others."""
    real = held_out[torch.randperm(len(held_out))[: 2 * len(images)]]
    seen = features(network, real)
    return frechet_distance(features(network, images), seen[: len(seen) // 2]), frechet_floor(seen)


def log_likelihood(flow: FlowMatching, held_out: Quantised, num_images: int) -> Estimate:
    """log p of the first held-out images, dequantised."""
    estimator = ODELikelihood(trace="hutchinson", num_probes=2, rtol=1e-3, atol=1e-3)
    return evidence(flow, estimator, held_out[torch.arange(num_images)], levels=held_out.num_levels)


def main(
    out: str | Path = "runs/mnist",
    *,
    steps: int = 3000,
    widths: tuple[int, ...] = (32, 64, 96),
    batch_size: int = 64,
    classifier_steps: int = 600,
    num_images: int = 2000,
    num_likelihoods: int = 32,
    folder: str | Path | None = None,
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
    started = time.process_time()
    flow = fit_flow(train, steps, widths, batch_size)
    fitted = time.process_time() - started
    network, accuracy = fit_classifier(train, held_out, classifier_steps)
    draws = infer(flow, DPMSolver(steps=20, batch_size=100), num_draws=num_images).flat("x")
    image_grid(draws[:100], out / "samples.png", title="MNIST by flow matching, 20 network calls a draw")
    distance, floor = frechet(network, draws, held_out)
    print(f"Fréchet {distance:.3g}, floor {floor:.3g}, classifier {accuracy:.1%}")
    estimate = log_likelihood(flow, held_out, num_likelihoods)
    print(estimate)
    bits, error = estimate.bits_per_dim()
    figures = {
        "bits_per_dim": bits,
        "bits_per_dim_error": error,
        "frechet": distance,
        "frechet_floor": floor,
        "classifier_accuracy": accuracy,
        "fit_cpu_minutes": fitted / 60,
    }
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps (%(default)s)")
    parser.add_argument("--out", default="runs/mnist", help="folder for pictures and figures (%(default)s)")
    options = parser.parse_args()
    print(json.dumps(main(options.out, steps=options.steps), indent=2))
