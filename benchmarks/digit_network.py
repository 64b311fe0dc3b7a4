"""A small network that predicts the noise in 8 x 8 digits, as arrays that any environment with PyTorch can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probgen.nets import TimeEmbedding, UNet
from probgen.processes import VP

EVENT = (1, 8, 8)
NUM_LEVELS = 1000  # of the chain it is fitted as: the first is t_min
PROCESS = VP(t_min=1 / NUM_LEVELS)
MAX_FREQUENCY = 30.0


def digit_network(widths: tuple[int, ...]) -> UNet:
    """Untrained, and smooth in time.

    With features of time as fine as 1/1000 a network is rough in t. No solver of 50 steps can know how rough, and
    their differences drown in it.
    """
    network = UNet(EVENT, widths)
    network.embed_time = TimeEmbedding(4 * widths[0], max_frequency=MAX_FREQUENCY)
    return network


def write_network(path: Path, network: UNet, widths: tuple[int, ...]) -> None:
    arrays = {name: value.numpy() for name, value in network.state_dict().items()}
    np.savez(path, widths=np.array(widths), **arrays)


def read_network(arrays: Mapping[str, np.ndarray]) -> UNet:
    """From what `write_network` wrote; other arrays beside it are not looked at."""
    network = digit_network(tuple(arrays["widths"].tolist()))
    network.load_state_dict({name: torch.from_numpy(arrays[name]) for name in network.state_dict()})
    return network.eval()


def noise_ratio(t: Tensor) -> Tensor:
    """sigma/alpha."""
    return PROCESS.sigma(t) / PROCESS.alpha(t)


def time_of(ratio: Tensor) -> Tensor:
    """The inverse, in float64; ratios are clamped to those the network knows."""
    return PROCESS.time_at(ratio.double().reshape(-1))
