"""What every kind of layer is: one use of a parameter, and the verbs that curvature is made with.

A *kind* is a class in :mod:`funcprecond.layers.kinds`. It says which torch functions are uses of it
(:meth:`LayerCall.recognize`), and what a layer's inputs and output gradients give: rows, second
moments, gradients of single examples. To add a kind, write one such file and name the class in
:data:`funcprecond.layers.kinds.KINDS`.

Letters: V cotangents, N examples, T positions (tokens, pixels), J groups, i and o input and output
dimensions.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from funcprecond.tree import Params, state, static

__all__ = ["FunctionCall", "LayerCall", "LayerUse", "Names", "Recognized", "Sharing"]

Sharing = Literal["expand", "reduce"]


class FunctionCall(NamedTuple):
    """A call of a torch function, as the recorder sees it.

    Attributes:
        function: which one.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def argument(self, i: int, name: str, default: Any = None) -> Any:
        """The argument that is the i-th, counted from 0, or has this name."""
        return self.args[i] if len(self.args) > i else self.kwargs.get(name, default)


class Names(Protocol):
    """Which tensors are parameters; the recorder knows."""

    def of(self, tensor: Any) -> str | None:
        """The name of a parameter; None for anything else."""
        ...

    def of_transpose(self, tensor: Any) -> str | None:
        """The name of the parameter that a tensor is the transpose of; None for anything else."""
        ...


class Recognized(NamedTuple):
    """A use of a parameter that was found in a function call.

    Attributes:
        call: which layer.
        input: what the layer was given; None stands for ones in the shape of the output.
    """

    call: "LayerCall"
    input: Tensor | None


@state
class LayerUse:
    """One use of a layer, in one run.

    Attributes:
        inputs: the layer's input as it came; token ids for an embedding, the normalised input for a
            norm layer.
        grads: (V, *output shape), the cotangents pulled back to the layer's output.
        call: the :class:`LayerCall` of the layer's kind.
    """

    inputs: Tensor
    grads: Tensor
    call: Any = static()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall(abc.ABC):
    """One use of a parameter by a layer: everything about it that is not a tensor.

    Attributes:
        weight: the parameter's name.
        bias: the bias's name, if the call adds one that is a parameter.
        shape: the output's shape.
    """

    weight: str
    bias: str | None = None
    shape: tuple[int, ...] = ()

    functions: ClassVar[tuple[Callable[..., Any], ...]] = ()
    """The torch functions that can be a use of this kind."""
    has_block: ClassVar[bool] = True
    """Whether the uses give the curvature of the weight, so that it has a block of its own."""

    @classmethod
    @abc.abstractmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        """The uses of parameters that a call of one of :attr:`functions` is; none if it is not."""

    @abc.abstractmethod
    def apply(self, params: Params, x: Tensor) -> Tensor:
        """What the call adds to the run, linear in its parameters, where these are ``params``."""

    @property
    def block(self) -> str:
        """The name of the block, ``"weight+bias"`` or ``"weight"``."""
        return self.weight if self.bias is None else f"{self.weight}+{self.bias}"

    def combines_with(self, other: "LayerCall") -> bool:
        """Whether the uses of both are further positions of one layer: all but the shape agrees."""
        return dataclasses.replace(self, shape=()) == dataclasses.replace(other, shape=())

    def example_gradients(self, uses: Sequence[LayerUse], params: Params) -> Any:
        """The rows of the layer, one for each cotangent and example.

        Args:
            uses: all uses of the layer.
            params: the parameters whose rows are wanted; some of the layer's may be missing.

        Returns:
            An :class:`funcprecond.layers.example_gradients.ExampleGradients`, or, where there is
            nothing to be gained from keeping them as products, (V N, *shape) for each parameter.
        """
        raise NotImplementedError

    def diagonal(self, uses: Sequence[LayerUse], params: Params) -> Params:
        """The sum of the squared rows, shaped like each of the layer's parameters."""
        rows = self.example_gradients(uses, params)
        return {k: x.square().sum(0) for k, x in rows.items()}
