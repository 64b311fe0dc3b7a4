"""Deep machines against the sum over all states: belief nets, pretraining, bounds, gradients, balance; wrong twins."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from probgen import (
    InputError,
    Optim,
    UnsupportedError,
    digits,
    evidence,
    fit,
    infer,
    load,
    save,
)
from probgen.core import Batch
from probgen.couplings import Couplings
from probgen.data import binarise_threshold
from probgen.evidence.ais import AIS
from probgen.evidence.elbo import ELBOEstimate
from probgen.evidence.enumeration import Enumeration, log_partition, states
from probgen.evidence.importance import ImportanceWeighted
from probgen.greedy import Lifted, pretrain
from probgen.inference.ancestral import Ancestral
from probgen.inference.gibbs import Gibbs, _Units
from probgen.inference.guide import Guide
from probgen.models.boltzmann_machine import BoltzmannMachine
from probgen.models.deep_belief_net import DeepBeliefNet
from probgen.models.deep_boltzmann_machine import DeepBoltzmannMachine
from probgen.models.rbm import RBM, GaussianRBM, TwinRBM
from probgen.moves import GibbsMoves
from probgen.objectives.contrastive_divergence import ContrastiveDivergence, PersistentContrastiveDivergence
from probgen.objectives.elbo import ELBO
from probgen.targets import read

MIN_P = 1e-4
F64 = torch.float64


def randomised(made: Any, seed: int = 0, scale: float = 1.0) -> Any:
    """The machine with random weights, float64."""
    made = made.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=F64))
    return made


def number(x: Tensor) -> Tensor:
    """Position of states in the order of counting."""
    return (x.double() @ 2.0 ** torch.arange(x.shape[-1] - 1, -1, -1, dtype=F64)).long()


def every(sizes: list[int]) -> list[Tensor]:
    """All states of layers of these sizes, layer by layer."""
    return list(states(sum(sizes)).double().split(sizes, 1))


def log_softmax(logits: Tensor) -> Tensor:
    return logits - logits.logsumexp(0)


# --- deep belief nets -----------------------------------------------------------------------------------------------


def net(seed: int = 0) -> DeepBeliefNet:
    """Eleven units in three hidden layers."""
    made: DeepBeliefNet = randomised(DeepBeliefNet((2, 2), widths=(3, 2, 2)), seed)
    return made


def layers_of(made: DeepBeliefNet) -> tuple[list[Tensor], Tensor]:
    """All states, layer by layer, and log p of each, by the definition: products of sigmoids below exp(-E) / Z."""
    first, *others = made.stack()
    sizes = [math.prod(made.event_shape), *(rbm.num_hidden for rbm in (first, *others))]
    layers = every(sizes)
    with torch.no_grad():
        top = made.stack()[-1]
        lower, upper = layers[-2:]
        energy = -(
            torch.einsum("ni,ij,nj->n", lower, top.weight, upper)
            + lower @ top.visible_bias
            + upper @ top.hidden_bias
        )
        seen = states(sizes[-2] + sizes[-1]).double()
        a, b = seen.split(sizes[-2:], 1)
        log_z = (
            torch.einsum("ni,ij,nj->n", a, top.weight, b) + a @ top.visible_bias + b @ top.hidden_bias
        ).logsumexp(0)
        log_p = -energy - log_z
        for rbm, (below, above) in zip(made.stack()[:-1], pairwise(layers), strict=False):
            rate = torch.sigmoid(rbm.visible_bias + above @ rbm.weight.mT)
            log_p = log_p + (below * rate.log() + (1 - below) * (1 - rate).log()).sum(1)
    return layers, log_p


def law_of_x(made: DeepBeliefNet) -> Tensor:
    """p(x) in the order of counting."""
    layers, log_p = layers_of(made)
    return torch.zeros(2 ** layers[0].shape[1], dtype=F64).index_add(0, number(layers[0]), log_p.exp())


def exact_bound(made: DeepBeliefNet) -> Tensor:
    """E_q[log p(x, h)] + H(q) of every x, q summed over all h: no Monte Carlo."""
    layers, log_p = layers_of(made)
    with torch.no_grad():
        log_q = torch.zeros_like(log_p)
        for rbm, (below, above) in zip(made.stack(), pairwise(layers), strict=True):
            rate = torch.sigmoid(rbm.hidden_bias + below @ rbm.weight)
            log_q = log_q + (above * rate.log() + (1 - above) * (1 - rate).log()).sum(1)
    size = 2 ** layers[0].shape[1]
    return torch.zeros(size, dtype=F64).index_add(0, number(layers[0]), log_q.exp() * (log_p - log_q))


def test_the_definition_is_a_law() -> None:
    assert float(law_of_x(net()).sum()) == pytest.approx(1)


def test_a_belief_net_is_drawn_top_down() -> None:
    """Chi-square of x over all states, and of the middle layer: a law off by 10 % in a common state would show."""
    made = net()
    draws = infer(made, Gibbs(num_warmup=100), num_draws=1, num_chains=4000)
    assert list(draws.draws) == ["h2", "h3", "x", "h1"] or set(draws.draws) == {"x", "h1", "h2", "h3"}
    assert draws["x"].shape == (4000, 1, 2, 2)
    counts = torch.bincount(number(draws.flat("x").flatten(1)), minlength=16).double()
    assert stats.chisquare(counts.numpy(), 4000 * law_of_x(made).numpy()).pvalue > MIN_P
    assert (
        stats.chisquare(counts.numpy(), 4000 * law_of_x(net(seed=1)).numpy()).pvalue < 1e-10
    )  # another net's
    layers, log_p = layers_of(made)
    for layer, site in zip(layers[1:], ("h1", "h2", "h3"), strict=True):
        exact = log_p.exp() @ layer
        error = (exact * (1 - exact) / 4000).sqrt()
        assert bool(((draws.flat(site).mean(0) - exact).abs() < 4.5 * error).all()), site


def test_units_of_the_top_can_be_held() -> None:
    """x given h3, as labels at the top are clamped: means within 4.5 standard errors of the sum over all states."""
    made, held = net(), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    draws = infer(made, Gibbs(num_warmup=100), data={"h3": held}, num_draws=1, num_chains=4000)
    assert draws["x"].shape == (4000, 1, 2, 2, 2)
    layers, log_p = layers_of(made)
    for row, seen in enumerate(held.double()):
        weight = log_p.exp() * (layers[-1] == seen).all(1)
        exact = (weight @ layers[0]) / weight.sum()
        error = (exact * (1 - exact) / 4000).sqrt()
        off = draws.flat("x")[:, row].flatten(1).mean(0) - exact
        assert bool((off.abs() < 4.5 * error).all())


def test_the_bound_of_a_belief_net() -> None:
    """`log_weight` is the bound by enumeration, + log Z of the top, within 4.5 standard errors; below log p(x)."""
    made, x = net(), states(4).double().reshape(-1, 2, 2)
    exact, truth = exact_bound(made), law_of_x(made).log()
    assert bool((exact < truth).all())
    torch.manual_seed(0)
    with torch.no_grad():
        log_z = log_partition(made.couplings())
        repeats = torch.stack([made.log_weight(x, num_draws=50) for _ in range(40)]) - log_z
    error = repeats.std(0) / math.sqrt(len(repeats))
    assert bool(((repeats.mean(0) - exact).abs() < 4.5 * error).all())
    found = evidence(made, AIS(num_runs=200, num_temperatures=200), x)
    assert found.kind == "lower bound"
    spread = (found.standard_error.square() + repeats.var(0) / 2).sqrt()  # of 100 draws, not of 50
    assert bool(((found.value - exact).abs() < 4.5 * spread).all())


def test_the_pass_upwards_is_its_guide() -> None:
    """Model and guide meet site by site: their ELBO is `log_weight`, up to log Z and called unnormalised."""
    made, x = net(), states(4).double().reshape(-1, 2, 2)
    found = evidence(made, ELBOEstimate(num_particles=2000), x)
    with torch.no_grad():
        exact = exact_bound(made) + log_partition(made.couplings())
    assert found.kind == "unnormalised"
    assert bool(((found.value - exact).abs() < 4.5 * found.standard_error).all())
    q = infer(made, Guide(), data={"x": x[:3]}, num_draws=3000)["h1"][0].mean(0)
    rate = made.stack()[0].couplings().mean("h", {"x": x[:3].flatten(1)}).detach()
    assert bool(((q - rate).abs() < 4.5 * (rate * (1 - rate) / 3000).sqrt()).all())


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda made, x: infer(made, Gibbs(), data={"x": x}, num_draws=1), "Guide"),
        (lambda made, _: infer(made, Ancestral(), num_draws=1), "Gibbs"),
        (lambda made, x: evidence(made, Enumeration(), x), "AIS"),
        (lambda made, x: fit(made, x, ContrastiveDivergence(), num_steps=1, progress=False), "pretrain"),
        (lambda made, x: fit(made, x, ELBO(), num_steps=1, progress=False), "normaliser"),
        (lambda _, x: fit(DeepBoltzmannMachine((2, 2), (2, 2)), x, ELBO(), progress=False), "normaliser"),
        (lambda _, x: pretrain(RBM((2, 2), 3), x, ContrastiveDivergence(), num_steps=1), "fit"),
    ],
)
def test_what_deep_machines_do_not_do(asked: Callable[[Any, Tensor], Any], words: str) -> None:
    """Each says what does."""
    with pytest.raises(UnsupportedError, match=words):
        asked(net(), torch.ones(3, 2, 2))


def test_a_saved_belief_net_is_the_same(tmp_path: Path) -> None:
    made = net()
    save(made, tmp_path / "net.safetensors")
    again: Any = load(tmp_path / "net.safetensors")
    torch.testing.assert_close(law_of_x(again), law_of_x(made))


# --- the mean field -------------------------------------------------------------------------------------------------


def test_the_mean_field_is_the_guide_of_a_deep_boltzmann_machine() -> None:
    """The ELBO of model and guide, traced, is `log_weight`, in closed form: a bound up to log Z."""
    made: DeepBoltzmannMachine = randomised(DeepBoltzmannMachine((4,), widths=(3, 2)))
    x = states(4).double()
    found = evidence(made, ELBOEstimate(num_particles=1000), x)
    with torch.no_grad():
        exact, log_z = made.log_weight(x), log_partition(made.couplings())
    assert found.kind == "unnormalised"
    assert bool(((found.value - exact).abs() < 4.5 * found.standard_error).all())
    shifted = (exact + 0.2 - found.value).abs() / found.standard_error  # what a lost 0.2 nats would look like
    assert float(shifted.median()) > 4.5
    assert bool((exact - log_z < evidence(made, Enumeration(), x).value).all())
    assert evidence(made, ImportanceWeighted(100), x).kind == "unnormalised"


def test_the_mean_field_is_a_fixed_point() -> None:
    """mu_l = sigmoid(what is felt from the neighbours' mu), to 1e-6; and a maximum of the bound along every unit."""
    made: DeepBoltzmannMachine = randomised(DeepBoltzmannMachine((4,), (3, 2), mean_field_steps=500))
    x = states(4).double()
    with torch.no_grad():
        couplings, mean = made.couplings(), made.mean_field(x)
        state = {"x": x, **mean}
        for site in ("h1", "h2"):
            torch.testing.assert_close(couplings.mean(site, state), mean[site], atol=1e-5, rtol=0)


# --- pretraining ----------------------------------------------------------------------------------------------------


def test_machines_with_copies_double_what_is_felt() -> None:
    """Of two copies of x at x, h feels twice W'x; given h each copy is as it would be alone."""
    twin = randomised(TwinRBM((4,), 3, visible_copies=2))
    x = states(4).double()[3:6]
    copies = torch.stack([x, x], 1).flatten(1)
    with torch.no_grad():
        couplings = twin.couplings()
        felt = couplings.field("h", {"x": copies})
        torch.testing.assert_close(felt, 2 * x @ twin.weight + twin.hidden_bias)
        h = twin.ascend(torch.stack([x, x], 1))
        torch.testing.assert_close(
            couplings.field("x", {"h": h}), (h @ twin.weight.mT + twin.visible_bias).repeat(1, 2)
        )
        top = randomised(TwinRBM((3,), 2, hidden_copies=2))
        both = torch.ones(1, 4, dtype=F64)
        torch.testing.assert_close(
            top.couplings().field("x", {"h": both}), 2 * top.weight.sum(1)[None] + top.visible_bias
        )


@pytest.mark.parametrize("widths", [(3, 2), (3, 4, 2), (3, 2, 4, 2)])
def test_an_assembled_machine_feels_the_mean_of_its_stack(widths: tuple[int, ...]) -> None:
    """What a hidden layer feels is the mean of what it felt in the two machines that share it."""
    made = DeepBoltzmannMachine((4,), widths).double()
    stack = [randomised(layer, seed=level) for level, layer in enumerate(made.stack())]
    made.assemble(stack)
    sizes = [4, *widths]
    torch.manual_seed(0)
    values = [torch.rand(5, size, dtype=F64).round() for size in sizes]
    state = dict(zip(made.layers, values, strict=True))
    with torch.no_grad():
        for level, site in enumerate(made.layers):
            felt = []
            if level > 0:
                below = values[level - 1].repeat(1, 2 if level == 1 else 1)
                felt.append(stack[level - 1].couplings().field("h", {"x": below})[:, : sizes[level]])
            if level < len(widths):
                above = values[level + 1].repeat(1, 2 if level == len(widths) - 1 else 1)
                felt.append(stack[level].couplings().field("x", {"h": above})[:, : sizes[level]])
            torch.testing.assert_close(made.couplings().field(site, state), torch.stack(felt).mean(0))


def test_a_stack_sees_what_the_layers_below_make_of_the_data() -> None:
    """Hidden units of the first layer at their rates, 0 or 1 and drawn anew; copies where a layer has them."""
    made, x = net(), states(4).double()[5:6].reshape(1, 2, 2).repeat(4000, 1, 1)
    first, second, _ = made.stack()
    seen = Lifted(x, [first], second)
    drawn = seen[torch.arange(4000)]
    rate = first.couplings().mean("h", {"x": x[:1].flatten(1)}).detach()[0]
    assert bool(((drawn == 0) | (drawn == 1)).all())
    assert bool(((drawn.mean(0) - rate).abs() < 4.5 * (rate * (1 - rate) / 4000).sqrt()).all())
    assert not torch.equal(drawn, seen[torch.arange(4000)])
    twins = DeepBoltzmannMachine((2, 2), (3, 2)).double().stack()
    copied = Lifted(x, [], twins[0])[torch.arange(3)]
    assert copied.shape == (3, 2, 2, 2)
    assert torch.equal(copied[:, 0], copied[:, 1])
    assert Lifted(x, twins[:1], twins[1])[torch.arange(3)].shape == (3, 1, 3)


class Stochastic:
    """A data set of levels in [0, 1], binarised anew whenever it is asked."""

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.levels[index].bernoulli()


def test_data_may_be_drawn_anew() -> None:
    """A data set that binarises at random serves a stack as it serves `fit`."""
    data = Stochastic(torch.full((40, 2, 2), 0.3))
    twins = DeepBoltzmannMachine((2, 2), (3, 2)).stack()
    seen = Lifted(data, [], twins[0])
    first = seen[torch.arange(40)]
    assert torch.equal(first[:, 0], first[:, 1])
    assert not torch.equal(first, seen[torch.arange(40)])
    histories = pretrain(
        DeepBeliefNet((2, 2), (3, 2)), data, ContrastiveDivergence(), num_steps=2, progress=False
    )
    assert len(histories) == 2


PATTERNS = torch.tensor(
    [[0.0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1]]
)


def test_pretraining_learns_a_law_layer_by_layer() -> None:
    """A belief net pretrained on bars and stripes: KL from the truth below 0.3 nats, of 0.98 before; the same twice."""
    objective = PersistentContrastiveDivergence(GibbsMoves(10), num_chains=300)

    def learnt(num_steps: int) -> DeepBeliefNet:
        torch.manual_seed(0)
        made = DeepBeliefNet((4,), widths=(8, 6))
        histories = pretrain(
            made,
            PATTERNS.repeat(50, 1),
            objective,
            num_steps=num_steps,
            batch_size=300,
            optim=Optim(lr=0.05, schedule="cosine"),
            progress=False,
        )
        assert [len(history.loss) for history in histories] == [num_steps] * 2
        return made.double()

    made = learnt(500)
    found = law_of_x(made)[number(PATTERNS)]
    kl = -float(found.log().mean()) - math.log(6)
    print(f"KL {kl:.3f} nats")
    assert kl < 0.3
    assert torch.equal(law_of_x(learnt(5)), law_of_x(learnt(5)))
    assert not dict(objective.named_buffers())  # each layer had a copy of its own


def test_pretraining_is_kept_in_a_folder(tmp_path: Path) -> None:
    """The same call reads what it did before, layer by layer, to the last bit."""
    for kind in (DeepBoltzmannMachine, DeepBeliefNet):
        folder, weights = tmp_path / kind.__name__, []
        made = kind((4,), widths=(3, 2))
        for again in (
            made,
            made,
            kind((4,), widths=(3, 2)),
        ):  # the same one, and another that has learnt nothing
            pretrain(again, PATTERNS, ContrastiveDivergence(), num_steps=5, run=folder, progress=False)
            weights.append(torch.cat([p.detach().flatten() for p in again.parameters()]))
        assert sorted(path.name for path in folder.iterdir()) == ["layer_1", "layer_2"]
        assert torch.equal(weights[0], weights[1])
        assert torch.equal(weights[0], weights[2])


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(made: Any, x: Tensor, moves: GibbsMoves, repeats: int) -> Tensor:
    rows = []
    for _ in range(repeats):
        loss = ContrastiveDivergence(moves).loss(made, Batch({"x": x}))
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(made.parameters()))]))
    return torch.stack(rows)


