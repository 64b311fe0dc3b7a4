"""The benchmark of Boltzmann machines has the keys it promises, and its hand-written side draws the same."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.energies import binary_digits, hand_written_ais, hand_written_step
from probgen.core import Batch
from probgen.evidence.ais import AIS
from probgen.models.rbm import RBM
from probgen.objectives.contrastive_divergence import PersistentContrastiveDivergence

ROOT = Path(__file__).parent.parent
KEYS = {"ours/rbm_step_over_torch", "ours/ais_over_torch"}


def machine() -> RBM:
    torch.manual_seed(0)
    rbm = RBM((64,), num_hidden=16)
    for weight in rbm.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return rbm


def test_last_line_is_one_json_object_of_ratios() -> None:
    command = [sys.executable, "-m", "benchmarks.energies", "--tiny", "--pairs", "2", "--steps", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    quartiles = result.pop("quartiles")
    with_peer = KEYS | {"ours/over_learnergy"}
    assert set(result) == set(quartiles) == (with_peer if importlib.util.find_spec("learnergy") else KEYS)
    assert all(0 < quartiles[key][0] <= median <= quartiles[key][1] for key, median in result.items())


def test_hand_written_step_is_that_of_fit_draw_for_draw() -> None:
    """Same seed, same random numbers in the same order: chains are equal, loss and gradients up to rounding."""
    rbm, x = machine(), binary_digits(8)[:20]
    objective = PersistentContrastiveDivergence(num_chains=20)
    objective.loss(rbm, Batch({"x": x}))
    chains = chains_of(objective)
    torch.manual_seed(1)
    loss = objective.loss(rbm, Batch({"x": x}))
    loss.backward()
    ours = gradients(rbm)
    torch.manual_seed(1)
    moved, value = hand_written_step(rbm)(x, chains)
    torch.testing.assert_close(value, loss, rtol=1e-4, atol=1e-4)
    for theirs, kept in zip(moved, chains_of(objective), strict=True):
        assert torch.equal(theirs, kept)
    assert (gradients(rbm) - ours).norm() < 1e-5 * ours.norm()


def test_hand_written_log_weights_are_those_of_ais() -> None:
    """Means over 1,000 runs agree within five standard errors; without Z_0, 48 nats, they do not."""
    rbm = machine().requires_grad_(False)
    bracket = AIS(num_runs=1000, num_temperatures=50, num_warmup=0).bracket(rbm)
    for ours, theirs in zip(
        (bracket.log_weights, bracket.reverse_log_weights), hand_written_ais(rbm, 1000, 50), strict=True
    ):
        error = (ours.var() / 1000 + theirs.var() / 1000).sqrt()
        assert abs(ours.mean() - theirs.mean()) < 5 * error
        assert abs(theirs.mean()) > 40 > 50 * error


def chains_of(objective: PersistentContrastiveDivergence) -> tuple[Tensor, Tensor]:
    kept = dict(objective.named_buffers())
    return kept["chains_x"], kept["chains_h"]


def gradients(rbm: RBM) -> Tensor:
    return torch.cat([weight.grad.flatten() for weight in rbm.parameters() if weight.grad is not None])


def test_digits_are_binary_and_large() -> None:
    data = binary_digits(28)
    assert data.shape[1] == 784
    assert set(data.unique().tolist()) == {0.0, 1.0}
    assert float(data.mean()) == pytest.approx(0.3, abs=0.1)
