"""Boltzmann machines against the sum over all states: laws, gradients, log Z; and machines made wrong on purpose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from probgen import InputError, Optim, UnsupportedError, evidence, fit, infer
from probgen.core import Batch
from probgen.couplings import Couplings
from probgen.evidence.ais import AIS
from probgen.evidence.enumeration import Enumeration, log_partition, states
from probgen.inference.ancestral import Ancestral
from probgen.inference.gibbs import Gibbs
from probgen.models.boltzmann_machine import BoltzmannMachine
from probgen.models.deep_boltzmann_machine import DeepBoltzmannMachine
from probgen.models.rbm import RBM, GaussianRBM
from probgen.moves import GibbsMoves
from probgen.objectives.contrastive_divergence import ContrastiveDivergence, PersistentContrastiveDivergence

MIN_P = 1e-4
_SWEEPS = Gibbs(num_warmup=100)
KINDS: dict[str, Callable[[], Any]] = {
    "visible": lambda: BoltzmannMachine((5,)),
    "hidden": lambda: BoltzmannMachine((4,), num_hidden=3),
    "hot": lambda: BoltzmannMachine((4,), num_hidden=2, temperature=2.5),
    "rbm": lambda: RBM((2, 2), num_hidden=3),
    "cold rbm": lambda: RBM((4,), num_hidden=3, temperature=0.6),
    "dbm": lambda: DeepBoltzmannMachine((4,), widths=(3, 2)),
    "deeper": lambda: DeepBoltzmannMachine((3,), widths=(2, 3, 2)),
}


def machine(kind: str, seed: int = 0, scale: float = 1.0) -> Any:
    """A machine with random couplings and biases, float64."""
    made = KINDS[kind]().double()
    with torch.no_grad():
        for parameter in made.parameters():
            generator = torch.Generator().manual_seed(seed + parameter.numel())
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def every_state(couplings: Couplings) -> dict[str, Tensor]:
    sizes = [len(bias) for bias in couplings.biases.values()]
    return dict(zip(couplings.sites, states(sum(sizes)).double().split(sizes, 1), strict=True))


def law_of_x(made: Any) -> Tensor:
    """p(x) of all states in the order of counting, by the definition: exp(-E) summed over h and divided by its sum."""
    with torch.no_grad():
        couplings = made.couplings()
        state = every_state(couplings)
        weight = (-couplings.energy(state)).softmax(0)
        size = len(couplings.biases["x"])
        return torch.zeros(2**size, dtype=weight.dtype).index_add(0, number(state["x"]), weight)


def number(x: Tensor) -> Tensor:
    """Position of states in the order of counting."""
    x = x.flatten(1) if x.ndim > 2 else x
    return (x.double() @ 2.0 ** torch.arange(x.shape[-1] - 1, -1, -1, dtype=torch.float64)).long()


def energy_by_loops(made: Any, state: Mapping[str, Tensor]) -> Tensor:
    """E as it stands in the textbook, from the parameters themselves."""
    if isinstance(made, BoltzmannMachine):
        s = torch.cat([state[site] for site in made.couplings().sites], 1)
        upper = made.weight.triu(1)
        return -(torch.einsum("ni,ij,nj->n", s, upper, s) + s @ made.bias) / made.temperature
    if isinstance(made, RBM):
        x, h = state["x"], state["h"]
        inner = torch.einsum("ni,ij,nj->n", x, made.weight, h)
        return -(inner + x @ made.visible_bias + h @ made.hidden_bias) / made.temperature
    layers = [state[site] for site in made.layers]
    inner = sum(((a @ w) * b).sum(1) for a, w, b in zip(layers, made.weights, layers[1:], strict=False))
    return -(inner + sum(s @ b for s, b in zip(layers, made.biases, strict=True)))


@pytest.mark.parametrize("kind", KINDS)
def test_energy_is_that_of_the_textbook(kind: str) -> None:
    made = machine(kind)
    state = every_state(made.couplings())
    with torch.no_grad():
        torch.testing.assert_close(made.couplings().energy(state), energy_by_loops(made, state))


@pytest.mark.parametrize("kind", KINDS)
def test_enumeration_sums_over_all_states(kind: str) -> None:
    """log Z and p(x) against the definition, layers summed out in closed form or not."""
    made = machine(kind)
    couplings = made.couplings()
    with torch.no_grad():
        exact = (-couplings.energy(every_state(couplings))).logsumexp(0)
        torch.testing.assert_close(log_partition(couplings), exact)
    x = states(len(couplings.biases["x"])).double().reshape(-1, *made.event_shape)
    found = evidence(made, Enumeration(), x)
    torch.testing.assert_close(found.value.exp(), law_of_x(made))
    assert found.kind == "exact"


def test_gaussian_machines_are_summed_too() -> None:
    """log Z against quadrature, and p(x) against a mixture of 2^3 Gaussians."""
    made = GaussianRBM((2,), num_hidden=3, scale=0.7).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        axis = torch.linspace(-9, 9, 901, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)
        area = (axis[1] - axis[0]) ** 2
        quadrature = (-made.energy(grid)).logsumexp(0) + area.log()
        torch.testing.assert_close(log_partition(made.couplings()), quadrature)
        draws = infer(made, Gibbs(), num_draws=400, num_chains=250).flat("x")
        density = (-made.energy(grid) - quadrature).exp() * area
        exact = density @ grid
        error = draws.std(0) / math.sqrt(len(draws) / 10)  # sweeps forget in fewer than ten
        assert bool(((draws.mean(0) - exact).abs() < 4.5 * error).all())


# --- Gibbs ----------------------------------------------------------------------------------------------------------


def chi_square(made: Any, couplings: Couplings | None = None, engine: Gibbs = _SWEEPS) -> float:
    """p of the states of 4,000 independent chains, one draw of each, against the exact law of `made`."""
    drawn = made if couplings is None else Stated(made, couplings)
    x = infer(drawn, engine, num_draws=1, num_chains=4000).flat("x")
    counts = torch.bincount(number(x), minlength=2 ** x[0].numel()).double()
    expected = len(x) * law_of_x(made)
    common = expected >= 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float(stats.chisquare(seen.numpy(), wanted.numpy() * float(seen.sum() / wanted.sum())).pvalue)


class Stated:
    """A machine whose engine is told other couplings."""

    def __init__(self, made: Any, couplings: Couplings) -> None:
        self.made, self.told, self.event_shape = made, couplings, made.event_shape

    def model(self, batch: Batch) -> Any:
        return self.made.model(batch)

    def couplings(self) -> Couplings:
        return self.told


@pytest.mark.parametrize("kind", KINDS)
def test_gibbs_draws_the_exact_law(kind: str) -> None:
    """Chi-square over all states of x; a law off by 10 % in one common state would show."""
    assert chi_square(machine(kind)) > MIN_P


@pytest.mark.parametrize("kind", ["rbm", "hidden"])
def test_gibbs_with_temperatures_draws_the_exact_law(kind: str) -> None:
    assert chi_square(machine(kind), engine=Gibbs(num_warmup=100, num_temperatures=4)) > MIN_P


@pytest.mark.parametrize("mutant", ["no temperature", "no hidden bias", "weights transposed in sign"])
def test_wrong_machines_are_found(mutant: str) -> None:
    """The chi-square that passes above fails where the temperature, the hidden bias or a sign is lost."""
    made = machine("cold rbm")
    right = made.couplings()
    weights, biases = dict(right.weights), dict(right.biases)
    if mutant == "no temperature":
        weights = {pair: weight * made.temperature for pair, weight in weights.items()}
        biases = {site: bias * made.temperature for site, bias in biases.items()}
    elif mutant == "no hidden bias":
        biases["h"] = torch.zeros_like(biases["h"])
    else:
        weights = {pair: -weight for pair, weight in weights.items()}
    assert chi_square(made, Couplings(weights, biases)) < 1e-6


def test_temperatures_carry_chains_over_barriers() -> None:
    """Six units that agree with one another: sweeps stay in a mode, exchange visits both as often as is right."""
    couplings = torch.full((6, 6), 2.0, dtype=torch.float64).fill_diagonal_(0)
    made = BoltzmannMachine.of(couplings, torch.full((6,), -4.95, dtype=torch.float64))
    exact = float(law_of_x(made)[states(6).sum(1) > 3].sum())

    def shares(engine: Gibbs) -> Tensor:
        x = infer(made, engine, num_draws=400, num_chains=50)["x"]
        return (x.sum(-1) > 3).double().mean(1)

    stuck, mixing = shares(Gibbs(num_warmup=50)), shares(Gibbs(num_warmup=50, num_temperatures=6))
    assert stuck.std() > 4 * mixing.std()
    assert abs(float(mixing.mean()) - exact) < 4.5 * float(mixing.std()) / math.sqrt(50)


def test_unseen_units_complete_the_pattern() -> None:
    """p(rest | seen) against enumeration, in each of two rows."""
    made = machine("hidden")
    x = torch.tensor([[1.0, math.nan, 0.0, math.nan], [math.nan, math.nan, 1.0, 1.0]])
    draws = infer(made, Gibbs(num_warmup=100), data={"x": x}, num_draws=1, num_chains=4000)["x"][:, 0]
    for row, seen in enumerate(x):
        law = law_of_x(made)
        every = states(4).double()
        fits = ((every == seen) | seen.isnan()).all(1)
        expected = (law * fits) / (law * fits).sum()
        counts = torch.bincount(number(draws[:, row]), minlength=16).double()
        assert counts[~fits].sum() == 0
        assert stats.chisquare(counts[fits].numpy(), 4000 * expected[fits].numpy()).pvalue > MIN_P


def test_hidden_units_given_data() -> None:
    """p(h | x) of a deep machine against enumeration: means within 4.5 standard errors."""
    made = machine("dbm")
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    drawn = infer(made, Gibbs(num_warmup=50), data={"x": x}, num_draws=1, num_chains=5000)
    couplings = made.couplings()
    state = every_state(couplings)
    with torch.no_grad():
        law = (-couplings.energy(state)).exp() * (state["x"] == x).all(1)
        for site in ("h1", "h2"):
            exact = (law @ state[site]) / law.sum()
            error = (exact * (1 - exact) / 5000).sqrt()
            assert bool(((drawn.flat(site)[:, 0].mean(0) - exact).abs() < 4.5 * error).all())


def fluxes(step: Callable[[Tensor], Tensor], law: Tensor, num_chains: int = 200_000) -> Tensor:
    """z of N(a -> b) against N(b -> a) for one step from the exact law, for the pairs of three states."""
    start = torch.multinomial(law, num_chains, replacement=True)
    end = number(step(states(round(math.log2(len(law)))).double()[start]))
    likely = law.topk(3).indices
    return torch.stack(
        [
            (
                torch.tensor(
                    float(((start == a) & (end == b)).sum()) - float(((start == b) & (end == a)).sum())
                )
            )
            / max(float(((start == a) & (end == b)).sum() + ((start == b) & (end == a)).sum()), 1) ** 0.5
            for i, a in enumerate(likely)
            for b in likely[i + 1 :]
        ]
    )


def test_detailed_balance_of_block_moves() -> None:
    """x -> h -> x' is reversible in p(x): as many go from a to b as back. With another bias on the way it is not."""
    made = machine("rbm", scale=0.7)
    couplings, law = made.couplings(), law_of_x(made)

    def step(x: Tensor, back: Couplings = couplings) -> Tensor:
        with torch.no_grad():
            state = {"x": x, "h": couplings.draw("h", {"x": x})}
            return back.draw("x", state)

    assert bool((fluxes(step, law).abs() < 4.5).all())
    tilted = Couplings(
        couplings.weights,
        {**couplings.biases, "x": couplings.biases["x"] + 0.5 * torch.tensor([1, -1, 1, -1])},
    )
    assert float(fluxes(lambda x: step(x, tilted), law).abs().max()) > 8


