"""Embeddings as pure functions with dense gradients."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

__all__ = ["EMBEDDINGS", "with_dense_gradient"]

EMBEDDINGS = {F.embedding, F.embedding_bag}


def with_dense_gradient(func: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments of a call of one of :data:`EMBEDDINGS`, with ``sparse=False``.

    Raises:
        RuntimeError: the call has an option that makes it write into its weight, or change its own
            gradient.
    """
    sparse = 6 if func is F.embedding else 7
    for i, name, does in (
        (3, "max_norm", "writes into its weight"),
        (5, "scale_grad_by_freq", "changes its own gradient"),
    ):
        value = args[i] if len(args) > i else kwargs.get(name)
        if value is not None and value is not False:
            msg = (
                f"an embedding with {name}={value} {does}, so that the loss is no function of the "
                "parameters: do the same in the model, to the rows that were looked up"
            )
            raise RuntimeError(msg)
    if len(args) > sparse:
        return (*args[:sparse], False, *args[sparse + 1 :]), kwargs
    return args, {**kwargs, "sparse": False}
