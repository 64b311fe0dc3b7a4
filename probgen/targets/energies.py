"""Energies and scores, functions or networks, as what chains move in: unconstrained space is the event, flat."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from probgen.core import Energetic, InputError, ScoreOnly, describe
from probgen.randomness import forked_rng
from probgen.targets.density import Density
from probgen.targets.graphs import recorded
from probgen.targets.point import Values

_SMALL = (
    64  # coordinates of an energy whose operations are recorded; beyond, they cost more than what calls them
)
_REPEATABLE, _ALONE = (
    1e-5,
    1e-3,
)  # relative: between two calls, and between batches, whose sums have another order
_ROWS = 3


class EnergyDensity(Density):
    """log p(x) = -E(x) of an `Energetic` program, its gradient by autograd; of a `ScoreOnly` one the gradient alone.

    All chains go through one call, outside of any vmap. Draws have the site "x".

    Args:
        program: with `energy(x)` or `grad_log_prob(x)`, and an `event_shape`. Points have the dtype and device of its
            weights; torch's default where it has none.

    Raises:
        InputError: no `event_shape`, output of another shape, an energy that is random, that x does not enter, or that
            depends on the other rows of a batch.
    """

    def __init__(self, program: Energetic | ScoreOnly) -> None:
        event_shape = getattr(program, "event_shape", None)
        if event_shape is None:
            raise InputError(
                f"{describe(program)} has no event_shape, so the shape of x is unknown: set it, "
                "or wrap the function in Energy(function, event_shape)."
            )
        self.program, self.event_shape = program, tuple(event_shape)
        self.dim = math.prod(self.event_shape)
        self.dtype, self.device = _kind_of(program)
        self.has_log_prob = isinstance(program, Energetic)
        self.dims = {"x": tuple(f"x_dim_{i}" for i in range(len(self.event_shape)))}
        self._check()

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        x = self._events(u.detach()).contiguous()  # networks are slow on rows that are strewn over memory
        value, grad = self._by_energy(x) if isinstance(self.program, Energetic) else self._by_score(x)
        return value, grad.reshape(len(x), -1).mT.contiguous()

    def function(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        graph = self._recorded(u) if self.dim <= _SMALL else None
        return self.value_and_grad if graph is None else graph

    def constrain(self, u: Tensor) -> Values:
        return {"x": self._events(u)}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        if "x" not in values or values["x"].shape[1:] != self.event_shape:
            got = {name: tuple(value.shape[1:]) for name, value in values.items()}
            raise InputError(
                f"{describe(self.program)} starts from draws of site 'x' of shape {self.event_shape}, got {got}."
            )
        return values["x"].to(self.device, self.dtype).reshape(-1, self.dim).mT.contiguous()

    def blame(self, u: Tensor) -> str:
        value, _ = self.value_and_grad(u)
        if not self.has_log_prob:
            return "the score"
        return "the gradient of the energy" if bool(torch.isfinite(value).all()) else "the energy"

    def _events(self, u: Tensor) -> Tensor:
        return u.mT.reshape(-1, *self.event_shape)

    def _by_energy(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.program, Energetic)
        with torch.enable_grad():
            x = x.requires_grad_()
            energy = self.program.energy(x)
            (grad,) = torch.autograd.grad(energy.sum(), x)
        return -energy.detach(), -grad

    def _by_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.program, ScoreOnly)
        with torch.no_grad():
            return x.new_full((len(x),), torch.nan), self.program.grad_log_prob(x)

    def _recorded(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
        """`value_and_grad` written down; None where choices depend on values, or chance, or it cannot be done."""

        def all_chains(u: Tensor) -> tuple[Tensor, Tensor]:
            x = self._events(u)
            if isinstance(self.program, Energetic):
                grad, value = torch.func.grad(self._summed, has_aux=True)(x)
            else:
                value, grad = self._by_score(x)
            return value, grad.reshape(len(x), -1).mT.contiguous()

        elsewhere = u + 1
        try:
            graph = recorded(all_chains, u)
            pairs = zip(graph(elsewhere), self.value_and_grad(elsewhere), strict=True)
        except Exception:  # noqa: BLE001 - whatever a function raises that cannot be followed
            return None
        return graph if all(_close(found, expected, _REPEATABLE) for found, expected in pairs) else None

    def _summed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.program, Energetic)
        log_prob = -self.program.energy(x)
        return log_prob.sum(), log_prob

    # --- at the border ---

    def _check(self) -> None:
        """Shapes, that x enters, that the same point has the same energy, alone or among others."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_ROWS, *self.event_shape, generator=generator, dtype=torch.float64)
        x = x.to(self.device, self.dtype)
        if not isinstance(self.program, Energetic):
            self._check_shape("score", self._called(x), tuple(x.shape))
            return
        energy = self._called(x)
        self._check_shape("energy", energy, (_ROWS,))
        if not energy.requires_grad:
            raise InputError(
                f"The energy of {describe(self.program)} does not depend on x by operations torch can differentiate. "
                "Write it in torch, without detach(), no_grad() and numpy."
            )
        if not _close(energy, self._called(x, seed=1), _REPEATABLE):
            raise InputError(
                f"The energy of {describe(self.program)} is random: two calls at the same x differ. An accept step "
                "would accept its luck. Switch off dropout and noise (eval()), or give its gradient alone as a Score."
            )
        if not _close(energy[:1], self._called(x[:1]), _ALONE):
            raise InputError(
                f"The energy of {describe(self.program)} at one x depends on the other rows of the batch, so that "
                "chains would move each other. Leave out what mixes rows (batch normalisation in training mode)."
            )

    def _called(self, x: Tensor, seed: int = 0) -> Tensor:
        with forked_rng(seed), torch.enable_grad():
            x = x.clone().requires_grad_()
            return (
                self.program.energy(x)
                if isinstance(self.program, Energetic)
                else self.program.grad_log_prob(x)
            )

    def _check_shape(self, what: str, value: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(value.shape) != expected:
            raise InputError(
                f"The {what} of {describe(self.program)} at x of shape {(_ROWS, *self.event_shape)}: expected shape "
                f"{expected}, got {tuple(value.shape)}"
                + (": sum over the event, and keep no dimension of it." if what == "energy" else ".")
            )


def _kind_of(program: Energetic | ScoreOnly) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of the weights, or buffers, of a module."""
    tensors: Iterable[Tensor] = ()
    if isinstance(program, nn.Module):
        tensors = (*program.parameters(), *program.buffers())
    for tensor in tensors:
        if tensor.is_floating_point():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    size = float(b.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * size, equal_nan=True)
