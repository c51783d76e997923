"""The functional states behind an optimizer: one for all parameters that took the same steps.

A method of this library has one state for all of its parameters, and torch's optimizers have one
for each parameter, so that a parameter without a gradient can sit out a step. Both agree as long as
all parameters take part in every step, which is one *piece*. When only some of them take part, the
piece is split in two, and each part goes on with its own state and its own count of steps.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.checkpoint import from_dict, to_dict
from funcprecond.tree import Params

__all__ = ["Piece", "cloned_where_shared", "packed", "part_of_state", "restored"]


class Piece:
    """The parameters that took the same steps, and their state.

    Attributes:
        params: the parameters, by the names that they have in the state.
        state: the states of the transforms that were applied to them, by their role.
        step: the number of steps that they took, which is the step at which the next needs are due.
    """

    # Trainers walk through the collections and dataclasses of a state and move their tensors. Here
    # the state moves by itself, where the parameters have been moved.
    def __init__(self, params: Params, state: dict[str, Any], step: int = 0):
        self.params, self.state, self.step = params, state, step
        self._devices = self._now()

    def _now(self) -> list[torch.device]:
        return [p.device for p in self.params.values()]

    def follow(self, init: Callable[[Params, Collection[str]], dict[str, Any]]) -> None:
        """Move the state to the devices of the parameters.

        Args:
            init: a function ``(params, roles) -> initial state``.
        """
        if self._devices != (now := self._now()):
            self.state = from_dict(init(self.params, self.state), to_dict(self.state))
            self._devices = now

    def __deepcopy__(self, memo: dict[int, Any]) -> "Piece":
        # A state is a tree of tensors without a graph, whose classes have no copy of their own.
        params = copy.deepcopy(self.params, memo)
        state = tree.map(lambda x: x.clone() if isinstance(x, Tensor) else x, self.state)
        found = Piece(params, state, self.step)
        memo[id(self)] = found
        return found


def part_of_state(
    state: dict[str, Any], like: dict[str, Any], chosen: Collection[str], names: Iterable[str]
) -> dict[str, Any]:
    """Select what belongs to some of the parameters of a state.

    Args:
        state: the state of all parameters.
        like: the initial state of the selected ones, which has the structure of the result.
        chosen: the names of the selected parameters.
        names: the names of all parameters.

    Returns:
        The state of the selected parameters. What all parameters share, such as a count of steps,
        is copied. A block of a weight and a bias of which only one is selected is left out.

    Raises:
        ValueError: the state belongs to all parameters together, such as that of L-BFGS.
    """
    flat, expected = to_dict(state), to_dict(like)
    empty = [p for p, x in tree.leaves_by_path(like, _is_empty) if _is_empty(x)]
    known = sorted(names, key=len, reverse=True)

    def owner(part: str) -> str | None:
        return next((k for k in known if part == k or part.startswith(f"{k}.")), None)

    def belongs(path: str) -> bool:
        if path in expected:
            return True
        fields = [p for p in empty if path.startswith(f"{p}.")]
        if not fields:
            return False
        block = path.removeprefix(f"{max(fields, key=len)}.")
        return all(owner(part) in chosen for part in block.split("+"))

    return from_dict(like, {k: x.clone() for k, x in flat.items() if belongs(k)})


def cloned_where_shared(state: Any, shared: Iterable[Tensor]) -> Any:
    """A state whose tensors have their own memory.

    The optimizer writes into the parameters and others write into their gradients. A method may
    keep either in its state, because it takes them for constants.

    Args:
        state: a tree of tensors.
        shared: the tensors that will be written into.
    """
    taken = {x.untyped_storage().data_ptr() for x in shared if x.numel()}

    def owned(x: Any) -> Any:
        is_shared = isinstance(x, Tensor) and x.untyped_storage().data_ptr() in taken
        return x.clone() if is_shared else x

    if any(x.untyped_storage().data_ptr() in taken for x in tree.leaves(state)):
        return tree.map(owned, state)
    return state


def packed(piece: Piece, position: Mapping[int, int]) -> dict[str, Any]:
    """A piece as plain numbers, lists and tensors, which ``torch.load(weights_only=True)`` reads.

    Args:
        piece: the piece.
        position: the position of each parameter in the optimizer, by its identity.
    """
    return {
        "names": list(piece.params),
        "params": [position[id(p)] for p in piece.params.values()],
        "steps": piece.step,
        "roles": list(piece.state),
        "tensors": dict(to_dict(piece.state)),
    }


def restored(
    saved: Mapping[str, Any],
    params: Sequence[Tensor],
    init: Callable[[Params, Collection[str]], dict[str, Any]],
) -> Piece:
    """The piece of :func:`packed`.

    Args:
        saved: the packed piece.
        params: the parameters of the optimizer, by position.
        init: a function ``(params, roles) -> initial state``.
    """
    own = {k: params[i] for k, i in zip(saved["names"], saved["params"], strict=True)}
    like = init(own, saved["roles"])
    state = from_dict(like, saved["tensors"])
    # The caller may go on to use what was loaded, or load it a second time.
    return Piece(own, tree.map(torch.clone, state), saved["steps"])


def _is_empty(x: Any) -> bool:
    return isinstance(x, dict) and not x
