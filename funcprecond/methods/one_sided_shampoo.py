"""One-sided Shampoo and ASGO: one factor, for the shorter axis of a parameter, and its square root.

Row: (F̂_emp^batch)^½, layer, one KF-dim factor, eigendecomposition. Xie et al., ICML 2025, arXiv
2503.10537; ASGO: An et al., arXiv 2503.20762. For a matrix with the shorter axis first::

    L <- L + G Gᵀ
    d  = (L + ε λ_max I)^(-1/2) G            one-sided Shampoo, ridge="inner"
    d  = (L^½ + ε λ_max^½ I)^(-1) G          ASGO, ridge="outer"

The exponent is 1/2, not Shampoo's 1/4: a single axis carries the whole root. A tensor of other
order is the matrix of that axis by all the others. Vectors and scalars get diagonal AdaGrad. Needs
the gradient only; 2 n² numbers a parameter, n its shortest axis; each step two products, each
refresh an eigendecomposition.
"""

from typing import Literal

import torch
from torch import Tensor

from funcprecond.evidence import Evidence
from funcprecond.linalg.batching import by_shape
from funcprecond.linalg.precision import decomposition_dtype, factor_dtype
from funcprecond.methods.table import Card
from funcprecond.need import Every, Need
from funcprecond.representation import average
from funcprecond.representation.average import Decay, check_decay
from funcprecond.representation.diagonal import zero_weight
from funcprecond.representation.kronecker_dim import axes_of, mode_gram
from funcprecond.solver.inverse_root import inverse_root, mode_product
from funcprecond.transform import Transform
from funcprecond.tree import Params, state

__all__ = ["OneSidedState", "one_sided_shampoo"]

Side = Literal["shortest", "first", "last"]


@state
class OneSidedState:
    """What one-sided Shampoo keeps, in float32 or wider.

    Attributes:
        totals, roots: (n, n) for each parameter with two axes; L is the total over ``weight``.
        diagonals, inverses: the same for vectors and scalars, entry by entry.
        weight: 0-d, see :mod:`funcprecond.representation.average`.
        mean: the running mean of the gradient, if there is momentum.
    """

    totals: Params
    roots: Params
    diagonals: Params
    inverses: Params
    weight: Tensor
    mean: Params


def one_sided_shampoo(
    *,
    epsilon: float | Tensor = 1e-6,
    decay: Decay = "sum",
    momentum: float | Tensor | None = None,
    side: Side = "shortest",
    ridge: Literal["inner", "outer"] = "inner",
    every: int = 1,
    refresh_every: int = 1,
    start: int = 0,
    dtype: torch.dtype | None = None,
) -> Transform:
    """The direction of one-sided Shampoo.

    Args:
        epsilon: the ridge, relative to L's largest eigenvalue, or its root's.
        decay: "sum", or the weight of the old value of a bias-corrected moving average.
        momentum: the weight of the old value of a running mean that takes the gradient's place
            under the root (practical ASGO), or None.
        side: which axis has the factor; of a linear layer's weight the first is the output's.
        ridge: where it is added, before the root ("inner") or after it ("outer").
        every, refresh_every, start: the intervals, as for :func:`funcprecond.shampoo`.
        dtype: what the decompositions run in, see :mod:`funcprecond.solver.inverse_root`.

    Raises:
        ValueError: an option has a value that it cannot have.
    """
    check_decay(decay)
    if side not in ("shortest", "first", "last") or ridge not in ("inner", "outer"):
        msg = f"side={side!r} or ridge={ridge!r} is none of the values listed"
        raise ValueError(msg)
    measure, refresh = Every("measure", every, start), Every("refresh", refresh_every, start)
    take = _inner if ridge == "inner" else _outer

    def init(params: Params) -> OneSidedState:
        dtypes = {k: factor_dtype(p) for k, p in params.items()}
        sizes = {k: p.shape[_axis(p.shape, side)] for k, p in params.items() if axes_of(p.shape)}
        rest = {k: p for k, p in params.items() if k not in sizes}
        return OneSidedState(
            {k: params[k].new_zeros((n, n), dtype=dtypes[k]) for k, n in sizes.items()},
            {k: torch.eye(n, dtype=dtypes[k], device=params[k].device) for k, n in sizes.items()},
            {k: torch.zeros_like(p, dtype=dtypes[k]) for k, p in rest.items()},
            {k: torch.ones_like(p, dtype=dtypes[k]) for k, p in rest.items()},
            zero_weight(params),
            {}
            if momentum is None
            else {k: torch.zeros_like(p, dtype=dtypes[k]) for k, p in params.items()},
        )

    def update(
        state: OneSidedState, grads: Params, evidence: Evidence | None = None
    ) -> tuple[OneSidedState, Params]:
        gradients = {k: g.to(factor_dtype(g)) for k, g in grads.items()}
        totals, diagonals, weight = state.totals, state.diagonals, state.weight
        if evidence is None or measure in evidence:
            new = {
                k: mode_gram(g, _axis(g.shape, side)) for k, g in gradients.items() if k in totals
            }
            at = average.at(weight, decay)
            totals = {k: average.accumulate(t, new[k], at) for k, t in totals.items()}
            diagonals = {
                k: average.accumulate(d, gradients[k].square(), at) for k, d in diagonals.items()
            }
            weight = average.weight(weight, at)
        roots, inverses = state.roots, state.inverses
        if evidence is None or refresh in evidence:
            names = list(totals)
            found = by_shape(
                lambda x, old, _: take(x / weight, old, epsilon, dtype),
                [totals[k] for k in names],
                [roots[k] for k in names],
                static=[None] * len(names),
            )
            roots = dict(zip(names, found, strict=True))
            # A vector's second moment is a diagonal matrix.
            inverses = {
                k: _diagonal(d / weight, inverses[k], epsilon) for k, d in diagonals.items()
            }
        ahead, mean = gradients, state.mean
        if momentum is not None:
            mean = {k: momentum * m + (1 - momentum) * gradients[k] for k, m in mean.items()}
            ahead = mean
        direction = {}
        for name, g in ahead.items():
            if name in roots:
                d = mode_product(roots[name], g, _axis(g.shape, side))
            else:
                d = inverses[name] * g
            direction[name] = d.to(grads[name].dtype)
        return OneSidedState(totals, roots, diagonals, inverses, weight, mean), direction

    def needs(t: int) -> tuple[Need, ...]:
        return (*measure.due(t), *refresh.due(t))

    return Transform(init, update, needs)


