"""The interface of every kind of layer: one use of a parameter in a run.

A *kind* is a class in :mod:`funcprecond.layers.kinds`. It defines which torch functions are calls
of such a layer (:meth:`LayerCall.recognize`), and computes rows, second moments and per-sample
gradients from the inputs and output gradients of the layer. To add a kind, write one such file and
add the class to :data:`funcprecond.layers.kinds.KINDS`.

Letters: V cotangents, N examples, T positions (tokens, pixels), J groups, i and o input and output
dimensions.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from torch import Tensor

from funcprecond.layers.place import Place
from funcprecond.layers.views import Lookup, View
from funcprecond.tree import Params, state, static

__all__ = ["FunctionCall", "LayerCall", "LayerUse", "Names", "Recognized", "Sharing"]

Sharing = Literal["expand", "reduce"]


class FunctionCall(NamedTuple):
    """A call of a torch function, as the recorder intercepts it.

    Attributes:
        function: the torch function.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def argument(self, i: int, name: str, default: Any = None) -> Any:
        """Look up the argument at position i, counted from 0, or with this name."""
        return self.args[i] if len(self.args) > i else self.kwargs.get(name, default)


class Names(Protocol):
    """What the tensors of a run have to do with parameters, which the recorder knows."""

    def of(self, tensor: Any) -> str | None:
        """The name of a tensor that is a parameter, in another dtype at most; or None."""
        ...

    def view(self, tensor: Any) -> View | None:
        """The view of a parameter that a tensor is; None for anything else."""
        ...

    def lookup(self, tensor: Any) -> Lookup | None:
        """The rows of a table that a tensor consists of, if no layer has used them yet; or None."""
        ...


class Recognized(NamedTuple):
    """A use of a parameter that was found in a function call.

    Attributes:
        call: the call of the layer.
        input: the input of the layer; None stands for ones in the shape of the output.
        rows: the argument of the function that consists of rows of a table, if this is their use.
    """

    call: "LayerCall"
    input: Tensor | None
    rows: Tensor | None = None


@state
class LayerUse:
    """One use of a layer in one run.

    Attributes:
        inputs: the input of the layer, as the model passes it. For an embedding, these are the
            token indices, and for a normalization layer, the normalized input.
        grads: the cotangents pulled back to the output of the layer, (V, *output shape).
        call: the :class:`LayerCall`.
    """

    inputs: Tensor
    grads: Tensor
    call: Any = static()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCall(abc.ABC):
    """One use of a parameter by a layer, without its tensors.

    Attributes:
        weight: the name of the parameter.
        bias: the name of the bias, if the call adds one that is a parameter.
        shape: the shape of the output.
        inner: the number of positions of each example that are merged into axis 0 of the output.
    """

    weight: str
    bias: str | None = None
    shape: tuple[int, ...] = ()
    inner: int = 1

    functions: ClassVar[tuple[Callable[..., Any], ...]] = ()
    """The torch functions whose calls can be uses of a layer of this kind."""
    has_block: ClassVar[bool] = True
    """Whether the uses determine the curvature of the weight, so that it has its own block."""
    needs_examples: ClassVar[bool] = False
    """Whether its block is computed from the gradients of single examples."""
    first_axis: ClassVar[bool] = True
    """Whether the examples, or positions merged with them, must be on axis 0 of the output."""

    @classmethod
    @abc.abstractmethod
    def recognize(cls, call: FunctionCall, names: Names) -> list[Recognized]:
        """Find the uses of parameters in a function call.

        Args:
            call: a call of one of :attr:`functions`.
            names: the names of the parameters.

        Returns:
            The uses. The list is empty if the call is not a layer of this kind.
        """

    @abc.abstractmethod
    def apply(self, params: Params, x: Tensor) -> Tensor:
        """Compute the contribution of the call to its output, which is linear in its parameters.

        Args:
            params: the values of the parameters.
            x: the input of the layer.
        """

    @property
    def block(self) -> str:
        """The name of the block, ``"weight+bias"`` or ``"weight"``."""
        return self.weight if self.bias is None else f"{self.weight}+{self.bias}"

    def combines_with(self, other: "LayerCall") -> bool:
        """Whether both calls belong to the same layer: everything except the shape agrees."""
        mine, theirs = (dataclasses.replace(x, shape=(), inner=1) for x in (self, other))
        return mine == theirs

    def takes(self, place: Place) -> bool:
        """Whether the rows of single examples can be computed if the examples are at a place."""
        return place.axis == 0 or not self.first_axis

    def by_example(self, inputs: Tensor, grads: Tensor, place: Place) -> "LayerUse":
        """Arrange a use of the layer so that axis 0 has the examples, and then their positions.

        Args:
            inputs: the input of the call.
            grads: (V, *output shape).
            place: where the examples are in the output and in the input.

        Returns:
            The use. If positions are merged with the examples, those of one example follow each
            other.
        """
        if place == Place(0):
            return LayerUse(inputs, grads, self)
        inputs = place.split(inputs).movedim(1 + place.axis, 1).flatten(0, 1)
        grads = place.split(grads, 1).movedim(2 + place.axis, 2).flatten(1, 2)
        call = dataclasses.replace(self, shape=tuple(grads.shape[1:]), inner=place.inner)
        return LayerUse(inputs, grads, call)

    def example_gradients(self, uses: Sequence[LayerUse], params: Params) -> Any:
        """Compute the rows of the layer, one for each cotangent and example.

        Args:
            uses: all uses of the layer.
            params: the parameters for which the rows are wanted. Some parameters of the layer may
                be missing.

        Returns:
            An :class:`funcprecond.layers.example_gradients.ExampleGradients`; or, if there is no
            advantage in keeping factors, the rows (V N, *shape) for each parameter.
        """
        raise NotImplementedError

    def diagonal(self, uses: Sequence[LayerUse], params: Params) -> Params:
        """Compute the sum of the squared rows, shaped like the parameters of the layer.

        Args:
            uses: all uses of the layer.
            params: see :meth:`example_gradients`.
        """
        rows = self.example_gradients(uses, params)
        return {k: x.square().sum(0) for k, x in rows.items()}
