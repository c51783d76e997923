"""The targets of a language model."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["next_tokens"]


def next_tokens(
    input_ids: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    """The targets for the logits of a causal language model: at each position the next token.

    Logits ``(N, T, V)`` at position t predict the token at position t + 1, so the targets are
    ``input_ids[:, t + 1]``. The last position has nothing to predict and is ignored. With these
    targets, :class:`funcprecond.losses.CrossEntropy` is the loss that the models of transformers
    compute from ``labels``, if the padding of these is -100.

    Args:
        input_ids: the tokens, (..., T). They may also be the ``labels`` of transformers, whose
            ignored entries stay ignored.
        attention_mask: 1 or True for a token and 0 or False for padding, shaped like the tokens.
            Padding is never a target.
        ignore_index: the target that the loss ignores.

    Returns:
        The targets, shaped like the tokens.

    Raises:
        TypeError: ``input_ids`` is not a tensor of integers.
        ValueError: ``input_ids`` has no axis, or ``attention_mask`` has another shape.

    Example:
        >>> import torch, funcprecond as fp
        >>> fp.losses.next_tokens(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]]))
        tensor([[   6,    7, -100, -100]])
    """
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        msg = f"input_ids must be a tensor of integers, not {kind}: pass the numbers of the tokens"
        raise TypeError(msg)
    if not input_ids.ndim:
        msg = "input_ids must have an axis of positions, not the shape (): pass (N, T)"
        raise ValueError(msg)
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            msg = (
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, not "
                f"{tuple(attention_mask.shape)}: pass the mask that marks padding"
            )
            raise ValueError(msg)
        input_ids = input_ids.masked_fill(attention_mask == 0, ignore_index)
    return F.pad(input_ids[..., 1:], (0, 1), value=ignore_index)
