"""Stochastic solvers through torchsde, one step at a time.

torchsde's solver classes are used without its driver `sdeint`: they take a step between two numbers, so that N steps
are N steps whatever rounding does to a clock of tensors, no call is made to look at shapes, and no Brownian tree is
built. Noise comes from `BrownianSteps`, or from a `BrownianPath` that is the same at every step size.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from probgen.core import InputError, NonFiniteWarning, did_you_mean
from probgen.dynamics.fields import ClockedField

SDEMethod = Literal["euler", "heun", "srk"]
SDE_METHODS: tuple[SDEMethod, ...] = get_args(SDEMethod)
Calculus = Literal["ito", "stratonovich"]
CALCULI: tuple[Calculus, ...] = get_args(Calculus)
_OF_CALCULUS = {"ito": ("euler", "milstein", "srk"), "stratonovich": ("heun", "milstein")}
_STAGES: dict[str, tuple[float, ...]] = {"euler": (0.0,), "heun": (0.0,), "srk": (0.0, 0.75)}
CALLS_PER_STEP: dict[str, int] = {"euler": 1, "heun": 2, "srk": 2}


class Brownian(Protocol):
    """Where solvers get their noise: increments over steps, of the shape of the state, not to be written into."""

    def increment(self, a: float, b: float) -> Tensor:
        """W(b) - W(a)."""

    def increment_and_area(self, a: float, b: float) -> tuple[Tensor, Tensor]:
        """W(b) - W(a) and the integral of W(s) - W(a) over s in [a, b]."""


# --- fields of one network call, on the clock -------------------------------------------------------------------


def solve_sde(field: ClockedField, x: Tensor, brownian: Brownian, method: str = "euler") -> Tensor:
    """Integrate the field with its noise from x `(batch, *event)` over its clock: the last of `sde_states`."""
    return deque(sde_states(field, x, brownian, method), maxlen=1)[0]


def sde_states(field: ClockedField, x: Tensor, brownian: Brownian, method: str = "euler") -> Iterator[Tensor]:
    """The state after each of `field.num_steps` steps.

    Args:
        field: drift and noise on a clock of unit steps; the noise does not depend on the state.
        x: the state at clock 0, `(batch, *event)`.
        brownian: a Brownian motion on the clock, in [0, num_steps].
        method: "euler" (Euler-Maruyama; strong order 1 as the noise is additive, 1 call of the network a step), "heun"
            (2 calls; strong order 1, order 2 in the drift alone) or "srk" (Roessler's SRA1; 2 calls, strong order 1.5).

    Raises:
        InputError: an unknown method.

    Source: Kloeden & Platen (1992); Roessler (2010), doi 10.1137/09076636X.
    """
    check_sde_method(method)
    field.tabulate(x, _STAGES[method])
    # The noise is additive, so that Ito and Stratonovich are one.
    calculus: Calculus = "stratonovich" if method == "heun" else "ito"
    step = _solver(method, _ClockedSystem(field, calculus), brownian)
    for u in range(field.num_steps):
        x = step(float(u), float(u + 1), x)
        yield x


def check_sde_method(method: str) -> None:
    """Raise `InputError` unless `method` is one of `SDE_METHODS`."""
    if method not in SDE_METHODS:
        raise InputError(f"Unknown SDE method {method!r}; {did_you_mean(method, SDE_METHODS)}")


class _ClockedSystem:
    """A `ClockedField` as torchsde's solvers want it. What they ask for twice in a row is worked out once."""

    noise_type = "additive"

    def __init__(self, field: ClockedField, calculus: Calculus) -> None:
        self.field, self.sde_type = field, calculus
        self._asked: tuple[float, Tensor] | None = None
        self._answer: Tensor | None = None

    def f_and_g_prod(self, u: float, x: Tensor, increment: Tensor) -> tuple[Tensor, Tensor]:
        return self.field.drift_and_noise(u, x, increment)

    def f(self, u: float, x: Tensor) -> Tensor:
        if self._answer is None or self._asked is None or self._asked[0] != u or self._asked[1] is not x:
            self._asked, self._answer = (u, x), self.field.drift(u, x)
        return self._answer

    def g_prod(self, u: float, x: Tensor, increment: Tensor) -> Tensor:
        return self.field.noise(u, x, increment)


# --- any SDE with diagonal noise --------------------------------------------------------------------------------


def integrate_sde(
    drift: Callable[[Tensor, Tensor], Tensor],
    diffusion: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    times: Sequence[float] | Tensor,
    brownian: Brownian,
    *,
    method: str = "euler",
    calculus: str = "ito",
) -> Tensor:
    """Integrate dx = drift(x, t) dt + diffusion(x, t) dW, one step between each two times.

    Args:
        drift, diffusion: x `(batch, *event)` and t `(1,)` -> `(batch, *event)`; each coordinate has its own noise,
            which may depend on the state.
        x: the state at the first time.
        times: `(n + 1,)`, strictly increasing; to run backwards, substitute s = -t.
        brownian: `BrownianSteps`, or a `BrownianPath` over these times to compare step sizes on one path.
        method: for Ito "euler" (strong order 1/2), "milstein" (1) or "srk" (Roessler's SRI2, 3/2); for Stratonovich
            "heun" or "milstein" (1). "milstein" differentiates the diffusion.
        calculus: what dW means, "ito" or "stratonovich"; they differ wherever the diffusion depends on x.

    Returns:
        The state at every time, `(n + 1, batch, *event)`.

    Raises:
        InputError: times that do not increase, an unknown method or calculus, one method not made for the calculus,
            shapes that do not agree.

    Source: Kloeden & Platen (1992), ISBN 978-3-540-54062-5; Roessler (2010), doi 10.1137/09076636X.

    >>> from probgen.randomness import BrownianSteps, Noise
    >>> steps = BrownianSteps(Noise(seed=0, num_chains=1, num_draws=4, shape=(1,)))
    >>> stock = torch.ones(4, 1)
    >>> integrate_sde(lambda x, t: 0.1 * x, lambda x, t: 0.2 * x, stock, [0.0, 0.5, 1.0], steps).shape
    torch.Size([3, 4, 1])
    """
    clock = _clock(times)
    _check_calculus(method, calculus)
    from torchsde._core.base_sde import ForwardSDE

    system = ForwardSDE(_DiagonalSystem(drift, diffusion, calculus))
    step = _solver(method, system, brownian)
    states = [x]
    for a, b in pairwise(clock.unbind() if method == "srk" else clock.tolist()):  # SRI2 asks for dt.sqrt()
        states.append(step(a, b, states[-1]))
    path = torch.stack(states)
    warn_of_non_finite(clock, path)
    return path


def _clock(times: Sequence[float] | Tensor) -> Tensor:
    clock = torch.as_tensor(times, dtype=torch.float64)
    if clock.ndim != 1 or len(clock) < 2 or not bool((clock.diff() > 0).all()):
        raise InputError(
            f"times must be (n + 1,) with n >= 1 and strictly increasing, got {_shown(times)}. To run backwards, "
            "substitute s = -t."
        )
    return clock


def _shown(times: Sequence[float] | Tensor) -> str:
    listed = times.tolist() if isinstance(times, Tensor) else list(times)
    return f"{listed}" if len(listed) <= 6 else f"{listed[:3]}...{listed[-2:]} ({len(listed)} times)"


def _check_calculus(method: str, calculus: str) -> None:
    if calculus not in CALCULI:
        raise InputError(f"Unknown calculus {calculus!r}; {did_you_mean(calculus, CALCULI)}")
    known = sorted({name for methods in _OF_CALCULUS.values() for name in methods})
    if method not in known:
        raise InputError(f"Unknown SDE method {method!r}; {did_you_mean(method, known)}")
    if method not in _OF_CALCULUS[calculus]:
        other = "stratonovich" if calculus == "ito" else "ito"
        raise InputError(
            f"{method!r} converges to the {other.title()} solution, which is another process than the "
            f"{calculus.title()} one. Use one of {', '.join(map(repr, _OF_CALCULUS[calculus]))}, or add "
            f"{'-' if calculus == 'ito' else '+'}1/2 g dg/dx to the drift and say calculus={other!r}."
        )


class _DiagonalSystem:
    """A user's SDE as torchsde wants it."""

    noise_type = "diagonal"

    def __init__(
        self,
        drift: Callable[[Tensor, Tensor], Tensor],
        diffusion: Callable[[Tensor, Tensor], Tensor],
        calculus: str,
    ) -> None:
        self.drift, self.diffusion, self.sde_type = drift, diffusion, calculus

    def f(self, t: Any, x: Tensor) -> Tensor:
        return self._asked("drift", self.drift, t, x)

    def g(self, t: Any, x: Tensor) -> Tensor:
        return self._asked("diffusion", self.diffusion, t, x)

    @staticmethod
    def _asked(name: str, function: Callable[[Tensor, Tensor], Tensor], t: Any, x: Tensor) -> Tensor:
        value = function(x, torch.as_tensor(t).reshape(1).to(x))
        if value.shape != x.shape:
            raise InputError(
                f"{name}(x, t) must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}: each coordinate "
                "has one noise."
            )
        return value


# --- torchsde ---------------------------------------------------------------------------------------------------


def _solver(method: str, system: Any, brownian: Brownian) -> Callable[[Any, Any, Tensor], Tensor]:
    """One step of a torchsde solver, from a to b."""
    from torchsde._core.methods import select

    solver = select(method=method, sde_type=system.sde_type)(
        sde=system,
        bm=_BrownianAdapter(brownian),
        dt=1.0,
        adaptive=False,
        rtol=0.0,
        atol=0.0,
        dt_min=0.0,
        options={},
    )

    def step(a: Any, b: Any, x: Tensor) -> Tensor:
        return solver.step(a, b, x, ())[0]

    return step


class _BrownianAdapter:
    """Noise behind torchsde's interface."""

    levy_area_approximation = "space-time"

    def __init__(self, brownian: Brownian) -> None:
        self.brownian = brownian

    def __call__(self, ta: Any, tb: Any, return_U: bool = False) -> Any:
        a, b = float(ta), float(tb)
        return self.brownian.increment_and_area(a, b) if return_U else self.brownian.increment(a, b)


def warn_of_non_finite(times: Tensor, states: Tensor) -> None:
    """Warn of rows of a path `(m, batch, *event)` that turned NaN or infinite, and since when."""
    bad = ~torch.isfinite(states).flatten(2).all(2)
    if not bool(bad.any()):
        return
    rows = bad.any(0).nonzero().flatten().tolist()
    first = times[int(bad.any(1).nonzero()[0])].item()
    shown = ", ".join(map(str, rows[:10])) + (", ..." if len(rows) > 10 else "")
    warnings.warn(
        f"The path turned NaN or infinite by t = {first:.4g} in rows {shown} ({len(rows)} of {states.shape[1]}); the "
        "others are unaffected. More steps, or a process with a larger t_min, may help.",
        NonFiniteWarning,
        stacklevel=3,
    )
