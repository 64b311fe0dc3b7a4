"""Writing down what a function of tensors does, operation by operation.

PyTorch's `make_fx` does the same several times slower (it also works out each result on tensors without values), and
records what is made inside of the function, a clock or a range of indices too, so that programs cannot look at it:
`for i in pyro.plate(...)`, `if t < end`. Here what does not depend on the argument is a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary


def record(function: Callable[..., Any], *examples: Tensor) -> fx.GraphModule:
    """The ATen operations of a function for tensors of these shapes, dtypes and devices.

    Args:
        function: of tensors, without choices that depend on their values, writing nothing in place
            (`torch.func.functionalize` makes it so).
        examples: its arguments.

    Returns a module that replays them; every node has an example of its result, without values, in `meta["val"]`.
    Raises whatever the function does, and `RuntimeError` for such a choice, or where something is written in place.

    >>> graph = record(lambda u: (u + torch.ones(2).exp()) * 2, torch.zeros(2))
    >>> graph(torch.zeros(2))
    tensor([5.4366, 5.4366])
    """
    recorder = _Recorder()
    arguments = [example.detach().clone() for example in examples]
    for i, argument in enumerate(arguments):
        recorder.hold(argument, recorder.graph.placeholder(f"argument_{i}"))
    with recorder:
        out = function(*arguments)
    recorder.graph.output(tree_map(recorder.as_argument, out))
    return fx.GraphModule(recorder.root, recorder.graph)


class _Recorder(TorchDispatchMode):
    """Operations on what depends on the arguments become nodes of a graph, and those that are random."""

    def __init__(self) -> None:
        super().__init__()
        self.graph, self.root = fx.Graph(), nn.Module()
        self._nodes: Any = WeakIdKeyDictionary()
        self._constants: dict[int, tuple[Tensor, fx.Node]] = {}  # by id, which is kept taken

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do the operation, and write it down."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        depends = any(
            isinstance(leaf, Tensor) and leaf in self._nodes for leaf in tree_leaves((args, kwargs))
        )
        if not depends and torch.Tag.nondeterministic_seeded not in func.tags:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable or not results:
            raise RuntimeError(f"{func} makes a choice that depends on an argument, or writes in place")
        node = self.graph.call_function(func, *tree_map(self.as_argument, (args, kwargs)))
        if isinstance(out, Tensor):
            self.hold(out, node)
        else:
            node.meta["val"] = tree_map(_without_values, out)
            for i, part in enumerate(out):
                if isinstance(part, Tensor):
                    self.hold(part, self.graph.call_function(operator.getitem, (node, i)))
        return out

    def hold(self, tensor: Tensor, node: fx.Node) -> None:
        """Know a tensor as the result of a node."""
        node.meta["val"] = _without_values(tensor)
        self._nodes[tensor] = node

    def as_argument(self, value: Any) -> Any:
        """The node of a tensor that depends on the arguments, a constant for any other; what is no tensor as it is."""
        if not isinstance(value, Tensor):
            return value
        if value in self._nodes:
            return self._nodes[value]
        if id(value) not in self._constants:
            name = f"constant_{len(self._constants)}"
            self.root.register_buffer(name, value.detach())
            node = self.graph.create_node("get_attr", name)
            node.meta["val"] = value.detach()
            self._constants[id(value)] = value, node
        return self._constants[id(value)][1]


def _without_values(value: Any) -> Any:
    """A tensor of the same shape, dtype and device that takes no memory."""
    return value.new_empty(()).expand(value.shape) if isinstance(value, Tensor) else value
