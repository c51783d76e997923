"""The blocks of a curvature matrix that belong to layers, and the measurements of all layers."""

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
            names: the parameters. If a weight is named without its bias, then its block becomes
                that of the weight alone.

        Returns:
            The selected measurements.

        Raises:
            ValueError: a bias was named without the weight of its block.
        """
        chosen = set(names)
        uses = {}
        for block, of_block in self.uses.items():
            weight, bias = split_block(block)
            if weight in chosen:
                uses[block if bias in chosen else weight] = of_block
            elif bias in chosen:
                msg = (
                    f"{bias!r} is preconditioned together with {weight!r}: assign both to the same "
                    "method"
                )
                raise ValueError(msg)
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
) -> dict[str, list[int]]:
    """Group the calls of a run by block, and keep the complete blocks.

    A block is complete if every use of its parameters is among the calls, and all of its calls are
    of the same kind and have the same bias.

    Args:
        calls: all calls of a run, in order.
        unrecorded: the parameters with a use that is not among the calls.
        usable: for each call, whether it may be in a block.
        tied: whether a block is also complete if it consists of embeddings and linear layers with
            the same table.

    Returns:
        The indices of the calls of each complete block.
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