# --- log Z ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["visible 16", "hidden 16", "rbm 12-8", "dbm 10-6-4"])
def test_ais_brackets_the_exact_log_partition(kind: str) -> None:
    """Forward and reverse within 3 standard errors of the exact log Z, ordered within their errors, 0.05 nats apart."""
    made = {
        "visible 16": BoltzmannMachine((16,)),
        "hidden 16": BoltzmannMachine((10,), num_hidden=6),
        "rbm 12-8": RBM((12,), num_hidden=8),
        "dbm 10-6-4": DeepBoltzmannMachine((10,), widths=(6, 4)),
    }[kind].double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        torch.manual_seed(0)
        found = AIS(num_runs=500, num_temperatures=300).bracket(made.couplings())
        exact = float(log_partition(made.couplings()))
    assert abs(found.forward - exact) < 3 * found.forward_error
    assert abs(found.reverse - exact) < 3 * found.reverse_error
    assert found.reverse - found.forward > -3 * math.hypot(found.forward_error, found.reverse_error)
    assert found.reverse - found.forward < 0.05
    assert found.forward_error < 0.02


def test_ais_with_too_few_temperatures_says_so() -> None:
    made = RBM((30,), num_hidden=30)
    with torch.no_grad():
        made.weight.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    estimate = evidence(made, AIS(num_runs=50, num_temperatures=2), torch.zeros(1, 30))
    assert not estimate.trusted
    assert "num_temperatures" in estimate.reason


