"""Records which layer uses which parameter in a run of a model.

Every torch function that the model calls is shown to a :class:`LayerRecorder`. It recognizes
parameters, and views of them, by the identity of the tensors and not by the class of a module. So
every use of a weight is found, also a second one or one inside ``nn.MultiheadAttention``. What it
does not know is noted as a use that was not recorded.
"""

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.hidden_uses import Recorded, hidden_uses, sequence_number
from funcprecond.layers.kinds import KINDS_OF_FUNCTION
from funcprecond.layers.kinds.embedding import Embedding
from funcprecond.layers.kinds.linear import Linear
from funcprecond.layers.layer_call import FunctionCall, LayerCall, Recognized
from funcprecond.layers.views import (
    CONSTANTS,
    LOOKUPS,
    VIEWS,
    Lookup,
    View,
    has_constant,
    looked_up,
    viewed,
)
from funcprecond.tracing import transform_level

__all__ = ["LayerRecorder"]

# Functions that only query the properties of a tensor, or cut it out of the graph. These are no
# uses of a parameter.
_QUESTIONS = {
    Tensor.dim,
    Tensor.size,
    Tensor.stride,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    Tensor.detach,
    *(
        getattr(Tensor, name).__get__
        for name in ["dtype", "device", "shape", "ndim", "requires_grad"]
    ),
    *(getattr(Tensor, name).__get__ for name in ["is_nested", "layout", "is_cuda"]),
}


