"""Annealed importance sampling against normalisers that are known: machines, energies, latents; and paths made wrong.

Thresholds: 3 standard errors for single estimates, whose seeds are fixed; 4.5 where many are looked at. A standard
error of 0.01 to 0.02 nats sees a log Z that is wrong by 0.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from example_tools import load, run
from probgen import (
    EBM,
    RBM,
    VAE,
    BoltzmannMachine,
    ConditionalVAE,
    Energy,
    GaussianRBM,
    ImportanceWeighted,
    InputError,
    SemiSupervisedVAE,
    UnsupportedError,
    evidence,
    infer,
)
from probgen.annealing import (
    Bracket,
    GaussianToEnergy,
    HamiltonianMoves,
    HamiltonianPath,
    MachinePath,
    Pilot,
    ends,
    hamiltonian,
    log_mean,
    log_mean_error,
    pilot,
    resampled,
    travel,
)
from probgen.conditioning import Labels
from probgen.core import Batch
from probgen.couplings import Couplings
from probgen.evidence.ais import AIS
from probgen.evidence.enumeration import Enumeration, log_partition
from probgen.inference.ancestral import Ancestral
from probgen.models import ddpm
from probgen.models.rbm import example as rbm_example
from probgen.models.vae import GaussianLikelihood
from probgen.moves import GibbsMoves

LIMIT, MANY = 3.0, 4.5
DOUBLE = torch.float64
LOOSE: Any = AIS  # to be given what its annotations forbid


def check(found: Bracket, exact: Tensor | float, most: float = 0.05) -> None:
    """Both sides within 3 standard errors, ordered within theirs, and no further apart than `most`."""
    gap, error = found.reverse - found.forward, torch.hypot(found.forward_error, found.reverse_error)
    print(f"{found}; exact {float(exact):.3f}")
    assert abs(found.forward - exact) < LIMIT * found.forward_error
    assert abs(found.reverse - exact) < LIMIT * found.reverse_error
    assert gap > -LIMIT * error
    assert gap < most
    assert found.forward_error < 0.03
    assert not found.reason


def bracket(program: Any, ais: AIS, **given: Any) -> Bracket:
    torch.manual_seed(0)
    return ais.bracket(program, **given)


def log_z(made: Any) -> float:
    with torch.no_grad():
        return float(log_partition(made.couplings()))


# --- machines (the others stand in test_boltzmann.py) ---------------------------------------------------------------


def gaussian_rbm() -> GaussianRBM:
    made = GaussianRBM((3,), num_hidden=5, scale=0.8).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.8 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return made


@pytest.mark.parametrize("moves", [GibbsMoves(), HamiltonianMoves()], ids=str)
def test_a_gaussian_rbm_is_bracketed_by_either_kind_of_moves(moves: Any) -> None:
    made = gaussian_rbm()
    check(bracket(made, AIS(500, 300, moves)), log_z(made))


@pytest.mark.parametrize("site", ["x", "h"])
def test_another_base_of_a_machine_has_the_same_end(site: str) -> None:
    """Biases of p_0 that are not the machine's, of the layer that is summed out or the one that is not."""
    made = gaussian_rbm()
    couplings = made.couplings()
    base = dict(couplings.biases) | {site: couplings.biases[site] + 0.3}
    check(bracket(made, AIS(500, 300, base=base)), log_z(made))


def boltzmann_machine(num_visible: int, num_hidden: int) -> BoltzmannMachine:
    made = BoltzmannMachine((num_visible,), num_hidden).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return made


