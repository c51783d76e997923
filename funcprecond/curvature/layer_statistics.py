"""Layer statistics: the inputs and the output gradients of each layer.

An affine layer ``z = W a + b`` receives inputs ``a``. Cotangents that are pulled back from the
model's outputs give its output gradients ``g``. The gradient of example n in ``[W | b]`` is
``Σ_t g_nt [a_nt, 1]^T`` over its positions t (tokens, pixels). Inputs and output gradients are
therefore all that the Kronecker-factored, unit-wise, diagonal and Gram representations of the
Fisher matrix need. Layers are found by the parameters that are used, not by the class of a module
(:mod:`funcprecond.autodiff.recorder`).

Letters: V cotangents, N examples, T positions, J groups; i and o are the input and output
dimensions.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.evidence import observe
from funcprecond.layers.blocks import Layers, part_of, split_block
from funcprecond.layers.layer_call import LayerCall, LayerUse, Sharing
from funcprecond.losses.base import Labels, check_labels
from funcprecond.need import Need
from funcprecond.problems import Problem
from funcprecond.tree import Params

__all__ = ["ExampleRows", "LayerStatistics", "layer_statistics", "layer_uses"]


@dataclasses.dataclass(frozen=True)
class LayerStatistics(Need):
    """The inputs and the output gradients of every layer.

    The measured value is a :class:`funcprecond.layers.blocks.Layers`.

    Attributes:
        labels: which cotangents are pulled back. "mc" samples labels from the model's prediction,
            for an unbiased estimate of the Fisher matrix. "empirical" takes the labels of the data,
            which gives the training gradient itself, at no cost. "exact" takes all cotangents of
            the exact Fisher matrix.
        samples: the number of sampled labels for each term of the loss, with "mc".
        others: what is measured for parameters that no layer covers: the "diagonal" of their
            curvature, their "rows", or "none". A parameter that the run does not use has no
            diagonal.
        sharing: how the positions of one example are combined in Kronecker factors. "expand" treats
            every position as a row of its own, which is exact for losses with one term per
            position. "reduce" averages the inputs and sums the output gradients over the positions,
            which is exact if the outputs are pooled over them (Eschenhagen et al., arXiv
            2311.00636).
        per_sample: count a layer among ``others`` if its rows do not belong to single examples.
            With "reduce" this is the case anyway.
        tied: keep a weight that is both an embedding and a linear layer among the layers, with uses
            of both kinds. By default it counts among ``others``.

    Raises:
        ValueError: ``labels`` or ``samples`` is not allowed.
    """

    labels: Labels = "mc"
    samples: int = 1
    others: Literal["diagonal", "rows", "none"] = "diagonal"
    sharing: Sharing = "expand"
    per_sample: bool = False
    tied: bool = False
    layers: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    frees_run: ClassVar[bool] = True
    gives: ClassVar[type] = Layers

    def __post_init__(self):
        check_labels(self.labels, self.samples)

    def draw(
        self, problem: Problem, params: Params, batch: Any, generator: torch.Generator | None
    ) -> Any:
        if self.labels != "mc":
            return ()
        return problem.loss.label_noise(problem.split(batch)[1], self.samples, generator)

    def cotangents(self, evaluation: Evaluation, noise: Any) -> list[Any]:
        """The cotangents that are pulled back to the layers."""
        return evaluation.cotangents(self.labels, noise)

    def takes_gradient(self, call: LayerCall, inputs: Tensor) -> bool:
        return self.labels == "empirical"

    def measure(self, evaluation: Evaluation, noise: Any) -> Layers:
        if self.labels == "empirical":
            # The gradient of the loss exists already. Its rows are c times those of the loss terms,
            # so that the scale c becomes c / c^2 = 1 / c.
            grads = [g.unsqueeze(0) for g in evaluation.layer_grads]
            return self._layers(evaluation, None, grads, 1 / evaluation.constant)
        cotangents = self.cotangents(evaluation, noise)
        frees = len(cotangents) - 1 if evaluation.is_last else None
        frees = None if frees is not None and self._pulls_again(evaluation) else frees
        pulled = [evaluation.pull_layers(u, keep=i != frees) for i, u in enumerate(cotangents)]
        grads = [_stack(g) for g in zip(*pulled, strict=True)]
        return self._layers(evaluation, cotangents, grads, evaluation.constant)

    def each(self, evaluation: Evaluation, noise: Any) -> Iterator[Layers]:
        """The same measurement in parts of a few cotangents, of which one is in memory at a time.

        The last part frees the graph of the evaluation, from which no other gradient can be taken
        afterwards, unless the examples can only be told apart in this graph.
        """
        cotangents = self.cotangents(evaluation, noise)
        # The gradients of a part take no more memory than the parameters. Large parts are faster,
        # because second moments of many rows at once cost less than a sum over parts.
        size = sum(math.prod(call.shape) for call in evaluation.calls)
        room = sum(p.numel() for p in evaluation.params.values())
        last, together = len(cotangents) - 1, max(1, room // max(1, size))
        again = self._pulls_again(evaluation)
        for start in range(0, len(cotangents), together):
            some = cotangents[start : start + together]
            pulled = [
                evaluation.pull_layers(u, keep=again or i < last) for i, u in enumerate(some, start)
            ]
            grads = [_stack(g) for g in zip(*pulled, strict=True)]
            del pulled
            yield self._layers(evaluation, some, grads, evaluation.constant)
            del grads  # frees the memory before the next part is computed

    def _pulls_again(self, evaluation: Evaluation) -> bool:
        """Whether parameters outside of the layers are pulled back through the same run."""
        if self.exact:
            return evaluation.examples.joint
        rest = self.others != "none" and self._rest(evaluation)
        return bool(rest) and (evaluation.examples.joint or bool(evaluation.examples.coupling))

    def _rest(self, evaluation: Evaluation) -> list[str]:
        """The parameters outside of the layers that are measured."""
        blocks = []
        if not (self.exact and evaluation.examples.joint):
            blocks = evaluation.blocks(**self._options)
        covered = {part for name in blocks for part in split_block(name) if part}
        names = [k for k in evaluation.params if k not in covered]
        if self.others != "diagonal":
            return names
        # What this run leaves out has no measurement, which differs from a curvature of zero.
        used = {*evaluation.unrecorded}
        for call in evaluation.calls:
            used |= {call.weight, call.bias} if 0 not in call.shape else set()
        return [k for k in names if k in used]

    @property
    def _options(self) -> dict[str, bool]:
        """Which blocks are layers, see :meth:`funcprecond.Evaluation.blocks`."""
        apart = self.per_sample or self.sharing == "reduce"
        return {"per_sample": apart, "tied": self.tied, "shared": self.labels == "mc"}

    def _layers(
        self,
        evaluation: Evaluation,
        cotangents: Sequence[Any] | None,
        grads: Sequence[Tensor],
        scale: Tensor,
    ) -> Layers:
        if self.exact:
            evaluation.examples.require_apart()
        uses = {}
        if not (self.exact and evaluation.examples.joint):
            uses = layer_uses(evaluation, grads, **self._options)
        names = self._rest(evaluation)
        if not names or self.others == "none":
            return Layers(uses, {}, scale, self.sharing)
        if cotangents is None:
            # The rows of the layers belong to the gradient of the loss, which includes c.
            (own,) = evaluation.cotangents("empirical", ())
            scaled = [(u * evaluation.constant).to(u.dtype) for u in tree.floating(own)]
            cotangents = [tree.with_floating(own, scaled)]
        if self.others == "diagonal":
            _warn_of_diagonals(names, evaluation)
        if self.others == "diagonal" and evaluation.examples.coupling and not self.exact:
            others = _estimated_squares(evaluation, cotangents, names)
            return Layers(uses, others, scale, self.sharing)
        pulled = [evaluation.pull_each(u, names, chunk_size=32) for u in cotangents]
        others = {k: torch.stack([p[k] for p in pulled]) for k in names}
        if self.others == "diagonal":
            others = {k: r.square().sum((0, 1)) for k, r in others.items()}
        return Layers(uses, others, scale, self.sharing)


@dataclasses.dataclass(frozen=True)
class ExampleRows(LayerStatistics):
    """Layer statistics whose rows are exactly those of single examples.

    The Gram matrix of the per-sample gradients follows from them. A model that couples its examples
    is refused; where its inputs are declared to belong to all examples together, all parameters
    count among the others.

    Attributes:
        labels, samples, others, sharing, per_sample, tied: see :class:`LayerStatistics`.
    """

    others: Literal["diagonal", "rows", "none"] = "rows"
    per_sample: bool = True
    exact: ClassVar[bool] = True


def layer_statistics(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    labels: Labels = "mc",
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Layers:
    """The inputs and the output gradients of the layers on one batch.

    Args:
        problem, params, batch: the problem, and the point and the batch to evaluate.
        labels, samples: see :class:`funcprecond.curvature.LayerStatistics`.
        generator: the source of randomness for the labels of "mc" and for dropout masks.

    Returns:
        A :class:`funcprecond.curvature.Layers`. Costs one gradient, and about a third of a gradient
        per pull-back. The number of pull-backs is ``samples`` with "mc", the number of entries of
        one example's output with "exact", and 0 with "empirical".

    Raises:
        TypeError: the loss has no known likelihood, and ``labels`` is not "empirical".
        ValueError: ``labels`` or ``samples`` is not allowed, random numbers are needed and there is
            no generator, or the batch is empty.

    Example:
        >>> import torch, funcprecond as fp
        >>> problem = fp.problem(torch.nn.Linear(4, 3), fp.losses.cross_entropy)
        >>> batch = torch.ones(8, 4), torch.zeros(8, dtype=torch.int64)
        >>> layers = fp.layer_statistics(problem, problem.params, batch, labels="empirical")
        >>> {block: tuple(use.grads.shape) for block, (use,) in layers.uses.items()}
        {'weight+bias': (1, 8, 3)}
    """
    need = LayerStatistics(labels, samples)
    return observe(problem, params, batch, (need,), generator=generator)[need]


def layer_uses(
    evaluation: Evaluation,
    grads: Sequence[Tensor],
    *,
    per_sample: bool = False,
    tied: bool = False,
    shared: bool = True,
) -> dict[str, tuple[LayerUse, ...]]:
    """The uses of each block whose calls were all recorded.

    Args:
        evaluation: the batch, opened with ``layers=True``.
        grads: (V, *output shape), the output gradients of each call.
        per_sample, tied: see :class:`LayerStatistics`.
        shared: see :meth:`funcprecond.Evaluation.blocks`.
    """
    inputs, calls = evaluation.layer_inputs, evaluation.calls

    def use(i: int, part: LayerCall) -> LayerUse:
        whole = LayerUse(inputs[i], grads[i], calls[i])
        if per_sample or calls[i].needs_examples:
            whole = calls[i].by_example(inputs[i], grads[i], evaluation.examples.calls[i])
        return whole if part is calls[i] else part_of(whole, part)

    return {
        name: tuple(use(*member) for member in members)
        for name, members in evaluation.blocks(
            per_sample=per_sample, tied=tied, shared=shared
        ).items()
    }


def _estimated_squares(
    evaluation: Evaluation, cotangents: Sequence[Any], names: Sequence[str]
) -> Params:
    """An estimate of the sum of the squared rows, where the examples are coupled.

    The cross terms of different examples vanish in the mean over the signs of the examples. The
    signs are pseudo-random and the same for each batch, so that no generator is needed.
    """
    places, count = evaluation.examples.outputs, evaluation.examples.count
    found = {k: torch.zeros_like(evaluation.params[k]) for k in names}
    for v, cotangent in enumerate(cotangents):
        tensors = tree.floating(cotangent)
        # One bit of a hash of the number of the example and of the cotangent.
        mixed = torch.arange(count, device=tensors[0].device) + count * v + 1
        for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
        signs = (1 - 2 * ((mixed >> 15) & 1)).to(tensors[0].dtype)
        signed = [
            u if place is None else place.spread(signs, u)
            for u, place in zip(tensors, places, strict=True)
        ]
        pulled = evaluation.pull(tree.with_floating(cotangent, signed))
        found = {k: x + pulled[k].square() for k, x in found.items()}
    return found


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _warn_of_diagonals(names: list[str], evaluation: Evaluation) -> None:
    """Warn of matrices whose curvature is kept as a diagonal only; Python shows each text once."""
    for name in () if torch.compiler.is_compiling() else names:
        if evaluation.params[name].ndim > 1:
            msg = f"parameter {name!r} {_use_of(name, evaluation)}: only the diagonal of its "
            warnings.warn(f"{msg}curvature is kept", stacklevel=2)


def _use_of(name: str, evaluation: Evaluation) -> str:
    """Why a parameter has no block."""
    if name in evaluation.unrecorded:
        function = evaluation.unrecorded[name]
        return f"is used by {function}, for which there are no layer statistics"
    own = [call for call in evaluation.calls if name in (call.weight, call.bias)]
    if len({type(call) for call in own}) > 1:
        return "is used by layers of several kinds"
    if not all(map(own[0].combines_with, own)):
        return "is used by one kind of layer in several ways"
    return "is used by a layer whose rows are not those of single examples"
