"""Energy-based models: score matching against closed forms, fits by every objective, draws by every kernel against
quadrature; and each of them broken on purpose.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_tools import load as script
from example_tools import run
from probgen import (
    EBM,
    RBM,
    ContrastiveDivergence,
    ExplicitScoreMatching,
    GaussianMixture,
    GibbsMoves,
    ImplicitScoreMatching,
    InputError,
    Labels,
    LangevinMoves,
    NoiseContrastive,
    Optim,
    PersistentContrastiveDivergence,
    SlicedScoreMatching,
    UnsupportedError,
    fit,
    infer,
    inference,
    load,
    save,
    unnoised,
)
from probgen.core import Batch, Engine
from probgen.devices import Devices
from probgen.diagnostics.chain_chi_square import ChainChiSquare, chain_chi_square
from probgen.diagnostics.landscape import Landscape, landscape
from probgen.diagnostics.mesh import Mesh
from probgen.inference.chees import ChEES
from probgen.inference.hmc import HMC
from probgen.inference.mala import MALA
from probgen.inference.nuts import NUTS
from probgen.inference.parallel_tempering import ParallelTempering
from probgen.inference.sgld import SGLD
from probgen.inference.ula import ULA
from probgen.inference.underdamped_langevin import UnderdampedLangevin
from probgen.models.energy import Energy
from probgen.models.score import Score
from probgen.objectives.smoothed_score_matching import SmoothedScoreMatching
from probgen.planar import rings, two_moons
from probgen.training import Rows, Training
from statistics_tools import ALLOWED_Z

F64 = torch.float64
MESH = Mesh((-8.0, -8.0), (8.0, 8.0), 256)
COARSE = Mesh((-8.0, -8.0), (8.0, 8.0), 128)


def on(mesh: Mesh, law: Any) -> Tensor:
    """The density of a law on a mesh."""
    return law.log_prob(mesh.points).exp().reshape(mesh.shape)


# --- score matching, against closed forms ---------------------------------------------------------------------------


class Bowl(nn.Module):
    """E = a |x|^2 / 2, whose score is -a x."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.a * x.square().sum(-1)


class Slope(nn.Module):
    """The same as a score that is no energy's."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        return -self.a * x


def bowl_data(size: int = 1000) -> Tensor:
    return 0.7 * torch.randn(size, 3, dtype=F64, generator=torch.Generator().manual_seed(3))


def gradient(objective: Any, function: Any, x: Tensor, wrap: Any = Energy) -> tuple[float, float]:
    """The loss, and its derivative by a."""
    loss = objective.loss(wrap(function, (3,)), Batch({"x": x}))
    (grad,) = torch.autograd.grad(loss, function.a)
    return float(loss.detach()), float(grad)


@pytest.mark.parametrize("wrap", [Energy, Score])
@pytest.mark.parametrize(
    "objective", [ImplicitScoreMatching(), SlicedScoreMatching(), SlicedScoreMatching(num_projections=2)]
)
def test_score_matching_of_a_bowl_is_its_closed_form(objective: Any, wrap: Any) -> None:
    """-a d + a^2 |x|^2 / 2, whose least value is at a = d / E|x|^2: signs know the trace of a multiple of I exactly."""
    x, a = bowl_data(), 1.3
    m = float(x.square().sum(1).mean())
    loss, grad = gradient(objective, Bowl(a) if wrap is Energy else Slope(a), x, wrap)
    assert loss == pytest.approx(-3 * a + 0.5 * a**2 * m, rel=1e-12)
    assert grad == pytest.approx(-3 + a * m, rel=1e-12)
    assert gradient(objective, Bowl(3 / m), x)[1] == pytest.approx(0, abs=1e-12)


def test_explicit_score_matching_of_a_bowl() -> None:
    x, a, truth = bowl_data(), 1.3, 1 / 0.49
    m = float(x.square().sum(1).mean())
    loss, grad = gradient(ExplicitScoreMatching(lambda x, t: -truth * x), Bowl(a), x)
    assert loss == pytest.approx(0.5 * (a - truth) ** 2 * m, rel=1e-12)
    assert grad == pytest.approx((a - truth) * m, rel=1e-12)


def test_smoothed_score_matching_of_a_bowl() -> None:
    """E |sigma a (x + sigma eps) - eps|^2 / 2 is least at a = d / (E|x|^2 + d sigma^2), the noise's own mean square."""
    x, sigma = bowl_data(200_000), 0.5
    m = float(x.square().sum(1).mean())

    def z(a: float) -> float:
        """Of the gradient from zero, over parts of the data."""
        objective = SmoothedScoreMatching(sigma)
        grads = torch.tensor([gradient(objective, Bowl(a), part)[1] for part in x.split(5000)])
        return float(grads.mean() / (grads.std() / math.sqrt(len(grads))))

    assert abs(z(3 / (m + 3 * sigma**2))) < ALLOWED_Z
    assert abs(z(3 / m)) > 20  # the clean data's