def test_likelihood_by_ais_is_that_of_enumeration() -> None:
    made = machine("rbm")
    x = states(4).double().reshape(-1, 2, 2)
    exact, estimate = (
        evidence(made, Enumeration(), x),
        evidence(made, AIS(num_runs=500, num_temperatures=300), x),
    )
    assert bool(((estimate.value - exact.value).abs() < 4 * estimate.standard_error).all())
    bound = evidence(machine("dbm"), AIS(), states(4).double())
    assert bound.kind == "lower bound"


def test_mean_field_bounds_the_likelihood() -> None:
    """E_q[-E] + H(q) - log Z <= log p(x) for every x, and not by much where couplings are weak."""
    for scale, most in ((1.0, 2.0), (0.2, 0.05)):
        made = machine("dbm", scale=scale)
        x = states(4).double()
        with torch.no_grad():
            bound = made.log_weight(x) - log_partition(made.couplings())
        gap = law_of_x(made).log() - bound
        assert float(gap.min()) > -1e-9
        assert float(gap.max()) < most


# --- fitting --------------------------------------------------------------------------------------------------------


def exact_gradient(made: Any, x: Tensor) -> list[Tensor]:
    """Gradient of -mean log p(x), log Z by the sum over all states."""
    couplings = made.couplings()
    log_p = -couplings.free_energy({"x": x}).mean() - log_partition(couplings)
    return list(torch.autograd.grad(-log_p, list(made.parameters())))


