"""What images are measured by: the features of a classifier."""

from __future__ import annotations

from statistics import median

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from probgen import ELBO, Batch, Quantised, fit, frechet_distance
from probgen.diagnostics.frechet import frechet_floor
from probgen.nets import Classifier
from probgen.report.record import Record
from probgen.report.steps.settings import OPTIM, Settings

MIN_ACCURACY = 0.97


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
    yardstick = Yardstick(reader.network, torch.cat([train.all(), held_out.all()]))
    with torch.no_grad():
        accuracy = (reader.network(held_out.all()).argmax(1) == held_out.labels).float().mean().item()
    record.note(accuracy=accuracy, floor=yardstick.floor)
    record.say(f"     {accuracy:.1%} of the held-out digits are read correctly")
    if accuracy < MIN_ACCURACY:
        record.advise(
            f"The classifier reads only {accuracy:.1%} of the digits: distances in its features mean little."
        )
    return yardstick