def test_smoothed_score_matching_given_its_noise() -> None:
    x, a, sigma = bowl_data(), 1.3, 0.5
    torch.manual_seed(0)
    loss, grad = gradient(SmoothedScoreMatching(sigma), Bowl(a), x)
    torch.manual_seed(0)
    eps = torch.randn_like(x)
    noisy = x + sigma * eps
    error = sigma * a * noisy - eps
    assert loss == pytest.approx(float(0.5 * error.square().sum(1).mean()), rel=1e-12)
    assert grad == pytest.approx(float((error * sigma * noisy).sum(1).mean()), rel=1e-12)


def test_exact_traces_of_a_network_are_those_of_its_hessian() -> None:
    """Implicit score matching of an MLP's energy, by autograd of autograd row by row; its gradient by differences."""
    torch.manual_seed(0)
    ebm, x = EBM.mlp((2,), widths=(8,)).double(), torch.randn(20, 2, dtype=F64)

    def by_hand() -> Tensor:
        energy = lambda row: ebm.energy(row[None])[0]  # noqa: E731
        hessians = torch.stack([torch.autograd.functional.hessian(energy, row) for row in x])
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(ebm.energy(at).sum(), at)
        return -hessians.diagonal(dim1=1, dim2=2).sum(1).mean() + 0.5 * slope.square().sum(1).mean()

    loss = ImplicitScoreMatching().loss(ebm, Batch({"x": x}))
    torch.testing.assert_close(loss.detach(), by_hand())
    weight = next(ebm.parameters())
    (grad,) = torch.autograd.grad(loss, weight)
    with torch.no_grad():
        values = []
        for step in (1e-5, -2e-5):
            weight[0, 0] += step
            with torch.enable_grad():
                values.append(float(by_hand()))
    assert float(grad[0, 0]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def without_second_order(program: Any, x: Tensor) -> Tensor:
    x = x if x.requires_grad else x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(program.energy(x).sum(), x)
    return -grad


def uphill(right: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    return lambda program, x: -right(program, x)


@pytest.mark.parametrize(
    "objective", [ImplicitScoreMatching(), SmoothedScoreMatching(0.5)], ids=["ism", "dsm"]
)
@pytest.mark.parametrize("mutant", ["no second order", "uphill"])
def test_broken_scores_are_found(objective: Any, mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that carries no graph has no gradient in a; one of the wrong sign drives a below zero."""
    x = bowl_data()
    wrong = without_second_order if mutant == "no second order" else uphill(unnoised.score_of)
    monkeypatch.setattr(unnoised, "score_of", wrong)
    monkeypatch.setattr("probgen.objectives.smoothed_score_matching.score_of", wrong)
    if mutant == "no second order":
        with pytest.raises(RuntimeError, match=r"not require grad|not have been used"):
            gradient(objective, Bowl(1.3), x)
    else:
        assert gradient(objective, Bowl(1e-3), x)[1] > 0.5  # a falls, although 1/var is 2


def test_conditions_reach_the_score() -> None:
    """E = |x - m_c|^2 / 2 has no gradient where m_c is the mean of its rows; with other conditions it has."""
    wells, x, c = wells_and_data()
    with torch.no_grad():
        wells.network.means[:2] = torch.stack([x[c == k].mean(0) for k in range(2)])
    wells.eval()
    loss = ImplicitScoreMatching().loss(wells, Batch({"x": x}, c))
    (grad,) = torch.autograd.grad(loss, wells.network.means)
    assert float(grad[:2].abs().max()) < 1e-6
    loss = ImplicitScoreMatching().loss(wells, Batch({"x": x}, c.flip(0)))
    (grad,) = torch.autograd.grad(loss, wells.network.means)
    assert float(grad[:2].abs().max()) > 0.1


@pytest.mark.parametrize(
    ("objective", "program", "error", "words"),
    [
        (ImplicitScoreMatching(t=0.3), EBM.mlp((2,), (4,)), InputError, "leave t out"),
        (SmoothedScoreMatching(), GaussianMixture.example(), UnsupportedError, "DenoisingScoreMatching"),
        (ImplicitScoreMatching(), RBM((4,), num_hidden=2), UnsupportedError, "RBM"),
        (ContrastiveDivergence(GibbsMoves()), EBM.mlp((2,), (4,)), UnsupportedError, "LangevinMoves"),
    ],
)
def test_what_does_not_fit_is_refused(objective: Any, program: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        objective.loss(program, Batch({"x": torch.randn(5, *program.event_shape)}))


# --- fits -----------------------------------------------------------------------------------------------------------

LANGEVIN = LangevinMoves(num_steps=10, step_size=0.03)
OBJECTIVES: dict[str, Callable[[], Any]] = {
    "CD": lambda: ContrastiveDivergence(LANGEVIN),
    "PCD": lambda: PersistentContrastiveDivergence(LANGEVIN, num_chains=128, restart=0.05),
    "DSM": lambda: SmoothedScoreMatching(0.1),
    "implicit": ImplicitScoreMatching,
    "sliced": SlicedScoreMatching,
    "NCE": lambda: NoiseContrastive(ratio=2),
}


def fitted(
    law: Any, objective: Any, num_steps: int, width: int = 64, base_scale: float = 3.0, batch_size: int = 256
) -> EBM:
    torch.manual_seed(0)
    x = law.sample((20_000,))
    ebm = EBM.mlp((2,), widths=(width, width), base_scale=base_scale)
    optim = Optim(lr=1e-2, schedule="cosine")
    fit(ebm, x, objective, num_steps=num_steps, batch_size=batch_size, optim=optim, progress=False)
    return ebm


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_finds_the_law(name: str) -> None:
    """KL to two wide moons by quadrature, 1.4 nats before, below 0.25 after a second's steps."""
    law = two_moons(0.4)
    ebm = fitted(law, OBJECTIVES[name](), num_steps=150, width=24, base_scale=2.0, batch_size=128)
    kl = landscape(ebm, COARSE).divergence_from(on(COARSE, law))
    print(f"{name}: KL {kl:.3f} nats")
    assert kl < 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_finds_the_law_closely(name: str) -> None:
    law = two_moons(0.3)
    ebm = fitted(law, OBJECTIVES[name](), num_steps=1000)
    kl = landscape(ebm, MESH).divergence_from(on(MESH, law))
    print(f"{name}: KL {kl:.4f} nats")
    assert kl < 0.05


# --- the law that was learnt, and draws from it ---------------------------------------------------------------------

LAWS = {"moons": two_moons, "rings": rings}
ENGINES: dict[str, Engine] = {
    "ULA": ULA(0.002, num_warmup=400, thin=30),
    "MALA": MALA(num_warmup=100, thin=8),
    "HMC": HMC(num_warmup=60, num_steps=8),
    "NUTS": NUTS(num_warmup=30, max_tree_depth=5),
    "ParallelTempering": ParallelTempering(HMC(num_warmup=60, num_steps=6), num_temperatures=6),
    "UnderdampedLangevin": UnderdampedLangevin(0.05, num_warmup=200, thin=10),
}


@pytest.fixture(scope="module")
def moons() -> EBM:
    return fitted(two_moons(), SlicedScoreMatching(), num_steps=600)


def test_the_likelihood_is_near_the_entropy(moons: EBM) -> None:
    """NLL by quadrature within 0.05 nats of the entropy; the same energy at twice the temperature is not."""
    truth, found = on(MESH, two_moons()), landscape(moons, MESH)
    entropy = -MESH.integral(torch.special.xlogy(truth, truth))
    print(f"NLL {found.cross_entropy(truth):.4f}, entropy {entropy:.4f} nats")
    assert MESH.integral(truth) == pytest.approx(1, abs=1e-6)
    assert 0 < found.cross_entropy(truth) - entropy < 0.05
    assert Landscape(MESH, found.energy / 2).divergence_from(truth) > 0.1


@pytest.mark.parametrize("name", ENGINES)
def test_draws_agree_with_the_grid(moons: EBM, name: str) -> None:
    """Chi-square over cells: an error of 35 % in the root mean square would show, for NUTS of 40 %."""
    chains = infer(moons, ENGINES[name], num_draws=12 if name == "NUTS" else 40, num_chains=150)["x"]
    found = chain_chi_square(MESH, landscape(moons, MESH).density, chains)
    print(f"{name}: {found}")
    assert found.z < ALLOWED_Z
    assert found.detectable < 0.4


@pytest.mark.parametrize("mutant", ["temperature 2", "half the noise"])
def test_broken_kernels_are_found(moons: EBM, mutant: str) -> None:
    density = landscape(moons, MESH).density
    if mutant == "temperature 2":
        hot, engine = Energy(lambda x: 0.5 * moons.energy(x), (2,)), ENGINES["MALA"]
        chains = infer(hot, engine, num_draws=40, num_chains=150)["x"]
    else:
        moves = LangevinMoves(num_steps=200, step_size=0.005, noise_scale=0.5 * math.sqrt(2 * 0.005))
        chains = moves.move(moons, {"x": two_moons().sample((2000,))})["x"].reshape(-1, 1, 2)
    assert chain_chi_square(MESH, density, chains).z > 2 * ALLOWED_Z


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_two_laws_closely(law: str) -> None:
    truth = on(MESH, LAWS[law]())
    ebm = fitted(LAWS[law](), SlicedScoreMatching(), num_steps=3000)
    found = landscape(ebm, MESH)
    entropy = -MESH.integral(torch.special.xlogy(truth, truth))
    print(
        f"{law}: NLL {found.cross_entropy(truth):.4f}, entropy {entropy:.4f}, KL {found.divergence_from(truth):.4f}"
    )
    assert found.cross_entropy(truth) - entropy < 0.05
    # Chains that do not cross between the rings keep the law that they begin in, if they are right.
    start = infer(ebm, ENGINES["ParallelTempering"], num_draws=100, num_chains=200)
    for name, engine in ENGINES.items():
        draws = infer(ebm, engine, num_draws=100, num_chains=200, init=start, seed=1)["x"]
        judged = chain_chi_square(MESH, found.density, draws)
        print(f"  {name}: z {judged.z:.2f}, {judged.ess:.0f} effective draws, finds {judged.detectable:.0%}")
        assert judged.z < ALLOWED_Z


SERVING: dict[str, Engine] = {
    "ula": ULA(step_size=0.05, num_warmup=200),
    "underdamped_langevin": UnderdampedLangevin(step_size=0.2, num_warmup=200),
    "sgld": SGLD(0.05, num_warmup=300),
    "parallel_tempering": ParallelTempering(HMC(num_warmup=60, num_steps=5), num_temperatures=4),
    "mala": MALA(num_warmup=60),
    "hmc": HMC(num_warmup=60),
    "chees": ChEES(num_warmup=60),
    "nuts": NUTS(num_warmup=30, max_tree_depth=4),
}


@pytest.mark.parametrize("name", [info.name for info in pkgutil.iter_modules(inference.__path__)])
def test_engines_leave_where_the_energy_was_raised(name: str) -> None:
    """The disc |x| < 1 holds 39 % of N(0, I); with 10 nats on top of it next to nothing, whoever draws."""
    engine = SERVING.get(name) or importlib.import_module(f"probgen.inference.{name}").example()

    def share(height: float) -> float:
        ebm = EBM(lambda x: height * (-0.5 * x.square().sum(1).square()).exp(), (2,), base_scale=1.0)
        draws = infer(ebm, engine, num_draws=30, num_chains=20)["x"]
        return float((draws.norm(dim=-1) < 1).double().mean())

    try:
        before = share(0.0)
    except (UnsupportedError, InputError):
        assert name not in SERVING
        return
    assert before > 0.2
    assert share(10.0) < 0.05


def test_the_picture_fails_where_its_claim_does(moons: EBM, tmp_path: Path) -> None:
    """The energy is the fixture's, kernels have been judged above; another law, or a kernel that is off, is told."""
    module = script("energy_landscape")
    off = {"a halved energy": 20.0, "MALA": 0.0}

    def judged(program: Any, name: str, *_: Any) -> ChainChiSquare:
        return ChainChiSquare(
            off["a halved energy"] if program is not moons else off.get(name, 0.0), 1e3, 0.1
        )

    module.SCALE, module.fitted, module.judged = 0.2, lambda *_: moons, judged
    assert run(module, tmp_path).startswith("Claim: ")
    assert (tmp_path / "energy_landscape.png").stat().st_size > 10_000
    for change, words in (({"MALA": 5.0}, "a kernel"), ({"a halved energy": 3.0}, "unnoticed")):
        off |= change
        with pytest.raises(AssertionError, match=words):
            run(module, tmp_path)
        off |= {"a halved energy": 20.0, "MALA": 0.0}
    module.SCALE = 0.3
    with pytest.raises(AssertionError, match="another law"):
        run(module, tmp_path)


@pytest.mark.slow
def test_the_picture_holds_its_claim(tmp_path: Path) -> None:
    run(script("energy_landscape"), tmp_path, num_steps=2000, num_chains=200, num_draws=40)


# --- conditions -----------------------------------------------------------------------------------------------------


class Wells(nn.Module):
    """E(x, c) = |x - m_c|^2 / 2 + log Z, which NCE learns; the last row of m is that of a missing c."""

    def __init__(self) -> None:
        super().__init__()
        self.means, self.log_z = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return 0.5 * (x - self.means[c]).square().sum(1) + self.log_z[c]


def wells_and_data(size: int = 2000) -> tuple[EBM, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    c = torch.randint(2, (size,), generator=generator)
    means = torch.tensor([[-2.0, 0.0], [3.0, 1.0]])
    return EBM(Wells(), (2,), condition=Labels(2)), means[c] + torch.randn(size, 2, generator=generator), c


@pytest.mark.parametrize("name", ["CD", "PCD", "NCE"])
def test_conditions_are_learnt_apart(name: str) -> None:
    """m_c becomes the mean of the data of each class, and that of a missing c the mean of all, within 0.15.

    Draws made without the condition would push both wells to the same place.
    """
    wells, x, c = wells_and_data()
    moves = LangevinMoves(num_steps=20, step_size=0.1)
    objectives = {
        "CD": ContrastiveDivergence(moves),
        "PCD": PersistentContrastiveDivergence(moves, num_chains=256, restart=0.05),
        "NCE": NoiseContrastive(ratio=2),
    }
    optim = Optim(lr=0.1, schedule="cosine")
    fit(wells, x, objectives[name], condition=c, num_steps=120, batch_size=256, optim=optim, progress=False)
    found = wells.network.means.detach()
    for k in range(2):
        assert float((found[k] - x[c == k].mean(0)).norm()) < 0.15, (name, k, found)


def test_persistent_chains_keep_their_conditions() -> None:
    """After a fit each chain is in the well of its own label, those without a label between them."""
    wells, x, c = wells_and_data()
    with torch.no_grad():
        wells.network.means.copy_(torch.tensor([[-2.0, 0.0], [3.0, 1.0], [0.0, 8.0]]))
    objective = PersistentContrastiveDivergence(LangevinMoves(20, 0.1), num_chains=600)
    wells.train()
    for _ in range(5):
        objective.loss(wells, Batch({"x": x}, c))
    chains, labels = objective.get_buffer("chains_x"), objective.get_buffer("condition")
    assert 0.05 < float((labels == -1).double().mean()) < 0.16  # the dropout of 0.1
    for k in (-1, 0, 1):
        found, error = chains[labels == k].mean(0), 1 / math.sqrt(float((labels == k).sum()))
        assert float((found - wells.network.means[k].detach()).abs().max()) < ALLOWED_Z * error


def test_negative_draws_are_made_at_the_conditions_of_the_data() -> None:
    """At the right wells CD has no gradient on average; with the conditions of the draws mixed up it has."""
    wells, x, c = wells_and_data(20_000)
    with torch.no_grad():
        wells.network.means.copy_(torch.tensor([[-2.0, 0.0], [3.0, 1.0], [0.0, 0.0]]))
    wells.eval()

    def gradient(moves: Any) -> float:
        loss = ContrastiveDivergence(moves).loss(wells, Batch({"x": x}, c))
        (grad,) = torch.autograd.grad(loss, wells.network.means)
        return float(grad[:2].abs().max())

    class MixedUp(LangevinMoves):
        def move(self, program: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
            mixed = wells.given(c[torch.randperm(len(c))])
            return super().move(mixed, state)

    assert gradient(LangevinMoves(30, 0.1)) < 0.03
    assert gradient(MixedUp(30, 0.1)) > 0.5


def test_labels_that_no_chain_has_begin_chains() -> None:
    """Data in the order of their labels: the first batch knows one of them."""
    wells, x, c = wells_and_data()
    order = c.argsort()
    objective = PersistentContrastiveDivergence(LangevinMoves(20, 0.1), num_chains=200)
    wells.train()
    objective.loss(wells, Batch({"x": x[order[:100]]}, c[order[:100]]))
    assert int((objective.get_buffer("condition") == 1).sum()) == 0
    objective.loss(wells, Batch({"x": x[:100]}, c[:100]))
    held = objective.get_buffer("condition")
    assert len(held) == 200
    assert int((held == 1).sum()) == int((c[:100] == 1).sum())


def test_constants_of_conditions_do_not_run_away() -> None:
    """E(x, c) + k(c) is the same law: chains at a label as often as data leave k alone, to the last bit."""
    wells, x, c = wells_and_data()
    objective = PersistentContrastiveDivergence(LangevinMoves(5, 0.1), num_chains=77)
    wells.train()
    loss = objective.loss(wells, Batch({"x": x}, c))
    (grad,) = torch.autograd.grad(loss, wells.network.log_z)
    assert float(grad.abs().max()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CD", "PCD", "NCE"])
def test_a_network_learns_a_law_for_each_label(name: str) -> None:
    """The inner and the outer of two rings, KL of each by quadrature below 0.1 nats, 0.3 by PCD.

    Chains that go on for ever need short steps and a penalty; with steps of 0.02 the energy grows ever steeper.
    """
    laws = [rings((1.0,)), rings((2.5,))]
    torch.manual_seed(0)
    x, c = torch.cat([law.sample((10_000,)) for law in laws]), torch.arange(2).repeat_interleave(10_000)
    ebm = EBM.mlp((2,), widths=(64, 64), base_scale=3.0, condition=Labels(2))
    optim = Optim(lr=3e-3 if name == "PCD" else 1e-2, schedule="cosine")
    objective = {
        "CD": ContrastiveDivergence(LangevinMoves(20, 0.01)),
        "PCD": PersistentContrastiveDivergence(
            LangevinMoves(20, 0.005), num_chains=256, restart=0.02, penalty=0.001
        ),
        "NCE": NoiseContrastive(ratio=2),
    }[name]
    fit(ebm, x, objective, condition=c, num_steps=1500, batch_size=256, optim=optim, progress=False)
    kl = [
        landscape(ebm, MESH, torch.tensor([k])).divergence_from(on(MESH, law)) for k, law in enumerate(laws)
    ]
    print(f"{name}: KL {kl[0]:.3f}, {kl[1]:.3f} nats")
    assert max(kl) < (0.3 if name == "PCD" else 0.1)


def test_draws_at_a_condition() -> None:
    wells, _, _ = wells_and_data()
    with torch.no_grad():
        wells.network.means.copy_(torch.tensor([[-2.0, 0.0], [3.0, 1.0], [0.0, 8.0]]))
    draws = infer(wells.given(torch.tensor([1])), HMC(num_warmup=50), num_draws=100, num_chains=1)["x"]
    assert float((draws.mean((0, 1)) - torch.tensor([3.0, 1.0])).norm()) < 0.6


def test_conditions_that_are_none() -> None:
    for program in (EBM.mlp((2,), (4,)), RBM((2,), num_hidden=2)):
        moves = GibbsMoves() if isinstance(program, RBM) else LANGEVIN
        for objective in (ContrastiveDivergence(moves), PersistentContrastiveDivergence(moves, num_chains=4)):
            with pytest.raises(InputError, match="condition"):
                objective.loss(program, Batch({"x": torch.ones(3, 2)}, torch.zeros(3, dtype=torch.int64)))


# --- state, files ---------------------------------------------------------------------------------------------------


def training(seed: int) -> Training:
    torch.manual_seed(seed)
    ebm = EBM.mlp((2,), widths=(8,), condition=Labels(2))
    _, x, c = wells_and_data(64)
    objective = PersistentContrastiveDivergence(LANGEVIN, num_chains=16, restart=0.2)
    return Training(ebm, Rows(x, c), None, objective, Optim(), 20, 16, Devices())


def test_chains_and_their_conditions_are_in_the_checkpoint() -> None:
    """A fit that was left after five steps goes on as if it had not been."""
    whole = training(0)
    for _ in range(5):
        whole.step()
    tensors, facts = whole.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    assert {"objective.chains_x", "objective.condition"} <= set(tensors)
    losses = [whole.step() for _ in range(5)]
    other = training(1)
    other.restore(tensors, facts)
    assert [other.step() for _ in range(5)] == losses


def test_conditional_models_are_saved(tmp_path: Path) -> None:
    ebm = EBM.mlp((2,), widths=(8,), condition=Labels(3)).eval()
    save(ebm, tmp_path / "ebm.safetensors")
    x, c = torch.randn(4, 2), torch.tensor([0, 1, 2, -1])
    assert torch.equal(load(tmp_path / "ebm.safetensors").eval().given(c).energy(x), ebm.given(c).energy(x))


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        ContrastiveDivergence(LangevinMoves(5, 2.0)),
        PersistentContrastiveDivergence(LangevinMoves(5, 2.0), num_chains=32),
    ],
    ids=["CD", "PCD"],
)
def test_energies_that_fall_for_ever_are_told(objective: Any) -> None:
    """Without a well chains leave, and are pushed on by each step; with one they stay."""
    torch.manual_seed(0)
    x, optim = torch.randn(256, 2), Optim(lr=0.2)
    with pytest.raises(InputError, match=r"ran away.*base_scale.*penalty.*step_size"):
        fit(EBM.mlp((2,), (16,), base_scale=None), x, objective, num_steps=2000, optim=optim, progress=False)


def test_energies_with_a_well_stay() -> None:
    x = torch.randn(256, 2)
    fit(EBM.mlp((2,), (16,)), x, ContrastiveDivergence(LANGEVIN), num_steps=50, progress=False)


def test_chains_of_an_energy_that_falls_for_ever() -> None:
    with pytest.raises(InputError, match="ran away"):
        infer(Energy(lambda x: -x.square().sum(1), (2,)), ULA(0.5, num_warmup=2000), num_draws=10)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: SmoothedScoreMatching(0.0), "noise_scale"),
        (lambda: EBM.mlp((2,), base_scale=-1.0), "base_scale"),
        (lambda: EBM(lambda x: x, (2,)).energy(torch.zeros(3, 2)), "one number a row"),
        (lambda: landscape(EBM.mlp((3,)), MESH), "axes"),
        (lambda: landscape(EBM.mlp((2,), base_scale=50.0), MESH), "larger box"),
        (lambda: chain_chi_square(MESH, torch.ones(MESH.shape), torch.zeros(5, 10, 2)), "at least 20 chains"),
        (lambda: two_moons(0.0), "scale"),
    ],
)
def test_bad_settings_are_named(made: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        made()
