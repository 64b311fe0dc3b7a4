"""Chains that begin far out, and programs that fail there: warm-up brings all of them to where the mass is."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen import HMC, ChEES, DataSets, InputError, infer
from probgen.kernels.run import Chains
from probgen.kernels.starts import left_behind
from probgen.targets import density, read


def test_chains_follow_others_of_their_data_set() -> None:
    """Two data sets, columns chain by chain: those that are lost are given chains that are not."""
    log_prob = torch.tensor([[-1.0, -900.0], [-500.0, -902.0], [-3.0, -5000.0], [-600.0, torch.nan]])
    behind, follows = left_behind(log_prob.flatten(), dim=3, num_sets=2)
    assert behind.tolist() == [False, False, True, False, False, True, True, True]
    assert follows.tolist() == [0, 1, 4, 3, 4, 1, 4, 3]


def test_nobody_follows_where_nobody_is_lost() -> None:
    behind, follows = left_behind(torch.tensor([-1.0, -36.0, -20.0]), dim=3, num_sets=1)
    assert not bool(behind.any())
    assert follows.tolist() == [0, 1, 2]


def plateau() -> None:
    """N(0, 1), and beyond 30 a plateau 500 nats below on which nothing pulls back."""
    x = pyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("bell", torch.logaddexp(-0.5 * x.square(), -500 - 0.5 * ((x - 60) / 20).square()))


def spread(engine: HMC) -> float:
    start = infer(plateau, HMC(step_size=0.1, num_warmup=0), num_draws=1, num_chains=16)
    start.draws["x"] = torch.where(torch.arange(16)[:, None] < 4, 60.0, start["x"])
    return float(infer(plateau, engine, init=start, num_draws=200, num_chains=16)["x"].abs().max())


def test_warm_up_fetches_chains_from_a_plateau(monkeypatch: pytest.MonkeyPatch) -> None:
    """No draw stands beyond 10 sd; without being fetched, chains stay at 60."""
    engine = HMC(num_steps=5, num_warmup=100)
    assert spread(engine) < 10
    monkeypatch.setattr(Chains, "_gather", lambda chains: None)
    assert spread(engine) > 30


class Fails(torch.autograd.Function):
    """The identity, of which the calculation fails beyond 4: as a solver's."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        if bool((x.abs() > 4).any()):
            raise RuntimeError("underflow in dt")
        return x.clone()

    @staticmethod
    def backward(_: object, *grads: Tensor) -> Tensor:
        return grads[0]


def solved() -> None:
    with pyro.plate("n", 2):
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.5))
        pyro.sample("y", dist.Normal(Fails.apply(x), 1.0))


def test_a_program_that_fails_far_out_has_no_density_there() -> None:
    """Columns that fail have log p = -inf, the others what they have alone; by any number of columns and data sets."""
    y = torch.tensor([[0.5, -1.0], [1.0, 2.0]], dtype=torch.float64)
    together = density(read(solved, DataSets({"y": y})))
    u = torch.tensor([[0.1, 5.0, 1.0, -0.4, 0.3, 2.0], [0.2, 0.1, -7.0, 1.0, 2.0, 0.5]], dtype=torch.float64)
    value, grad = together.value_and_grad(u)
    assert torch.isinf(value).tolist() == [False, True, True, False, False, False]
    for i in (0, 3, 4, 5):
        alone = density(read(solved, {"y": y[i % 2]}))
        expected, slope = alone.value_and_grad(u[:, i : i + 1])
        torch.testing.assert_close(value[i : i + 1], expected)
        torch.testing.assert_close(grad[:, i : i + 1], slope)


@pytest.mark.parametrize("engine", [HMC(num_steps=4, num_warmup=200), ChEES(num_warmup=200)], ids=str)
def test_chains_of_a_program_that_fails_far_out_stay_inside(engine: HMC | ChEES) -> None:
    data = {"y": torch.tensor([0.5, 3.5], dtype=torch.float64)}
    x = infer(solved, engine, data=data, num_draws=200, num_chains=8)["x"]
    assert float(x.abs().max()) <= 4
    assert float(x.abs().max()) > 3


def test_a_program_that_fails_everywhere_is_named() -> None:
    def broken() -> None:
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if bool(x.detach().abs() >= 0):
            pyro.sample("y", dist.Normal(x.reshape(3), 1.0))

    with pytest.raises(InputError):
        infer(broken, HMC(), data={"y": torch.zeros(3)}, num_draws=2)
