"""Tests in a backward pass of which gradients are wanted, and of which the values are not used."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

__all__ = ["Spared", "asked"]


def asked(ctx, count: int) -> list[bool]:
    """Find for each of the first ``count`` arguments whether this backward pass uses its gradient.

    In contrast, ``ctx.needs_input_grad`` is whether any backward pass may use it.

    Args:
        ctx: the context of the autograd function.
        count: the number of arguments.
    """
    nodes = [node for node, _ in ctx.next_functions[:count]]
    needed = [*map(_is_executed, nodes)] + [False] * (count - len(nodes))
    return [a and b for a, b in zip(needed, ctx.needs_input_grad, strict=False)]


def _is_executed(node) -> bool:
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)  # pyright: ignore
    except RuntimeError:
        # torch has no answer for a leaf. It raises this error only where the leaf is wanted.
        return True


class Spared:
    """Parameters whose gradients have a graph but, while this is switched on, no values.

    A product with the Hessian uses only the graph of the gradient. In an affine layer, this saves
    one of nine matrix products.
    """

    def __init__(self, params: Iterable[Tensor]):
        self._nodes = {p.grad_fn for p in params} - {None}
        self._on = False

    def __contains__(self, node) -> bool:
        """Whether the value of the gradient at this node of the graph is not used."""
        return self._on and node in self._nodes

    @contextlib.contextmanager
    def switched_on(self) -> Iterator[None]:
        self._on = True
        try:
            yield
        finally:
            self._on = False
