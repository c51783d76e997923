"""GELU and layer norm whose second derivatives are computed once, where they are asked for.

torch's own rules (2.13) write them out in some twenty element-wise operations, all of them at each
product; a kept product would spend more time there than in a small model's matrix products. That of
weight norm is wrong on a CPU, so that here it is what it is short for.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from funcprecond.tracing import is_watched

__all__ = ["Corrected", "Spared", "asked", "gelu", "layer_norm", "weight_norm"]


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu``; torch's own for the approximation, and where :func:`is_watched`."""
    if is_watched() or approximate != "none":
        return F.gelu(input, approximate=approximate)
    return _Gelu.apply(input)  # pyright: ignore[reportReturnType]


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``, to be differentiated twice and not more; torch's own if it is watched."""
    if is_watched():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    out, _ = _Normalised.apply(input, list(normalized_shape), eps)  # pyright: ignore
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``: g times v over its norm, for each index of ``dim`` or over all."""
    if dim == -1:
        return v * (g / v.norm())
    rows = v.movedim(dim, 0)
    return v * (g / rows.reshape(len(rows), -1).norm(dim=1).reshape(g.shape))


class Corrected(TorchFunctionMode):
    """The mode without torch's wrong rules: weight norm's second, layer norm's third derivative."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        run = {torch._weight_norm: weight_norm, F.layer_norm: layer_norm}.get(func, func)
        return run(*args, **(kwargs or {}))


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


class _Gelu(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.slope = _Slope()
        return F.gelu(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _GeluPull.apply(g, x, ctx.slope)
        return ctx.slope.times(g, x)


class _GeluPull(Function):
    """Output gradients times the first derivative."""

    @staticmethod
    def forward(ctx, g, x, slope):
        ctx.save_for_backward(g, x)
        ctx.slope, ctx.bend, ctx.again = slope, None, False
        return slope.times(g, x)

    @staticmethod
    def backward(ctx, v):
        g, x = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _GeluPull.apply(v, x, ctx.slope), v * g * _bend(x), None
        of_g, of_x = asked(ctx, 2)
        for_x = None
        if of_x:
            bend = _bend(x).mul_(g) if ctx.bend is None else ctx.bend
            # Kept for the third product where there is a second: one alone has no use for it.
            ctx.bend, ctx.again = (bend if ctx.again else None), True
            for_x = v * bend
        return ctx.slope.times(v, x) if of_g else None, for_x, None


class _Slope:
    """The first derivative; kept once it has been used more often than a single product does."""

    def __init__(self):
        self.value, self.uses = None, 0

    def times(self, g: Tensor, x: Tensor) -> Tensor:
        self.uses += 1
        if self.uses > 3 and self.value is None:
            self.value = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
        return torch.ops.aten.gelu_backward(g, x) if self.value is None else g * self.value


def _bend(x: Tensor) -> Tensor:
    """The second derivative, ``(2 - x^2)`` times the standard normal density; in four passes."""
    log_scale, two = x.new_full((), -0.5 * math.log(2 * math.pi)), x.new_full((), 2.0)
    density = torch.addcmul(log_scale, x, x, value=-0.5).exp_()
    return density * torch.addcmul(two, x, x, value=-1)


class _Normalised(Function):
    """``y = (x - mean) r`` over the last axes, and ``r``, the inverse of the deviation."""

    @staticmethod
    def forward(ctx, x, shape, eps):
        y, _, inverse = torch.native_layer_norm(x, shape, None, None, eps)
        ctx.save_for_backward(y, inverse)
        ctx.set_materialize_grads(False)
        ctx.shape = shape
        return y, inverse

    @staticmethod
    def backward(ctx, g, h):
        y, inverse = ctx.saved_tensors
        found = None if g is None else _Centred.apply(g, y, inverse, ctx.shape)
        if h is not None:
            through = y * (inverse**2 * h / -math.prod(ctx.shape))
            found = through if found is None else found + through
        return found, None, None


class _Centred(Function):
    """The pull-back ``r (g - <g> - y <g y>)``, with <> the mean.

    It is its own transpose in g; in y that of v is ``-r (<g y> v + <v y> g)``, and in r the sum of
    ``v (g - <g> - y <g y>)``.
    """

    @staticmethod
    def forward(ctx, g, y, inverse, shape):
        ctx.save_for_backward(g, y, inverse)
        ctx.shape = shape
        return _centred(g, y, inverse, shape)

    @staticmethod
    def backward(ctx, v):
        if torch.is_grad_enabled():
            msg = "layer norm is differentiated twice here, and a third time was asked for"
            raise NotImplementedError(msg)
        g, y, inverse = ctx.saved_tensors
        of_g, of_y, of_inverse = asked(ctx, 3)
        for_g = _centred(v, y, inverse, ctx.shape) if of_g else None
        for_y = for_inverse = None
        if of_y or of_inverse:
            axes, count = tuple(range(-len(ctx.shape), 0)), math.prod(ctx.shape)

            def total(a, b):
                return (a * b).sum(axes, keepdim=True)

            gy, vy = total(g, y) / count, total(v, y) / count
            for_y = torch.addcmul(gy * v, vy, g) * -inverse
            means = v.mean(axes, True) * g.mean(axes, True)
            for_inverse = total(v, g) - count * (means + gy * vy)
        return for_g, for_y, for_inverse, None


def _centred(g, y, inverse, shape):
    zero, one, mask = torch.zeros_like(inverse), torch.ones_like(inverse), [True, False, False]
    found = torch.ops.aten.native_layer_norm_backward(g, y, shape, zero, one, None, None, mask)
    return found[0] * inverse
