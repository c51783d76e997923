"""The measurements of several micro-batches as that of one batch with all their examples.

For a mean, the reduction constant of all micro-batches b together is ``c = 1 / Σ_b (1 / c_b)``. The
curvature matrix is c times the sum of the outer products of all rows, and each micro-batch gave
``σ_b Σ r r^T`` with rows r and a scale ``σ_b``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.curvature.sampled_gradient import SampledGradient, SampledGradients
from funcprecond.curvature.sketch import Sketch
from funcprecond.layers.blocks import Layers, split_block
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.layer_call import LayerUse
from funcprecond.need import Need
from funcprecond.optim.watch import Measured
from funcprecond.tree import Params

__all__ = ["whole"]


def whole(parts: Sequence[Measured], need: Need, params: Params) -> Any:
    """The measurement of a need on all micro-batches of a step, as if they had been one batch.

    Args:
        parts: the measurements.
        need: the need.
        params: all parameters that were measured.

    Returns:
        A value of the type of the need.

    Raises:
        RuntimeError: the loss is a sum, and what it was divided by is not known.
        ValueError: the micro-batches do not fit together.
    """
    constants = _constants(parts)
    total = constants[0] if parts[0].is_sum else 1 / torch.stack([1 / c for c in constants]).sum()
    values = [part.values[need] for part in parts]
    if isinstance(need, Sketch):
        return values[0]
    if isinstance(need, SampledGradient):
        return _gradients(values, constants, total, parts, need)
    assert isinstance(need, LayerStatistics)
    return _layers(_in_one_form(values, params), parts, total, need)


def _constants(parts: Sequence[Measured]) -> list[Tensor]:
    """The reduction constant of each micro-batch; for a sum, what its value was multiplied by."""
    if len({part.is_sum for part in parts}) > 1:
        msg = "the losses of some micro-batches are means and others are sums: use one of the two"
        raise ValueError(msg)
    if not parts[0].is_sum:
        return [part.constant for part in parts]
    factors = []
    for part in parts:
        assert part.factor is not None
        factors.append(part.factor.to(part.constant))
    found = torch.stack(factors)
    if any(part.is_half for part in parts) or bool((found > 1.001).any()):
        msg = (
            "the loss is a sum that was multiplied by more than 1 or computed in float16, as with "
            "a GradScaler, so that the scale of the curvature is not known: use a loss with "
            "reduction='mean', or autocast to bfloat16 without a GradScaler"
        )
        raise RuntimeError(msg)
    if bool((found - found[0]).abs().max() > 1e-3 * found[0].abs()):
        msg = (
            "the loss is a sum that was divided by another number in each micro-batch: divide by "
            "the number of all terms of the step, or use a loss with reduction='mean'"
        )
        raise RuntimeError(msg)
    return factors


def _gradients(values, constants, total, parts, need) -> SampledGradients:
    """Gradients of the micro-batches' losses as those of the whole loss, which is their mean."""
    found: dict[str, Tensor] = {}
    for value, part, own in zip(values, parts, constants, strict=True):
        # The gradients have the factor c_b of their own loss, or its root.
        share = total / part.constant if part.is_sum else total / own
        share = share.sqrt() if need.per_sample else share
        for k, g in value.grads.items():
            scaled = (g * share).to(g.dtype) if len(parts) > 1 or part.is_sum else g
            found[k] = found[k] + scaled if k in found else scaled
    return SampledGradients(found)


def _layers(
    values: Sequence[Layers], parts: Sequence[Measured], total: Tensor, need: LayerStatistics
) -> Layers:
    if len(values) == 1 and not parts[0].is_sum:
        return values[0]
    uses: dict[str, tuple[LayerUse, ...]] = {}
    others: dict[str, Tensor] = {}
    for value, part in zip(values, parts, strict=True):
        # The scale of the rows of a micro-batch relative to c_b is 1, or 1 / c_b^2 if they are rows
        # of its own gradient.
        share = value.scale / part.constant
        for block, own in value.uses.items():
            if need.labels == "empirical":
                own = tuple(_scaled(use, share.sqrt()) for use in own)
            uses[block] = _joined(block, uses[block], own, need) if block in uses else own
        for k, x in value.others.items():
            x = (x * share).to(x.dtype)
            others[k] = others[k] + x if k in others else x
    return Layers(uses, others, total, values[0].sharing)


def _in_one_form(values: Sequence[Layers], params: Params) -> Sequence[Layers]:
    """The measurements, with a diagonal for what only some of them have in a block of its own.

    A layer may be used in another way by some micro-batches, such as an embedding by one example.
    """
    forms: dict[str, set[str | None]] = {}
    for value in values:
        for block in value.uses:
            for name in filter(None, split_block(block)):
                forms.setdefault(name, set()).add(block)
        for name in value.others:
            forms.setdefault(name, set()).add(None)
    mixed = {name for name, found in forms.items() if len(found) > 1}
    found = []
    for value in values:
        flat = {b: u for b, u in value.uses.items() if not mixed.isdisjoint(split_block(b))}
        others = dict(value.others)
        for uses in flat.values():
            others |= uses[0].call.diagonal(uses, params)
        kept = {b: u for b, u in value.uses.items() if b not in flat}
        found.append(dataclasses.replace(value, uses=kept, others=others))
    return found


def _scaled(use: LayerUse, factor: Tensor) -> LayerUse:
    return dataclasses.replace(use, grads=(use.grads * factor).to(use.grads.dtype))


def _joined(
    block: str, old: tuple[LayerUse, ...], new: tuple[LayerUse, ...], need: LayerStatistics
) -> tuple[LayerUse, ...]:
    """The uses of a block by the examples of both."""
    affine = all(isinstance(use.call, AffineCall) for use in (*old, *new))
    if affine and need.sharing == "expand" and not need.per_sample:
        # Every position of every use is a row, whatever example it belongs to.
        return (*old, *new)
    fits = len(old) == len(new) and all(
        a.inputs.shape[1:] == b.inputs.shape[1:] and a.grads.shape[2:] == b.grads.shape[2:]
        for a, b in zip(old, new, strict=True)
    )
    if not fits:
        msg = (
            f"the micro-batches have examples of different shapes in the layer of {block!r}, whose "
            "curvature needs the examples side by side: pad them to one length, or take a step for "
            "each micro-batch"
        )
        raise ValueError(msg)
    joined = []
    for a, b in zip(old, new, strict=True):
        grads = torch.cat([a.grads, b.grads], 1)
        call = dataclasses.replace(a.call, shape=tuple(grads.shape[1:]))
        joined.append(LayerUse(torch.cat([a.inputs, b.inputs]), grads, call))
    return tuple(joined)
