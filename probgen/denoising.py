"""What programs around one network share: it is called net(x, t) or net(x, t, c) and read as a denoiser."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor, nn

from probgen.conditioning import Condition, drop
from probgen.core import Batch, InputError, Probability, Size, describe, did_you_mean
from probgen.nets import usual_denoiser
from probgen.processes import PREDICTIONS, Prediction, Process, denoiser_coefficients, over_event
from probgen.recorded import Recorded


class DenoisingProgram(Recorded):
    """x0hat = a(t) x_t + b(t) net(x_t, t, c), a and b from the process and from what the network predicts.

    Args:
        network: `net(x, t)`, x `(batch, *event)`, t `(batch,)` in [0, 1] -> `(batch, *event)`, any nn.Module; with a
            condition `net(x, t, c)`, c `(batch, ...)`.
        process: the noising law.
        prediction: what the network's output is: "x0", "eps", "v", "score", "velocity" or "edm"; None where a subclass
            has its own `denoiser_coefficients`.
        event_shape: shape of one datum; None takes `network.event_shape`.
        condition: what c is, `Labels(num_classes)` or `Vector(shape)`; None takes `network.condition`, if it has one.
        condition_dropout: probability in [0, 1] with which a row's condition is dropped in training mode, so that one
            network learns p(x | c) and p(x) (Ho & Salimans 2022, arXiv 2207.12598).

    Raises:
        InputError: an unknown prediction, no event shape, or a probability out of range.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        prediction: Prediction | None,
        *,
        event_shape: Sequence[Size] | None = None,
        condition: Condition | None = None,
        condition_dropout: Probability = 0.1,
    ) -> None:
        super().__init__()
        if prediction is not None and prediction not in PREDICTIONS:
            raise InputError(
                f"Unknown prediction {prediction!r}; {did_you_mean(str(prediction), PREDICTIONS)}"
            )
        if not 0 <= condition_dropout <= 1:
            raise InputError(f"condition_dropout must lie in [0, 1], got {condition_dropout!r}.")
        event_shape = event_shape if event_shape is not None else getattr(network, "event_shape", None)
        if event_shape is None:
            raise InputError(
                f"{type(self).__name__} needs the shape of one datum: {type(network).__name__} has no event_shape; "
                f"pass {type(self).__name__}(..., event_shape=(1, 28, 28))."
            )
        self.network = network
        self.event_shape = tuple(event_shape)
        self.prediction = prediction
        self.condition: Condition | None = condition or getattr(network, "condition", None)
        self.condition_dropout = condition_dropout
        self._process = process
        self._takes_one_time: bool = getattr(network, "takes_one_time", False)
        self._given: Tensor | None = None

    @classmethod
    def of_shape(
        cls,
        event_shape: Sequence[int],
        width: int | None = None,
        condition: Condition | None = None,
        **settings: Any,
    ) -> Self:
        """With a network of the usual kind for data of this shape: a small `UNet` for images, else a `TimeMLP`.

        Args:
            event_shape: shape of one datum.
            width: channels at full resolution (32), or width of the residual stream (128).
            condition: what c is, `Labels(num_classes)` or `Vector(shape)`; None for a program without.
            settings: the constructor's other arguments.
        """
        return cls(usual_denoiser(event_shape, width, condition), **settings)

    def process(self) -> Process:
        """The noising law."""
        return self._process

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The network's own output: x_t `(batch, *event)`, t `(batch,)` or `(1,)` -> `(batch, *event)`."""
        t = t if self._takes_one_time else t.expand(len(x_t))
        if self.condition is None:
            return self.network(x_t, t)
        return self.network(x_t, t, self._rows_of_c(self.condition, x_t))

    def denoiser_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a, b with x0hat = a x_t + b predict(x_t, t), at times `(n,)`."""
        assert self.prediction is not None
        return denoiser_coefficients(self._process, self.prediction, t)

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """E[x_0 | x_t] as the network has it, `(batch, *event)`."""
        on_x, on_output = (over_event(value, x_t) for value in self.denoiser_coefficients(t))
        return on_x * x_t + on_output * self.predict(x_t, t)

    def given(self, condition: Tensor | None) -> Self:
        """The same program, weights shared, at a condition `(rows, ...)`; None is missing throughout.

        Where x holds several copies of the rows, one after another, the condition is repeated for each.

        Raises `InputError` for a condition of the wrong kind, or where the network takes none.
        """
        view = copy.copy(self)
        view._given = None if condition is None else self._checked(condition)
        return view

    def for_rows(self, batch: Batch) -> Self:
        """This program at the condition of a batch; itself where it has been given one already, or there is none."""
        return self if batch.condition is None or self._given is not None else self.given(batch.condition)

    def _checked(self, c: Tensor) -> Tensor:
        if self.condition is None:
            raise InputError(
                f"{describe(self)} takes no condition: its network is net(x, t). Build it as net(x, t, c), with "
                "condition=Labels(num_classes) or condition=Vector(shape)."
            )
        self.condition.check(c)
        return drop(self.condition, c, self.condition_dropout) if self.training else c

    def _rows_of_c(self, condition: Condition, x: Tensor) -> Tensor:
        c = self._given
        if c is None:
            return condition.missing(len(x), x)
        copies, left_over = divmod(len(x), len(c))
        if left_over or not copies:
            raise InputError(
                f"{describe(self)} was given {len(c)} rows of a condition for {len(x)} rows of x."
            )
        c = c.to(x.device)
        return c if copies == 1 else c.repeat(copies, *[1] * (c.ndim - 1))
