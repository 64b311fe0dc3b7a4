"""The example of Boltzmann machines on MNIST runs from end to end on made-up images, and goes on where it was."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest

from probgen.evidence.ais import AIS

ROOT = Path(__file__).parent.parent


def test_machines_are_fitted_measured_and_drawn_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        images = generator.integers(0, 256, (200, 28, 28)).astype(np.uint8)
        np.savez(tmp_path / f"mnist_{name}.npz", images=images, labels=np.zeros(200, np.uint8))
    example = runpy.run_path(str(ROOT / "examples" / "boltzmann_mnist.py"))
    short = AIS(num_runs=10, num_temperatures=10, num_warmup=1)
    sizes = example["Sizes"]((64, 64), 0.1, short, short, sweeps=3)
    found, again = (
        example["main"](tmp_path / "out", data=f"mnist:{tmp_path}", sizes=sizes) for _ in range(2)
    )
    assert found == again
    num_stages = 0
    for name, published in example["PUBLISHED"].items():
        curve = json.loads((tmp_path / "out" / f"curve_{name}.json").read_text())
        num_stages += len(curve)
        assert [point["epochs"] for point in curve] == sorted(point["epochs"] for point in curve)
        assert json.loads((tmp_path / "out" / f"figures_{name}.json").read_text()) == found[name]
        assert found[name]["log_likelihood"] < published[1] / 2  # noise is not compressed
    assert (tmp_path / "out" / "boltzmann_mnist.png").stat().st_size > 1000
    assert capsys.readouterr().out.count('"epochs"') == num_stages == 17  # each measured once