def exact_gradient(made: BoltzmannMachine, x: Tensor) -> Tensor:
    """Gradient of -mean log p(x), both sums over all states."""
    couplings = made.couplings()
    rows, hidden = states(len(couplings.biases["x"])).double(), states(made.num_hidden).double()
    energy = torch.stack([couplings.energy({"x": rows, "h": h.expand(len(rows), -1)}) for h in hidden], 1)
    log_weight = (-energy).logsumexp(1)
    log_p = (log_weight - log_weight.logsumexp(0))[number(x)].mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(-log_p, list(made.parameters()))])


def test_gradients_of_a_machine_with_hidden_units_that_are_coupled() -> None:
    """CD-300 within 4.5 pooled standard errors of the exact gradient; CD-1 is not."""
    torch.manual_seed(0)
    made: BoltzmannMachine = randomised(BoltzmannMachine((4,), num_hidden=2), scale=0.8)
    x = (torch.rand(400, 4, dtype=F64) < 0.3).double()
    exact = exact_gradient(made, x)
    found = gradients(made, x, GibbsMoves(300), repeats=16)
    moved = exact != 0  # the lower triangle of W is not used
    pooled = (found.var(0)[moved].mean() / len(found)).sqrt()
    worst = float(((found.mean(0) - exact) / pooled).abs().max())
    print(f"off by at most {worst:.1f} standard errors of {float(pooled):.4f}")
    assert worst < 4.5
    short = gradients(made, x, GibbsMoves(1), repeats=16).mean(0)
    assert float(((short - exact) / pooled).abs().max()) > 10  # CD-1 is biased


