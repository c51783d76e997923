"""Kronecker factors measured on data: on one batch, or over many however they are split."""

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
    """The layers with output gradients of zero, which take no backward pass."""
    like = next(iter(evaluation.params.values()))
    grads = [like.new_zeros(()).expand(1, *call.shape) for call in evaluation.calls]
    return Layers(layer_uses(evaluation, grads), {}, evaluation.constant)


def factors_of_parts(
    parts: Iterable[Layers], params: Params, sharing: Sharing, thin: bool = False
) -> tuple[KroneckerIO, dict[str, tuple[LayerUse, ...]]]:
    """The factors of all cotangents, and the layers' uses without these."""
    found, uses = KroneckerIO.init(params, thin), {}
    for part in parts:
        found = found.with_cotangents(part)
        uses = {
            name: tuple(dataclasses.replace(use, grads=use.grads[:0].clone()) for use in block)
            for name, block in part.uses.items()
        }
        del part  # so that it is gone while the next is made
    # Inputs come last, when the run's graph is gone.
    return found.with_inputs(uses, sharing), uses


def factors_over_batches(
    measured: Iterable[tuple[Iterable[Layers], Tensor, bool]],
    params: Params,
    sharing: Sharing,
    forward_only: bool,
) -> KroneckerIO:
    """The factors over all batches.

    What is made of output gradients is averaged over the batches as the loss is, the inputs' second
    moments by their number of positions.
    """
    # By block or name: a batch's value, with what it counts.
    inputs, outputs = _Mean(), _Mean()
    units, others = _Mean(), _Mean()
    inputs_left: dict[str, bool] = {}
    for parts, share, is_total in measured:
        if forward_only:
            (layers,) = parts
            one, uses_of = factors_of_inputs(layers, params, sharing), layers.uses
        else:
            one, uses_of = factors_of_parts(parts, params, sharing)
        is_mean = not is_total
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
        msg = "there are no batches, or no parameters: pass a list or a DataLoader, no iterator"
        raise ValueError(msg)
    a, g = inputs.means(), outputs.means()
    left = {k: a[k] if inputs_left[k] else g[k] for k in a}
    right = {k: g[k] if inputs_left[k] else a[k] for k in a}
    one = scalar_like(params, 1.0)
    return KroneckerIO(left, right, units.means(), others.means(), one, tuple(params))


class _Mean:
    """Weighted means by name, or sums."""

    def __init__(self):
        self.totals: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}

    def add(self, name: str, x: Tensor, weight: Tensor, is_mean: bool = True) -> None:
        weight = weight.to(x.dtype)
        # A batch whose every term is ignored has a mean of 0 / 0, and no share.
        x = torch.where(weight > 0, x * weight, 0.0)
        if name in self.totals:
            x = self.totals[name] + x
            weight = self.weights[name] + weight if is_mean else weight
        self.totals[name], self.weights[name] = x, weight

    def means(self) -> dict[str, Tensor]:
        return {k: x / self.weights[k] for k, x in self.totals.items()}


def factors_of_inputs(
    layers: Layers, params: Params, sharing: Sharing, keep_thin: bool = False
) -> KroneckerIO:
    """FOOF's factors: the inputs' second moments, and the identity everywhere else."""
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
    """EKFAC: the exact second moments in the factors' eigenbases."""
    moments = _Mean()
    for (layers,), share, is_total in measured:
        for name, uses in layers.uses.items():
            if name in bases:
                bias = split_block(name)[1] is not None
                basis = bases[name]
                found = uses[0].call.second_moments(uses, bias, basis.left, basis.right)
                moments.add(name, found * layers.scale, share, not is_total)
    return {
        k: Rotated(bases[k].left, bases[k].right, x.reshape(bases[k].values.shape), bases[k].rest)
        for k, x in moments.means().items()
    }