def _axis(shape: torch.Size, side: Side) -> int:
    axes = axes_of(shape)
    if side == "shortest":
        return min(axes, key=lambda i: shape[i])
    return axes[0] if side == "first" else axes[-1]


def _inner(matrices: Tensor, previous: Tensor, epsilon, dtype) -> Tensor:
    root, ok = inverse_root(matrices, 2, epsilon=epsilon, dtype=dtype)
    return torch.where(ok[..., None, None], root, previous)


def _outer(matrices: Tensor, previous: Tensor, epsilon, dtype) -> Tensor:
    """``(L^½ + ε λ_max^½ I)^-1``, with the precautions of :func:`inverse_root`."""
    if dtype is None:
        dtype = decomposition_dtype(matrices)
    dtype = torch.promote_types(matrices.dtype, dtype)
    a = (matrices + matrices.mT).to(dtype) / 2
    scale = a.diagonal(dim1=-2, dim2=-1).mean(-1)
    ok = (torch.isfinite(a).all(-1).all(-1) & (scale > 0))[..., None, None]
    scale = torch.where(ok, scale[..., None, None], 1.0)
    a = torch.where(ok, a / scale, torch.eye(a.shape[-1], dtype=dtype, device=a.device))
    values, vectors = torch.linalg.eigh(a)
    roots = values.clamp_min(0.0).sqrt()
    inverse = 1 / (roots + epsilon * roots[..., -1:])
    inverse = (vectors * inverse.unsqueeze(-2)) @ vectors.mT / scale.sqrt()
    return torch.where(ok, inverse.to(matrices.dtype), previous)


def _diagonal(d: Tensor, previous: Tensor, epsilon) -> Tensor:
    largest = d.max() if d.numel() else d.new_zeros(())
    ok = torch.isfinite(largest) & (largest > 0)
    return torch.where(ok, (d + epsilon * torch.where(ok, largest, 1.0)).rsqrt(), previous)


CARDS = (
    Card(
        "one_sided_shampoo",
        "One-sided Shampoo (Xie 2025)",
        "(F̂_emp^batch)^½",
        "layer, one KF-dim factor",
        "G direct, eigendecomposition",
        one_sided_shampoo,
        learning_rate=0.3,
        intervals=True,
    ),
)