def test_the_sign_of_the_negative_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """A twin that adds the two phases instead of subtracting them is found by the exact gradient."""
    torch.manual_seed(0)
    made: BoltzmannMachine = randomised(BoltzmannMachine((4,), num_hidden=2), scale=0.8)
    x = (torch.rand(400, 4, dtype=F64) < 0.3).double()
    exact, right = exact_gradient(made, x), Couplings.statistics

    def added(self: Couplings, state: Any, share: Tensor) -> Couplings:
        return right(self, state, -share.abs())

    monkeypatch.setattr(Couplings, "statistics", added)
    found = gradients(made, x, GibbsMoves(50), repeats=8)
    pooled = (found.var(0)[exact != 0].mean() / len(found)).sqrt()
    assert float(((found.mean(0) - exact) / pooled).abs().max()) > 20


# --- balance of exchanges -------------------------------------------------------------------------------------------


def exchanges(made: Any, betas: tuple[float, float], num_chains: int = 200_000) -> tuple[Tensor, Tensor]:
    """Pairs of states at two temperatures, from their exact laws, before and after one exchange; as numbers."""
    units = _Units(read(made, {}), num_chains=num_chains, num_temperatures=2)
    size = len(made.couplings().biases["x"])
    every_x = states(size).double()
    with torch.no_grad():
        energy = made.couplings().energy({"x": every_x})
        units.betas = torch.tensor(betas)
        laws = [(-beta * energy).softmax(0) for beta in (1.0, 0.0)]
        start = torch.cat([torch.multinomial(law, num_chains, replacement=True) for law in laws])
        units.state = {"x": every_x[start]}
        units._exchange()
    before, after = (
        pair[:num_chains] * 2**size + pair[num_chains:] for pair in (start, number(units.state["x"]))
    )
    return before, after


