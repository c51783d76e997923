"""Attention that can be recorded and differentiated twice, with given dropout masks."""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from funcprecond.autodiff.random_functions import dropout
from funcprecond.tracing import is_traced

__all__ = ["COMPOSITES", "scaled_dot_product"]


def _without_dispatch(function: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a Python function of torch, so that a mode intercepts the calls inside the copy.

    The copy has no torch-function checks, with which the original is intercepted as one call.
    """

    def no(*_):
        return False

    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    namespace = function.__globals__ | dict.fromkeys(names, no)
    inner = types.FunctionType(
        function.__code__,
        namespace,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    inner.__kwdefaults__ = function.__kwdefaults__
    return inner


COMPOSITES = {F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward)}
"""Functions inside which the recorder must intercept calls, with the copies that allow it."""


def scaled_dot_product(
    mask: Callable[[tuple[int, ...], float, Tensor], Tensor],
    twice: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention`` with a given dropout mask.

    Args:
        mask: a function ``(shape, p, like) -> booleans`` that returns a dropout mask, True where an
            entry is kept.
        twice: whether to use the kernel that has a second derivative.
        query, key, value, attn_mask, dropout_p, is_causal: the arguments of torch's function.
        **kwargs: further keyword arguments of torch's function.

    Returns:
        The output of the attention.
    """
    if dropout_p == 0.0:
        attention = F.scaled_dot_product_attention
        if not twice:
            return attention(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
        with sdpa_kernel(SDPBackend.MATH):
            out = attention(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
        if out.dtype not in (torch.float16, torch.bfloat16) or is_traced():
            return out
        # In half precision the kernels round differently, and a measurement of curvature would
        # change the loss. The value is that of the usual kernel, and the derivatives are not.
        with torch.no_grad():
            usual = attention(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
        return usual + (out - out.detach())
    if kwargs.get("enable_gqa"):
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    scale = kwargs.get("scale") or query.shape[-1] ** -0.5
    scores = scale * query @ key.transpose(-2, -1)
    if is_causal:
        causal = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_bool else scores + attn_mask
    return dropout(F.dropout, mask, scores.softmax(-1), dropout_p) @ value
