"""The MNIST example runs from end to end, on made-up images."""

import json
import runpy
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


def test_mnist_is_fitted_drawn_and_measured(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        images = generator.integers(0, 256, (60, 28, 28)).astype(np.uint8)
        labels = generator.integers(0, 10, 60).astype(np.uint8)
        np.savez(tmp_path / f"mnist_{name}.npz", images=images, labels=labels)
    main = runpy.run_path(str(ROOT / "examples" / "mnist.py"))["main"]
    tiny = {"steps": 2, "widths": (4, 4), "batch_size": 8, "classifier_steps": 2, "num_images": 10}
    figures = main(tmp_path / "out", **tiny, num_likelihoods=2, folder=tmp_path)
    assert json.loads((tmp_path / "out" / "figures.json").read_text()) == figures
    assert (tmp_path / "out" / "samples.png").stat().st_size > 1000
    assert 0 < figures["bits_per_dim"] < 20
    assert figures["frechet"] > 0