def worst_flux(before: Tensor, after: Tensor) -> float:
    """Largest z of N(a -> b) against N(b -> a) over the three pairs of states that exchange most."""
    moved = before != after
    codes, counts = torch.unique(torch.stack([before[moved], after[moved]]), dim=1, return_counts=True)
    worst = 0.0
    for a, b in codes[:, counts.argsort(descending=True)[:6]].T:
        there, back = float(((before == a) & (after == b)).sum()), float(((before == b) & (after == a)).sum())
        worst = max(worst, abs(there - back) / math.sqrt(there + back))
    return worst


def test_detailed_balance_of_exchanges_between_temperatures() -> None:
    """From the product of two exact laws as many pairs go from a to b as back; with a wrong acceptance they do not."""
    torch.manual_seed(0)
    made = BoltzmannMachine.of(
        torch.tensor([[0.0, 1.5], [1.5, 0.0]], dtype=F64), torch.tensor([0.4, -1.0], dtype=F64)
    )
    assert worst_flux(*exchanges(made, (1.0, 0.0))) < 4.5
    assert worst_flux(*exchanges(made, (0.0, 1.0))) > 8  # the sign of the ratio lost
    assert worst_flux(*exchanges(made, (2.0, 0.0))) > 8  # the temperature ignored


def test_chains_go_on_from_a_state() -> None:
    """From their end and with other noise: draws of both parts follow the exact law; other chains are refused."""
    made: RBM = randomised(RBM((3,), 2))
    asked: dict[str, Any] = {"num_draws": 1, "num_chains": 3000}
    first = infer(made, Gibbs(num_warmup=50, num_temperatures=2), **asked)
    then = infer(made, Gibbs(num_temperatures=2), state=first.state, **asked)
    assert then.state.step == first.state.step + 1
    assert not torch.equal(first["x"], then["x"])
    law = (-made.free_energy(states(3).double())).softmax(0).detach()
    counts = torch.bincount(number(then.flat("x")), minlength=8).double()
    assert stats.chisquare(counts.numpy(), 3000 * law.numpy()).pvalue > MIN_P
    with pytest.raises(InputError, match="chains"):
        infer(made, Gibbs(num_temperatures=2), state=first.state, num_draws=1, num_chains=2)


