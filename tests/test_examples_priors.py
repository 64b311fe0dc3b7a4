"""Examples around a fitted prior run, with tiny settings, and what they claim is checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import test_examples_continuous
from example_tools import claims, load, run
from probgen.core import Engine
from probgen.inference.hmc import HMC
from probgen.inference.split_gibbs import SplitGibbs
from probgen.inference.twisted_smc import TwistedSMC
from probgen.priors.noise_space import NoiseSpace

PARTICLES = TwistedSMC(particles=16, steps=6)
GIBBS = SplitGibbs(num_steps=4, num_warmup=10)
HAMILTONIAN = HMC(num_steps=2, num_warmup=10, space=NoiseSpace(steps=2, method="euler"))
ENGINES: dict[str, Engine] = {"TwistedSMC": PARTICLES, "SplitGibbs": GIBBS, "HMC": HAMILTONIAN}
TINY: dict[str, dict[str, Any]] = {
    "inpainting": {"num_digits": 2, "num_steps": 5, "num_draws": 8, "width": 16, "engines": ENGINES},
    "unknown_noise": {"num_images": 2, "num_steps": 5, "num_draws": 8, "width": 16, "engines": ENGINES},
}


@pytest.mark.filterwarnings("ignore::probgen.priors.particles.CollapsedWarning")
@pytest.mark.parametrize("name", TINY)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network of five steps knows nothing: what is claimed of a fitted one is left out here."""
    module = load(name)
    monkeypatch.setattr(module, "check", lambda *_: None, raising=False)
    assert run(module, tmp_path / "new", **TINY[name]).startswith("Claim: ")
    pictures = list((tmp_path / "new").glob("*.png"))
    assert len(pictures) == len(ENGINES)
    assert all(picture.stat().st_size > 10_000 for picture in pictures)


def test_what_is_claimed_of_the_noise() -> None:
    """Intervals that hold s, engines that agree, images nearer than what was seen: without any of them it fails."""
    module = load("unknown_noise")
    seen = module.see(torch.zeros(2, 1, 8, 8))
    right = module.Found(seen.s, 0.1 * seen.s, 0.8 * seen.s, 1.2 * seen.s, 0.1, 0.3)
    module.check({"a": right, "b": right}, seen)
    for slip in (
        {"low": 1.1 * seen.s},
        {"mean": 1.15 * seen.s},
        {"error": 0.4},
    ):
        with pytest.raises(AssertionError):
            module.check({"a": right, "b": right._replace(**slip)}, seen)


def test_every_claim_is_run_by_a_test() -> None:
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    loaded = {name for text in texts for name in re.findall(r'(?:load|script)\(\s*"(\w+)"', text)}
    assert claims() <= {*test_examples_continuous.TINY, *TINY, *loaded}
