"""The solver benchmark runs without peers, says what it promises, and its parts mean what they say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.digit_network import PROCESS, digit_network, noise_ratio, read_network, time_of, write_network
from benchmarks.solvers import over_best_peer

ROOT = Path(__file__).parent.parent


def test_last_line_is_one_json_object() -> None:
    command = [sys.executable, "-m", "benchmarks.solvers", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    frechet = result.pop("frechet")
    assert "peers" in result.pop("skipped")
    assert set(result) == {"ours/5", "ours/10", "error_of_exact"}
    assert set(frechet) == {
        f"{name}/{budget}"
        for name in ("ours", "ours_ddim_eta_1", "ours_dpm_solver_sde")
        for budget in (5, 10)
    }
    assert all(value > 0 for value in result.values())
    assert all(found["distance"] > 0 and found["error"] > 0 for found in frechet.values())


def test_best_peer_is_that_of_the_budget() -> None:
    results = {"ours/5": 0.3, "peer/a/5": 0.5, "peer/b/5": 0.4, "peer/c/15": 0.1, "peer/c/50": 0.1}
    assert over_best_peer(results, 5) == pytest.approx(0.75)


def test_network_is_the_same_after_writing_and_reading(tmp_path: Path) -> None:
    network = digit_network((8, 8))
    torch.nn.init.normal_(network.out[-1].weight)
    write_network(tmp_path / "network.npz", network, (8, 8))
    with np.load(tmp_path / "network.npz", allow_pickle=False) as arrays:
        again = read_network(dict(arrays))
    x, t = torch.randn(2, 1, 8, 8), torch.rand(2)
    assert torch.equal(again(x, t), network(x, t))


def test_times_and_noise_ratios_are_inverses() -> None:
    t = torch.tensor([PROCESS.t_min, 0.2, 0.7, 1.0], dtype=torch.float64)
    torch.testing.assert_close(time_of(noise_ratio(t)), t)
