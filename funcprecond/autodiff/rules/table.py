"""The table of the torch functions whose derivatives are replaced, and the mode that uses it.

Every replacement computes the values of torch's function. Its second derivative replaces one of
torch that is slow, not implemented or wrong. Where a transform, a compiler or forward mode traces
the call, the replacement is torch's function, unless the derivative of torch is wrong.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from funcprecond import tree
from funcprecond.autodiff.attention import COMPOSITES
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.autodiff.rules.convolution import convolve
from funcprecond.autodiff.rules.gelu import gelu
from funcprecond.autodiff.rules.layer_norm import layer_norm
from funcprecond.autodiff.rules.linear import linear
from funcprecond.autodiff.rules.logcumsumexp import logcumsumexp
from funcprecond.autodiff.rules.max_pool import max_pool2d
from funcprecond.autodiff.rules.norms import NORMS
from funcprecond.autodiff.rules.relu import relu
from funcprecond.autodiff.rules.weight_norm import weight_norm
from funcprecond.tracing import is_traced

__all__ = ["RULES", "DifferentiatedTwice", "differentiated", "replaced"]


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    # Torch's own function has no second derivative.
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def _if_traced(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return (NORMS[function] if is_traced() else function)(*args, **kwargs)


_AFFINE: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: linear,
    **{f: functools.partial(convolve, f) for f in (F.conv1d, F.conv2d, F.conv3d)},
}
RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    **{f: functools.partial(_if_traced, f) for f in NORMS},
    **_AFFINE,
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), relu),
    F.gelu: gelu,
    F.hardsigmoid: _hardsigmoid,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d),
    F.layer_norm: layer_norm,
    torch._weight_norm: weight_norm,
    **dict.fromkeys((torch.logcumsumexp, torch.Tensor.logcumsumexp), logcumsumexp),
}


def replaced(function: Callable[..., Any], spared: Spared | None = None) -> Callable[..., Any]:
    """Look up the replacement of a torch function for a run that is differentiated twice.

    Args:
        function: the torch function.
        spared: the parameters whose gradients may be left without values.

    Returns:
        A function of the same arguments. It is ``function`` itself if the table has no other, or
        under autocast, which chooses dtypes by torch's functions.
    """
    # This method calls super(), which torch's compiler cannot trace inside of a mode. It is not in
    # the table, because the compiler does not find it there.
    if function is torch.Tensor.unflatten:
        return torch.ops.aten.unflatten.int
    if function not in RULES:
        return function
    if torch._C._is_any_autocast_enabled() and function is not torch._weight_norm:
        return function
    if function in _AFFINE:
        return functools.partial(_AFFINE[function], spared=spared)
    return RULES[function]


def differentiated(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The tensors in which a call of ``torch.autograd.grad`` takes derivatives."""
    return [x for x in tree.leaves(inputs) if isinstance(x, Tensor)]


class DifferentiatedTwice(TorchFunctionMode):
    """The mode for a user's function that is differentiated twice.

    Attributes:
        own_leaves: the tensors in which the function takes derivatives of its own.
    """

    def __init__(self):
        super().__init__()
        self.own_leaves: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            self.own_leaves += differentiated(*args, **kwargs)
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            # The other kernels have no second derivative.
            with sdpa_kernel(SDPBackend.MATH):
                return func(*args, **kwargs)
        return replaced(func)(*args, **kwargs)
