"""The benchmark of Markov chains: all sample the same densities, and a tiny run says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor

from benchmarks.mcmc_targets import PROBLEMS, Problem, banana_draws

ROOT = Path(__file__).parent.parent
KEYS = {"banana/gradients_over_steps", "network/over_bare", "million/seconds", "million/gigabytes"}


def log_density_of_program(problem: Problem, z: Tensor) -> Tensor:
    """log p of the program in unconstrained coordinates, by Pyro alone; sites in the order of the vector."""
    like, potential, _, _ = initialize_model(pyro.condition(problem.program, problem.data))
    parts = z.split([value.numel() for value in like.values()])
    return -potential({name: part.reshape(like[name].shape) for name, part in zip(like, parts, strict=True)})


def check_same_density(problem: Problem) -> None:
    """Up to a constant, and to rounding in single precision."""
    torch.manual_seed(0)
    z = torch.randn(8, problem.size)
    by_hand = problem.log_density(z, torch)
    by_pyro = torch.stack([log_density_of_program(problem, row) for row in z])
    difference = by_hand - by_pyro
    torch.testing.assert_close(difference, difference[:1].expand(8), rtol=0, atol=1e-4 * by_pyro.abs().max())


@pytest.mark.parametrize("name", PROBLEMS)
def test_program_and_density_by_hand_are_the_same(name: str) -> None:
    """Coordinates off by 1 % are seen."""
    problem = PROBLEMS[name]()
    check_same_density(problem)
    off = replace(problem, log_density=lambda z, xp: problem.log_density(1.01 * z, xp))
    with pytest.raises(AssertionError):
        check_same_density(off)


def test_schools_vector_is_unconstrained_and_in_the_order_of_the_density() -> None:
    mu, tau, eta = torch.randn(2, 3), torch.rand(2, 3), torch.randn(2, 3, 8)
    vectors = PROBLEMS["schools"]().vectors({"mu": mu, "tau": tau, "eta": eta})
    assert vectors.shape == (2, 3, 10)
    np.testing.assert_allclose(vectors[..., 1], np.log(tau.numpy()), rtol=1e-6)


def test_draws_of_the_banana_are_exact() -> None:
    """E y = 1/2 and Var y = 1/2 + 1/4: five standard errors of 100,000 draws are 0.014 and 0.03."""
    x, y = banana_draws(100_000, seed=0).T.astype(np.float64)
    assert abs(y.mean() - 0.5) < 0.014
    assert abs(y.var() - 0.75) < 0.03
    assert abs((x**2 * (y - x**2 / 2)).mean()) < 0.014


def test_tiny_run_has_its_keys() -> None:
    command = [sys.executable, "-m", "benchmarks.mcmc", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    quartiles, samplers = result.pop("quartiles"), result.pop("samplers")
    assert "--peers" in result.pop("skipped")["peers"]
    assert set(result) == set(quartiles) == KEYS
    assert set(samplers) == {f"{name}/ours" for name in PROBLEMS} | {"schools/ours_4", "logistic/ours_4"}
    assert result["banana/gradients_over_steps"] == 1
    assert all(value > 0 for value in result.values())
