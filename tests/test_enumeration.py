"""Discrete latents summed out: against densities summed by hand, value and gradient, by every route."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

from mcmc_tools import Moments, worst_z
from probgen import Batch, InputError, UnsupportedError, infer
from probgen.core import DataSets
from probgen.inference.hmc import HMC
from probgen.randomness import forked_rng
from probgen.targets import read
from probgen.targets.density import ProgramDensity
from probgen.targets.routes import Batched, Route, Single, Vmap

F64 = torch.float64
ROUTES = {"single": Single, "vmap": Vmap, "batched": Batched}
Program = Callable[[], Any]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


Y = tensor(-1.0, 0.3, 2.0, 2.5, 0.1)
TABLE = torch.tensor([[0.8, 0.15, 0.05], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]], dtype=F64)


def pick(values: Tensor, z: Tensor) -> Tensor:
    """values[..., z], chains and plates on the left of values."""
    return Vindex(values)[..., z.long()]


def normal(value: Tensor, loc: Tensor | float, scale: float = 0.7) -> Tensor:
    return dist.Normal(torch.as_tensor(loc, dtype=F64), scale).log_prob(value)


def weights_and_locs() -> tuple[Tensor, Tensor]:
    """w on the simplex (event), mu real, chains may stand on their left."""
    w = pyro.sample("w", dist.Dirichlet(tensor(2.0, 1.0, 1.5)))
    mu = pyro.sample("mu", dist.Normal(tensor(-1.0, 0.0, 2.0), 1.0).to_event(1))
    return w, mu


# --- programs beside the same programs summed by hand; chains may be a dimension on the left of one plate -----------


def mixture() -> None:
    w, mu = weights_and_locs()
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal(pick(mu, z), 0.7), obs=Y)


def mixture_by_hand() -> None:
    w, mu = weights_and_locs()
    joint = w.log() + normal(Y[:, None], mu)
    pyro.factor("y", joint.logsumexp(-1).sum(-1, keepdim=True))


def one_switch() -> None:
    """A single discrete site outside of the plate of the data."""
    w, mu = weights_and_locs()
    z = pyro.sample("z", dist.Categorical(w))
    with pyro.plate("data", 5):
        pyro.sample("y", dist.Normal(pick(mu, z), 0.7), obs=Y)


def one_switch_by_hand() -> None:
    w, mu = weights_and_locs()
    joint = w.log() + normal(Y[:, None], mu).sum(-2, keepdim=True)
    pyro.factor("y", joint.logsumexp(-1))


def outside_and_inside() -> None:
    """A switch s outside of a plate, another z_i for each datum that depends on it."""
    w, mu = weights_and_locs()
    s = pyro.sample("s", dist.Bernoulli(w[..., 0]))
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Categorical(TABLE[s.long()]))
        pyro.sample("y", dist.Normal(pick(mu, z) + s, 0.7), obs=Y)


def outside_and_inside_by_hand() -> None:
    w, mu = weights_and_locs()
    terms = []
    for s, prior in ((0.0, 1 - w[..., :1]), (1.0, w[..., :1])):
        joint = TABLE[int(s)].log() + normal(Y[:, None], mu + s)
        terms.append(prior.log() + joint.logsumexp(-1).sum(-1, keepdim=True))
    pyro.factor("y", torch.stack(terms).logsumexp(0).squeeze(-1)[..., None])


def hidden_markov(transitions: Tensor = TABLE) -> Program:
    def program() -> None:
        w, mu = weights_and_locs()
        z = None
        for t in pyro.markov(range(5)):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=w.log() if z is None else transitions.log()[z]))
            pyro.sample(f"y_{t}", dist.Normal(pick(mu, z), 0.7), obs=Y[t])

    return program


def hidden_markov_by_hand(transitions: Tensor = TABLE) -> Program:
    """The forward algorithm."""

    def program() -> None:
        w, mu = weights_and_locs()
        forward = w.log()
        for t in range(5):
            if t:
                forward = (forward[..., None] + transitions.log()).logsumexp(-2)
            forward = forward + normal(Y[t], mu)
        pyro.factor("y", forward.logsumexp(-1))

    return program


def sequential_plate() -> None:
    """A plate in Python: a discrete site for each turn, all hanging on one outside."""
    w, mu = weights_and_locs()
    s = pyro.sample("s", dist.Bernoulli(w[..., 0]))
    for i in pyro.plate("data", 5):
        z = pyro.sample(f"z_{i}", dist.Categorical(TABLE[s.long()]))
        pyro.sample(f"y_{i}", dist.Normal(pick(mu, z) + s, 0.7), obs=Y[i])


def continuous_below() -> None:
    """A continuous latent whose prior depends on the discrete one."""
    w, mu = weights_and_locs()
    z = pyro.sample("z", dist.Categorical(w))
    x = pyro.sample("x", dist.Normal(pick(mu, z), 0.5))
    pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])


def continuous_below_by_hand() -> None:
    w, mu = weights_and_locs()
    x = pyro.sample("x", dist.Normal(0 * Y[0], 1.0).mask(False))
    pyro.factor("x | z", (w.log() + normal(x[..., None], mu, 0.5)).logsumexp(-1))
    pyro.sample("y", dist.Normal(x, 1.0), obs=Y[0])


FORBIDDEN = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]], dtype=F64)
PAIRS: dict[str, tuple[Program, Program]] = {
    "mixture": (mixture, mixture_by_hand),
    "outside of the plate": (one_switch, one_switch_by_hand),
    "outside and inside": (outside_and_inside, outside_and_inside_by_hand),
    "sequential plate": (sequential_plate, outside_and_inside_by_hand),
    "hidden Markov": (hidden_markov(), hidden_markov_by_hand()),
    "hidden Markov, left to right": (hidden_markov(FORBIDDEN), hidden_markov_by_hand(FORBIDDEN)),
    "continuous below": (continuous_below, continuous_below_by_hand),
}


def density_of(program: Program, data: Mapping[str, Tensor] | None = None) -> ProgramDensity:
    return ProgramDensity(read(program, data))


def points(density: ProgramDensity, n: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return scale * torch.randn(density.dim, n, generator=generator, dtype=F64)


def assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a[1], b[1], rtol=1e-9, atol=1e-9)


@cache
def pair(name: str) -> tuple[ProgramDensity, ProgramDensity]:
    program, by_hand = PAIRS[name]
    return density_of(program), density_of(by_hand)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("name", PAIRS)
def test_sums_are_those_by_hand(name: str, route: type[Route]) -> None:
    """Value and gradient to rounding, for 1, 2 and 100 chains, far out in the tails too."""
    program, by_hand = pair(name)
    for n, scale in ((1, 1.0), (2, 5.0), (100, 1.0)):
        u = points(program, n, scale)
        few = u[:, :5]  # one after another they take long
        expected = Single(by_hand).value_and_grad(few)
        if route is Single:
            assert_same(Single(program).value_and_grad(few), expected)
            continue
        value, grad = route(program).value_and_grad(u)
        assert_same((value[:5], grad[:, :5]), expected)
        assert_same((value, grad), by_hand.value_and_grad(u))


def test_all_chains_run_together() -> None:
    """Programs with sums are recorded like any other, also those written for one chain alone: mu[z]."""

    def natural() -> None:
        w, mu = weights_and_locs()
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], 0.7), obs=Y)

    density = density_of(natural)
    assert isinstance(density.route, Vmap)
    assert density.summed_out == ("z",)
    u = points(density, 7)
    assert_same(density.value_and_grad(u), Single(density_of(mixture_by_hand)).value_and_grad(u))


def test_nested_plates() -> None:
    """A site for each group, another for each member of a group."""
    y = points_on(3, 4)

    def program() -> None:
        w, mu = weights_and_locs()
        with pyro.plate("groups", 4, dim=-1):
            g = pyro.sample("g", dist.Categorical(w))
            with pyro.plate("members", 3, dim=-2):
                z = pyro.sample("z", dist.Categorical(TABLE[g]))
                pyro.sample("y", dist.Normal(mu[z] - mu[g], 0.7), obs=y)

    def by_hand() -> None:
        w, mu = weights_and_locs()
        joint = TABLE.log() + normal(y[..., None, None], mu - mu[:, None])
        groups = w.log() + joint.logsumexp(-1).sum(0)
        pyro.factor("y", groups.logsumexp(-1).sum())

    compare(program, by_hand)


def points_on(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=F64)


def compare(program: Program, by_hand: Program) -> None:
    summed, known = density_of(program), density_of(by_hand)
    u = points(known, 5)
    assert_same(summed.value_and_grad(u), Single(known).value_and_grad(u))
    assert_same(Single(summed).value_and_grad(u), Single(known).value_and_grad(u))


def test_plates_of_their_own() -> None:
    """Two plates of one dimension, of different sizes, under one switch; and a plate of a single row."""
    longer = points_on(7)

    def program() -> None:
        w, mu = weights_and_locs()
        s = pyro.sample("s", dist.Categorical(w))
        with pyro.plate("first", 5):
            pyro.sample("y", dist.Normal(mu[s], 0.7), obs=Y)
        with pyro.plate("second", 7):
            z = pyro.sample("z", dist.Categorical(TABLE[s]))
            pyro.sample("longer", dist.Normal(mu[z], 0.7), obs=longer)
        with pyro.plate("single", 1):
            pyro.sample("one", dist.Normal(mu[s], 0.7), obs=Y[:1])

    def by_hand() -> None:
        w, mu = weights_and_locs()
        second = (TABLE.log() + normal(longer[:, None, None], mu)).logsumexp(-1).sum(0)
        first = normal(Y[:, None], mu).sum(0) + normal(Y[0], mu)
        pyro.factor("y", (w.log() + first + second).logsumexp(-1))

    compare(program, by_hand)


def test_batch_dimensions_without_a_plate_are_independent() -> None:
    def program() -> None:
        w, mu = weights_and_locs()
        z = pyro.sample("z", dist.Categorical(w.expand(5, 3)))
        pyro.sample("y", dist.Normal(mu[z], 0.7), obs=Y)

    compare(program, mixture_by_hand)


# --- scales and masks ---------------------------------------------------------------------------------------------


def test_a_scaled_plate_scales_its_sums() -> None:
    """Rows that stand for more rows: (sum_z p(z) p(y | z))^s, and not sum_z (p(z) p(y | z))^s."""

    def rows(batch: Batch) -> None:
        w, mu = weights_and_locs()
        with batch.plate():
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], 0.7), obs=batch.data["y"])

    def program() -> None:
        rows(Batch({"y": Y}, total=20))

    def by_hand() -> None:
        w, mu = weights_and_locs()
        pyro.factor("y", 4 * (w.log() + normal(Y[:, None], mu)).logsumexp(-1).sum())

    compare(program, by_hand)


def test_data_may_be_scaled_under_a_switch_that_is_not() -> None:
    """p(s) prod_i p(y_i | s)^2; a scaled switch over unscaled data has no such meaning and is refused."""

    def program() -> None:
        w, mu = weights_and_locs()
        s = pyro.sample("s", dist.Categorical(w))
        with pyro.poutine.scale(scale=2.0), pyro.plate("data", 5):
            pyro.sample("y", dist.Normal(mu[s], 0.7), obs=Y)

    def by_hand() -> None:
        w, mu = weights_and_locs()
        pyro.factor("y", (w.log() + 2 * normal(Y[:, None], mu).sum(0)).logsumexp(-1))

    def scaled_switch() -> None:
        w, mu = weights_and_locs()
        with pyro.poutine.scale(scale=2.0):
            s = pyro.sample("s", dist.Categorical(w))
        pyro.sample("y", dist.Normal(mu[s], 0.7), obs=Y[0])

    compare(program, by_hand)
    with pytest.raises(UnsupportedError, match="one scale"):
        density_of(scaled_switch)


def test_masked_rows_do_not_count() -> None:
    keep = torch.tensor([True, False, True, True, False])

    def program() -> None:
        w, mu = weights_and_locs()
        with pyro.plate("data", 5), pyro.poutine.mask(mask=keep):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(mu[z], 0.7), obs=Y)

    def by_hand() -> None:
        w, mu = weights_and_locs()
        # A masked row is a factor of one for each value of its site.
        pyro.factor("y", (w.log() + normal(Y[:, None], mu)).logsumexp(-1)[keep].sum() + 2 * math.log(3))

    compare(program, by_hand)


# --- many posteriors, and draws -----------------------------------------------------------------------------------


def test_data_sets_side_by_side() -> None:
    def program() -> None:
        w, mu = weights_and_locs()
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("y", dist.Normal(pick(mu, z), 0.7))

    sets = points_on(3, 5)
    density = ProgramDensity(read(program, DataSets({"y": sets})))
    u = points(density, 6)
    alone = Single(density_of(program, {"y": sets[2]})).value_and_grad(u[:, 2::3])
    for route in (density.route, Batched(density), Single(density)):
        value, grad = route.value_and_grad(u)
        assert_same((value[2::3], grad[:, 2::3]), alone)


def test_marginals_of_a_run_are_exact() -> None:
    """theta ~ N(0, 1), z_i ~ Bernoulli(sigmoid(theta)), y_i ~ N(2 z_i, 1): mean and sd by quadrature.

    With about 4,000 effective draws a mean off by 7 % of an sd is found; the twin that forgets the prior of z is off
    by 40 %.
    """
    y = tensor(1.5, 2.5, 2.0, -0.5, 1.2)

    def program(prior_of_z: bool = True) -> None:
        theta = pyro.sample("theta", dist.Normal(tensor(0.0)[0], 1.0))
        with pyro.plate("data", 5):
            logits = theta if prior_of_z else 0 * theta
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)

    grid = torch.linspace(-8, 8, 4001, dtype=F64)[:, None]
    on, off = normal(y, 2.0, 1.0) - torch.nn.functional.softplus(-grid), normal(y, 0.0, 1.0)
    log_p = torch.logaddexp(on, off - torch.nn.functional.softplus(grid)).sum(1) - 0.5 * grid[:, 0].square()
    p = log_p.softmax(0)
    mean = float(p @ grid[:, 0])
    exact = {"theta": Moments(mean, float(p @ (grid[:, 0] - mean).square()) ** 0.5)}
    engine = HMC(num_steps=6, num_warmup=200)
    draws = infer(program, engine, num_draws=500, num_chains=16, seed=0).draws
    assert set(draws) == {"theta"}
    assert worst_z(draws, exact)[0] < 4.5
    broken = infer(program, engine, args=(False,), num_draws=500, num_chains=16, seed=0).draws
    assert worst_z(broken, exact)[0] > 10


# --- wrong use ----------------------------------------------------------------------------------------------------


def crossed_plates() -> None:
    """Every pair of rows and columns shares a factor, as in a Boltzmann machine."""
    w, _ = weights_and_locs()
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Bernoulli(w[..., 0]))
    with columns:
        b = pyro.sample("b", dist.Bernoulli(w[..., 1]))
    with rows, columns:
        pyro.sample("y", dist.Normal(a - b, 1.0), obs=torch.zeros(3, 4, dtype=F64))


def summed_over_its_plate() -> None:
    w, mu = weights_and_locs()
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Bernoulli(w[..., 0]))
    with pyro.plate("single", 1):
        pyro.sample("y", dist.Normal(z.sum(-1, keepdim=True), 1.0), obs=Y[:1])


def summed_from_the_left() -> None:
    w, mu = weights_and_locs()
    with pyro.plate("data", 5):
        z = pyro.sample("z", dist.Bernoulli(w[..., 0]))
    pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=Y[0])


def chosen_by_if() -> None:
    w, mu = weights_and_locs()
    z = pyro.sample("z", dist.Bernoulli(w[..., 0]))
    pyro.sample("y", dist.Normal(mu[..., 0] if z else mu[..., 1], 1.0), obs=Y[0])


def recorded() -> None:
    w, mu = weights_and_locs()
    z = pyro.sample("z", dist.Bernoulli(w[..., 0]))
    pyro.deterministic("loc", mu[..., 0] * z)


REFUSED = {
    crossed_plates: ("'a', 'b' of independent plates", "sequential"),
    summed_over_its_plate: ("stands outside of its plate 'data'", "Move the site into the plate"),
    summed_from_the_left: ("'y' has a dimension -1 of size 2", "from the right"),
    chosen_by_if: ("failed at site 'z'", "torch.where instead of if"),
    recorded: ("Deterministic site 'loc'", "leave it out"),
}


@pytest.mark.parametrize("program", REFUSED, ids=lambda program: program.__name__)
def test_wrong_use_is_named(program: Program) -> None:
    """Each of these would be a wrong density, or an error from deep within."""
    with forked_rng(0), pytest.raises(UnsupportedError) as caught:
        density_of(program)
    for words in REFUSED[program]:
        assert words in str(caught.value)


def test_nothing_but_discrete_latents_is_nothing_to_draw() -> None:
    def program() -> None:
        pyro.sample("z", dist.Bernoulli(tensor(0.3)[0]))

    with pytest.raises(InputError, match="'z'.*discrete, and are summed out"):
        density_of(program)
