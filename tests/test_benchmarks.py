"""The benchmarks run, say what they promise, and compare like with like."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sampling
from benchmarks.timing import Stamps, interleaved
from benchmarks.training import hand_written_ddpm, hand_written_vae
from probgen import DDPM, ELBO, VAE, VP, TimeMLP
from probgen.core import Batch

ROOT = Path(__file__).parent.parent
KEYS = {
    "training": {"ours/conv_ddpm", "ours/mlp_ddpm", "ours/vae", "ours/vae_digits"},
    "sampling": {f"ours/{net}/{engine}" for net in ("unet", "mlp") for engine in sampling.ENGINES},
}


@pytest.mark.parametrize("name", KEYS)
def test_last_line_is_one_json_object_of_ratios(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", "--tiny", "--pairs", "2", "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    quartiles = result.pop("quartiles")
    assert set(result) == set(quartiles) == KEYS[name]
    for key, median in result.items():
        lower, upper = quartiles[key]
        assert 0 < lower <= median <= upper


def small_ddpm() -> DDPM:
    network = TimeMLP((1, 8, 8), width=16, num_blocks=1)
    for weight in network.parameters():  # its output starts at zero, and zeros agree with anything
        torch.nn.init.normal_(weight, std=0.1)
    return DDPM(network, VP(), num_steps=20)


@pytest.mark.parametrize(
    ("build", "write_by_hand"),
    [(small_ddpm, hand_written_ddpm), (lambda: VAE.mlp((1, 8, 8), 4, (16,)), hand_written_vae)],
)
def test_hand_written_loss_is_the_elbo_draw_for_draw(build, write_by_hand) -> None:
    """Same seed, same random numbers in the same order: values and gradients meet up to rounding."""
    torch.manual_seed(0)
    program, x = build(), torch.rand(32, 1, 8, 8) * 2 - 1
    weights = list(program.parameters())
    losses = (lambda: ELBO().loss(program, Batch({"x": x}, total=1000)), lambda: write_by_hand(program)(x))
    values, gradients = [], []
    for loss in losses:
        torch.manual_seed(1)
        values.append(loss())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(values[-1], weights)]))
    torch.testing.assert_close(*values, rtol=1e-4, atol=0)
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_ratio_of_a_thing_and_itself_thrice() -> None:
    ratio = interleaved(lambda: 3.0, lambda: 1.0, num_pairs=4)
    assert (ratio.median, ratio.lower, ratio.upper, ratio.theirs) == (3.0, 3.0, 3.0, 1.0)


def test_stamps_take_the_last_ones() -> None:
    stamps = Stamps()
    stamps.moments = [0.0, 100.0, 101.0, 103.0]
    assert stamps.interval(3) == 1.5