def test_hidden_units_that_are_coupled_are_summed_exactly() -> None:
    made = boltzmann_machine(4, 3)
    x = (torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    found, exact = evidence(made, AIS(200, 200), x), evidence(made, Enumeration(), x)
    assert found.kind == "unbiased"
    assert bool(((found.value - exact.value).abs() < LIMIT * found.standard_error).all())


def test_hidden_units_too_many_to_sum_are_annealed_with_x_clamped() -> None:
    """26 of them, not coupled among themselves, so that their sum is known."""
    made = boltzmann_machine(4, 26)
    with torch.no_grad():
        made.weight[4:, 4:] = 0
    couplings = made.couplings()
    alone = Couplings(
        {pair: w for pair, w in couplings.weights.items() if pair != ("h", "h")}, couplings.biases
    )
    x = (torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    found = evidence(made, AIS(40, 30), x)
    with torch.no_grad():
        exact = -alone.free_energy({"x": x}) - log_partition(alone)
    print(found.value - exact, found.standard_error)
    assert bool(((found.value - exact).abs() < LIMIT * found.standard_error).all())
    assert float(found.standard_error.max()) < 0.2


# --- energies -------------------------------------------------------------------------------------------------------


def gaussian(dim: int, constant: float = 3.0) -> tuple[Energy, float, MultivariateNormal]:
    """A correlated Gaussian away from the origin as an energy, its log Z, and itself."""
    generator = torch.Generator().manual_seed(dim)
    root = torch.randn(dim, dim, generator=generator, dtype=DOUBLE)
    law = MultivariateNormal(
        2 * torch.randn(dim, generator=generator, dtype=DOUBLE),
        root @ root.mT / dim + 0.1 * torch.eye(dim, dtype=DOUBLE),
    )
    precision = law.precision_matrix

    def energy(x: Tensor) -> Tensor:
        apart = x.double() - law.mean
        return (0.5 * (apart @ precision * apart).sum(-1) + constant).to(x)

    return Energy(energy, (dim,)), 0.5 * float((2 * math.pi * law.covariance_matrix).logdet()) - constant, law


@pytest.mark.parametrize(("dim", "num_temperatures"), [(2, 500), (10, 600)])
def test_gaussian_energies_are_bracketed(dim: int, num_temperatures: int) -> None:
    energy, exact, _ = gaussian(dim)
    check(bracket(energy, AIS(500, num_temperatures)), exact)


def test_langevin_with_an_accept_step_will_do() -> None:
    energy, exact, _ = gaussian(2)
    check(bracket(energy, AIS(500, 1000, HamiltonianMoves(num_steps=1))), exact)


def test_a_given_base_is_started_from() -> None:
    energy, exact, law = gaussian(10)
    base = MultivariateNormal(law.mean + 0.3, 1.5 * law.covariance_matrix)
    check(bracket(energy, AIS(300, 200, base=base)), exact)


def two_modes(x: Tensor) -> Tensor:
    """0.3 N(3, 0.5^2) + 0.7 N(-3, 1) up to their widths, six deviations and more apart."""
    narrow = math.log(0.3) - 0.5 * ((x - 3) / 0.5).square().sum(-1)
    return -torch.logaddexp(narrow, math.log(0.7) - 0.5 * (x + 3).square().sum(-1))


def test_two_modes_are_both_counted() -> None:
    """The narrow one has a tenth of the mass: missed, log Z would be 0.10 below."""
    exact = math.log(2 * math.pi * (0.3 * 0.25 + 0.7))
    check(bracket(Energy(two_modes, (2,)), AIS(700, 400)), exact)


def test_likelihood_of_an_energy() -> None:
    energy, _, law = gaussian(2)
    x = law.sample((20,)).float()
    found = evidence(energy, AIS(300, 300), x)
    error = found.value - law.log_prob(x.double())
    assert found.kind == "unbiased"
    assert bool((error.abs() < LIMIT * found.standard_error).all())
    assert float(found.standard_error.max()) < 0.05
    assert found.trusted


class Tilted(nn.Module):
    """E(x, c) = |x|^2 / (2 s_c^2) with s = 1, 2, 4 by label; where the label is missing s = 1."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale = 2.0 ** c.clamp(min=0).to(x)
        return 0.5 * (x / scale[:, None]).square().sum(-1)


def test_every_condition_has_a_normaliser_of_its_own() -> None:
    ebm = EBM(Tilted(), (2,), condition=Labels(3))
    labels = torch.tensor([2, 0, 1, 2, 0])
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    scale = 2.0 ** labels[:, None]
    found = evidence(ebm, AIS(300, 300), x, args=(labels,))
    exact = dist.Normal(torch.zeros(5, 2), scale).to_event(1).log_prob(x)
    assert bool(((found.value - exact).abs() < LIMIT * found.standard_error).all())
    assert float(found.standard_error.max()) < 0.1
    assert found.value[0] != found.value[3]
    assert found.diagnostics["log_partition_forward"][0] == found.diagnostics["log_partition_forward"][3]


# --- latents --------------------------------------------------------------------------------------------------------

NOISE = 0.4


class Encoder(nn.Module):
    """A guide that is a little wrong: the posterior's mean, its deviations all of one size."""

    def __init__(self, gain: Tensor, loc: Tensor) -> None:
        super().__init__()
        self.gain, self.loc = gain, loc

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = (x - self.loc) @ self.gain.mT
        return mean, torch.full_like(mean, 0.25)


def linear_vae() -> tuple[VAE, MultivariateNormal]:
    """z in R^2, x = W z + b + noise in R^4, and the exact law of x."""
    generator = torch.Generator().manual_seed(0)
    weight, loc = (torch.randn(*shape, generator=generator, dtype=DOUBLE) for shape in ((4, 2), (4,)))
    covariance = weight @ weight.mT + NOISE**2 * torch.eye(4, dtype=DOUBLE)
    decoder = nn.Linear(2, 4).double()
    with torch.no_grad():
        decoder.weight.copy_(weight)
        decoder.bias.copy_(loc)
    encoder = Encoder(weight.mT @ covariance.inverse(), loc)
    vae = VAE((4,), 2, encoder, decoder, likelihood=GaussianLikelihood(NOISE)).double()
    return vae, MultivariateNormal(loc, covariance)


def simulated(program: Any, rows: int, **given: Any) -> dict[str, Tensor]:
    draws = infer(program, Ancestral(), num_draws=rows, **given)
    return {site: draws.flat(site) for site in ("x", "z")}


@pytest.mark.parametrize("base", [None, "guide"])
def test_likelihood_of_a_linear_vae(base: Any) -> None:
    """Each datum within its standard errors, which are honest; the importance-weighted bound is not above."""
    vae, law = linear_vae()
    x = simulated(vae, 40)["x"]
    exact = law.log_prob(x)
    found = evidence(vae, AIS(100, 150, base=base), x)
    z = (found.value - exact) / found.standard_error
    print(
        f"error {float(z.abs().max()):.2f} standard errors of {float(found.standard_error.mean()):.3f} nats"
    )
    assert found.kind == "lower bound"
    assert float(z.abs().max()) < MANY
    assert float(found.standard_error.mean()) < 0.1
    assert abs(found.mean - float(exact.mean())) < LIMIT * found.monte_carlo_error
    weighted = evidence(vae, ImportanceWeighted(25), x)
    assert weighted.mean < found.mean + LIMIT * found.monte_carlo_error


def test_simulated_data_have_their_likelihood_bracketed() -> None:
    """The z that made x is an exact draw of p(z | x): runs back from it bound log p(x) from above."""
    vae, law = linear_vae()
    data = simulated(vae, 30)
    found = bracket(vae, AIS(100, 150, num_warmup=20), data=data)
    exact = law.log_prob(data["x"])
    assert found.forward.shape == found.reverse.shape == (30,)
    for side, error in ((found.forward, found.forward_error), (found.reverse, found.reverse_error)):
        assert float(((side - exact) / error).abs().max()) < MANY
    few = bracket(vae, AIS(2, 20, num_warmup=20), data=data)
    assert float(few.forward.mean()) < float(exact.mean()) < float(few.reverse.mean())


def test_a_wrong_start_of_the_reverse_runs_shows() -> None:
    """z of other rows are no draws of p(z | x): without moves to mend that the bracket is upside down."""
    vae, _ = linear_vae()
    data = simulated(vae, 30)
    found = bracket(vae, AIS(50, 100, num_warmup=0), data={**data, "z": data["z"].flip(0)})
    assert "at equilibrium" in found.reason


def test_likelihood_given_a_condition() -> None:
    """x | c Gaussian: the label moves the mean of a linear conditional VAE."""
    torch.manual_seed(0)
    cvae = ConditionalVAE.mlp((3,), 2, 4, widths=()).double()
    law_of = cvae.law_of_x
    labels = torch.tensor([0, 3, 1, 3])
    hot = torch.eye(4, dtype=DOUBLE)[labels]
    with torch.no_grad():
        loc = law_of(torch.zeros(4, 2, dtype=DOUBLE), hot).mean
        columns = [law_of(unit.expand(4, 2), hot).mean - loc for unit in torch.eye(2, dtype=DOUBLE)]
        scale = law_of(torch.zeros(4, 2, dtype=DOUBLE), hot).stddev
    root = torch.stack(columns, -1)
    exact = MultivariateNormal(loc, root @ root.mT + scale.square().diag_embed())
    x = exact.sample()
    found = evidence(cvae, AIS(100, 100), x, args=(labels,))
    assert float(((found.value - exact.log_prob(x)) / found.standard_error).abs().max()) < MANY


class Waiting(nn.Module):
    """rate ~ Gamma(3, 2), x ~ Exponential(rate): p(x) = 3 2^3 / (2 + x)^4, with the rate in (0, inf)."""

    event_shape = (1,)

    def model(self, batch: Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Gamma(torch.tensor(3.0, dtype=DOUBLE), 2.0))
            pyro.sample("x", dist.Exponential(z[..., None]).to_event(1))

    def guide(self, batch: Batch) -> None:
        x = batch.data["x"][..., 0]
        with batch.plate():
            pyro.sample("z", dist.LogNormal((3 / (2 + x)).log(), 0.6))


@pytest.mark.parametrize("base", [None, "guide"])
def test_latents_in_a_support(base: Any) -> None:
    x = torch.tensor([[0.1], [1.0], [4.0]], dtype=DOUBLE)
    found = evidence(Waiting(), AIS(300, 100, base=base), x)
    exact = math.log(24) - 4 * (2 + x[:, 0]).log()
    assert float(((found.value - exact) / found.standard_error).abs().max()) < LIMIT
    assert float(found.standard_error.max()) < 0.05


# --- paths made wrong -----------------------------------------------------------------------------------------------


class Broken:
    """A path of which parts are replaced."""

    def __init__(self, path: Any, **parts: Any) -> None:
        self.path = path
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.path, name)


def machine_path() -> tuple[Any, float]:
    made = gaussian_rbm()
    return MachinePath(made.couplings(), 2000), log_z(made)


def energy_path(factor: float = 1.0) -> tuple[Any, float]:
    """To a Gaussian from another, with steps longer than the pilot's."""
    energy, exact, law = gaussian(2)
    ends, moves = (
        GaussianToEnergy(energy, 2000, law=MultivariateNormal(law.mean + 1, 4 * torch.eye(2))),
        HamiltonianMoves(),
    )
    found = pilot(ends, moves)
    longer = Pilot(found.betas, [factor * step for step in found.step_sizes], found.position)
    return HamiltonianPath(ends, moves, longer), exact


def off(path: Any, exact: float, num_temperatures: int = 60, go: Callable[..., Any] = travel) -> float:
    """Standard errors between the forward estimate and the truth."""
    gained = path.log_partition + go(path, path.draw(), path.schedule(num_temperatures)).gained[-1]
    return float((log_mean(gained) - exact).abs() / log_mean_error(gained))


PATHS = {"machine": machine_path, "energy": energy_path}


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(
    "fault", ["none", "temperature ignored", "log Z_0 dropped", "after the move", "beta shifted"]
)
@torch.no_grad()
def test_wrong_paths_are_found(kind: str, fault: str) -> None:
    torch.manual_seed(0)
    path, exact = PATHS[kind]()
    good = path
    go: Callable[..., Any] = travel
    if fault == "none":
        assert off(path, exact) < LIMIT
        return
    if fault == "temperature ignored":
        path = Broken(path, move=lambda state, beta: good.move(state, 1.0))
    elif fault == "log Z_0 dropped":
        # the Gaussian base is normalised: there what is lost is the volume of its coordinates
        lost = good.log_partition if kind == "machine" else good.ends.log_scale
        path = Broken(path, log_partition=good.log_partition - lost)
    elif fault == "beta shifted":
        path = Broken(
            path, log_ratio=lambda state, before, after: good.log_ratio(state, before, after + 0.002)
        )
    else:
        go = after_the_move
    assert off(path, exact, go=go) > 6


def after_the_move(path: Any, state: Any, betas: Sequence[float]) -> Any:
    """`travel` that counts what the state it moves to would gain."""
    total = torch.zeros(())
    for before, after in pairwise(betas):
        state = path.move(state, after)
        total = total + path.log_ratio(state, before, after)
    return type("Found", (), {"gained": total[None]})


@torch.no_grad()
def test_long_steps_need_their_accept_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert off(*energy_path(factor=1.2)) < LIMIT
    path, exact = energy_path(factor=1.2)
    monkeypatch.setattr(
        hamiltonian, "accept", lambda old, new, log_ratio, noise: (new, log_ratio.exp(), noise[0] > 0)
    )
    assert off(path, exact) > 6


class WithoutJacobian(ends._Placed):
    """The transform's part of the density, forgotten."""

    jacobian = property(lambda _: torch.zeros(()), lambda *_: None)


def test_a_lost_jacobian_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin of `test_latents_in_a_support`."""
    monkeypatch.setattr(ends, "_Placed", WithoutJacobian)
    x = torch.tensor([[0.1], [1.0], [4.0]], dtype=DOUBLE)
    found = evidence(Waiting(), AIS(300, 100), x)
    exact = math.log(24) - 4 * (2 + x[:, 0]).log()
    assert float(((found.value - exact) / found.standard_error).abs().max()) > 6


# --- its parts ------------------------------------------------------------------------------------------------------


def test_runs_go_on_as_often_as_their_weights_ask() -> None:
    weights = torch.tensor([[0.5, 0.1], [0.0, 0.2], [0.5, 0.3], [0.0, 0.4]])  # (runs, rows)
    index = resampled(weights.log().flatten(), num_rows=2).reshape(4, 2)
    assert (index % 2 == torch.arange(2)).all()
    counts = torch.stack([torch.bincount(index[:, row] // 2, minlength=4) for row in range(2)], 1)
    assert bool(((counts - 4 * weights).abs() < 1).all())


def test_a_bracket_holds_what_a_picture_of_it_needs() -> None:
    made = gaussian_rbm()
    found = bracket(made, AIS(50, 250))
    assert found.betas[0] == 0
    assert found.betas[-1] == 1
    assert bool((found.betas.diff() > 0).all())
    assert found.forward_paths.shape == found.reverse_paths.shape == (len(found.betas), 50)
    start = MachinePath(made.couplings(), 50).log_partition.double()
    assert bool((found.forward_paths[0] == start).all())
    torch.testing.assert_close(found.reverse_paths[0], start.expand(50))
    assert len(found.betas) <= 150


def test_the_example_draws_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiny settings, at which nothing is claimed."""
    module = load("ais_paths")
    monkeypatch.setattr(module, "check", lambda *_: None)
    assert "exact log Z" in run(
        module, tmp_path, num_steps=2, num_hidden=4, num_runs=10, temperatures=(2, 20)
    )
    assert (tmp_path / "ais_paths.png").stat().st_size > 10_000


# --- distrust and refusals ------------------------------------------------------------------------------------------


def test_too_few_temperatures_for_a_vae() -> None:
    vae, _ = linear_vae()
    found = evidence(vae, AIS(50, 2), 5 + torch.zeros(3, 4, dtype=DOUBLE))
    assert not found.trusted
    assert "num_temperatures" in found.reason


@pytest.mark.parametrize(
    "energy",
    [lambda x: -3 * x.sum(-1), lambda x: -x.square().sum(-1), lambda x: -x.pow(4).sum(-1)],
    ids=["linear", "quadratic", "quartic"],
)
def test_energies_that_fall_for_ever_are_an_error(energy: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(InputError, match="bounded below.*base_scale"):
        evidence(Energy(energy, (2,)), AIS(30, 100), torch.ones(1, 2))


def test_energies_that_are_nan_are_not_trusted() -> None:
    found = evidence(Energy(lambda x: (x.sum(-1) - 0.5).log(), (2,)), AIS(30, 100), torch.ones(1, 2))
    assert not found.trusted
    assert "NaN" in found.reason


@pytest.mark.parametrize(
    ("made", "ais", "words"),
    [
        (ddpm.example, AIS(), "chain of many steps"),
        (lambda: Energy(two_modes, (2,)), AIS(moves=GibbsMoves()), "HamiltonianMoves"),
        (lambda: BoltzmannMachine((2,)), AIS(moves=HamiltonianMoves()), "guide"),
        (lambda: Energy(two_modes, (2,)), AIS(base="guide"), "MultivariateNormal"),
        (lambda: linear_vae()[0], AIS(base={"x": torch.zeros(2)}), '"guide"'),
        (lambda: BoltzmannMachine((2,)), AIS(base="guide"), "biases by layer"),
    ],
)
def test_what_has_no_path_is_refused_in_words(made: Callable[[], Any], ais: AIS, words: str) -> None:
    program = made()
    support = ais.supports(program)
    assert not support
    assert words in support.reason


def test_discrete_latents_are_refused_by_name() -> None:
    program = SemiSupervisedVAE.mlp((4,), latent_dim=2, num_classes=3)
    with pytest.raises(UnsupportedError, match="'c'.*discrete"):
        evidence(program, AIS(5, 5), torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: linear_bracket({"x": torch.zeros(2, 4, dtype=DOUBLE)}), "'z' is missing"),
        (lambda: LOOSE(base="prior"), "base"),
        (lambda: LOOSE(moves=3), "moves"),
        (lambda: HamiltonianMoves(num_steps=0), "num_steps"),
        (lambda: HamiltonianMoves(acceptance=1.0), "acceptance"),
        (
            lambda: bracket(gaussian(2)[0], AIS(5, 5, base=MultivariateNormal(torch.zeros(3), torch.eye(3)))),
            "2 coordinates",
        ),
        (lambda: bracket(gaussian_rbm(), AIS(5, 5, base={"x": torch.zeros(3)})), "biases of the shapes"),
        (lambda: evidence(boltzmann_machine(2, 1), AIS(5, 5), torch.tensor([[1.0, math.nan]])), "NaN"),
        (
            lambda: evidence(BoltzmannMachine((2,), 1), Enumeration(), {"h": torch.ones(1, 1)}),
            "x is not among",
        ),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def linear_bracket(data: dict[str, Tensor]) -> Bracket:
    return bracket(linear_vae()[0], AIS(5, 5), data=data)


def test_the_error_of_log_z_does_not_average_out_over_data() -> None:
    """All data share it: taken for independent errors of 100 data it would be ten times too small."""
    machine, x = rbm_example(), torch.ones(100, 4)
    exact, estimator = evidence(machine, Enumeration(), x).mean, AIS(num_runs=50, num_temperatures=20)
    found = [evidence(machine, estimator, x, seed=seed) for seed in range(40)]
    z = torch.tensor([(each.mean - exact) / each.monte_carlo_error for each in found])
    assert 0.6 < float(z.square().mean().sqrt()) < 1.5  # a chi-square of 40 lies there but for 1 in 10,000
    assert all(each.mean_error >= each.monte_carlo_error for each in found)


def test_runs_begin_near_the_data() -> None:
    """Two phases, all units off and all on, a barrier between them: data are in the second, which has all the mass.

    From the machine's own biases runs begin in the first and never leave: forward and back agree, and are wrong.
    """
    machine = RBM((20,), num_hidden=8)
    with torch.no_grad():
        for parameter, value in zip(machine.parameters(), (1.2, -4.0, -8.0), strict=True):
            parameter.fill_(value)
    x = torch.ones(5, 20)
    exact, estimator = evidence(machine, Enumeration(), x), AIS(num_runs=100, num_temperatures=300)
    found = evidence(machine, estimator, x)
    assert found.trusted
    assert abs(found.mean - exact.mean) < 3 * found.monte_carlo_error + 1e-4
    astray = evidence(machine, replace(estimator, base=dict(machine.couplings().biases)), x)
    assert astray.mean > exact.mean + 10
