"""What a program must be for Markov chains to draw from it, found out at a few points by single chains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from probgen.core import InputError, Target, UnsupportedError, describe
from probgen.randomness import forked_rng
from probgen.targets.choosing import Alone
from probgen.targets.point import Latent, jacobian
from probgen.targets.routes import Single

_FAR = (40.0, 80.0)  # the sigmoid is 1 at both in float32, exp is finite at both
_ROUNDING = 1e-6  # sums on accelerators are not done in the same order twice
_MOVES = (4.0, -4.0)


def check_known(target: Target, name: str, law: Any) -> None:
    """Raise `UnsupportedError` where the density of a latent is a bound, or not known at all."""
    kind = getattr(law, "density_kind", "exact")
    if kind in ("exact", "unnormalised"):
        return
    raise UnsupportedError(
        f"Site {name!r} of {describe(target.program)} has the law {law}, of whose density "
        + ("a random lower bound is known alone" if kind == "lower bound" else "nothing is known")
        + ": chains that accept or reject by it would draw from something else. Engines that need no density of a "
        "prior: TwistedSMC, SplitGibbs, GuidedSDE and GuidedODE for a diffusion or a flow, HMC(space='noise') for what "
        "is decoded from noise."
    )


def check_repeatable(target: Target, single: Single, u: Tensor, value: float) -> None:
    """Raise `InputError` where log p(u) is another one when the random stream is."""
    with forked_rng(1):
        again = float(single.value_and_grad(u[:, None])[0])
    same = math.isclose(again, value, rel_tol=_ROUNDING) or (math.isnan(again) and math.isnan(value))
    if not same:
        raise InputError(
            f"{describe(target.program)} has a random density: two runs at the same point gave {value:.6g} and "
            f"{again:.6g}. Draw random numbers by pyro.sample, outside of the program, or not at all; layers with "
            "dropout must be in evaluation mode."
        )


def with_idle_entries(
    latents: Iterable[Latent], masks: Mapping[str, Tensor], single: Single, u: Tensor
) -> tuple[Latent, ...]:
    """The layout, where latents say whether anything depends on those of their entries that are masked out."""
    return tuple(
        replace(latent, idle=latent.name in masks and _is_idle(latent, masks[latent.name], single, u))
        for latent in latents
    )


def _is_idle(latent: Latent, mask: Tensor, single: Single, u: Tensor) -> bool:
    event_dims = len(latent.unconstrained_shape) - latent.batch_dims
    out = (~mask)[..., *[None] * event_dims].expand(latent.unconstrained_shape)
    moved = u.clone()
    moved[latent.start : latent.stop] += out.reshape(-1).to(u)

    def others(u: Tensor) -> float:
        return float(sum(term for name, term in single.terms(u).items() if name != jacobian(latent.name)))

    return others(moved) == others(u)


def check_proper(target: Target, latents: Iterable[Latent], single: Single, alone: Alone) -> None:
    """Raise `InputError` where the density does not depend on a coordinate that reaches to infinity.

    This is a sign of an improper posterior that can be trusted; others show when chains run away.
    """
    points = [alone.u[:, i] for i in alone.columns]
    values, grads = zip(*(single.without_jacobians(u) for u in points), strict=True)
    held = torch.stack(grads).ne(0).any(0)
    transforms = single.at(points[0], single.data(0)).transforms
    for latent in latents:
        if latent.free:
            continue
        suspects = [i for i in range(latent.start, latent.stop) if not held[i]]
        if suspects and not _is_bounded(transforms[latent.name], latent, points[0]):
            for coordinate in suspects:
                if _nothing_moves(single, points[0], values[0], coordinate):
                    raise InputError(_improper(target, latent))


def _is_bounded(transform: Any, latent: Latent, like: Tensor) -> bool:
    """Far out in unconstrained space values do not move any more."""
    near, far = (transform(torch.full(latent.unconstrained_shape, u).to(like)) for u in _FAR)
    return torch.allclose(near, far)


def _nothing_moves(single: Single, u: Tensor, value: Tensor, coordinate: int) -> bool:
    step = torch.zeros_like(u)
    step[coordinate] = 1
    return all(bool(single.without_jacobians(u + move * step)[0] == value) for move in _MOVES)


def _improper(target: Target, latent: Latent) -> str:
    return (
        f"The posterior of {describe(target.program)} is improper: the law of site {latent.name!r} is flat on a "
        "support without end, and neither an observation nor another site depends on it. Give it a proper prior, "
        "observe something that depends on it, or leave it out."
    )
