"""Where chains begin: uniformly in (-2, 2) of unconstrained space, or at the draws of another posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from probgen.core import InputError, Posterior
from probgen.kernels.core import per_set
from probgen.randomness import Noise
from probgen.targets import Density

_RADIUS = 2.0
_TRIES = 100
_NATS, _NATS_PER_DIM = 30.0, 2.0  # by which the log density of a chain that is lost is lower
_KEY = 2**63  # of the noise, beyond those of transitions


def starting_points(
    density: Density, num_columns: int, seed: int, init: Posterior | None, first_column: int = 0
) -> Tensor:
    """Points of finite density and gradient, `(dim, num_columns)`.

    Without `init` columns are uniform in (-2, 2); those that are not finite are drawn again, up to 100 times, nearer
    and nearer to 0. With it they are draws of each of its chains, spread evenly up to the last.

    Raises `InputError` where no finite start is found, naming the site.
    """
    if init is not None:
        return _given(density, num_columns, init, first_column)
    # The start of chain i does not depend on how many chains there are.
    noise = Noise(seed, 1, num_columns, (density.dim,), torch.float64, first=first_column)
    u = torch.empty(density.dim, num_columns, dtype=density.dtype, device=density.device)
    finite = torch.zeros(num_columns, dtype=torch.bool, device=density.device)
    for attempt in range(_TRIES):
        radius = _RADIUS * (1 - attempt / _TRIES)
        fresh = (radius * torch.erf(noise(_KEY + attempt).mT * 0.5**0.5)).to(u)
        u = torch.where(finite, u, fresh)
        finite = _is_finite(density, u)
        if bool(finite.all()):
            return u.contiguous()
    raise InputError(
        f"No start was found: {_blame(density, u, finite)} is not finite at {_TRIES} random points of unconstrained "
        "space. Check the program's support and data there, or start from draws: infer(..., init=posterior)."
    )


def left_behind(log_prob: Tensor, dim: int, num_sets: int) -> tuple[Tensor, Tensor]:
    """Which chains are lost on their way from the start, and whom each could follow.

    A chain whose log density is below the best one of its data set by more than 30 + 2 dim nats stands where there is
    next to no mass, as on a plateau far out: a mode there would have to be exp(2) times wider in every direction.

    Args:
        log_prob: `(n,)`, not finite for chains that are lost too.
        dim: number of coordinates.
        num_sets: data sets; chain i belongs to set i mod num_sets.

    Returns which chains are left behind and, for every chain, a chain of its data set that is not, `(n,)` each.

    >>> left_behind(torch.tensor([-3.0, -500.0, -2.0, -4.0]), dim=2, num_sets=1)
    (tensor([False,  True, False, False]), tensor([0, 2, 2, 3]))
    """
    each = per_set(log_prob.nan_to_num(nan=-torch.inf), num_sets)
    behind = each < each.amax(0) - (_NATS + _NATS_PER_DIM * dim)
    order = behind.to(torch.int8).argsort(stable=True, dim=0)  # those that are not, first
    place = torch.arange(len(each), device=each.device)[:, None] % (~behind).sum(0).clamp(min=1)
    chain = torch.where(behind, order.gather(0, place.expand_as(order)), torch.arange(len(each))[:, None])
    return behind.flatten(), (chain * num_sets + torch.arange(num_sets)).flatten()


def _given(density: Density, num_columns: int, init: Posterior, first_column: int) -> Tensor:
    """The draws to start from, in unconstrained space."""
    first = first_column // density.num_sets
    chosen = _chosen(init, first + num_columns // density.num_sets)
    chosen = {name: value[first:] for name, value in chosen.items()}
    if density.sets_shown:
        chosen = {name: value.flatten(0, 1) for name, value in chosen.items()}
    try:
        u = density.unconstrain(chosen)
    except (RuntimeError, ValueError, IndexError):  # of transforms that are given other shapes than theirs
        u = torch.empty(0)
    if u.shape != (density.dim, num_columns):
        shapes = {name: tuple(value.shape[2:]) for name, value in init.draws.items()}
        raise InputError(
            f"The draws of `init` do not fit: the program has {density.dim} unconstrained coordinates for each of "
            f"{density.num_sets} data sets, the draws have shapes {shapes}. They must come from the same program."
        )
    finite = _is_finite(density, u)
    if not bool(finite.all()):
        raise InputError(
            f"A chain cannot start at its draw of `init`: {_blame(density, u, finite)} is not finite there. The draws "
            "must come from the same program and observations, inside their supports."
        )
    return u.contiguous()


def _chosen(init: Posterior, num_chains: int) -> dict[str, Tensor]:
    """One draw for each of `num_chains`, `(num_chains, ...)`: of every chain in turn, the last draws among them."""
    each = -(-num_chains // init.num_chains)
    if each > init.num_draws:
        raise InputError(
            f"{num_chains} chains cannot start from {init.num_chains} x {init.num_draws} draws: there must be one each."
        )
    draws = [init.num_draws - 1 - k * init.num_draws // each for k in range(each)]
    return {
        name: value[:, draws].transpose(0, 1).flatten(0, 1)[:num_chains] for name, value in init.draws.items()
    }


def _is_finite(density: Density, u: Tensor) -> Tensor:
    """Which columns have a finite gradient, and a finite density where it is known: `(n,)`."""
    log_prob, grad = density.value_and_grad(u)
    finite = torch.isfinite(grad).all(0)
    return finite & torch.isfinite(log_prob) if density.has_log_prob else finite


def _blame(density: Density, u: Tensor, finite: Tensor) -> str:
    """What is not finite, and in which chain first."""
    column = int((~finite).nonzero()[0, 0])
    return f"{density.blame(u[:, column : column + 1])} (chain {column // density.num_sets})"
