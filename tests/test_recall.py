"""Memory and completion: patterns recalled from a part, halves of real data drawn given the other, their pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from torch import Tensor

from example_tools import load, run
from probgen import InputError, infer, to_arviz
from probgen.core import Cost, Posterior
from probgen.diagnostics.predict import predict
from probgen.diagnostics.unit_plots import example, plot_fantasies, plot_filters, plot_recall
from probgen.evidence.enumeration import states
from probgen.inference.gibbs import Gibbs
from probgen.inference.hmc import HMC
from probgen.models.boltzmann_machine import BoltzmannMachine
from probgen.models.deep_belief_net import DeepBeliefNet
from probgen.models.deep_belief_net import example as belief_net
from probgen.models.energy import Energy
from probgen.models.rbm import RBM, GaussianRBM
from probgen.models.rbm import example as rbm

F64 = torch.float64


# --- memory ---------------------------------------------------------------------------------------------------------


def patterns(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, size, generator=torch.Generator().manual_seed(seed), dtype=F64).round()


def recalled(machine: BoltzmannMachine, stored: Tensor, seen: int) -> int:
    """Patterns of which every pixel is right in one draw, the first `seen` of them held."""
    cue = stored.clone()
    cue[:, seen:] = math.nan
    x = infer(machine, Gibbs(num_warmup=20), data={"x": cue}, num_draws=1, num_chains=1)["x"][0, 0]
    assert torch.equal(x[:, :seen], stored[:, :seen])
    return int((x == stored).all(1).sum())


def test_hebbian_energy_is_that_of_hopfield() -> None:
    """-1/2 s'J s with s = 2x - 1 and J = 1/n sum s s' without its diagonal, up to a constant, for every state."""
    stored = patterns(3, 5)
    x, s = states(5).double(), 2 * states(5).double() - 1
    spins = 2 * stored - 1
    pull = torch.einsum("mi,mj->ij", spins, spins) / 5
    expected = -0.5 * torch.einsum("ni,ij,nj->n", s, pull - torch.diag(pull.diagonal()), s)
    with torch.no_grad():
        found = BoltzmannMachine.hebbian(stored).couplings().energy({"x": x})
    gap = found - expected
    torch.testing.assert_close(gap, gap[:1].expand(32))


def test_half_a_pattern_brings_back_the_whole() -> None:
    """All of 6 patterns of 150 pixels from half of each; hot machines forget, and others never knew."""
    stored = patterns(6, 150)
    assert recalled(BoltzmannMachine.hebbian(stored, temperature=0.1), stored, seen=75) == 6
    assert recalled(BoltzmannMachine.hebbian(stored, temperature=5.0), stored, seen=75) == 0
    assert recalled(BoltzmannMachine.hebbian(patterns(6, 150, seed=1), temperature=0.1), stored, seen=75) == 0


def test_too_many_patterns_are_not_remembered() -> None:
    """0.5 patterns a unit is far beyond 0.138: none of them comes back."""
    stored = patterns(60, 120)
    assert recalled(BoltzmannMachine.hebbian(stored, temperature=0.1), stored, seen=60) <= 2


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(0, 3), torch.tensor([[0.5, 1.0]]), torch.tensor([1.0, 0.0]), torch.tensor([[-1.0, 1.0]])],
)
def test_patterns_are_binary(wrong: Tensor) -> None:
    with pytest.raises(InputError, match="0 and 1|shape"):
        BoltzmannMachine.hebbian(wrong)


# --- completion of real data ----------------------------------------------------------------------------------------


def gaussian() -> GaussianRBM:
    made = GaussianRBM((2,), num_hidden=3, scale=0.7).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.linspace(-1.5, 1.3, parameter.numel(), dtype=F64).reshape(parameter.shape))
    return made


def slice_of(made: GaussianRBM, seen: float) -> tuple[Tensor, Tensor]:
    """x_2 on a grid, and p(x_2 | x_1 = seen) there by quadrature."""
    axis = torch.linspace(-9, 9, 3601, dtype=F64)
    with torch.no_grad():
        return axis, (-made.energy(torch.stack([torch.full_like(axis, seen), axis], 1))).softmax(0)


@pytest.mark.parametrize("seen", [-1.0, 0.6])
def test_unseen_pixels_of_real_data_are_drawn(seen: float) -> None:
    """Mean and spread of x_2 given x_1 by Gibbs moves, within 4.5 standard errors of quadrature."""
    made = gaussian()
    data = torch.tensor([[seen, math.nan], [0.0, 0.0]], dtype=F64)
    x = infer(made, Gibbs(num_warmup=50), data={"x": data}, num_draws=1, num_chains=5000)["x"][:, 0]
    assert bool((x[:, 0, 0] == seen).all())
    assert bool((x[:, 1] == 0).all())
    axis, law = slice_of(made, seen)
    check(x[:, 0, 1], axis, law)


def test_what_is_left_of_an_energy_is_an_energy() -> None:
    """The same law by Hamiltonian chains on z -> E(seen, z)."""
    made, seen = gaussian(), 0.6
    rest = Energy(lambda z: made.energy(torch.cat([torch.full_like(z, seen), z], -1).double()), (1,))
    z = infer(rest, HMC(num_warmup=100, num_steps=8, thin=2), num_draws=100, num_chains=100)["x"]
    axis, law = slice_of(made, seen)
    check(z.flatten(), axis, law, chains=100)


def check(x: Tensor, axis: Tensor, law: Tensor, chains: int = 0) -> None:
    """Means of x and x^2 against a law on a grid; errors from chains where draws depend on each other."""
    for power in (1, 2):
        values, exact = x.double() ** power, float(law @ axis**power)
        parts = values.reshape(chains, -1).mean(1) if chains else values
        error = float(parts.std()) / math.sqrt(len(parts))
        assert abs(float(values.mean()) - exact) < 4.5 * error, (power, float(values.mean()), exact, error)


def test_completions_are_handed_to_arviz() -> None:
    """Held and drawn units of x side by side, and what was seen; no law of x alone, so nothing is predicted of it."""
    data = torch.tensor([[1.0, 0.0, math.nan, math.nan]])
    completed = infer(rbm(), Gibbs(num_warmup=5), data={"x": data}, num_draws=10, num_chains=2)
    handed = to_arviz(completed)
    assert handed.posterior["x"].dims == ("chain", "draw", "data", "x_dim_0")
    assert set(handed.groups()) == {"posterior", "observed_data"}
    with pytest.raises(InputError, match="no law of its own"):
        predict(completed)
    free = to_arviz(infer(rbm(), Gibbs(num_warmup=5), num_draws=10, num_chains=2))
    assert free.posterior["h"].dims == ("chain", "draw", "h_dim_0")


# --- pictures -------------------------------------------------------------------------------------------------------

IMAGES = example()
HALF_SEEN = torch.where(torch.arange(3)[:, None] < 1, IMAGES, math.nan)


def draws_of(x: Tensor) -> Posterior:
    return Posterior({"x": x}, "mcmc", "asymptotic", "hand", Cost())


PICTURES: dict[str, Callable[[Path], Path]] = {
    "filters": lambda path: plot_filters(RBM((4, 4), 9), path, title="Nine"),
    "first filters of a net": lambda path: plot_filters(DeepBeliefNet((4, 4), (5, 3)).stack()[0], path),
    "fantasies": lambda path: plot_fantasies(draws_of(torch.rand(3, 50, 1, 4, 4).round()), path),
    "one draw": lambda path: plot_fantasies(draws_of(torch.rand(3, 1, 4, 4)), path),
    "recall": lambda path: plot_recall(
        IMAGES, HALF_SEEN, {"one": IMAGES.expand(5, -1, -1, -1), "two": torch.rand(2, 2, 3, 4)}, path
    ),
    "recall of channels": lambda path: plot_recall(
        IMAGES[:, None], HALF_SEEN[:, None], {"one": torch.rand(3, 2, 1, 3, 4)}, path, title="Two"
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_written(name: str, tmp_path: Path) -> None:
    before, path = dict(mpl.rcParams), tmp_path / "new" / "picture.png"
    assert PICTURES[name](path) == path
    assert path.stat().st_size > 3000
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda path: plot_filters(rbm(), path), "no images"),
        (lambda path: plot_filters(BoltzmannMachine((3, 3)), path), "no hidden units"),
        (lambda path: plot_filters(belief_net(), path), "h1, h2"),
        (lambda path: plot_fantasies(draws_of(torch.rand(3, 5, 4)), path), "images"),
        (lambda path: plot_recall(IMAGES, HALF_SEEN, {"one": torch.rand(5, 3, 4)}, path), "one"),
        (lambda path: plot_recall(IMAGES[0], HALF_SEEN[0], {}, path), "truth"),
    ],
)
def test_what_is_no_picture(asked: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=words) as caught:
        asked(tmp_path / "picture.png")
    assert type(caught.value).__module__ == "probgen.core"


# --- examples -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_recall_and_its_claim(tmp_path: Path) -> None:
    text = run(load("recall"), tmp_path, num_units=100, num_repeats=3, num_steps=800)
    assert text.startswith("Claim: ")
    assert (tmp_path / "recall.png").stat().st_size > 10_000


@pytest.mark.slow
def test_half_digits_and_its_claim(tmp_path: Path) -> None:
    text = run(
        load("half_digits"),
        tmp_path,
        num_steps=600,
        num_digits=30,
        engine=HMC(num_steps=6, num_warmup=60),
    )
    assert text.startswith("Claim: ")
    assert (tmp_path / "half_digits.png").stat().st_size > 10_000
