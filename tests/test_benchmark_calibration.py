"""The benchmark of calibration: its references are right, and a tiny run says what it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.calibration import CLAIM_A_POSTERIOR, OURS, TINY
from benchmarks.calibration_testbeds import TESTBEDS, by_quadrature
from probgen import infer
from probgen.core import Batch, DataSets
from probgen.models.gaussian_mixture import GaussianMixture
from probgen.randomness import forked_rng

ROOT = Path(__file__).parent.parent


def test_quadrature_agrees_with_the_closed_form() -> None:
    """On a linear observation of two numbers, where both are known."""
    operator = torch.tensor([[1.0, 0.5, -0.3, 0.2], [0.1, -0.7, 0.4, 0.9]], dtype=torch.float64)
    prior, y = GaussianMixture.example(4), torch.tensor([0.4, -0.9], dtype=torch.float64)
    exact = prior.posterior(y, operator, 0.3)
    found = by_quadrature(prior, operator, lambda s: s, 0.3, y)
    torch.testing.assert_close(found.mean, exact.mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.sd, exact.covariance.diagonal().sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights, exact.weights, rtol=0, atol=1e-6)
    assert found.log_evidence == pytest.approx(float(prior.evidence(y, operator, 0.3)), abs=1e-6)


@pytest.mark.parametrize("dim", [2, 16])
def test_references_are_those_of_weighted_draws(dim: int) -> None:
    """Of tanh, by 40,000 draws of the prior weighted by the likelihood: within 4.5 standard errors."""
    bed = TESTBEDS["tanh"](dim)
    y = bed.data(1, seed=2)[0]
    with forked_rng(0):
        x = bed.prior.model(Batch(num_rows=40_000))
    log_weight = torch.distributions.Normal(bed.observe(x), bed.noise).log_prob(y).sum(1)
    w, exact = log_weight.softmax(0), bed.posterior(y)
    error = float(w.square().sum().sqrt())
    assert error < 0.1
    assert float(((w @ x - exact.mean) / exact.sd).abs().max()) < 4.5 * error
    assert float((w @ bed.prior.responsibilities(x) - exact.weights).abs().max()) < 4.5 * error
    assert abs(float(log_weight.exp().mean().log()) - exact.log_evidence) < 4.5 * error


def test_tiny_run_has_its_keys(tmp_path: Path) -> None:
    picture = tmp_path / "calibration.svg"
    command = [sys.executable, "-m", "benchmarks.calibration", "--tiny", "--only", "DPS", "TwistedSMC"]
    command += ["--plot", str(picture)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result.pop("skipped")) == {"peer"}
    costs, verdicts = result.pop("costs"), result.pop("verdicts")
    coverage = {f"ours/{name}/coverage/2" for name in ("DPS", "TwistedSMC")}
    assert set(verdicts) == coverage
    assert coverage < set(result)
    errors = {key.removeprefix("ours/TwistedSMC/") for key in result if key.startswith("ours/TwistedSMC/")}
    measured = ("mean", "sd", "weights", "log_evidence", "log_evidence_se")
    assert errors == {"coverage/2"} | {f"{bed}/2/{error}" for bed in TESTBEDS for error in measured}
    assert all(cost["cpu_seconds"] > 0 and cost["network_calls"] > 0 for cost in costs.values())
    assert picture.stat().st_size > 5000


def test_all_that_claim_a_posterior_are_there() -> None:
    assert set(CLAIM_A_POSTERIOR) < set(OURS)


def test_network_calls_are_of_all_chains_at_once() -> None:
    """As many for one chain of one y as for two of each of three."""
    bed = TESTBEDS["mixture"](2)
    for name in ("TwistedSMC", "SplitGibbs", "HMC_noise"):
        engine = OURS[name](replace(TINY, particles=128), bed)
        calls = {
            infer(
                bed.program, engine, data=DataSets({"y": bed.data(n, 0)}), num_draws=2, num_chains=c, seed=0
            ).cost.network_calls
            for n, c in ((1, 1), (3, 2))
        }
        assert len(calls) == 1, (name, calls)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript, which azula uses
@pytest.mark.parametrize("name", ["DPS", "PiGDM", "TMPD", "MMPS", "TDS"])
def test_peers_draw_for_every_y(name: str) -> None:
    """Where azula is installed: of a Gaussian MMPS is exact but for its steps, and others are near."""
    azula = pytest.importorskip("benchmarks.peers.calibration", exc_type=ImportError)
    bed = TESTBEDS["gaussian"](2)
    y = bed.data(2, seed=0)
    posterior = infer(
        bed.program,
        azula.Azula(name, bed, 50, 64),
        data=DataSets({"y": y}),
        num_draws=200,
        num_chains=1,
        seed=0,
    )
    assert posterior["x"].shape == (1, 200, 2, 2)
    for i in range(2):
        exact = bed.posterior(y[i])
        off = (posterior.flat("x")[:, i].mean(0) - exact.mean) / exact.sd
        assert float(off.abs().max()) < (0.3 if name == "MMPS" else 2)