# --- bad input ------------------------------------------------------------------------------------------------------


def one_step(made: Any, x: Tensor) -> None:
    fit(made, x, PersistentContrastiveDivergence(num_chains=4), num_steps=1, progress=False)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda: one_step(RBM((2,), 3), torch.full((4, 2), 0.5)), r"0 or 1, got values 0\.5\.\.0\.5"),
        (lambda: one_step(BoltzmannMachine((2,)), torch.tensor([[0.0, -3.0]])), r"-3\.\.0"),
        (lambda: one_step(DeepBoltzmannMachine((2,), (2, 2)), torch.full((4, 2), 16.0)), r"16\.\.16"),
        (lambda: one_step(GaussianRBM((2,), 3), 255 * torch.rand(4, 2)), "(?s)scales from.*[Ss]tandardise"),
        (lambda: one_step(RBM((2,), 3), torch.tensor([[0.0, math.nan]])), "1 NaN"),
        (lambda: one_step(GaussianRBM((2,), 3), torch.tensor([[0.0, math.nan]])), "1 NaN"),
        (lambda: pretrain(net(), torch.full((4, 2, 2), 0.5), ContrastiveDivergence(), num_steps=1), "0 or 1"),
        (lambda: pretrain(net(), torch.ones(4, 3), ContrastiveDivergence(), num_steps=1), "shape"),
        (lambda: DeepBeliefNet((4,), widths=(3,)), "RBM"),
        (lambda: DeepBeliefNet((4,), widths=(3, 0)), "widths"),
        (lambda: TwinRBM((4,), 3, visible_copies=0), "visible_copies"),
        (
            lambda: evidence(RBM((2,), 3), Enumeration(), torch.tensor([[0.0, math.nan]])),
            "1 NaN",
        ),
        (
            lambda: infer(
                DeepBoltzmannMachine((2,), (2, 2)), Guide(), data={"x": torch.tensor([[0.0, math.nan]])}
            ),
            "1 NaN",
        ),
    ],
)
def test_bad_input_is_named(asked: Callable[[], Any], words: str) -> None:
    """NaN, a unit that was not seen, is for Gibbs alone: fits, bounds and other engines refuse it."""
    with pytest.raises(InputError, match=words):
        asked()


