"""Distributions of our own against Pyro's."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from probgen.distributions import DiagonalNormal

LOC = torch.randn(4, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [torch.tensor(0.7), torch.rand(3, 2) + 0.5], ids=["one", "each"])
@pytest.mark.parametrize("event_dim", [1, 2])
def test_density_and_gradients_are_pyros(scale: Tensor, event_dim: int) -> None:
    x = torch.randn(5, 4, 3, 2, dtype=torch.float64)
    if scale.ndim and event_dim == 1:
        scale = scale[0]
    results = []
    for family in (DiagonalNormal, dist.Normal):
        loc, spread = LOC.clone().requires_grad_(), scale.double().requires_grad_()
        law = family(loc, spread).to_event(event_dim)
        log_prob = law.log_prob(x)
        results.append((log_prob, *torch.autograd.grad(log_prob.cos().sum(), (loc, spread))))
        assert law.batch_shape == LOC.shape[: LOC.ndim - event_dim]
        assert law.event_shape == LOC.shape[LOC.ndim - event_dim :]
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs)


def test_draws_and_moments() -> None:
    law = DiagonalNormal(LOC, torch.tensor(0.3, dtype=torch.float64)).to_event(2)
    draws = law.rsample((20_000,))
    assert draws.shape == (20_000, *LOC.shape)
    assert float(((draws.mean(0) - law.mean) / (law.variance / 20_000).sqrt()).abs().max()) < 4.5
    assert float(((draws.var(0) / law.variance - 1) / (2 / 20_000) ** 0.5).abs().max()) < 4.5


def test_it_expands_and_checks_like_any_other() -> None:
    law = DiagonalNormal(LOC, torch.tensor(0.3, dtype=torch.float64)).to_event(2)
    assert law.expand((7, 4)).log_prob(torch.zeros(7, 4, 3, 2, dtype=torch.float64)).shape == (7, 4)
    assert law.to_event(1).event_dim == 3
    with pytest.raises(ValueError, match="positive|GreaterThan|constraint"):
        DiagonalNormal(LOC, torch.tensor(-1.0), validate_args=True)
