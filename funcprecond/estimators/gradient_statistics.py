r"""Statistics of a batch's gradients: norms, inner products, the tangent kernel, the noise scale.

For layers a per-example gradient is ``sum_t g_nt a_nt^T``, so that norms and inner products follow
from inputs and output gradients, and no per-example gradient is formed.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from funcprecond import tree
from funcprecond.autodiff.evaluation import Evaluation
from funcprecond.curvature.layer_statistics import LayerStatistics
from funcprecond.evidence import observe
from funcprecond.losses import MSE, Loss
from funcprecond.operators.data import check_data, each_batch
from funcprecond.problems import Params, Problem
from funcprecond.representation.gram import Gram
from funcprecond.tree import state

__all__ = [
    "NoiseScale",
    "gradient_noise_scale",
    "ntk",
    "per_sample_gram",
    "per_sample_norms",
]

# The data's own labels, every parameter, examples told apart.
ROWS = LayerStatistics("empirical", others="rows", by_example=True)
ENTRIES = LayerStatistics("exact", others="rows", by_example=True)


def per_sample_gram(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(N, N): the inner products of the examples' gradients, those of :func:`per_sample_grads`.

    Costs two thirds of a gradient and the smaller of two products a layer, of positions or of rows.
    Parameters in no layer have their rows formed.

    Raises:
        ValueError: the model couples the examples of a batch.
    """
    gram, constant = _rows(problem, params, batch, generator)
    # U U^T of the empirical Fisher matrix is c times the examples' inner products.
    return gram.gram() / constant


