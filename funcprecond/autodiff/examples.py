"""Which axis of each tensor of a run counts the examples, and whether the examples are apart.

Rows of a Fisher matrix, per-sample gradients and exact blocks need to know which part of a layer's
input belongs to which example. The lengths of axes cannot tell: a sequence may be as long as the
batch, a layer may see the position first, and positions may be merged into the axis of the
examples. So the model is run once more, on two of the examples. The axes that change their length
are those that count examples, and the values of these examples must be the same as in the whole
batch.

The answer is the same for all batches of the same shapes, and is remembered with the problem.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.once import renamed
from funcprecond.autodiff.recorder import Recorder
from funcprecond.layers.layer_call import LayerCall
from funcprecond.layers.place import Place
from funcprecond.losses.base import require_examples
from funcprecond.problems import Problem
from funcprecond.tracing import is_eager, is_traced
from funcprecond.tree import floating

__all__ = ["CoupledExamples", "Examples", "find"]

# The number of ways to split the inputs that are tried.
ATTEMPTS = 16


class CoupledExamples(ValueError):
    """The gradient of a single example is not defined, because the model couples its examples."""


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Where the examples of a run are.

    Attributes:
        count: their number, N.
        inputs, masks, outputs: the place in each leaf of the inputs, in each dropout mask and in
            each floating-point leaf of the outputs; None where there is none.
        calls: the place in the output of each recorded call of a layer; None if there is none, or
            if the values for one example depend on other examples.
        coupling: None if the examples are apart. Otherwise why they are not.
        joint: whether the user has declared that the inputs belong to all examples together.
        shared: for each recorded call, whether its output is the same for all examples, so that its
            gradients are sums over the examples.
    """

    count: int
    inputs: tuple[Place | None, ...]
    masks: tuple[Place | None, ...]
    outputs: tuple[Place | None, ...]
    calls: tuple[Place | None, ...]
    coupling: str | None = None
    joint: bool = False
    shared: tuple[bool, ...] = ()

    def require_apart(self) -> None:
        """Raise an error if the gradients of single examples are not defined.

        Raises:
            CoupledExamples: the examples of the batch are coupled.
        """
        if self.coupling is not None and not self.joint:
            msg = (
                f"per-sample gradients are not defined, because {self.coupling}. Use layers that "
                "treat each example alone (GroupNorm, or eval mode); or say which axis of each "
                "input counts the examples with fp.problem(..., in_axes=...), where in_axes=None "
                "means that the inputs belong to all examples together, as in a graph whose nodes "
                "are the examples"
            )
            raise CoupledExamples(msg)

    def check_cotangent(self, cotangent: Any) -> None:
        """Raise an error if the loss depends on an output that all examples share.

        Args:
            cotangent: shaped like the outputs.

        Raises:
            CoupledExamples: it is not zero in such an output.
        """
        tensors = tree.floating(cotangent)
        if None not in self.outputs or not is_eager(tensors):
            return
        for i, (u, place) in enumerate(zip(tensors, self.outputs, strict=True)):
            if place is None and bool(u.any()):
                msg = (
                    f"the loss depends on output {i} of the model, of the shape {tuple(u.shape)}, "
                    "which has no axis of examples, so that it is not a sum over the examples: "
                    "return a value for each example instead"
                )
                raise CoupledExamples(msg)


def find(evaluation: Any) -> Examples:
    """Find where the examples of a run are.

    Args:
        evaluation: an :class:`funcprecond.Evaluation`.

    Returns:
        The places. The first call for given shapes costs a few runs of the model on two examples.

    Raises:
        TypeError: no output has an axis, as where the model computes the loss itself; or the
            problem is one of :func:`funcprecond.residuals` or :func:`funcprecond.vmc`.
        ValueError: ``in_axes`` of the problem do not fit the inputs.
    """
    problem = evaluation.problem
    if problem.by_points:
        msg = (
            "the points of this problem are no examples of one kind, so that it has neither layer "
            "statistics nor per-sample gradients: use fp.engd, fp.spring or fp.sr, or a method of "
            "the gradient"
        )
        raise TypeError(msg)
    require_examples(evaluation.outputs)
    shapes = ((x.shape, x.dtype) if isinstance(x, Tensor) else type(x) for x in evaluation.leaves)
    key = (problem.options(), len(evaluation.calls), len(evaluation.masks), *shapes)
    if key in problem.remembered:
        return problem.remembered[key]
    found, is_certain = _find(evaluation)
    # A compiled run only reads what is remembered: it would be compiled again after each change.
    if is_certain and not torch.compiler.is_compiling():
        problem.remember(key, found)
    return found


