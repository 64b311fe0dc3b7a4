"""A classifier that knows how noisy its input is, as a likelihood p(c | x), and p(c | x_t, t) for guided engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from probgen.core import InputError, check_arguments, describe, shown


class NoiseAware(TorchDistribution):
    """p(c | x) = softmax(classifier(x, t = 0))_c, which also knows p(c | x_t, t) at every noise level.

    As a site below a prior, `pyro.sample("label", NoiseAware(classifier, x), obs=c)`, it is an ordinary likelihood;
    engines that follow x_t ask it for `log_prob_at(c, x_t, t)`, which needs no approximation.

    Args:
        classifier: `(x, t) -> logits`, x `(rows, *event)`, t `(rows,)` in [0, 1] -> `(rows, num_classes)`, fitted at
            all noise levels; with an `event_shape` where x has batch dimensions.
        x: the value of the prior's site, `(*batch, *event)`.
        validate_args: check values; None takes torch's setting.

    Raises:
        InputError: a classifier that does not take a time, or logits of another shape.

    Source: Dhariwal & Nichol (2021), arXiv 2105.05233.

    >>> classifier = lambda x, t: torch.stack([x.sum(-1), 0 * t], -1)
    >>> law = NoiseAware(classifier, torch.ones(2))
    >>> law.log_prob(torch.tensor(0)).exp()
    tensor(0.8808)
    >>> law.log_prob_at(torch.tensor([0]), torch.zeros(1, 2), torch.tensor([0.5])).exp()
    tensor([0.5000])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(
        self, classifier: Callable[[Tensor, Tensor], Tensor], x: Tensor, validate_args: bool | None = None
    ) -> None:
        check_arguments(NoiseAware.__init__, locals())
        if not x.numel():
            raise InputError(f"NoiseAware: x must have values, got {shown(x)}.")
        self.classifier, self.x = classifier, x
        event = tuple(getattr(classifier, "event_shape", x.shape))
        super().__init__(x.shape[: x.ndim - len(event)], torch.Size(), validate_args=False)
        self._event, self._checked = event, validate_args
        self.logits = self._logits(x, torch.zeros(1, dtype=x.dtype, device=x.device))

    @property
    def support(self) -> Any:
        """0 .. num_classes - 1."""
        return constraints.integer_interval(0, self.logits.shape[-1] - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NoiseAware:
        """The same for a larger batch."""
        return NoiseAware(self.classifier, self.x.expand(torch.Size(batch_shape) + self._event))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Classes, `(*sample, *batch)`."""
        return torch.distributions.Categorical(logits=self.logits, validate_args=False).sample(
            torch.Size(sample_shape)
        )

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All classes, `(num_classes, *batch)`."""
        law = torch.distributions.Categorical(logits=self.logits, validate_args=False)
        return law.enumerate_support(expand)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(c | x) in nats."""
        return _picked(self.logits, value)

    def log_prob_at(self, value: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """log p(c | x_t, t) in nats: c `(*batch)`, x_t `(*batch, *event)`, t `()` or `(1,)` -> `(*batch)`."""
        return _picked(self._logits(x_t, t), value)

    def _logits(self, x: Tensor, t: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self._event)]
        rows = x.reshape(-1, *self._event)
        try:
            logits = self.classifier(rows, t.reshape(-1).to(x).expand(len(rows)))
        except TypeError as error:
            raise InputError(
                f"NoiseAware needs a classifier (x, t) -> logits, x {tuple(rows.shape)}, t ({len(rows)},); "
                f"{describe(self.classifier)} failed: {error}. One without t knows clean data alone: give its logits "
                "to a Categorical, which guidance then evaluates at E[x_0 | x_t]."
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(rows):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else shown(logits)
            raise InputError(
                f"NoiseAware: expected logits of shape ({len(rows)}, num_classes) of the classifier, got {got}."
            )
        return logits.reshape(*batch, logits.shape[-1])


def _picked(logits: Tensor, value: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(logits.shape[:-1], value.shape)
    log_probs = logits.log_softmax(-1).expand(*batch, -1)
    return log_probs.gather(-1, value.long().expand(batch)[..., None])[..., 0]