# --- digits ---------------------------------------------------------------------------------------------------------


def test_rates_of_the_data_are_where_a_fit_begins() -> None:
    """Without weights each unit of x is on as often as in the data; one that never is stays finite."""
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]]).repeat(8, 1)
    x[:4, 3] = 0
    for made in (RBM((4,), 3, temperature=0.5), DeepBoltzmannMachine((4,), (3, 2))):
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        made.set_rates(x)
        couplings = made.couplings()
        rates = couplings.mean("x", couplings.zeros(1))[0].detach()
        torch.testing.assert_close(rates, torch.tensor([15 / 16, 1 / 16, 1 / 16, 0.5]))


@pytest.mark.slow
def test_pretraining_helps_a_deep_boltzmann_machine() -> None:
    """Held-out digits, 8 x 8 and binarised: after 300 steps in all the bound is higher by 1 nat with pretraining."""
    train, held_out = (binarise_threshold(part.levels, 17).reshape(-1, 64) for part in digits())
    optim = Optim(lr=0.01, schedule="cosine")

    def bound(first: int, then: int) -> Tensor:
        torch.manual_seed(0)
        made = DeepBoltzmannMachine((64,), widths=(100, 50))
        made.set_rates(train)
        objective = PersistentContrastiveDivergence(GibbsMoves(5), num_chains=100)
        if first:
            pretrain(made, train, objective, num_steps=first, batch_size=100, optim=optim, progress=False)
        fit(made, train, objective, num_steps=then, batch_size=100, optim=optim, progress=False)
        return evidence(made, AIS(num_runs=100, num_temperatures=500), held_out).value

    without, with_it = bound(0, 300), bound(100, 100)
    gain = with_it - without
    error = float(gain.std()) / math.sqrt(len(gain))
    print(f"bound {with_it.mean():.2f} nats with pretraining, {without.mean():.2f} without: +- {error:.2f}")
    assert float(gain.mean()) > max(0.5, 4.5 * error)