def _find(evaluation: Any) -> tuple[Examples, bool]:
    """The places, and whether they are certain to be the same for other values."""
    problem = evaluation.problem
    if problem.in_axes is None:
        return _by_length(evaluation, "its inputs belong to all examples together", True), True
    known = problem.couples_examples()
    if known is not None:
        return _by_length(evaluation, f"{known} couples the examples of a batch"), True
    if is_traced():
        return _by_shapes(evaluation), False
    whys: list[str] = []
    second: tuple[Examples, bool] | None = None
    for count, axes in itertools.islice(_hypotheses(evaluation), ATTEMPTS):
        attempt = _Attempt(evaluation, count, axes)
        if attempt.found is None:
            whys.append(attempt.why)
        elif any(place is not None and place.axis == 0 for place in attempt.found.outputs):
            return attempt.found, attempt.is_certain
        elif second is None:
            # Where one input counts the rows of the outputs and another one the columns, the rows
            # are the examples.
            second = attempt.found, attempt.is_certain
    if second is not None:
        return second
    return _by_length(evaluation, whys[0] if whys else "no input has an axis for them"), True


def _by_length(evaluation: Any, coupling: str | None, joint: bool = False) -> Examples:
    """The places, if axis 0 counts examples wherever it has their number as its length."""
    outputs = floating(evaluation.outputs)
    count = next(x.shape[0] for x in outputs if x.ndim)

    def place(shape: Sequence[int]) -> Place | None:
        return Place(0) if tuple(shape[:1]) == (count,) and not joint else None

    return Examples(
        count,
        tuple(place(x.shape) if isinstance(x, Tensor) else None for x in evaluation.leaves),
        tuple(place(x.shape) for x in evaluation.masks),
        tuple(Place(0) if x.ndim else None for x in outputs),
        tuple(place(call.shape) for call in evaluation.calls),
        coupling,
        joint,
    )


def _by_shapes(evaluation: Any) -> Examples:
    """The places as far as shapes tell, for a traced run, whose values cannot be compared."""
    found = _by_length(evaluation, None)
    tensors = [x for x in evaluation.leaves if isinstance(x, Tensor)]
    if not any(found.count in x.shape[1:] for x in tensors):
        return found
    axes = tuple(None if place is None else place.axis for place in found.inputs)
    attempt = _Attempt(evaluation, found.count, axes, values=False)
    if attempt.found is None:
        return dataclasses.replace(found, calls=(None,) * len(found.calls))
    return attempt.found


