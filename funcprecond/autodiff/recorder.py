"""Watching a model run: which layer uses which parameter, and where it draws random numbers.

One ``TorchFunctionMode`` sees every torch function that the model calls, whether the model is an
``nn.Module`` or a plain function, and recognises parameters by identity, not by module class. So a
weight used twice, through ``F.linear`` or inside ``nn.MultiheadAttention`` is seen each time.
Nothing is registered on the model, and nothing is left behind.

Three jobs, done in one pass because they all need the same interception:

* *layers*: each call that applies a weight is recorded with its input, and its output is handed to
  a ``tap`` so that gradients with respect to it can be taken;
* *dropout*: masks come from tensors drawn beforehand, or from the caller's generator, never from
  the global one;
* *kernels without a second derivative*: a run that is differentiated twice takes the math kernel of
  attention and torch's own recurrent layers instead of cuDNN's; an embedding that would write into
  its weight is refused.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from funcprecond import tree
from funcprecond.autodiff.random_functions import (
    DRAWS,
    DROPOUTS,
    RECURRENT,
    dropout,
    recurrent_options,
)
from funcprecond.autodiff.rules.convolution import convolve
from funcprecond.autodiff.rules.layer_norm import Spared, gelu, layer_norm, weight_norm
from funcprecond.autodiff.rules.linear import linear
from funcprecond.autodiff.rules.piecewise_linear import max_pool2d, relu
from funcprecond.linalg import random

__all__ = ["CONVS", "TRANSPOSED_CONVS", "Call", "Capture"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of a parameter by a layer: everything about it that is not a tensor.

    Attributes:
        kind: "linear", "conv", "conv_transpose", "embedding", "norm", or "add" of a parameter to
            something else.
        weight: the parameter's name.
        bias: the bias's name, if the call adds one that is a parameter.
        options: what the layer's formula needs beside its tensors, by kind.
        shape: the output's shape.
    """

    kind: str
    weight: str
    bias: str | None
    options: tuple
    shape: tuple[int, ...]


# By their number of dimensions.
CONVS = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
TRANSPOSED_CONVS = {F.conv_transpose1d: 1, F.conv_transpose2d: 2, F.conv_transpose3d: 3}
# What stands in for a function in a run that is differentiated twice.
_TWICE = {
    F.linear: linear,
    **{f: functools.partial(convolve, f) for f in CONVS},
    F.gelu: gelu,
    **dict.fromkeys((F.relu, torch.relu, torch.Tensor.relu), relu),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), max_pool2d),
    F.layer_norm: layer_norm,
    torch._weight_norm: weight_norm,
}
_AFFINE = {F.linear, *CONVS}
_NORMS = {F.layer_norm, F.batch_norm, F.group_norm, F.instance_norm, F.rms_norm}
_MATMULS = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__}
_ADDS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
_TRANSPOSES = {
    torch.t,
    torch.Tensor.t,
    torch.Tensor.T.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.mT.__get__,  # pyright: ignore[reportAttributeAccessIssue]
}
_METADATA = {
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    *(
        getattr(torch.Tensor, name).__get__
        for name in [
            "dtype",
            "device",
            "shape",
            "ndim",
            "requires_grad",
            "is_nested",
            "layout",
            "is_cuda",
        ]
    ),
}


def _without_dispatch(function: Callable) -> Callable:
    """The same Python function with its torch-function test off, so that a mode sees inside it."""

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


_COMPOSITES = {F.multi_head_attention_forward: _without_dispatch(F.multi_head_attention_forward)}
_EMBEDDINGS = {F.embedding, F.embedding_bag}
_SPECIAL = {
    *DROPOUTS,
    *DRAWS,
    *RECURRENT,
    *_COMPOSITES,
    *_EMBEDDINGS,
    F.scaled_dot_product_attention,
}


