"""Observations in place, also in plates that draw some of their rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor


class Observing(Messenger):
    """`pyro.condition` for which a plate that draws m of its N rows sees the same rows of an observation of N rows.

    Args:
        data: values by site name, at full size.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def model():
    ...     with pyro.plate("data", 5, subsample=torch.tensor([3, 1])):
    ...         return pyro.sample("y", dist.Normal(0.0, 1.0))
    >>> Observing({"y": torch.arange(5.0)})(model)()
    tensor([3., 1.])
    """

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.data = dict(data)

    def __enter__(self) -> Any:
        self.index: dict[str, Tensor] = {}
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.data:
            msg["value"], msg["is_observed"] = self._drawn(msg), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.index[msg["name"]] = msg["value"]

    def _drawn(self, msg: Any) -> Tensor:
        value = self.data[msg["name"]]
        for frame in msg["cond_indep_stack"]:
            if frame.vectorized and frame.size < frame.full_size and frame.name in self.index:
                dim = value.ndim + frame.dim - len(msg["fn"].event_shape)
                if dim >= 0 and value.shape[dim] == frame.full_size:
                    value = value.index_select(dim, self.index[frame.name])
        return value
