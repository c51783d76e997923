"""Recurrent layers written out, so that their weights are recorded and their dropout is given.

torch runs all steps of a recurrent layer in one function. It shows neither the inputs nor the
output gradients of the weights inside, and draws its dropout masks from the global generator. Here
the same layer is a loop over the steps::

    z_t = W_ih x_t + b_ih            for all t at once
    s_t = W_hh h_(t-1) + b_hh
    h_t = cell(z_t, s_t)

Both weights are linear layers. The inputs of the second one are the states ``h_(t-1)``. Except in a
GRU, ``z_t`` and ``s_t`` are only added, so that their gradients are the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from funcprecond.autodiff.layer_recorder import LayerRecorder
from funcprecond.autodiff.random_functions import dropout
from funcprecond.autodiff.rules.backward import asked

__all__ = ["CELLS", "can_write_out", "cell", "written_out"]

Mask = Callable[[tuple[int, ...], float, Tensor], Tensor]

CELLS = {
    torch.lstm_cell: torch.lstm,
    torch.gru_cell: torch.gru,
    torch.rnn_tanh_cell: torch.rnn_tanh,
    torch.rnn_relu_cell: torch.rnn_relu,
}
"""The functions of one step, and those of all steps."""


def can_write_out(args: Sequence[Any]) -> bool:
    """Whether the arguments are those of a layer without packed sequences and projections."""
    if not isinstance(args[3], bool):
        return False
    weights, has_bias, layers, bidirectional = args[2], args[3], args[4], args[7]
    return len(weights) == layers * (1 + bidirectional) * (4 if has_bias else 2)


def written_out(
    func: Callable[..., Any],
    layers: LayerRecorder | None,
    mask: Mask,
    mode: Any,
    input: Tensor,
    start: Tensor | Sequence[Tensor],
    weights: Sequence[Tensor],
    has_bias: bool,
    depth: int,
    p: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """Compute a recurrent layer step by step.

    Args:
        func: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``.
        layers: the recorder of the layers; None records none.
        mask: a function ``(shape, p, like) -> booleans`` that returns a dropout mask.
        mode: the mode under which the products with the inputs run.
        input, start, weights, has_bias, depth, p, training, bidirectional, batch_first: the
            arguments of the function.

    Returns:
        What the function returns.
    """
    size = 4 if has_bias else 2
    starts, time = [start] if isinstance(start, Tensor) else start, 1 if batch_first else 0
    finals, x = [], input
    for layer in range(depth):
        outputs = []
        for backward in range(1 + bidirectional):
            k = layer * (1 + bidirectional) + backward
            own = [*weights[size * k : size * (k + 1)], None, None][:4]
            state = [s[k] for s in starts]
            out, last = _direction(func, layers, mode, x, state, own, time, bool(backward))
            outputs.append(out)
            finals.append(last)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        if training and p and layer < depth - 1:
            x = dropout(F.dropout, mask, x, p)
    return (x, *(torch.stack(parts) for parts in zip(*finals, strict=True)))


def _direction(func, layers, mode, x, state, weights, time, backward):
    """One layer in one direction: its outputs and its last state."""
    w_ih, w_hh, b_ih, b_hh = weights
    with mode:
        z = F.linear(x, w_ih, b_ih)
    first, index, shift, states = 0, None, None, []
    if layers is not None:
        first = layers.number()
        summand = layers.zeros_like(z) if func is torch.gru else z
        summand, index = layers.open(w_hh, b_hh, summand)
        w_hh, b_hh = layers.prepared(w_hh), layers.prepared(b_hh)
        if layers.in_graph and not mode.twice and w_hh.requires_grad:
            summand = _WithWeight.apply(summand, w_hh, states)
            w_hh = w_hh.detach()
        z, shift = (z, summand) if func is torch.gru else (summand, None)
    if b_hh is not None and func is not torch.gru:
        z, b_hh = z + b_hh, None
    steps = z.unbind(time)
    shifts = [None] * len(steps) if shift is None else shift.unbind(time)
    order = range(len(steps))
    before: list[Any] = [None] * len(steps)
    after: list[Any] = [None] * len(steps)
    for t in reversed(order) if backward else order:
        before[t] = state[0]
        s, shift = F.linear(state[0], w_hh, b_hh), shifts[t]
        s = s if shift is None else s + shift
        state = cell(func, steps[t], s, state)
        after[t] = state[0]
    out = torch.stack(after, time)
    if layers is not None:
        states.append(torch.stack(before, time))
        names = [layers.of(w) for w in weights[1::2]]
        layers.close(index, states[0], names, first, [out, *state])
    return out, state


class _WithWeight(Function):
    """The identity, whose pull-back is also that of the products with the recurrent weight.

    The gradient in the weight is one product over all steps. Autograd would add one per step.
    """

    @staticmethod
    def forward(ctx: Any, z, weight, states):
        ctx.weight, ctx.states = weight, states
        return z.view_as(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g):
        if not asked(ctx, 2)[1]:
            return g, None, None
        rows, states = g.flatten(0, -2), ctx.states[0].detach().flatten(0, -2)
        return g, (rows.mT @ states).to(ctx.weight.dtype), None


def cell(func: Callable[..., Any], z: Tensor, s: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
    """The state after one step, (h,) or (h, c).

    Args:
        func: the function of all steps.
        z: the product of the input, (N, gates).
        s: the product of the state.
        state: the state before.
    """
    if func is torch.lstm:
        i, f, g, o = (z + s).chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(c), c]
    if func is torch.gru:
        z_r, z_u, z_n = z.chunk(3, -1)
        s_r, s_u, s_n = s.chunk(3, -1)
        n = torch.tanh(z_n + torch.sigmoid(z_r + s_r) * s_n)
        return [n + torch.sigmoid(z_u + s_u) * (state[0] - n)]
    return [torch.tanh(z + s) if func is torch.rnn_tanh else torch.relu(z + s)]