class LayerRecorder:
    """The layers of one run.

    Args:
        params: the tensors that the model receives as its parameters, by name.
        tap: a function of the output of a layer, whose result replaces the output.
        in_graph: whether the run is an ordinary autograd graph.
        detached: whether the recorded calls get their parameters without a graph. What remains in
            the graph of the outputs are uses that were not recorded.

    Attributes:
        calls: the recorded calls of layers, in order.
        inputs: their inputs, in the same order.
        unrecorded: the parameters with a use outside ``calls``, and the function that uses each.
        own_leaves: tensors of the recorder's own that require a gradient.
    """

    def __init__(
        self,
        params: Mapping[str, Tensor],
        tap: Callable[[Tensor], Tensor],
        in_graph: bool = False,
        detached: bool = False,
    ):
        self.tap = tap
        self.calls: list[LayerCall] = []
        self.inputs: list[Tensor] = []
        self.unrecorded: dict[str, str] = {}
        self.own_leaves: list[Tensor] = []
        self.in_graph, self._detached = in_graph, detached
        self._level = transform_level()
        self._made: list[Recorded] = []
        # The tensors are kept alive, because the identity of a dead tensor may be used again.
        self._views = {id(p): (p, View.of(name, p)) for name, p in params.items()}
        self._waiting: dict[int, _Rows] = {}

    # ------------------------------------------------------------- what the kinds of layers ask
    def of(self, tensor: Any) -> str | None:
        """The name of a tensor that is a parameter, in another dtype at most."""
        view = self.view(tensor)
        return view.name if view is not None and view.is_parameter else None

    def view(self, tensor: Any) -> View | None:
        """The view that a tensor is; None for anything else."""
        found = self._views.get(id(tensor))
        return None if found is None else found[1]

    def lookup(self, tensor: Any) -> Lookup | None:
        """The rows of a table that a tensor consists of and that no layer has used yet."""
        found = self._waiting.get(id(tensor))
        return None if found is None or found.tapped is not None else found.lookup

    # ------------------------------------------------------------------------------ the recording
    def record(self, func: Callable, run: Callable, args: Sequence[Any], kwargs: dict[str, Any]):
        """Run a function, and record which parameters it uses and how.

        Args:
            func: the function that the model calls.
            run: the function that computes it.
            args, kwargs: its arguments.

        Returns:
            Its result.
        """
        own = [*self._own(args), *self._own(kwargs.values())]
        if not own or func in _QUESTIONS:
            return run(*args, **kwargs)
        # A transform inside the model, such as vmap or jvp, makes other nodes than the call alone.
        if self._level == transform_level():
            if len(own) == 1 and self._may_follow(func, own[0], args, kwargs):
                return self._followed(func, run, own[0], args, kwargs)
            kind = KINDS_OF_FUNCTION.get(func)
            uses = kind.recognize(FunctionCall(func, args, kwargs), self) if kind else []
            if uses:
                return self._recorded(func, run, args, kwargs, uses)
        return self._unknown(func, run, args, kwargs, own)

    # ------------------------------------------------------------------ layers written as a loop
    def number(self) -> int:
        """The number of the next node of the graph."""
        return sequence_number() if self.in_graph else 0

    def zeros_like(self, x: Tensor) -> Tensor:
        """Zeros to be added to the output of a layer, with a gradient that can be asked for."""
        zeros = torch.zeros_like(x)
        if not self.in_graph:
            return zeros
        self.own_leaves.append(zeros.requires_grad_())
        return zeros

    def open(self, weight: Tensor, bias: Tensor | None, out: Tensor) -> tuple[Tensor, int | None]:
        """Record a linear layer whose inputs are known later.

        Args:
            weight, bias: its parameters.
            out: a tensor whose gradient is that of the output of the layer.

        Returns:
            The tensor that replaces ``out``, and the index of the call for :meth:`close`; None if
            the weight is no parameter.
        """
        call = Linear(weight=self.of(weight) or "", bias=self.of(bias))
        if not call.weight:
            self._note(F.linear, [] if bias is None else [bias], ())
            return out, None
        return self._add(Recognized(call, out), out), len(self.calls) - 1

    def close(
        self,
        index: int | None,
        inputs: Tensor,
        names: Iterable[str | None],
        first: int,
        outputs: Sequence[Tensor],
    ) -> None:
        """Enter the inputs of a call of :meth:`open`.

        Args:
            index: the index of the call.
            inputs: its inputs.
            names: the names of its parameters.
            first: the number of the first node of the graph that the loop has made.
            outputs: what the loop has computed.
        """
        if index is None:
            return
        self.inputs[index] = inputs
        self._note_nodes([name for name in names if name], first, *outputs)

    def prepared(self, x: Any) -> Any:
        """A parameter of a recorded layer, without a graph if only other uses are looked for."""
        return x.detach() if self._detached and self.view(x) is not None else x

    # ------------------------------------------------------------------------------ after the run
    def finish(self, outputs: Any) -> Any:
        """The outputs of the run, with rows of tables among them recorded.

        Rows that no function used afterwards may have been used by something that cannot be
        intercepted.
        """
        if not self._waiting:
            return outputs
        if any(id(x) in self._waiting for x in tree.leaves(outputs)):
            outputs = tree.map(lambda x: self._tapped(x) if isinstance(x, Tensor) else x, outputs)
        for rows in self._waiting.values():
            if rows.tapped is None and not rows.is_read:
                self.unrecorded[rows.lookup.name] = "a function that cannot be intercepted"
        return outputs

    def hidden_uses(self, outputs: Sequence[Tensor]) -> dict[str, str]:
        """The parameters that the outputs depend on other than through ``calls``, in a graph run.

        Args:
            outputs: the outputs of the run.

        Returns:
            A description of the use of each such parameter.
        """
        sources = [(view.name, x) for x, view in self._views.values()]
        sources += [(w.lookup.name, w.tensor) for w in self._waiting.values() if w.tapped is None]
        # Rows of a table are noted when they are used, later than they were looked up.
        return hidden_uses(outputs, sources, sorted(self._made, key=lambda call: call.first))

    def _own(self, arguments: Iterable[Any]) -> Iterator[Tensor]:
        """The tensors in nested containers that are views, or rows of a table."""
        for x in arguments:
            if isinstance(x, (tuple, list)):
                yield from self._own(x)
            elif isinstance(x, dict):
                yield from self._own(x.values())
            elif isinstance(x, Tensor) and (id(x) in self._views or id(x) in self._waiting):
                yield x

    def _may_follow(self, func, source, args, kwargs) -> bool:
        """Whether a function of a view or of rows may have such a tensor as its result."""
        view = self.view(source)
        if func in CONSTANTS:
            return view is not None and has_constant(func, source, args, kwargs)
        if func is F.embedding:
            return len(args) > 1 and args[1] is source and view is not None
        first = bool(args) and args[0] is source
        return first and (func in LOOKUPS or (func in VIEWS and view is not None))

    def _followed(self, func, run, source, args, kwargs):
        """Run a function that may make a view of a view, or look up rows."""
        view, rows = self.view(source), self.lookup(source)
        if view is None and rows is None:
            return self._unknown(func, run, args, kwargs, [source])
        first = self.number()
        out = run(*args, **kwargs)
        if out is source:
            return out
        found = None if view is None else viewed(func, view, source, args, kwargs, out)
        if found is not None:
            pairs = zip(out, found, strict=True) if isinstance(found, list) else [(out, found)]
            for x, piece in pairs:
                if piece is not None:
                    self._views[id(x)] = x, piece
                    self._note_nodes({piece.name}, first, x)
            return out
        followed = view if rows is None else rows
        found = None
        if func in LOOKUPS and followed is not None:
            found = looked_up(func, followed, args, kwargs, out)
        if found is None:
            return self._unknown(func, run, args, kwargs, [source])
        if rows is not None:
            self._waiting[id(source)].is_read = True
        self._waiting[id(out)] = _Rows(out, found, first, self.number())
        if func is F.embedding and not _is_shared(found):
            return self._tapped(out)
        return out

    def _recorded(self, func, run, args, kwargs, uses: Sequence[Recognized]):
        """Run a function that uses parameters as layers do."""
        parts = {k for use in uses for k in (use.call.weight, use.call.bias) if k is not None}
        own = [*self._own(args), *self._own(kwargs.values())]
        # A parameter that is also an input of the layer has a use outside of the call.
        self._note(func, own, parts)
        for use in uses:
            if use.rows is not None:
                self._waiting[id(use.rows)].is_read = True
        taken = {id(use.rows) for use in uses if use.rows is not None}
        args = self._prepared(args, parts, taken)
        kwargs = self._prepared(kwargs, parts, taken)
        first = self.number()
        out = run(*args, **kwargs)
        self._note_nodes(parts, first, out)
        if self.in_graph and out.grad_fn is None:
            # Nothing depends on what happens here, as under torch.no_grad.
            return out
        for use in uses:
            out = self._add(use, out)
        return out

    def _unknown(self, func, run, args, kwargs, own):
        """Run a function that is no layer."""
        self._note(func, own, set())
        return run(*self._prepared(args, (), ()), **self._prepared(kwargs, (), ()))

    def _add(self, use: Recognized, out: Tensor) -> Tensor:
        """Record one use of a layer, and return its output."""
        self.calls.append(dataclasses.replace(use.call, shape=tuple(out.shape)))
        ones = out.new_ones(()).expand(out.shape) if use.input is None else use.input
        self.inputs.append(ones)
        return self.tap(out)

    def _note(self, func, own, recorded) -> None:
        """Note the parameters whose views are among ``own``, other than those in ``recorded``."""
        for x in own:
            view = self.view(x)
            if view is not None and view.name not in recorded:
                self.unrecorded[view.name] = getattr(func, "__name__", str(func))

    def _prepared(self, arguments: Any, parts: Container[str], taken: Container[int]) -> Any:
        """The arguments of a function that uses ``parts`` as layers do.

        Rows of tables, other than those in ``taken``, are used as any other tensor is. So they are
        recorded first.
        """
        if isinstance(arguments, dict):
            return {k: self._prepared(x, parts, taken) for k, x in arguments.items()}
        if type(arguments) in (tuple, list):
            return type(arguments)([self._prepared(x, parts, taken) for x in arguments])
        if id(arguments) in self._waiting and id(arguments) not in taken:
            return self._tapped(arguments)
        view = self.view(arguments)
        is_recorded = id(arguments) in taken or (view is not None and view.name in parts)
        return arguments.detach() if self._detached and is_recorded else arguments

    def _tapped(self, x: Tensor) -> Tensor:
        """Record the rows of a table that a tensor consists of; other tensors are returned."""
        rows = self._waiting.get(id(x))
        if rows is None:
            return x
        if rows.tapped is not None:
            return rows.tapped
        found = rows.lookup
        if rows.is_read:
            # The gradient in this tensor would contain those of the uses that were recorded.
            self.unrecorded[found.name] = "several functions"
            return x
        call = Embedding(weight=found.name, vocabulary=found.rows, padding=found.padding)
        if self.in_graph and x.grad_fn is not None:
            self._made.append(
                Recorded(rows.first, rows.end, frozenset([found.name]), frozenset([x.grad_fn]))
            )
        if not self.in_graph or x.grad_fn is not None:
            alone = x.detach() if self._detached else x
            rows.tapped = self._add(Recognized(call, found.ids), alone)
        return x if rows.tapped is None else rows.tapped

    def _note_nodes(self, names: Iterable[str], first: int, *outputs: Tensor) -> None:
        """Note that a recorded call of these parameters has made the latest nodes of the graph."""
        if not self.in_graph:
            return
        nodes = frozenset(x.grad_fn for x in outputs if x.grad_fn is not None)
        if nodes:
            self._made.append(Recorded(first, sequence_number(), frozenset(names), nodes))


@dataclasses.dataclass
class _Rows:
    """Rows of a table that were looked up.

    All examples may share them, as they share the positions of a sequence. They are therefore
    recorded where they meet the examples: at the sum or the expansion that the next function makes.

    Attributes:
        tensor: the rows.
        lookup: which rows of which table they are.
        first, end: the numbers of the nodes of the graph that the lookup has made.
        is_read: whether a recorded call has used them.
        tapped: the output of the call that records them alone; None as long as there is none.
    """

    tensor: Tensor
    lookup: Lookup
    first: int
    end: int
    is_read: bool = False
    tapped: Tensor | None = None


def _is_shared(rows: Lookup) -> bool:
    """Whether all examples may share the rows that an embedding looked up."""
    return rows.ids.ndim < 2 or rows.ids.shape[0] == 1
