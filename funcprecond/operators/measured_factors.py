"""Kronecker factors measured on one batch, or on many independently of how the data are split."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import layer_uses
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import LayerUse, Sharing
from funcprecond.linalg.precision import factor_dtype
from funcprecond.linalg.treemath import scalar_like
from funcprecond.operators.block_forms import Rotated
from funcprecond.representation.kronecker_io import KroneckerIO
from funcprecond.tree import Params

__all__ = [
    "corrected_blocks",
    "factors_of_inputs",
    "factors_of_parts",
    "factors_over_batches",
    "inputs_only",
]


def inputs_only(evaluation: Evaluation) -> Layers:
    """The layers' inputs, with zeros in the place of output gradients: no backward pass is run."""
    like = next(iter(evaluation.params.values()))
    grads = [like.new_zeros(()).expand(1, *call.shape) for call in evaluation.calls]
    return Layers(layer_uses(evaluation, grads), {}, evaluation.constant)


def factors_of_parts(
    parts: Iterable[Layers], params: Params, sharing: Sharing, thin: bool = False
) -> tuple[KroneckerIO, dict[str, tuple[LayerUse, ...]]]:
    """The factors of one batch.

    Args:
        parts: the layers' inputs and output gradients, split by cotangents.
        params: the parameters.
        sharing: "expand" or "reduce".
        thin: whether to store a factor as the smaller matrix W with ``W^T W`` equal to it, where W
            has fewer rows than columns.

    Returns:
        The factors, and the layers' uses without their output gradients.
    """
    found, uses = KroneckerIO.init(params, thin), {}
    for part in parts:
        found = found.with_cotangents(part)
        uses = {
            name: tuple(dataclasses.replace(use, grads=use.grads[:0].clone()) for use in block)
            for name, block in part.uses.items()
        }
        del part  # frees its memory before the next part is computed
    # The inputs' factors come last, after the graph of the run has been freed.
    return found.with_inputs(uses, sharing), uses


def factors_over_batches(
    measured: Iterable[tuple[Iterable[Layers], Tensor, bool]],
    params: Params,
    sharing: Sharing,
    forward_only: bool,
) -> KroneckerIO:
    """The factors over all batches.

    Everything that is computed from output gradients is averaged over all batches with the weights
    of the loss. The second moments of the inputs are averaged with their numbers of positions. A
    layer that a batch leaves out has output gradients of zero there, and no positions.

    Args:
        measured: for each batch, its layers split by cotangents, its weight, and whether the loss
            is a sum.
        params: the parameters.
        sharing: "expand" or "reduce".
        forward_only: whether only the inputs were measured.

    Raises:
        ValueError: there are no batches or no parameters.
    """
    inputs, outputs, is_mean = _Mean(), _Mean(), True
    units, others = _Mean(), _Mean()
    inputs_left: dict[str, bool] = {}
    total: Tensor | None = None
    for parts, share, is_total in measured:
        if forward_only:
            (layers,) = parts
            one, uses_of = factors_of_inputs(layers, params, sharing), layers.uses
        else:
            one, uses_of = factors_of_parts(parts, params, sharing)
        is_mean = not is_total
        total = share if total is None else total + share
        for name in one.left:
            uses = uses_of[name]
            inputs_left[name] = uses[0].call.inputs_first
            a, g = one.left[name], one.right[name]
            a, g = (a, g) if inputs_left[name] else (g, a)
            inputs.add(
                name, a, share.new_full((), sum(u.call.positions(u.inputs, sharing) for u in uses))
            )
            outputs.add(name, g, share, is_mean or forward_only)
        for name, x in one.units.items():
            units.add(name, x, share, is_mean or forward_only)
        for name, x in one.others.items():
            others.add(name, x, share, is_mean or forward_only)
    if not inputs.totals and not units.totals and not others.totals:
        msg = (
            "there are no batches in batches=, or no parameters: pass a non-empty list or "
            "DataLoader, and a problem with trainable parameters"
        )
        raise ValueError(msg)
    every = None if forward_only or not is_mean else total
    a, g = inputs.means(), outputs.means(every)
    left = {k: a[k] if inputs_left[k] else g[k] for k in a}
    right = {k: g[k] if inputs_left[k] else a[k] for k in a}
    one = scalar_like(params, 1.0)
    names, shapes = tuple(params), tuple(tuple(p.shape) for p in params.values())
    found = KroneckerIO(left, right, units.means(every), {}, one, names, shapes=shapes)
    # Of a parameter that some batches use outside of layers, only the diagonal is kept.
    rest = others.means(every)
    flat = found.flattened(rest)
    both = {k: x + rest[k] if k in rest else x for k, x in flat.others.items()}
    return dataclasses.replace(flat, others=rest | both)


