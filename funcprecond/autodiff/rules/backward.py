"""What a backward pass of our own asks of torch: which gradients are wanted, and which unused."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Spared", "asked"]


def asked(ctx, count: int) -> list[bool]:
    """For each of the first arguments, whether this very backward pass needs its gradient."""
    nodes = [node for node, _ in ctx.next_functions[:count]]
    needed = [*map(_is_executed, nodes)] + [False] * (count - len(nodes))
    return [a and b for a, b in zip(needed, ctx.needs_input_grad, strict=False)]


def _is_executed(node) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore
    except RuntimeError:
        # torch does not answer for a leaf, and is only asked to where the leaf is wanted.
        return True


class Spared:
    """Parameters of whose gradients a graph is made and, while it is switched on, no value.

    A product with the Hessian takes the gradient's graph alone; the value is one of the nine matrix
    products that an affine layer has in it.
    """

    def __init__(self, params: Iterable[Tensor]):
        self._nodes = {p.grad_fn for p in params} - {None}
        self._on = False

    def __contains__(self, node) -> bool:
        """Whether the value of what arrives at this node of the graph is of no use."""
        return self._on and node in self._nodes

    @contextlib.contextmanager
    def switched_on(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False
