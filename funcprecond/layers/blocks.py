"""The blocks of a curvature matrix that belong to layers, and what is measured of all of them."""

from collections.abc import Container, Iterable, Sequence

from torch import Tensor

from funcprecond.layers.example_gradients import ExampleGradients
from funcprecond.layers.kinds.embedding import Embedding
from funcprecond.layers.kinds.linear import Linear
from funcprecond.layers.layer_call import LayerCall, LayerUse, Sharing
from funcprecond.linalg.precision import factor_dtype
from funcprecond.tree import Params, state, static

__all__ = ["Layers", "complete_blocks", "split_block"]


@state
class Layers:
    """What :class:`funcprecond.curvature.layer_statistics.LayerStatistics` measures.

    With the rows of all cotangents and examples below each other as U, ``scale U^T U`` is the
    curvature matrix.

    Attributes:
        uses: for each block ``"weight+bias"`` (or ``"weight"``), the layer's uses; several if the
            weight is shared.
        others: parameters that no layer covers, by what was asked for: the diagonal of their
            curvature, or their rows (V, N, *shape), both without ``scale``.
        scale: what the sum of outer products is multiplied by, a 0-d tensor.
        sharing: as asked for.
    """

    uses: dict[str, tuple[LayerUse, ...]]
    others: dict[str, Tensor]
    scale: Tensor
    sharing: Sharing = static(default="expand")

    def restrict(self, names: Iterable[str]) -> "Layers":
        """Only what concerns the named parameters; a block without its bias is its weight's.

        Raises:
            ValueError: a bias was named without the weight that it is preconditioned with.
        """
        chosen = set(names)
        uses = {}
        for block, of_block in self.uses.items():
            weight, bias = split_block(block)
            if weight in chosen:
                uses[block if bias in chosen else weight] = of_block
            elif bias in chosen:
                msg = (
                    f"{bias!r} is preconditioned together with {weight!r}: give both to one method"
                )
                raise ValueError(msg)
        others = {k: v for k, v in self.others.items() if k in chosen}
        return Layers(uses, others, self.scale, self.sharing)

    def example_gradients(self, params: Params) -> tuple[tuple[ExampleGradients, ...], Params]:
        """The rows of the curvature matrix, without ``scale``.

        Args:
            params: the parameters whose rows are wanted: their shapes.

        Returns:
            The affine layers' rows, kept as inputs and output gradients; and the other rows, formed,
            (V N, *shape) for each parameter.
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
    """``"weight+bias"`` or ``"weight"`` to (weight, bias or None)."""
    weight, _, bias = name.partition("+")
    return weight, bias or None


def complete_blocks(
    calls: Sequence[LayerCall], unrecorded: Container[str], usable: Sequence[bool], tied: bool
) -> dict[str, list[int]]:
    """The calls of each block whose every use was recorded, in one kind and with one bias.

    Args:
        calls: all calls of a run, in order.
        unrecorded: parameters with a use that is not among the calls.
        usable: for each call, whether it may be in a block.
        tied: whether a block may be an embedding and a linear layer of the same table, too.

    Returns:
        The indices of the calls, by block.
    """
    blocks: dict[str, list[int]] = {}
    owners: dict[str, set[str]] = {}
    for i, call in enumerate(calls):
        blocks.setdefault(call.block, []).append(i)
        for part in split_block(call.block):
            if part:
                owners.setdefault(part, set()).add(call.block)

    def is_complete(name: str, indices: list[int]) -> bool:
        first, *rest = (calls[i] for i in indices)
        parts = [part for part in split_block(name) if part]
        return (
            first.has_block
            and all(usable[i] for i in indices)
            and not any(part in unrecorded or len(owners[part]) > 1 for part in parts)
            and (all(map(first.combines_with, rest)) or (tied and _are_tied([first, *rest])))
        )

    return {name: indices for name, indices in blocks.items() if is_complete(name, indices)}


def _are_tied(calls: Sequence[LayerCall]) -> bool:
    """Whether all apply one (V, d) table: they look up its rows, or give V outputs."""
    applied = [call for call in calls if isinstance(call, Linear)]
    looked_up = [call for call in calls if isinstance(call, Embedding)]
    return (
        len(applied) + len(looked_up) == len(calls)
        and bool(applied)
        and bool(looked_up)
        and not any(call.inputs_first for call in applied)
        and all(map(looked_up[0].combines_with, looked_up))
    )
