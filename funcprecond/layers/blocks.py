"""The blocks of a curvature matrix that belong to layers, and the measurements of all layers."""

import dataclasses
from collections.abc import Container, Iterable, Sequence

from torch import Tensor

from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.layers.kinds.affine import AffineCall
from funcprecond.layers.kinds.bias import Bias
from funcprecond.layers.kinds.embedding import Embedding
from funcprecond.layers.kinds.linear import Linear
from funcprecond.layers.kinds.scale import Scale
from funcprecond.layers.layer_call import LayerCall, LayerUse, Sharing
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params, state, static

__all__ = ["Layers", "complete_blocks", "part_of", "split_block"]


@state
class Layers:
    """The measurement of :class:`funcprecond.curvature.layer_statistics.LayerStatistics`.

    The curvature matrix is ``scale U^T U``. U has one row for each of V cotangents and N examples:
    the pull-back of the cotangent of this example to the parameters.

    Attributes:
        uses: the uses of a layer in the run, for each block ``"weight+bias"`` or ``"weight"``. A
            shared weight has several uses.
        others: for each parameter that no layer covers, the diagonal of its curvature or its part
            (V, N, *shape) of the rows of U, as requested, without ``scale``.
        scale: the factor of the sum of outer products, a 0-d tensor.
        sharing: the requested treatment of the positions of an example.
    """

    uses: dict[str, tuple[LayerUse, ...]]
    others: dict[str, Tensor]
    scale: Tensor
    sharing: Sharing = static(default="expand")

    def restrict(self, names: Iterable[str]) -> "Layers":
        """Select the measurements of the named parameters.

        Args:
            names: the parameters. If only one of a weight and its bias is named, then its block
                becomes that of this parameter alone.

        Returns:
            The selected measurements.
        """
        chosen = set(names)
        uses = {}
        for block, of_block in self.uses.items():
            weight, bias = split_block(block)
            own = [k for k in (weight, bias) if k in chosen]
            if len(own) == 2 or bias is None:
                uses |= {block: of_block} if own else {}
            elif own:
                pairs = [(use, parts(use.call)[own[0] == bias]) for use in of_block]
                uses[own[0]] = tuple(part_of(*pair) for pair in pairs)
        others = {k: v for k, v in self.others.items() if k in chosen}
        return Layers(uses, others, self.scale, self.sharing)

    def example_gradients(self, params: Params) -> tuple[tuple[ExampleGradients, ...], Params]:
        """Compute the rows of U.

        Args:
            params: the parameters for which the rows are wanted. Only their shapes are used.

        Returns:
            The rows of the affine layers, kept as inputs and output gradients; and the rows of the
            other parameters as tensors, (V N, *shape) for each.
        """
        kept: list[ExampleGradients] = []
        formed: Params = {}
        for uses in self.uses.values():
            found = uses[0].call.example_gradients(uses, params)
            if isinstance(found, ExampleGradients):
                kept.append(found)
            else:
                formed |= found
        for name, rows in self.others.items():
            if name in params:
                formed[name] = rows.flatten(0, 1).to(factor_dtype(rows))
        shaped = {k: x.reshape(-1, *params[k].shape) for k, x in formed.items()}
        return tuple(kept), shaped


def split_block(name: str) -> tuple[str, str | None]:
    """Split the name of a block into the names (weight, bias or None) of its parameters."""
    weight, _, bias = name.partition("+")
    return weight, bias or None


def complete_blocks(
    calls: Sequence[LayerCall], unrecorded: Container[str], usable: Sequence[bool], tied: bool
) -> dict[str, list[tuple[int, LayerCall]]]:
    """Group the calls of a run by block, and keep the complete blocks.

    A block is complete if every use of its parameters is among the calls, and all of its calls are
    of one kind. A weight and its bias form one block if they always appear together. Otherwise each
    has a block of its own.

    Args:
        calls: all calls of a run, in order.
        unrecorded: the parameters with a use that is not among the calls.
        usable: for each call, whether it may be in a block.
        tied: whether a block is also complete if it consists of embeddings and linear layers with
            the same table.

    Returns:
        For each complete block, the indices of its calls, and what the calls are for the block: as
        they were recorded, or without their bias, or their bias alone.
    """
    partners: dict[str, set[str | None]] = {}
    # A call without rows, such as that of an expert that gets none, is as good as no call.
    present = [(i, call) for i, call in enumerate(calls) if 0 not in call.shape]
    for _, call in present:
        partners.setdefault(call.weight, set()).add(call.bias)
        if call.bias is not None:
            partners.setdefault(call.bias, set()).add(call.weight)
    blocks: dict[str, list[tuple[int, LayerCall]]] = {}
    for i, call in present:
        together = call.bias is None or (
            partners[call.weight] == {call.bias}
            and partners[call.bias] == {call.weight}
            and not (call.weight in unrecorded or call.bias in unrecorded)
        )
        for part in (call,) if together else parts(call):
            blocks.setdefault(part.block, []).append((i, part))

    def is_complete(members: list[tuple[int, LayerCall]]) -> bool:
        first, *rest = (call for _, call in members)
        return (
            first.has_block
            and all(usable[i] for i, _ in members)
            and not any(k in unrecorded for k in (first.weight, first.bias) if k)
            and (all(map(first.combines_with, rest)) or (tied and _are_tied([first, *rest])))
        )

    return {name: members for name, members in blocks.items() if is_complete(members)}


def parts(call: LayerCall) -> tuple[LayerCall, LayerCall]:
    """A call without its bias, and its bias alone."""
    bias, weight = call.bias or "", dataclasses.replace(call, bias=None)
    if isinstance(call, Scale):
        return weight, dataclasses.replace(weight, weight=bias)
    axis = call.channel if isinstance(call, AffineCall) else -1
    return weight, Bias(weight=bias, shape=call.shape, inner=call.inner, axis=axis)


def part_of(use: LayerUse, part: LayerCall) -> LayerUse:
    """What a use is for a part of its call, as :func:`parts` makes it."""
    part = dataclasses.replace(part, shape=use.call.shape, inner=use.call.inner)
    if part.weight == use.call.weight:
        return dataclasses.replace(use, call=part)
    return LayerUse(use.grads.new_ones(()).expand(use.call.shape), use.grads, part)


def _are_tied(calls: Sequence[LayerCall]) -> bool:
    """Whether all calls use one (V, d) table, as embeddings or as linear layers with V outputs."""
    applied = [call for call in calls if isinstance(call, Linear)]
    looked_up = [call for call in calls if isinstance(call, Embedding)]
    return (
        len(applied) + len(looked_up) == len(calls)
        and bool(applied)
        and bool(looked_up)
        and not any(call.inputs_first for call in applied)
        and all(map(looked_up[0].combines_with, looked_up))
    )