def per_sample_norms(
    problem: Problem,
    params: Params,
    batch: Any,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(N,): the Euclidean norms of the examples' gradients, without forming them.

    Raises:
        ValueError: the model couples the examples of a batch.
    """
    gram, constant = _rows(problem, params, batch, generator)
    squares = [_squared_norms(pairs) for pairs in gram.pairs]
    squares += [x.reshape(len(x), -1).square().sum(1) for x in gram.explicit.values()]
    return (torch.stack(squares).sum(0) * gram.scale / constant).clamp_min(0).sqrt()


def ntk(
    problem: Problem,
    params: Params,
    batch: Any,
    other: Any = None,
    *,
    kind: Literal["full", "sum"] = "full",
    generator: torch.Generator | None = None,
) -> Tensor:
    """The empirical neural tangent kernel ``J J^T`` of the model's outputs, one tensor (N, *out).

    Args:
        problem, params, batch: where.
        other: a second batch of M examples, for the kernel between the two.
        kind: "full" for (N, O, M, O) over all O entries of an output, or "sum" for (N, M), the
            trace over them.
        generator: draws dropout masks.

    Costs a pull-back to the layers for each of the O entries, and for each layer the smaller of two
    products, of positions or of rows; O of these for "sum", O^2 for "full". The Jacobian is not
    formed: in memory are O times the layers' output gradients. Parameters in no layer have their
    rows formed.

    Raises:
        ValueError: the model couples the examples of a batch.
    """
    if kind not in ("full", "sum"):
        msg = f"kind must be 'full' or 'sum', not {kind!r}"
        raise ValueError(msg)
    left = _jacobian(problem, params, batch, generator)
    right = left if other is None else _jacobian(problem, params, other, generator)
    entries = left[1]
    if kind == "sum":
        each = ((_entry(*left, v), _entry(*right, v)) for v in range(entries))
        return torch.stack([_inner(a, b) for a, b in each]).sum(0)
    kernel = _inner(left[0], right[0])
    return rearrange(kernel, "(o n) (q m) -> n o m q", o=entries, q=entries)


@state
class NoiseScale:
    """How noisy the gradient is (McCandlish et al., arXiv 1812.06162).

    Attributes:
        scale: the batch size at which the noise is as large as the gradient, ``tr S / |g|²``.
        variance: ``tr S``, the trace of the covariance of one example's gradient.
        squared_norm: ``|g|²`` of the true gradient, both unbiased; it may come out negative where
            the noise drowns it.
        examples: how many were seen.
    """

    scale: Tensor
    variance: Tensor
    squared_norm: Tensor
    examples: Tensor


def gradient_noise_scale(
    problem: Problem,
    params: Params,
    batch: Any = None,
    *,
    batches: Iterable[Any] | None = None,
    generator: torch.Generator | None = None,
) -> NoiseScale:
    """The gradient noise scale of a mean loss, from the norms of per-example gradients.

    Args:
        problem, params: whose, and where.
        batch, batches: one batch, or an iterable of them; at least two examples.
        generator: draws dropout masks.
    """
    check_data(batch, batches)
    total: Params = {}
    squares, count = None, 0
    for b in each_batch(batch, batches):
        found = observe(problem, params, b, (ROWS,), generator=generator)
        n = tree.leaves(found.outputs)[0].shape[0]
        gram = Gram.from_layers(found[ROWS], params)
        # Rows are 1/n of an example's gradient under a mean loss, and sum to the batch's.
        norms = [_squared_norms(p) for p in gram.pairs]
        norms += [x.reshape(len(x), -1).square().sum(1) for x in gram.explicit.values()]
        here = n**2 * torch.stack(norms).sum()
        squares = here if squares is None else squares + here
        grads = tree.mul(found.grads, float(n))
        total = tree.add(total, grads) if total else grads
        count += n
    if squares is None or count < 2:
        msg = "the noise of a gradient takes at least two examples"
        raise ValueError(msg)
    mean_square = squares / count
    whole = tree.dot(total, total) / count**2
    variance = (mean_square - whole) * count / (count - 1)
    signal = whole - variance / count
    examples = torch.full_like(variance, count)
    return NoiseScale(variance / signal, variance, signal, examples)


def _rows(problem, params, batch, generator) -> tuple[Gram, Tensor]:
    _refuse_coupling(problem)
    evaluation = Evaluation(problem, params, batch, generator=generator, taps=True)
    (layers,) = ROWS.each(evaluation, ())
    return Gram.from_layers(layers, params), layers.scale


def _refuse_coupling(problem: Problem) -> None:
    if coupling := problem.couples_examples():
        msg = f"per-example gradients are not defined: {coupling} couples the examples of a batch"
        raise ValueError(msg)


def _squared_norms(pairs) -> Tensor:
    """(N,): the squared norms of one layer's rows, by the cheaper of the two ways."""
    g = pairs.grads[:, 0]
    if pairs.ids:
        same = (pairs.inputs.unsqueeze(-1) == pairs.inputs.unsqueeze(-2)).to(g.dtype)
        return (same * (g @ g.mT)).sum((0, 2, 3))
    a = pairs.inputs
    t, o, i = g.shape[2], g.shape[3], a.shape[3]
    if t == 1:
        return (a.square().sum(-1) * g.square().sum(-1)).sum((0, 2))
    if t * (o + i) < o * i:
        return ((a @ a.mT) * (g @ g.mT)).sum((0, 2, 3))
    return (g.mT @ a).square().sum((0, 2, 3))


@dataclasses.dataclass(frozen=True, eq=False)
class _Outputs(Loss):
    """Each entry of an output by itself: the rows of its "exact" Fisher matrix are those of J."""

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        if not isinstance(outputs, Tensor):
            msg = "the tangent kernel is defined for a model with one tensor as its output"
            raise TypeError(msg)
        return outputs.sum()

    def constant(self, outputs: Tensor, targets: Any) -> Tensor:
        return outputs.new_ones(())

    def exact(self, outputs: Tensor, targets: Any) -> Iterator[Tensor]:
        return MSE().exact(outputs, targets)


def _jacobian(problem, params, batch, generator) -> tuple[Gram, int]:
    """The outputs' Jacobian, rows (o, n), as layers' inputs and output gradients; and O."""
    problem = dataclasses.replace(problem, loss=_Outputs())
    _refuse_coupling(problem)
    found = observe(problem, params, batch, (ENTRIES,), generator=generator)
    return Gram.from_layers(found[ENTRIES], params), found.outputs[0].numel()


def _entry(gram: Gram, entries: int, v: int) -> Gram:
    """The rows of one entry of the outputs."""
    pairs = tuple(dataclasses.replace(p, grads=p.grads[:, v : v + 1]) for p in gram.pairs)
    explicit = {k: x.unflatten(0, (entries, -1))[v] for k, x in gram.explicit.items()}
    return dataclasses.replace(gram, pairs=pairs, explicit=explicit)


def _inner(a: Gram, b: Gram) -> Tensor:
    """The inner products of two sets of rows."""
    left, right = ({p.weight: p for p in gram.pairs} for gram in (a, b))
    shared = left.keys() & right.keys()
    terms = [left[k].gram(right[k]) for k in shared]
    # What is a layer on one batch only has its rows formed.
    rows = [
        gram.explicit
        | {k: x for p in gram.pairs if p.weight not in shared for k, x in p.rows().items()}
        for gram in (a, b)
    ]
    ours, theirs = ({k: x.reshape(len(x), -1) for k, x in each.items()} for each in rows)
    terms += [x @ theirs[k].mT for k, x in ours.items()]
    return torch.stack(terms).sum(0)
