"""Claim: what is far from the digits has a low likelihood; what is like all of them at once has too high a one.

    python examples/out_of_distribution.py

An energy (denoising score matching) and a VAE are fitted to the digits of scikit-learn. Two sets do not belong to it:
printed letters, and averages of eight digits of a class, in which nobody's handwriting is left. Four scores are asked
to tell each set from digits that were held out: the energy, minus the VAE's log-likelihood (importance sampling, a
lower bound), and of both the distance from their mean over training data, |log p(x) - mean log p|: typicality.

Checked: letters are told by all four (areas under the curve above 0.9); averages are *more* likely than digits, so that
energy and likelihood take them for the best digits of all (below 0.2), and typicality alone tells them (above 0.6).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from probgen import EBM, ELBO, VAE, Optim, Quantised, digits, fit
from probgen.diagnostics.plots import new_figure
from probgen.diagnostics.roc import ROC, draw_roc, roc
from probgen.evidence import ImportanceWeighted
from probgen.letters import letters
from probgen.objectives.smoothed_score_matching import SmoothedScoreMatching
from probgen.randomness import forked_rng
from probgen.verbs import evidence

Score = Callable[[Tensor], Tensor]
AVERAGED = 8
SHOWN = (4, 8)


def main(
    folder: str | Path = "runs/out_of_distribution", num_steps: int = 1500, num_samples: int = 50
) -> Path:
    print(__doc__)
    train, held_out = digits()
    with forked_rng(0):
        sets = {"letters": letters(len(held_out)).all(), "averages": averages(held_out, len(held_out)).all()}
        inside, known = held_out.all(), train[torch.randperm(len(train))[:500]]
    raw = scores(train, num_steps, num_samples)
    typical = {f"typicality of {name}": typicality(score, known) for name, score in raw.items()}
    curves: dict[str, dict[str, ROC]] = {}
    for outside, x in sets.items():
        curves[outside] = {name: roc(score(inside), score(x)) for name, score in {**raw, **typical}.items()}
        for name, curve in curves[outside].items():
            print(f"{outside}, {name}:\n  {curve}")
    letter, average = curves["letters"], curves["averages"]
    assert all(curve.auc > 0.9 for curve in letter.values()), "letters pass for digits"
    assert all(average[name].auc < 0.2 for name in raw), "averages are no likelier than digits"
    assert all(average[name].auc > 0.6 for name in typical), "averages are typical"
    path = draw({"digits held out": inside, **sets}, curves, Path(folder) / "out_of_distribution.png")
    print(path)
    return path


def averages(digits: Quantised, count: int) -> Quantised:
    """Means of the levels of eight digits of a class, to the nearest level; classes take turns."""
    rows = [(digits.labels == i % 10).nonzero().squeeze(1) for i in range(count)]
    chosen = [some[torch.randperm(len(some))[:AVERAGED]] for some in rows]
    levels = torch.stack([digits.levels[some].double().mean(0).round().long() for some in chosen])
    return Quantised(levels, digits.num_levels)


def scores(train: Quantised, num_steps: int, num_samples: int) -> dict[str, Score]:
    """What each fitted program thinks of data, high where they are unlikely, in nats."""
    optim = Optim(schedule="cosine")
    with forked_rng(0):
        ebm, vae = EBM.mlp((1, 8, 8), (256, 256), base_scale=1.0), VAE.mlp((1, 8, 8), 16)
    fit(ebm, train, SmoothedScoreMatching(0.3), num_steps=num_steps, optim=optim)
    fit(vae, train, ELBO(), num_steps=num_steps, optim=optim)

    def energy(x: Tensor) -> Tensor:
        with torch.no_grad():
            return ebm.energy(x)

    def surprise(x: Tensor) -> Tensor:
        return -evidence(vae, ImportanceWeighted(num_samples), x).value

    return {"energy": energy, "VAE's -log p": surprise}


def typicality(score: Score, known: Tensor) -> Score:
    """How far a score is from its mean over data that belong."""
    usual = score(known).mean()
    return lambda x: (score(x) - usual).abs()


def draw(sets: dict[str, Tensor], curves: dict[str, dict[str, ROC]], path: Path) -> Path:
    with new_figure(path, size=(9.0, 4.9)) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1, 3.1))
        for axes, (name, x) in zip(left.subplots(3, 1), sets.items(), strict=True):
            axes.imshow(tiled(x).numpy(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axes.set_title(name)
            axes.axis("off")
        for axes, (name, some) in zip(right.subplots(1, 2), curves.items(), strict=True):
            draw_roc(axes, some)
            axes.set_title(f"{name} against digits held out")
    return path


def tiled(x: Tensor) -> Tensor:
    """The first few images side by side, a grey line between."""
    rows, columns = SHOWN
    padded = torch.nn.functional.pad(x[: rows * columns, 0], (0, 1, 0, 1), value=0.3)
    return padded.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)


if __name__ == "__main__":
    main()
