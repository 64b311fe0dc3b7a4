"""A score as a program: the gradient of a log density that need not be known, nor exist."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from probgen.core import Batch, Size, UnsupportedError, check_shape
from probgen.recorded import Recorded, nameable


class Score(Recorded):
    """s(x) in place of grad log p(x), as a network trained by score matching gives it. Site "x".

    Engines without an accept step draw from it. Whether s is the gradient of anything is not asked: where it is not,
    the chains still have a law, which is not exp of any integral of s.

    Args:
        function: s, an nn.Module or a function in torch: x `(batch, *event)` -> `(batch, *event)`. It may be noisy, as
            gradients of minibatches are.
        event_shape: shape of one x.

    Raises:
        InputError: s of another shape than x.

    Source: Hyvarinen (2005), J. Mach. Learn. Res. 6, 695; Song & Ermon (2019), arXiv 1907.05600.

    >>> import torch
    >>> Score(lambda x: -x, event_shape=(2,)).grad_log_prob(torch.ones(1, 2))
    tensor([[-1., -1.]])
    """

    paper: ClassVar[str] = "Song & Ermon 2019, arXiv 1907.05600"
    offers: ClassVar[str] = "draws by unadjusted engines from a score alone"
    gives_up: ClassVar[str] = "the density, and with it every accept step"

    def __init__(self, function: Callable[[Tensor], Tensor], event_shape: Sequence[Size]) -> None:
        super().__init__()
        self.function = function
        self.event_shape = tuple(event_shape)

    def grad_log_prob(self, x: Tensor) -> Tensor:
        """s(x): x `(batch, *event)` -> `(batch, *event)`."""
        score = self.function(x)
        check_shape("Score: function(x)", score, x.shape)
        return score

    def model(self, batch: Batch) -> Any:
        """There is no density to write down: `UnsupportedError`."""
        raise UnsupportedError(
            "A score is no density: this program can neither be run forwards nor conditioned. Draw by an engine "
            "without an accept step, e.g. infer(program, ULA(...)), or write the density as an Energy."
        )


def example() -> Score:
    """A Gaussian with a rotation added: the gradient of nothing."""
    return Score(_rotated, (2,))


@nameable
def _rotated(x: Tensor) -> Tensor:
    x, y = x.unbind(-1)
    return torch.stack([-x - 0.5 * y, 0.5 * x - 2 * y], dim=-1)