class Capture(TorchFunctionMode):
    """The mode that one run of a model happens under; see the module's docstring.

    Args:
        params: the parameters, as the model is going to see them.
        tap: takes a layer's output and returns what the model goes on with; None records no layers.
        masks: dropout masks drawn beforehand, in the order of the model's draws.
        generator: draws the masks that are missing.
        twice: the run will be differentiated twice.
        spared: then, the parameters whose gradients may be left without a value.

    Attributes:
        calls: the layers' calls, in order.
        inputs: their inputs, in the same order.
        masks: all masks used.
        unrecorded: parameters with a use that is not in ``calls``, and by which function.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        tap: Callable[[Tensor], Tensor] | None = None,
        masks: tuple[Tensor, ...] = (),
        generator: torch.Generator | None = None,
        twice: bool = False,
        spared: Spared | None = None,
    ):
        super().__init__()
        self.tap = tap
        self.generator = generator
        self.twice = twice
        self.masks = list(masks)
        self.drawn = 0
        self.calls: list[Call] = []
        self.inputs: list[Tensor] = []
        self.unrecorded: dict[str, str] = {}
        self.spared = spared
        self._names = {id(p): name for name, p in params.items()} if tap is not None else {}
        # Kept alive, and compared with `is`: identities of dead tensors are used again.
        self._transposed: list[tuple[Tensor, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Most functions are nothing special, and are passed on after this one look.
        if func not in _SPECIAL:
            return self._call(func, args, kwargs)
        if func in DROPOUTS:
            return dropout(func, self._mask, *args, **kwargs)
        if func in DRAWS and DRAWS[func](args, kwargs):
            msg = (
                f"the model draws random numbers by {func.__name__}, which no generator controls "
                "here: use dropout, or make the random numbers part of the batch"
            )
            raise RuntimeError(msg)
        if func in _COMPOSITES:
            with self:
                return _COMPOSITES[func](*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(func, *args, **kwargs)
        if func in _EMBEDDINGS:
            args, kwargs = _pure_embedding(func, args, kwargs)
        if func in RECURRENT and (self.twice or not recurrent_options(args)[2]):
            # cuDNN's have no second derivative, and in eval mode no first one.
            with torch.backends.cudnn.flags(enabled=False):
                return self._call(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func, args, kwargs):
        run = _TWICE.get(func, func) if self.twice else func
        if self.twice and func in _AFFINE:
            run = functools.partial(run, spared=self.spared)
        if self.tap is None:
            return run(*args, **kwargs)
        return self._layer(self.tap, func, run, args, kwargs)

    # ------------------------------------------------------------------------------------ layers
    def _layer(self, tap, func, run, args, kwargs):
        def argument(i, name, default=None):
            return args[i] if len(args) > i else kwargs.get(name, default)

        def record(kind, x, weight, bias, options):
            # A parameter that is a layer's input has a use that its own pairs do not tell of.
            if kind != "add":
                self._report(func, argument(0, "input"))
            out = run(*args, **kwargs)
            call = Call(kind, weight, self._name(bias), options, tuple(out.shape))
            self.calls.append(call)
            self.inputs.append(x)
            return tap(out)

        if func is F.linear:
            x, matrix, bias = argument(0, "input"), argument(1, "weight"), argument(2, "bias")
            if weight := self._name(matrix):
                return record("linear", x, weight, bias, ("out_in",))
            if bias is None and (weight := self._view_of(matrix)):
                return record("linear", x, weight, None, ("in_out",))
        elif func in CONVS:
            if weight := self._name(argument(1, "weight")):
                names = (("stride", 1), ("padding", 0), ("dilation", 1), ("groups", 1))
                options = [argument(i, n, d) for i, (n, d) in enumerate(names, 3)]
                dims = CONVS[func]
                options = (dims, *(_per_axis(o, dims) for o in options[:3]), options[3])
                return record("conv", argument(0, "input"), weight, argument(2, "bias"), options)
        elif func in TRANSPOSED_CONVS:
            x, kernel, bias = argument(0, "input"), argument(1, "weight"), argument(2, "bias")
            if (weight := self._name(kernel)) and x.ndim == kernel.ndim:
                dims = TRANSPOSED_CONVS[func]
                names = (("stride", 3, 1), ("padding", 4, 0), ("dilation", 7, 1))
                options = [_per_axis(argument(i, n, d), dims) for n, i, d in names]
                added = _per_axis(argument(5, "output_padding", 0), dims)
                options = (dims, *options, argument(6, "groups", 1), added)
                out = record("conv_transpose", x, weight, None, options)
                if name := self._name(bias):
                    # The weight's positions are the input's, the bias's the output's: it is a
                    # layer of its own, a scale of ones.
                    call = Call("norm", name, None, ("channel",), tuple(out.shape))
                    self.calls.append(call)
                    self.inputs.append(out.new_ones(()).expand(out.shape))
                    out = tap(out)
                return out
        elif func is F.embedding:
            if weight := self._name(argument(1, "weight")):
                padding = argument(2, "padding_idx")
                return record("embedding", argument(0, "input"), weight, None, (padding,))
        elif func in _NORMS:
            scale, bias, normalise, axes = _norm(func, argument)
            if weight := self._name(scale):
                # The normalised input itself: recovered from the output, it would be lost where the
                # scale is zero.
                return record("norm", normalise(argument(0, "input")), weight, bias, axes)
        elif func in _MATMULS:
            right = argument(1, "other")
            if weight := self._view_of(right):
                return record("linear", argument(0, "input"), weight, None, ("out_in",))
            if (weight := self._name(right)) and right.ndim == 2:
                return record("linear", argument(0, "input"), weight, None, ("in_out",))
        elif func in _ADDS and len(args) == 2 and not kwargs:
            own = [x for x in args if self._name(x)]
            if len(own) == 1 and (weight := self._name(own[0])):
                # The other summand is not recorded: nothing about the parameter depends on it.
                (other,) = (x for x in args if x is not own[0])
                self._report(func, other)
                return record("add", own[0], weight, None, ())
        elif func in _TRANSPOSES and (weight := self._name(args[0])):
            out = func(*args, **kwargs)
            self._transposed.append((out, weight))
            return out
        if func not in _METADATA:
            for leaf in tree.leaves((args, kwargs)):
                self._report(func, leaf)
        return run(*args, **kwargs)

    def _report(self, func, used: Any) -> None:
        if isinstance(used, Tensor) and (weight := self._name(used) or self._view_of(used)):
            self.unrecorded[weight] = getattr(func, "__name__", str(func))

    def _name(self, tensor: Any) -> str | None:
        return self._names.get(id(tensor))

    def _view_of(self, tensor: Tensor) -> str | None:
        return next((name for view, name in self._transposed if view is tensor), None)

    # ------------------------------------------------------------------------------------- noise
    def _mask(self, shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
        """True where an entry is kept, with probability ``1 - p``."""
        if self.drawn == len(self.masks):
            uniform = random.uniform(shape, self.generator, dtype=torch.float32, device=like.device)
            self.masks.append(uniform >= p)
        self.drawn += 1
        return self.masks[self.drawn - 1]

    def _attention(
        self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs
    ):
        if dropout_p == 0.0:
            if not self.twice:
                return func(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
            with sdpa_kernel(SDPBackend.MATH):
                return func(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
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
        return dropout(F.dropout, self._mask, scores.softmax(-1), dropout_p) @ value


def _pure_embedding(func, args, kwargs) -> tuple[tuple, dict]:
    """The arguments with dense gradients; what has no gradient of its own is refused."""
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


def _norm(func, argument) -> tuple[Any, Any, Callable[[Tensor], Tensor], tuple]:
    """(scale, bias, the normalisation without them, where the scale's axes are in the input)."""
    if func in (F.layer_norm, F.rms_norm):
        shape = argument(1, "normalized_shape")
        trailing = ("trailing", len(shape))
        if func is F.rms_norm:
            epsilon = argument(3, "eps")
            return argument(2, "weight"), None, lambda x: func(x, shape, None, epsilon), trailing
        epsilon = argument(4, "eps", 1e-5)
        scale, bias = argument(2, "weight"), argument(3, "bias")
        return scale, bias, lambda x: func(x, shape, None, None, epsilon), trailing
    if func is F.group_norm:
        groups, epsilon = argument(1, "num_groups"), argument(4, "eps", 1e-5)
        scale, bias = argument(2, "weight"), argument(3, "bias")
        return scale, bias, lambda x: func(x, groups, None, None, epsilon), ("channel",)
    mean, variance = argument(1, "running_mean"), argument(2, "running_var")
    own = argument(5, "use_input_stats" if func is F.instance_norm else "training", False)
    if own or mean is None:
        # Without them, so that the running statistics are updated once, by the model's own call.
        mean = variance = None
    scale, bias, epsilon = argument(3, "weight"), argument(4, "bias"), argument(7, "eps", 1e-5)
    return (
        scale,
        bias,
        lambda x: func(x, mean, variance, None, None, mean is None, 0.0, epsilon),
        ("channel",),
    )


def _per_axis(option: Any, dims: int) -> Any:
    if isinstance(option, str):
        return option
    return tuple(option) if isinstance(option, (tuple, list)) else (option,) * dims