def _hypotheses(evaluation: Any) -> Iterator[tuple[int, tuple[int | None, ...]]]:
    """The number of examples and their axis in each input, the most plausible answers first."""
    inputs = evaluation.leaves
    if evaluation.problem.in_axes != "auto":
        yield _declared_axes(evaluation.problem, evaluation.inputs)
        return
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    output = next(x for x in floating(evaluation.outputs) if x.ndim)
    # By convention axis 0 of the outputs counts them, or axis 0 of the inputs, where the outputs
    # have the positions of all examples on one axis. Otherwise axis 1 may.
    counts = [n for axis in (0, 1) for x in (output, *tensors) for n in x.shape[axis : axis + 1]]
    for count in dict.fromkeys(n for n in counts if n and output.shape[:2].numel() % n == 0):
        choices = [
            [axis for axis, n in enumerate(x.shape) if n == count] + [None]
            if isinstance(x, Tensor)
            else [None]
            for x in inputs
        ]
        ways = list(itertools.islice(itertools.product(*choices), 256))
        ways = [way for way in ways if any(axis is not None for axis in way)]
        # The fewer inputs deviate from their first axis of the right length, the more plausible.
        ways.sort(key=lambda way: sum(a != c[0] for a, c in zip(way, choices, strict=True)))
        for way in ways[: ATTEMPTS // 2]:
            yield count, way


def _declared_axes(problem: Problem, inputs: Any) -> tuple[int, tuple[int | None, ...]]:
    """The number of examples and the axis of each leaf of the inputs, as ``in_axes`` declares.

    Raises:
        ValueError: ``in_axes`` do not fit the inputs.
    """
    axes = tree.broadcast_prefix(problem.in_axes, inputs)
    leaves = tree.leaves(inputs)
    lengths = {}
    for x, axis in zip(leaves, axes or (), strict=False):
        if axis is not None and isinstance(x, Tensor) and -x.ndim <= axis < x.ndim:
            lengths.setdefault(x.shape[axis], axis)
        elif axis is not None:
            axes = None
            break
    if axes is None or len(lengths) != 1:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
        msg = (
            f"in_axes={problem.in_axes!r} does not fit inputs of the shapes {shapes}: it must be "
            "an int, None, or a tree of them like the inputs, and the axes must have one length"
        )
        raise ValueError(msg)
    axes = tuple(None if a is None else a % x.ndim for x, a in zip(leaves, axes, strict=True))
    return next(iter(lengths)), axes


class _Attempt:
    """A run on some of the examples, under the hypothesis that the inputs are split in one way.

    Args:
        evaluation: the run on all examples.
        count: the number of examples.
        axes: for each leaf of the inputs, the axis that counts them, or None.
        values: whether to compare values, or only shapes.

    Attributes:
        found: the places, or None if the hypothesis is refuted.
        why: what refutes it.
        is_certain: whether the outputs of the examples differ, so that a coupling would show.
    """

    def __init__(self, evaluation, count, axes, values=True):
        self.found, self.why, self.is_certain = None, "", count == 1
        self._evaluation, self._count, self._values = evaluation, count, values
        # Never as many as there are. Neither the first nor the last, if possible, and others before
        # and behind them than in the whole batch.
        self._chosen = {1: [0, 0], 2: [1, 0, 0], 3: [2, 0]}.get(count, [count - 2, 1])
        self._inputs = tuple(None if axis is None else Place(axis) for axis in axes)
        if not evaluation.masks:
            self._try([])
            return
        run = self._run(None)
        if run is None:
            return
        masks = [
            self._place(x.shape, y.shape)
            for x, y in zip(evaluation.masks, run[0].masks, strict=False)
        ]
        if len(run[0].masks) != len(evaluation.masks) or False in masks:
            self.why = "the dropout masks of the model depend on the number of examples"
            return
        self._try(masks)
        if self.found is None and any(m is not None and m.inner > 1 for m in masks):
            self._try([m if m is None else m._replace(examples_first=False) for m in masks])

    def _run(
        self, masks: Sequence[Any] | None, chosen: Sequence[int] | None = None
    ) -> tuple[Recorder, list[Tensor]] | None:
        """Run the model on some of the examples.

        Args:
            masks: the places of the examples in the masks of the whole run; None draws fresh ones.
            chosen: the examples, by default those of this attempt.
        """
        evaluation, chosen = self._evaluation, self._chosen if chosen is None else chosen
        taken = None
        if masks is not None:
            pairs = zip(evaluation.masks, masks, strict=True)
            taken = tuple(x if place is None else place.take(x, chosen) for x, place in pairs)
        parts = [
            x if place is None else place.take(x, chosen)
            for x, place in zip(evaluation.leaves, self._inputs, strict=True)
        ]
        inputs = tree.unflatten(parts, tree.flatten(evaluation.inputs)[1])
        params = {k: p.detach() for k, p in renamed(evaluation.params).items()}
        fresh = torch.Generator() if taken is None else None
        recorder = Recorder(params, lambda z: z, taken or (), fresh)
        try:
            with torch.enable_grad(), recorder:
                outputs, _ = evaluation.problem.forward(params, evaluation._buffers, inputs)
                outputs = recorder.finish(outputs)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            self.why = (
                f"the model cannot be run on {len(self._chosen)} of its {self._count} examples "
                f"({type(error).__name__}: {reason})"
            )
            return None
        return recorder, floating(outputs)

    def _try(self, masks: Sequence[Any]) -> None:
        evaluation, chosen = self._evaluation, self._chosen
        run = self._run(masks)
        if run is None:
            return
        recorder, parts = run
        calls, shared, first_coupled = self._calls(recorder)
        whole = floating(evaluation.outputs)
        outputs = [self._located(x, y) for x, y in zip(whole, parts, strict=False)]
        sized = [p for p, x in zip(outputs, whole, strict=False) if x.ndim]
        if len(parts) != len(whole) or False in sized or not any(sized):
            self.why = first_coupled or "the outputs of one example depend on the others"
            return
        classes = getattr(evaluation.problem.loss, "class_dim", None)
        if classes is not None and any(
            p and p.axis == classes % x.ndim for p, x in zip(outputs, whole, strict=True)
        ):
            self.why = "the axis of the outputs that counts them is that of the classes"
            return
        if first_coupled and not self._values:
            calls = (None,) * len(calls)
        self.is_certain = self.is_certain or any(
            place and not torch.equal(place.take(x, chosen[:1]), place.take(x, chosen[1:2]))
            for place, x in zip(outputs, whole, strict=True)
        )
        places = tuple(p or None for p in outputs)
        shared = self._confirmed(shared, masks) if any(shared) else shared
        self.found = Examples(self._count, self._inputs, tuple(masks), places, calls, shared=shared)

    def _confirmed(self, shared: tuple[bool, ...], masks: Sequence[Any]) -> tuple[bool, ...]:
        """Which calls have the same input for another example, too.

        An expert may get all of its tokens from one of the chosen examples.
        """
        others = [n for n in range(self._count) if n not in self._chosen][:1] or [self._chosen[-1]]
        run = self._run(masks, others)
        if run is None:
            return (False,) * len(shared)
        again = self._calls(run[0])[1]
        return tuple(a and b for a, b in zip(shared, again, strict=True))

    def _calls(
        self, recorder: Recorder
    ) -> tuple[tuple[Place | None, ...], tuple[bool, ...], str | None]:
        """The places of the calls, which of them all examples share, and what couples examples.

        The last one is a sentence about the first call with coupled examples, or None.
        """
        evaluation = self._evaluation
        places, shared, coupled = [], [], None
        # The two runs may record the layers in another order, or some of them less often.
        counts = Counter(map(_layer, evaluation.calls))
        found: dict[Any, list[Any]] = {}
        for part, y in zip(recorder.calls, recorder.inputs, strict=True):
            found.setdefault(_layer(part), []).append((part, y))
        pairs = {k: iter(x) for k, x in found.items() if len(x) == counts[k]}
        for call, x in zip(evaluation.calls, evaluation.layer_inputs, strict=True):
            if _layer(call) not in pairs:
                places.append(None)
                shared.append(False)
                continue
            part, y = next(pairs[_layer(call)])
            place, of_input = self._place(call.shape, part.shape), self._located(x, y)
            is_same = place is None and of_input is None and call.takes(Place(0))
            shared.append(is_same and _agree(x, y))
            if of_input is False and coupled is None:
                coupled = (
                    f"what the layer with the parameter {call.weight!r} receives for one example "
                    "depends on the other examples of the batch"
                )
            if not call.has_block:
                places.append(place if place and place.inner == 1 else None)
                continue
            places.append(of_input if place and of_input and place[:2] == of_input[:2] else None)
        return tuple(places), tuple(shared), coupled

    def _located(self, whole: Tensor, part: Tensor) -> Any:
        """The place in a tensor whose values agree with those of the part; False if they do not."""
        place = self._place(whole.shape, part.shape)
        if not place:
            return place
        if not self._values:
            return place if place.inner == 1 else None
        for candidate in (place, place._replace(examples_first=False))[: 1 + (place.inner > 1)]:
            if _agree(candidate.take(whole, self._chosen), part):
                return candidate
        return False

    def _place(self, whole: Sequence[int], part: Sequence[int]) -> Any:
        """The place by shapes; None if the shapes agree, False if they differ in another way."""
        if len(whole) != len(part):
            return False
        changed = [i for i, (m, n) in enumerate(zip(whole, part, strict=True)) if m != n]
        if not changed:
            return None
        (axis, *more), chosen = changed, len(self._chosen)
        fits = whole[axis] % self._count == 0 and whole[axis] * chosen == part[axis] * self._count
        return Place(axis, whole[axis] // self._count) if fits and not more else False


def _layer(call: LayerCall) -> tuple[str, str | None]:
    return call.weight, call.bias


def _agree(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of runs on different batches."""
    if not x.is_floating_point() or not x.numel():
        return torch.equal(x, y)
    rounding = torch.finfo(x.dtype).eps ** 0.5 * float(x.abs().nan_to_num().amax())
    return torch.allclose(x, y, rtol=0, atol=rounding, equal_nan=True)
