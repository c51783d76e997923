"""Which uses of a parameter were not recorded, as the autograd graph of the run proves.

The recorder intercepts torch functions. It does not intercept a model that differentiates inside
its own forward, a scripted function, a custom ``autograd.Function`` or a ``torch.func`` transform
inside the model. Each of these leaves paths in the graph that lead to the parameter, but not
through the output of a recorded call.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Recorded", "hidden_uses", "passes_by", "sequence_number"]


@dataclasses.dataclass(frozen=True, eq=False)
class Recorded:
    """The nodes of the graph that a recorded call has made.

    Autograd numbers the nodes of a thread in the order in which they are made.

    Attributes:
        first, end: the numbers of its nodes are at least ``first`` and less than ``end``.
        names: the parameters that the call uses.
        outputs: the nodes of its outputs, usually of one.
    """

    first: int
    end: int
    names: frozenset[str]
    outputs: frozenset[Any]


def sequence_number() -> int:
    """The number that autograd gives to the next node."""
    return torch._C._autograd._get_sequence_nr()  # pyright: ignore


def hidden_uses(
    outputs: Iterable[Tensor],
    sources: Iterable[tuple[str, Tensor]],
    recorded: Sequence[Recorded],
) -> dict[str, str]:
    """Find the parameters with a path from the outputs that is not through a recorded output.

    Args:
        outputs: the outputs of the run.
        sources: the names of parameters, with the tensors that stand for them in the graph.
        recorded: the recorded calls, in the order in which they were made.

    Returns:
        A description of such a path for each parameter that has one. Costs a walk over the graph,
        two microseconds per node.
    """
    names = {node: name for name, x in sources if (node := _node(x)) is not None}
    starts = [call.first for call in recorded]

    def made_by(number: int) -> Recorded | None:
        i = bisect.bisect_right(starts, number) - 1
        return recorded[i] if i >= 0 and number < recorded[i].end else None

    stack = [x.grad_fn for x in outputs if x.grad_fn is not None]
    seen, found = set(stack), {}
    while stack:
        node = stack.pop()
        call = made_by(node._sequence_nr())
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following in names:
                if call is None or names[following] not in call.names:
                    found.setdefault(names[following], node.name())
                continue
            entered = made_by(following._sequence_nr())
            if entered is not None and entered is not call and following not in entered.outputs:
                # The call is entered elsewhere than at its output, as when it is differentiated.
                found |= {name: node.name() for name in entered.names if name not in found}
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def passes_by(loss: Tensor, outputs: Iterable[Tensor], sources: Iterable[Tensor]) -> bool:
    """Whether a loss depends on parameters by a path that is not through an output of the model.

    Args:
        loss: the loss.
        outputs: the outputs of the model.
        sources: the parameters, or the tensors that stand for them in the graph.
    """
    seen = {_node(x) for x in outputs}
    ends = {node for x in sources if (node := _node(x)) is not None} - seen
    stack = [_node(loss)]
    while stack:
        node = stack.pop()
        if node in ends:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return False


def _node(x: Tensor) -> Any:
    """The node of a tensor in the graph; None for one that was made where gradients are off."""
    if x.grad_fn is not None or not x.requires_grad:
        return x.grad_fn
    with torch.enable_grad():
        return x.view_as(x).grad_fn.next_functions[0][0]  # pyright: ignore