class _Mean:
    """Weighted means of tensors by name, or weighted sums (``is_mean=False``)."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, weight: Tensor, is_mean: bool = True) -> None:
        weight = weight.to(x.dtype)
        # The mean of a batch in which every term is ignored is 0 / 0; its weight is zero.
        x = torch.where(weight > 0, x * weight, 0.0)
        if name in self.totals:
            x = self.totals[name] + x
            weight = self.weights[name] + weight if is_mean else weight
        self.totals[name], self.weights[name] = x, weight

    def means(self, weight: Tensor | None = None) -> dict[str, Tensor]:
        """The sums over a weight, or each over the weights that it was given."""
        if weight is not None:
            return {k: x / weight.to(x.dtype) for k, x in self.totals.items()}
        return {k: x / self.weights[k] for k, x in self.totals.items()}


def factors_of_inputs(
    layers: Layers, params: Params, sharing: Sharing, keep_thin: bool = False
) -> KroneckerIO:
    """FOOF's factors: the inputs' second moments, and the identity everywhere else.

    Args:
        layers: the layers' inputs.
        params: the parameters.
        sharing: "expand" or "reduce".
        keep_thin: see ``thin`` of :func:`factors_of_parts`.
    """
    left, right, units = {}, {}, {}
    for name, uses in layers.uses.items():
        call, bias = uses[0].call, split_block(name)[1] is not None
        if isinstance(call, Scale):
            eye = _identity(2 if bias else 1, uses[0])
            units[name] = eye.expand(params[call.weight].numel(), *eye.shape)
            continue
        inputs = call.input_factor(uses, bias, sharing, thin=keep_thin)
        outputs = _identity(call.fan_out, uses[0])
        outputs = outputs if call.groups == 1 else outputs.expand(call.groups, -1, -1)
        first, last = (inputs, outputs) if call.inputs_first else (outputs, inputs)
        left[name], right[name] = first, last
    covered = {k for name in layers.uses for k in split_block(name) if k}
    others = {k: torch.ones_like(p) for k, p in params.items() if k not in covered}
    one = torch.ones((), dtype=layers.scale.dtype, device=layers.scale.device)
    return KroneckerIO(left, right, units, others, one, tuple(params))


def _identity(size: int, use: LayerUse) -> Tensor:
    return torch.eye(size, dtype=factor_dtype(use.grads), device=use.grads.device)


def corrected_blocks(
    measured: Iterable[tuple[Iterable[Layers], Tensor, bool]], bases: dict[str, Rotated]
) -> dict[str, Any]:
    """EKFAC's blocks: the exact second moments in the eigenbases of K-FAC's factors.

    Args:
        measured: see :func:`factors_over_batches`; each batch has its layers in one part.
        bases: the eigenbases of each block.
    """
    moments, total, is_mean = _Mean(), None, True
    for (layers,), share, is_total in measured:
        is_mean = not is_total
        total = share if total is None else total + share
        for name, uses in layers.uses.items():
            if name in bases:
                bias = split_block(name)[1] is not None
                basis = bases[name]
                found = uses[0].call.second_moments(uses, bias, basis.left, basis.right)
                moments.add(name, found * layers.scale, share, is_mean)
    return {
        k: Rotated(bases[k].left, bases[k].right, x.reshape(bases[k].values.shape), bases[k].rest)
        for k, x in moments.means(total if is_mean else None).items()
    }