def gradients(made: Any, x: Tensor, num_sweeps: int, repeats: int) -> Tensor:
    """CD gradients, flat, one row a repeat."""
    objective = ContrastiveDivergence(GibbsMoves(num_sweeps))
    rows = []
    for _ in range(repeats):
        loss = objective.loss(made, Batch({"x": x}))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(made.parameters()))]))
    return torch.stack(rows)


def test_long_chains_give_the_gradient_of_the_likelihood() -> None:
    """CD-1000 within 4 standard errors of the exact gradient; CD-1 is biased, and the wrong sign is found."""
    torch.manual_seed(0)
    made = machine("rbm", scale=2.0)
    x = (torch.rand(500, 2, 2, dtype=torch.float64) < 0.3).double()
    exact = torch.cat([g.flatten() for g in exact_gradient(made, x.flatten(1))])
    long = gradients(made, x, num_sweeps=1000, repeats=16)
    error = long.std(0) / math.sqrt(len(long))
    pooled = error.square().mean().sqrt()
    assert float(((long.mean(0) - exact) / pooled).abs().max()) < 4
    short = gradients(made, x, num_sweeps=1, repeats=16)
    bias = float(((short.mean(0) - exact) / pooled).abs().max())
    print(
        f"CD-1 is off by up to {bias:.0f} standard errors of CD-1000, {float((short.mean(0) - exact).abs().max()):.3f}"
    )
    assert bias > 10
    assert float(((-long.mean(0) - exact) / pooled).abs().max()) > 10


def test_persistent_chains_learn_a_law() -> None:
    """PCD fits bars and stripes, 2 x 2, by an RBM: KL from the truth below 0.05 nats, of 1.0 before."""
    patterns = torch.tensor(
        [[0.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
    )
    x = patterns.repeat(100, 1)
    torch.manual_seed(0)
    rbm = RBM((4,), num_hidden=8)
    objective = PersistentContrastiveDivergence(GibbsMoves(10), num_chains=300)
    fit(
        rbm,
        x,
        objective,
        num_steps=1500,
        batch_size=300,
        optim=Optim(lr=0.05, schedule="cosine"),
        progress=False,
    )
    found = -float(evidence(rbm, Enumeration(), patterns).value.mean()) - math.log(6)
    print(f"KL {found:.3f} nats")
    assert found < 0.05
    assert float(objective.get_buffer("chains_x").mean()) == pytest.approx(0.5, abs=0.1)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: RBM((4,), num_hidden=0), "num_hidden"),
        (lambda: RBM((4,), num_hidden=2, temperature=0.0), "temperature"),
        (lambda: BoltzmannMachine.of(torch.tensor([[0.0, 1.0], [0.5, 0.0]]), torch.zeros(2)), "symmetric"),
        (lambda: BoltzmannMachine.of(torch.ones(2, 2), torch.zeros(2)), "diagonal"),
        (lambda: DeepBoltzmannMachine((4,), widths=(3,)), "RBM"),
        (lambda: GaussianRBM((4,), num_hidden=2, scale=-1.0), "scale"),
        (lambda: Gibbs(num_temperatures=0), "num_temperatures"),
        (lambda: AIS(num_runs=1), "num_runs"),
    ],
)
def test_bad_settings_are_named(made: Callable[[], Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        made()


def test_data_that_are_not_binary_are_refused_with_their_range() -> None:
    with pytest.raises(InputError, match="0.5") as caught:
        infer(machine("rbm"), Gibbs(), data={"x": torch.full((1, 2, 2), 0.5)}, num_draws=1)
    assert "'x'" in str(caught.value)


def test_machines_too_large_to_enumerate() -> None:
    with pytest.raises(InputError, match="AIS"):
        evidence(RBM((100,), num_hidden=50), Enumeration(), torch.zeros(1, 100))


def test_nobody_runs_them_forwards() -> None:
    with pytest.raises(UnsupportedError, match="Gibbs"):
        infer(machine("rbm"), Ancestral(), num_draws=1)
