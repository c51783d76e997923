"""Embeddings as pure functions with dense gradients."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

__all__ = ["EMBEDDINGS", "with_dense_gradient"]

EMBEDDINGS = {F.embedding, F.embedding_bag}


def with_dense_gradient(func: Callable[..., Any], args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Set ``sparse=False`` in the arguments of a call of one of :data:`EMBEDDINGS`.

    Args:
        func: the function that is called.
        args, kwargs: its arguments.

    Returns:
        The new (args, kwargs).

    Raises:
        RuntimeError: the call has the option ``max_norm``, which changes the weight, or the option
            ``scale_grad_by_freq``, which changes the gradient.
    """
    sparse = 6 if func is F.embedding else 7
    for i, name, does in (
        (3, "max_norm", "writes into its weight"),
        (5, "scale_grad_by_freq", "changes its own gradient"),
    ):
        value = args[i] if len(args) > i else kwargs.get(name)
        if value is not None and value is not False:
            msg = (
                f"an embedding with {name}={value} {does}, so its derivatives are not those of a "
                "function of the parameters: remove the option, and apply its effect in the model "
                "to the vectors that the embedding returns"
            )
            raise RuntimeError(msg)
    if len(args) > sparse:
        return (*args[:sparse], False, *args[sparse + 1 :]), kwargs
    return args, {**kwargs, "sparse": False}
