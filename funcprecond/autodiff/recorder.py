"""Watching a model run: which layer uses which parameter, and where it draws random numbers.

One ``TorchFunctionMode`` sees every torch function that the model calls, whether the model is an
``nn.Module`` or a plain function, and recognises parameters by identity, not by module class. So a
weight that is used twice, by ``F.linear`` or inside ``nn.MultiheadAttention``, is seen each time.
Nothing is registered on the model, and nothing is left behind.

Three jobs are done in one pass, because they all need the same interception:

* *layers*: each call that applies a weight is recorded with its input, and its output is handed to
  a ``tap`` so that gradients with respect to it can be taken;
* *random numbers*: dropout masks come from tensors drawn beforehand, or from the caller's
  generator, never from the global one;
* *derivatives*: a run that is differentiated twice takes our own rules, the math kernel of
  attention, and torch's own recurrent layers instead of cuDNN's.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcprecond import tree
from funcprecond.autodiff import attention
from funcprecond.autodiff.embedding import EMBEDDINGS, with_dense_gradient
from funcprecond.autodiff.random_functions import (
    DRAWS,
    DROPOUTS,
    RECURRENT,
    dropout,
    recurrent_options,
    refuse,
)
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.autodiff.rules.table import replaced
from funcprecond.layers.kinds import KINDS_OF_FUNCTION
from funcprecond.layers.layer_call import FunctionCall, LayerCall
from funcprecond.linalg import random

__all__ = ["Recorder"]

_TRANSPOSES = {
    torch.t,
    torch.Tensor.t,
    torch.Tensor.T.__get__,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.mT.__get__,  # pyright: ignore[reportAttributeAccessIssue]
}
# Functions that only ask what a tensor is, which is no use of it.
_QUESTIONS = {
    torch.Tensor.dim,
    torch.Tensor.size,
    torch.Tensor.stride,
    torch.Tensor.numel,
    torch.Tensor.__len__,
    torch.Tensor.is_floating_point,
    *(
        getattr(torch.Tensor, name).__get__
        for name in ["dtype", "device", "shape", "ndim", "requires_grad"]
    ),
    *(getattr(torch.Tensor, name).__get__ for name in ["is_nested", "layout", "is_cuda"]),
}
_SPECIAL = {
    *DROPOUTS,
    *DRAWS,
    *RECURRENT,
    *attention.COMPOSITES,
    *EMBEDDINGS,
    F.scaled_dot_product_attention,
}


class Recorder(TorchFunctionMode):
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
        self.calls: list[LayerCall] = []
        self.inputs: list[Tensor] = []
        self.unrecorded: dict[str, str] = {}
        self._spared = spared
        self._masks_used = 0
        self._names = _Names({} if tap is None else params)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Most functions are nothing special, and are passed on after this one look.
        if func not in _SPECIAL:
            return self._call(func, args, kwargs)
        if func in DROPOUTS:
            return dropout(func, self._mask, *args, **kwargs)
        if func in DRAWS and DRAWS[func](args, kwargs):
            refuse(func)
        if func in attention.COMPOSITES:
            with self:
                return attention.COMPOSITES[func](*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return attention.scaled_dot_product(self._mask, self.twice, *args, **kwargs)
        if func in EMBEDDINGS:
            args, kwargs = with_dense_gradient(func, args, kwargs)
        if func in RECURRENT and (self.twice or not recurrent_options(args)[2]):
            # cuDNN's have no second derivative, and in eval mode no first one.
            with torch.backends.cudnn.flags(enabled=False):
                return self._call(func, args, kwargs)
        return self._call(func, args, kwargs)

    def _call(self, func, args, kwargs):
        run = replaced(func, self._spared) if self.twice else func
        if self.tap is None:
            return run(*args, **kwargs)
        return self._record(self.tap, func, run, args, kwargs)

    def _record(self, tap, func, run, args, kwargs):
        """Run the function, and note which parameters it uses and how."""
        names = self._names
        if func in _TRANSPOSES and (weight := names.of(args[0])):
            return names.transposed(func(*args, **kwargs), weight)
        kind = KINDS_OF_FUNCTION.get(func)
        if kind is not None:
            uses = kind.recognize(FunctionCall(func, args, kwargs), names)
            if uses:
                parts = {k for use in uses for k in (use.call.weight, use.call.bias)}
                # A parameter that is a layer's input has a use that its own pairs do not tell of.
                self._note(func, (x for x in (*args, *kwargs.values())), parts)
                out = run(*args, **kwargs)
                for use in uses:
                    self.calls.append(dataclasses.replace(use.call, shape=tuple(out.shape)))
                    ones = out.new_ones(()).expand(out.shape) if use.input is None else None
                    self.inputs.append(ones if use.input is None else use.input)  # pyright: ignore
                    out = tap(out)
                return out
        if func not in _QUESTIONS:
            self._note(func, tree.leaves((args, kwargs)), set())
        return run(*args, **kwargs)

    def _note(self, func, used, recorded) -> None:
        """Note the parameters among the arguments that are used in another way than recorded."""
        for x in used:
            if not isinstance(x, Tensor):
                continue
            name = self._names.of(x) or self._names.of_transpose(x)
            if name is not None and name not in recorded:
                self.unrecorded[name] = getattr(func, "__name__", str(func))

    def _mask(self, shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
        """True where an entry is kept, with probability ``1 - p``."""
        if self._masks_used == len(self.masks):
            uniform = random.uniform(shape, self.generator, dtype=torch.float32, device=like.device)
            self.masks.append(uniform >= p)
        self._masks_used += 1
        return self.masks[self._masks_used - 1]


class _Names:
    """Which tensors of the run are parameters, or transposes of them."""

    def __init__(self, params: Mapping[str, Tensor]):
        self._names = {id(p): name for name, p in params.items()}
        # Kept alive, and compared with `is`: identities of dead tensors are used again.
        self._transposes: list[tuple[Tensor, str]] = []

    def of(self, tensor: Any) -> str | None:
        return self._names.get(id(tensor))

    def of_transpose(self, tensor: Any) -> str | None:
        return next((name for view, name in self._transposes if view is tensor), None)

    def transposed(self, view: Tensor, name: str) -> Tensor:
        """Remember that a tensor is the transpose of a parameter."""
        self._transposes.append((view, name))
        return view
