"""The latents beside the prior, as the program itself draws them, in unconstrained coordinates."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, ClassVar

import torch
from pyro import poutine
from pyro.distributions import ImproperUniform
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probgen.bounds import validation
from probgen.core import InputError, Target, describe
from probgen.priors.conditioned import Conditioned
from probgen.randomness import forked_rng
from probgen.targets.density import ProgramDensity
from probgen.targets.point import Values
from probgen.targets.reading import FlatStart, innermost


class OtherLatents:
    """z ~ p(z), what the program says of its other latents before anything was observed.

    Where the law of z depends on x, it is taken at the prior's stand-in for x: a law to start from, whose density is
    known.

    Args:
        conditioned: the program.

    Raises:
        InputError: a latent with an improper law.

    >>> import pyro, pyro.distributions as dist
    >>> from probgen.models.gaussian_mixture import GaussianMixture
    >>> from probgen.priors.prior import Prior
    >>> from probgen.targets import read
    >>> prior = Prior(GaussianMixture.example())
    >>> def seen():
    ...     x = pyro.sample("x", prior)
    ...     noise = pyro.sample("noise", dist.LogNormal(0.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x, noise).to_event(1))
    >>> others = OtherLatents(Conditioned(read(seen, {"y": torch.zeros(2)})))
    >>> z = others.draw(3, seed=0)
    >>> z.shape, torch.allclose(others.log_prob(z), torch.distributions.Normal(0, 1).log_prob(z[:, 0].float()).double())
    (torch.Size([3, 1]), True)
    """

    def __init__(self, conditioned: Conditioned) -> None:
        self.conditioned = conditioned
        # Each data set has the same z before it is seen.
        self.target = replace(conditioned.target, model=_Unseen()(conditioned.target.model), sets={})
        with forked_rng(0), torch.no_grad(), validation(False):
            _check_proper(self.target, self._nodes())
        self.density = ProgramDensity(self.target, free=conditioned.name)

    def draw(self, num_draws: int, seed: int) -> Tensor:
        """z `(num_draws, k)`, unconstrained; the same for the same seed and number."""
        with forked_rng(seed), torch.no_grad(), validation(False):
            values = self._together(num_draws) or self._one_by_one(num_draws)
        x = self._stand_in(num_draws)
        u = self.density.unconstrain(values | {self.conditioned.name: x})
        return self.conditioned.split(u)[1]

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) of z `(n, k)` in unconstrained coordinates: `(n,)`."""
        u = self.conditioned.join(self._stand_in(len(z)), z)
        return self.density.value_and_grad(u)[0]

    def _stand_in(self, n: int) -> Tensor:
        return self.conditioned.prior.stand_in().expand(n, *self.conditioned.shape)

    def _together(self, num_draws: int) -> Values | None:
        """All in one run; None for programs that `vmap` does not follow."""
        each = torch.func.vmap(self._run_apart, randomness="different")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of operations that vmap runs one after another
                drawn: Values = each(torch.zeros(num_draws, device=self.conditioned.device))
        except Exception:  # noqa: BLE001 -- programs raise what they like
            return None
        return drawn

    def _one_by_one(self, num_draws: int) -> Values:
        drawn = [self._run() for _ in range(num_draws)]
        return {name: torch.stack([values[name] for values in drawn]) for name in drawn[0]}

    def _run_apart(self, one: Tensor) -> Values:
        with _Apart(one):
            return self._run()

    def _run(self) -> Values:
        return {name: torch.as_tensor(node["value"]) for name, node in self._nodes().items()}

    def _nodes(self) -> dict[str, Any]:
        start = FlatStart(self.conditioned.dtype)
        trace = poutine.trace(start(self.target.model)).get_trace(*self.target.args)
        return {name: trace.nodes[name] for name in self.conditioned.others}


class _Unseen(Messenger):
    """What was observed keeps its value and has no density."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"]:
            msg["mask"] = False


class _Apart(TorchFunctionMode):
    """Tensors that laws make to fill them with noise are made for each of the draws that `vmap` runs."""

    _MAKERS: ClassVar[frozenset[Any]] = frozenset({torch.empty, Tensor.new, Tensor.new_empty})

    def __init__(self, one: Tensor) -> None:
        super().__init__()
        self.one = one

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        return made + self.one.new_zeros(made.shape, dtype=made.dtype) if func in self._MAKERS else made


def _check_proper(target: Target, nodes: dict[str, Any]) -> None:
    for name, node in nodes.items():
        if isinstance(innermost(node["fn"]), ImproperUniform):
            raise InputError(
                f"Site {name!r} of {describe(target.program)} has an improper law: particles cannot be drawn from it. "
                "Give it a proper, wide one."
            )
