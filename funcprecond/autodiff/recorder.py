"""A recorder of a model's run: which layer uses which parameter, and which random numbers it draws.

One ``TorchFunctionMode`` intercepts every torch function that the model calls, whether the model is
an ``nn.Module`` or a plain function. Nothing is registered on the model.

The mode does three jobs, because they all need the same interception:

* *layers*: each call that applies a weight is recorded with its input
  (:mod:`funcprecond.autodiff.layer_recorder`). Its output is passed to a function ``tap``, so that
  gradients can be taken with respect to it;
* *random numbers*: dropout masks and other random numbers are drawn beforehand or from the caller's
  generator, never from the global generator. A draw that cannot be replaced is an error;
* *derivatives*: a run that is differentiated twice uses the derivatives of
  :mod:`funcprecond.autodiff.rules`, the math kernel of attention, and torch's own recurrent layers
  instead of those of cuDNN.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcprecond import tree
from funcprecond.autodiff import attention
from funcprecond.autodiff.embedding import EMBEDDINGS, with_dense_gradient
from funcprecond.autodiff.layer_recorder import LayerRecorder
from funcprecond.autodiff.random_functions import (
    DRAWS,
    DROPOUTS,
    RECURRENT,
    REPLACED,
    GlobalState,
    dropout,
    recurrent_options,
    refuse,
    replaced_draw,
)
from funcprecond.autodiff.recurrent import CELLS, can_write_out, cell, written_out
from funcprecond.autodiff.rules.backward import Spared
from funcprecond.autodiff.rules.table import differentiated, replaced
from funcprecond.layers.layer_call import LayerCall
from funcprecond.linalg import random
from funcprecond.tracing import in_transform

__all__ = ["Recorder"]

_SPECIAL = {
    *DROPOUTS,
    *DRAWS,
    *REPLACED,
    *RECURRENT,
    *CELLS,
    *attention.COMPOSITES,
    *EMBEDDINGS,
    F.scaled_dot_product_attention,
    torch.autograd.grad,
}


class Recorder(TorchFunctionMode):
    """The mode for one run of a model; see the docstring of this module.

    Args:
        params: the tensors that the model receives as its parameters, by name.
        tap: a function of the output of a layer, whose result replaces the output. With None, no
            layers are recorded.
        masks: dropout masks and other random numbers that were drawn beforehand, in the order in
            which the model draws them.
        generator: the source of the missing ones.
        twice: whether the run will be differentiated twice.
        spared: the parameters whose gradients may be left without values, in such a run.
        in_graph: whether the run is an ordinary autograd graph.
        detached: whether the recorded calls get their parameters without a graph. What remains in
            the graph of the outputs are uses that were not recorded.

    Attributes:
        calls, inputs, unrecorded: the layers, see
            :class:`funcprecond.autodiff.layer_recorder.LayerRecorder`.
        masks: all random numbers of the run.
        own_leaves: the tensors in which the model takes derivatives of its own.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        tap: Callable[[Tensor], Tensor] | None = None,
        masks: tuple[Tensor, ...] = (),
        generator: torch.Generator | None = None,
        twice: bool = False,
        spared: Spared | None = None,
        in_graph: bool = False,
        detached: bool = False,
    ):
        super().__init__()
        self.generator = generator
        self.twice = twice
        self.masks = list(masks)
        self._layers = None if tap is None else LayerRecorder(params, tap, in_graph, detached)
        self.calls: list[LayerCall] = [] if self._layers is None else self._layers.calls
        self.inputs: list[Tensor] = [] if self._layers is None else self._layers.inputs
        self.unrecorded: dict[str, str] = {} if self._layers is None else self._layers.unrecorded
        self.own_leaves: list[Tensor] = [] if self._layers is None else self._layers.own_leaves
        self._spared = spared
        self._masks_used = 0
        self._depth, self._global_state = 0, None
        # Tensors that the model has written random results into, and the results.
        self._written: list[tuple[Tensor, Tensor]] = []

    def __enter__(self):
        # The mode enters itself again inside of composite functions.
        if self._depth == 0 and not torch.compiler.is_compiling():
            self._global_state = GlobalState()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, exc_type, exc_value, traceback):
        super().__exit__(exc_type, exc_value, traceback)
        self._depth -= 1
        if self._depth or exc_type is not None:
            return
        if self._global_state is not None:
            self._global_state.check()
        if self._masks_used < len(self.masks):
            # A draw that was not seen, as a compiler may hide it, would shift all later ones.
            msg = (
                f"the model took {self._masks_used} of the {len(self.masks)} random tensors that "
                "were drawn for it: draw them in the same mode (train or eval), and let the model "
                "make the same draws in every run; under a compiler, replace rand_like and "
                "randn_like by rand and randn"
            )
            raise RuntimeError(msg)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._written:
            args, kwargs = tree.map(self._as_written, (args, kwargs))
        # Most functions are not special. They are passed on after this one test.
        if func not in _SPECIAL:
            return self._call(func, args, kwargs)
        if func in DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func in REPLACED and (self.generator or self._masks_used < len(self.masks)):
            return self._drawn(func, args, kwargs)
        if func is torch.autograd.grad:
            self.own_leaves += differentiated(*args, **kwargs)
        if func in RECURRENT and can_write_out(args):
            draws = DRAWS[func](args, kwargs)
            if draws or self._records(args[2]):
                return written_out(func, self._layers, self._mask, self, *args)
        if func in CELLS and self._records(args[2:]):
            return self._step(CELLS[func], *args)
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
            # The layers of cuDNN have no second derivative, and in eval mode no first derivative.
            with torch.backends.cudnn.flags(enabled=False):
                return self._call(func, args, kwargs)
        return self._call(func, args, kwargs)

    def hidden_uses(self, outputs: Sequence[Tensor]) -> dict[str, str]:
        """See :meth:`funcprecond.autodiff.layer_recorder.LayerRecorder.hidden_uses`."""
        return {} if self._layers is None else self._layers.hidden_uses(outputs)

    def finish(self, outputs: Any) -> Any:
        """See :meth:`funcprecond.autodiff.layer_recorder.LayerRecorder.finish`."""
        return outputs if self._layers is None else self._layers.finish(outputs)

    def _call(self, func, args, kwargs):
        run = replaced(func, self._spared) if self.twice else func
        if self._layers is None:
            return run(*args, **kwargs)
        return self._layers.record(func, run, args, kwargs)

    def _records(self, weights: Sequence[Any]) -> bool:
        """Whether one of the weights is a parameter whose layer is recorded."""
        layers = self._layers
        return layers is not None and any(layers.view(w) is not None for w in weights)

    def _step(self, func, input, state, w_ih, w_hh, b_ih=None, b_hh=None):
        """One step of a recurrent layer, whose two products are recorded as linear layers."""
        state = [state] if isinstance(state, Tensor) else list(state)
        with self:
            z, s = F.linear(input, w_ih, b_ih), F.linear(state[0], w_hh, b_hh)
        found = cell(func, z, s, state)
        return found[0] if len(found) == 1 else tuple(found)

    def _dropout(self, func, input, p=0.5, training=True, inplace=False):
        out = dropout(func, self._mask, input, p, training)
        if not inplace or out is input:
            return out
        # A tensor that requires a gradient was made by the run, and is written to, so that its
        # views change too. Any other may belong to the caller, as the inputs of the model do.
        return self._write(input, out, not input.requires_grad)

    def _drawn(self, func, args, kwargs):
        out, in_place = replaced_draw(func, self._next, args, kwargs)
        # Under vmap, the numbers may be mapped and the tensor not.
        whole = in_place and args[0]._base is None
        return self._write(args[0], out, whole and in_transform()) if in_place else out

    def _write(self, target: Tensor, value: Tensor, stand_in: bool) -> Tensor:
        """Write into a tensor, or let the value stand for it in the rest of the run."""
        if stand_in:
            self._written.append((target, value))
            return value
        return target.copy_(value)

    def _as_written(self, x):
        # The latest value counts.
        return next((value for old, value in reversed(self._written) if old is x), x)

    def _mask(self, shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
        """Return the next dropout mask: True where an entry is kept, with probability ``1 - p``."""

        def draw(generator):
            return random.uniform(shape, generator, dtype=torch.float32, device=like.device) >= p

        return self._next(shape, draw)

    def _next(self, shape: tuple[int, ...], draw: Callable[..., Tensor]) -> Tensor:
        """Return the next random numbers of the run."""
        if self._masks_used == len(self.masks):
            self.masks.append(draw(self.generator))
        found = self.masks[self._masks_used]
        self._masks_used += 1
        if tuple(found.shape) != shape:
            msg = (
                f"the model needs random numbers of the shape {shape}, and those that were drawn "
                f"for it have the shape {tuple(found.shape)}: draw them for this batch, "
                "fp.draw(problem, params, batch, needs, generator=...)"
            )
            raise ValueError(msg)
        return found
